"""One quantized module of a checkpoint: its format, and the role of each of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llmc.compiler.checkpoint.safetensors import TensorRef

Format = Literal[
    "fp8",  # E4M3, one scale
    "fp8-channel",  # E4M3, a scale for each row
    "fp8-block",  # E4M3, a scale for each block of (usually) 128 x 128
    "nvfp4",  # E2M1, an E4M3 scale for each 16 values of a row, and a global scale
    "int4-awq",  # ModelOpt: two rows in a byte, a scale for each group of a row
    "int4-packed",  # compressed-tensors: eight values in an int32
    "int8-packed",  # compressed-tensors: four values in an int32
    "int8",  # one byte per value, one scale or a scale for each row
    "mxfp4",  # E2M1, an E8M0 scale for each 32 values of a row: the experts of gpt-oss
]
Role = Literal[
    "weight",
    "weight_scale",  # the codes are multiplied by it, whatever the format calls it
    "global_scale",  # weight_scale is multiplied by it
    "inverse_global_scale",  # weight_scale is divided by it
    "input_scale",  # the codes of activations are multiplied by it
    "inverse_input_scale",  # 1 / input_scale
    "zero_point",
    "shape",
    "group_index",
    "pre_quant_scale",  # the activations are multiplied by it before the matrix product
    "bias",
]

# The tensors of a module by the last part of their names.
ROLES: dict[str, Role] = {
    "weight": "weight",
    "weight_packed": "weight",
    "weight_scale": "weight_scale",
    "weight_scale_inv": "weight_scale",  # DeepSeek; despite its name, it multiplies
    "weight_scale_2": "global_scale",  # ModelOpt
    "weight_global_scale": "inverse_global_scale",  # compressed-tensors
    "input_scale": "input_scale",
    "input_global_scale": "inverse_input_scale",  # compressed-tensors
    "weight_zero_point": "zero_point",
    "weight_shape": "shape",
    "weight_g_idx": "group_index",
    "pre_quant_scale": "pre_quant_scale",
    "bias": "bias",
}
# The last parts of the names of KV cache tensors, which belong to attention modules or k_proj and v_proj.
KV_NAMES = ("k_scale", "v_scale", "q_scale", "k_bias", "v_bias")
# A stack of experts in MXFP4: X_blocks U8 [experts, out, in / 32, 16], two codes in a byte, the even column
# in the low nibble, and X_scales U8 [experts, out, in / 32], E8M0. X is the name of the model's parameter.
# https://huggingface.co/openai/gpt-oss-20b
STACK_ROLES: dict[str, Role] = {"_blocks": "weight", "_scales": "weight_scale"}
_SCALE_LIKE = re.compile(
    r"(weight|input|output)_.*(scale|zero_point).*|weight_(packed|shape|g_idx)|pre_quant_scale"
    r"|qweight|qzeros|scales|g_idx|svdquant_.*"
)


def is_auxiliary(name: str) -> bool:
    """Return whether `name` belongs to quantization (a scale, a zero point, ...) and not to the model."""
    return _SCALE_LIKE.fullmatch(name.rpartition(".")[2]) is not None


def stack_role(ref: TensorRef) -> tuple[str, Role] | None:
    """Return the parameter and the role of a tensor of experts in MXFP4; None for another tensor."""
    for end, role in STACK_ROLES.items():
        if ref.name.endswith(end) and ref.dtype == "U8" and len(ref.shape) == (4 if role == "weight" else 3):
            return ref.name.removesuffix(end), role
    return None


@dataclass(frozen=True)
class Stack:
    """A stack of experts as a parameter of the model, whose matrices are [in, out]."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class QuantizedModule:
    """A quantized linear layer of a checkpoint, or the matrices of all experts, one below the other."""

    name: str
    format: Format
    #: The shape [out, in] of the dequantized weight.
    shape: tuple[int, int]
    #: The rows and columns of the weight that share one value of `weight_scale`.
    block: tuple[int, int]
    #: The layer's tensors as stored on disk, by role.
    tensors: Mapping[Role, TensorRef]
    #: The number of experts; 0: a linear layer.
    experts: int = 0

    @property
    def parameter(self) -> QuantizedModule | Stack:
        """The shape of the model's parameter that it stands for."""
        rows, columns = self.shape
        return Stack((self.experts, columns, rows // self.experts)) if self.experts else self

    @property
    def group_size(self) -> int | None:
        """The number of values of a row that share a scale; None if a whole row or several rows share one."""
        return self.block[1] if self.block[0] == 1 and self.block[1] < self.shape[1] else None

    @property
    def nbytes(self) -> int:
        """The size of all its tensors in bytes."""
        return sum(ref.nbytes for ref in self.tensors.values())
