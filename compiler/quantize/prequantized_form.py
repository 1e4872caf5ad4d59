"""Choose the format and the scales in which an engine holds a pre-quantized module.

    in the checkpoint           in the engine
    fp8, fp8-channel            E4M3, one scale or one per row
    fp8-block [h, w]            E4M3, a scale for w columns; those of h rows are repeated
    nvfp4                       E2M1, the same two scales
    mxfp4 (experts)             E2M1, the same scales
    int4-awq, int4-packed       4 bits, a scale for each group or row
    int4-packed, zero points    int8: code - zero point is within -15..15
    int8, int8-packed           int8, a scale for each group or row

Every code and scale is exactly the checkpoint's, except compressed-tensors' inverse scales, which become
multipliers in fp32: 1 / x, rounded once. If the blocks do not divide a row, they are split into smaller ones
with the same scales. The recipe is the quantization that the checkpoint's configuration declares. Activations
with static scales are quantized as in the recipe. Activations that the recipe quantizes dynamically, or to
int8, are not quantized.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llmc.compiler.checkpoint.prequantized.dequantize import code_bits, zero_points
from llmc.compiler.checkpoint.prequantized.module import QuantizedModule, Role
from llmc.compiler.checkpoint.prequantized.scheme import DeclaredSchemes
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.passes.canonicalize.fuse_linears import FusionKey
from llmc.passes.quantize.formats import Format, systematic_format
from llmc.runtime.errors import CheckpointError, UnsupportedError

_CODES = {
    "fp8": "e4m3",
    "fp8-channel": "e4m3",
    "fp8-block": "e4m3",
    "nvfp4": "e2m1",
    "mxfp4": "e2m1",
    "int4-awq": "int4",
    "int4-packed": "int4",
    "int8-packed": "int8",
    "int8": "int8",
}
_WAY_OUT = "build from a checkpoint that was quantized in another way, or from the unquantized one"


@dataclass(frozen=True)
class PrequantizedModule:
    """A module of a pre-quantized checkpoint, and its format in the engine."""

    module: QuantizedModule
    format: Format
    #: The multiplier of NVFP4's block scales; None for other formats.
    global_scale: np.float32 | None = None
    #: The static scale of the activations, a multiplier; None if they are not quantized.
    input_scale: np.float32 | None = None
    #: The tensor that the layer's input is multiplied by; None if it is absent, or all ones.
    pre_quant_scale: TensorRef | None = None
    #: The values of `pre_quant_scale` as bytes.
    factors: bytes = field(default=b"", repr=False)
    #: The activation quantization of the recipe that the engine omits; "" if there is none.
    note: str = ""


def read_module(module: QuantizedModule, schemes: DeclaredSchemes | None, dtype: str) -> PrequantizedModule:
    """Choose the format of `module` in an engine that computes in `dtype` ("F32", "BF16" or "F16").

    16-bit scales keep their dtype if the engine computes in it or in fp32; else they are widened to fp32.
    Raises UnsupportedError, naming the module, if no format has the same values.
    """
    element, block = _CODES[module.format], _block(module)
    _refuse_reordered(module)
    if "zero_point" in module.tensors:
        element = _element_without_zero_points(module)
    scheme = schemes.of(module.name) if schemes else None
    declared = scheme.inputs if scheme else ""
    static = _scalar(module, "input_scale", "inverse_input_scale")
    activations = ""
    if static is not None and element in ("e4m3", "e2m1") and (declared or scheme is None):
        # ModelOpt's W4A8_NVFP4_FP8: NVFP4 weights, E4M3 inputs.
        activations = "e4m3" if element == "e4m3" or declared == "fp8" else "e2m1"
    stored = module.tensors["weight_scale"].dtype
    of_floats = stored in ("F32", "F16", "BF16") and dtype in ("F32", stored) and not activations
    keep = of_floats or element == "e2m1"  # E4M3 of NVFP4, E8M0 of MXFP4
    fmt = systematic_format(element, block, stored if keep else "F32", activations)
    if reason := fmt.why_not(module.shape):
        raise UnsupportedError(f"module {module.name} is {module.format}: {reason}", _WAY_OUT)
    width = 32 if module.format == "mxfp4" else 16
    if element == "e2m1" and block != width:
        raise UnsupportedError(
            f"module {module.name} is {module.format.upper()} in groups of {block}; engines support groups "
            f"of {width}",
            _WAY_OUT,
        )
    factor = module.tensors.get("pre_quant_scale")
    values = factor.read().astype(np.float32) if factor else np.ones(1, np.float32)
    if (values == 1).all():
        factor, values = None, values[:0]
    return PrequantizedModule(
        module,
        fmt,
        _scalar(module, "global_scale", "inverse_global_scale"),
        static if activations else None,
        factor,
        values.tobytes(),
        f"inputs, {declared} in the recipe, are not quantized" if declared and not activations else "",
    )


def fusion_key(part: PrequantizedModule) -> FusionKey:
    """Return the properties that linear layers with the same input must share to be fused losslessly.

    These are the properties that `joined_format` compares, and the scales that a fused layer has only once.
    """
    fmt = part.format
    block = 0 if fmt.block == -1 else fmt.block
    return FusionKey(
        (fmt.element, fmt.activations, block),
        fmt.name,
        (
            ("global scales", _number(part.global_scale)),
            ("input scales", _number(part.input_scale)),
            ("pre_quant_scales", hashlib.sha256(part.factors).hexdigest()),
        ),
    )


def _number(scale: np.float32 | None) -> float | None:
    return None if scale is None else float(scale)


def joined_format(parts: Sequence[PrequantizedModule]) -> Format | None:
    """Return the format of the fused matrix of all `parts`, or None if they cannot be fused.

    FP8 weights with one scale each become a matrix with one scale per row, unless they share the scale.
    """
    forms = [part.format for part in parts]
    if len({(fmt.element, fmt.activations) for fmt in forms}) > 1:
        return None
    blocks = {fmt.block for fmt in forms}
    if blocks == {-1} and len({_tensor_scale(part) for part in parts}) > 1:
        blocks = {0}
    blocks = {0} if blocks == {-1, 0} else blocks
    if len(blocks) > 1:
        return None
    scales = {fmt.scales for fmt in forms}
    fmt = forms[0]
    return systematic_format(
        fmt.element, blocks.pop(), scales.pop() if len(scales) == 1 else "F32", fmt.activations
    )


def _tensor_scale(part: PrequantizedModule) -> float:
    return float(part.module.tensors["weight_scale"].read().astype(np.float32).reshape(()))


def _block(module: QuantizedModule) -> int:
    """Return how many columns share a scale in the engine; 0: the whole row, -1: all columns and rows."""
    width, columns = module.block[1], module.shape[1]
    if module.format == "fp8":
        return -1
    return 0 if width >= columns else math.gcd(width, columns)


def _scalar(module: QuantizedModule, role: Role, inverse: Role) -> np.float32 | None:
    """Return the fp32 multiplier that the module stores as `role`, or as its reciprocal as `inverse`.

    Returns None if it stores neither. Raises CheckpointError if the scale is not finite and positive.
    """
    ref, global_scale = module.tensors.get(role), module.tensors.get(inverse)
    tensor = ref or global_scale
    if tensor is None:
        return None
    value = float(tensor.read().astype(np.float32).reshape(-1)[0])
    with np.errstate(over="ignore"):
        scale = np.float32(value if tensor is ref else 1 / value if value else math.inf)
    if not np.isfinite(scale) or scale <= 0:
        raise CheckpointError(
            f"tensor {tensor.name} is {value}; a scale must be finite and positive",
            "run `llmc check CHECKPOINT` for details",
        )
    return scale


def _refuse_reordered(module: QuantizedModule) -> None:
    ref = module.tensors.get("group_index")
    if ref is None:
        return
    index = ref.read()
    in_order = np.arange(module.shape[1]) // module.block[1]
    if (index >= 0).all() and not np.array_equal(index, in_order):  # -1: uninitialized
        raise UnsupportedError(
            f"module {module.name} has reordered columns (weight_g_idx), but engines have contiguous groups",
            "quantize with another activation ordering: actorder `weight` or none",
        )


def _element_without_zero_points(module: QuantizedModule) -> str:
    """Return the element type that holds code - zero point. Raises UnsupportedError if 8 bits do not."""
    if code_bits(module) == 4:
        return "int8"
    if zero_points(module, 0, module.shape[0]).any():
        raise UnsupportedError(
            f"module {module.name} has 8-bit codes with zero points; code - zero point needs 9 bits",
            "engines are symmetric; quantize it with `symmetric: true`",
        )
    return "int8"
