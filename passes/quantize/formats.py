"""The quantization formats of linear layers, and the arrays of each.

A weight W [out, in] becomes several arrays, named as in ModelOpt's checkpoints:

    name              weight             weight_scale         weight_scale_2   bits per weight
    int8, int8-smoothquant
                      int8 [out, in]     fp32 [out]                            8 + 32 / in
    int4              4 bits, packed     fp16 [out, in/32]                     4.5
    int4-block128     4 bits, packed     fp16 [out, in/128]                    4.125
    fp8               E4M3 [out, in]     fp32 []                               8
    fp8-per-channel   E4M3 [out, in]     fp32 [out]                            8 + 32 / in
    nvfp4, nvfp4-weight-only
                      E2M1, packed       E4M3 [out, in/16]    fp32 []          4.5
    mxfp4             E2M1, packed       E8M0 [out, in/32]                     4.25

"packed" is uint8 [out, in/2] with the even column in the low nibble. ModelOpt's and compressed-tensors' NVFP4
and 4-bit tensors in ONNX have this layout (ModelOpt's INT4 pairs rows instead). Every format is symmetric,
because TensorRT takes no zero points: weight = code x scale, and for NVFP4
code x (weight_scale x weight_scale_2).
nvfp4 and nvfp4-weight-only have the same weights and differ in `activations`.
mxfp4 is the format of the OCP Microscaling Formats (MX) Specification 1.0, weight-only. Its scales are powers
of two.
int8-smoothquant stores a W whose columns were multiplied by s, and pre_quant_scale [in], 1 / s
(`compiler/quantize/smoothquant.py`).

INT4 has blocks of 32 by default. On our trained checkpoint their squared error is a third less than that of
blocks of 128, for 0.375 bits more, and they divide every matrix of the model zoo, which 128 does not.
The scales are fp16: fp32 would cost another half bit, and bf16 would have an error of up to 0.8 % in a whole
block. DequantizeLinear returns the dtype of its scale, so a graph that computes in fp32 casts the scales to
fp32 first. Then code x scale is exact, and OpenVINO still keeps the weights compressed. TensorRT needs scales
in the dtype that it computes in (`Format.with_scales`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from llmc.plugins.paged_attention.spec import E4M3_MAX as E4M3_MAX
from llmc.plugins.round_fp4.spec import E2M1_MAX as E2M1_MAX
from llmc.runtime.dtypes import DTYPES, FLOATS
from llmc.runtime.errors import RequestError

INT8_MAX = 127.0
E4M3_SMALLEST = 2.0**-9  # the smallest subnormal


@dataclass(frozen=True)
class Format:
    """A quantization format."""

    #: The name, as in `--quant`.
    name: str
    #: Element type of the weight: "int8", "int4", "e4m3" or "e2m1".
    element: str
    #: Number of columns that share a scale. 0: one scale per row, -1: one scale for the matrix.
    block: int
    #: Dtype of `weight_scale`, by its safetensors name.
    scales: str
    #: Element type of the layer's quantized input: "int8", "e4m3" or "e2m1"; "": weight-only.
    activations: str = ""
    #: Whether the input is multiplied by `pre_quant_scale` and the weight's columns are divided by it.
    smoothed: bool = False

    @property
    def double_scaled(self) -> bool:
        """Whether the scales of blocks are multiplied by a global `weight_scale_2`, as in NVFP4."""
        return self.scales == "F8_E4M3"

    @property
    def float_scales(self) -> bool:
        """Whether `weight_scale` is of a type that the graph can compute in."""
        return self.scales in FLOATS

    @property
    def has_global_scale(self) -> bool:
        """Whether one scale spans the matrix; fused linear layers must then share it."""
        return self.block == -1 or self.double_scaled

    @property
    def packed(self) -> bool:
        """Whether a byte of `weight` holds two weights."""
        return self.element in ("int4", "e2m1")

    def with_scales(self, dtype: str) -> Format:
        """Return the same format with `weight_scale` in "F16", "BF16" or "F32".

        Raises ValueError for other dtypes, and for a format with fixed scales, such as NVFP4's E4M3.
        """
        if not self.float_scales or dtype not in ("F16", "BF16", "F32"):
            raise ValueError(f"{self.name} cannot have {dtype} scales")
        return replace(self, scales=dtype)

    def why_not(self, shape: tuple[int, ...]) -> str:
        """Return why a matrix of this shape cannot have the format, or ""."""
        if len(shape) != 2 or 0 in shape:
            return f"shape {list(shape)} is not that of a matrix with elements"
        if self.block > 0 and shape[1] % self.block:
            return f"{shape[1]} columns are not a multiple of the block of {self.block}"
        if self.packed and shape[1] % 2:
            return f"{shape[1]} columns of 4 bits do not fill whole bytes"
        return ""

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return name -> (safetensors dtype, shape) of the arrays that a weight of `shape` becomes."""
        rows, columns = shape
        weight = {"int8": "I8", "e4m3": "F8_E4M3"}.get(self.element, "U8")
        scales: tuple[int, ...] = () if self.block == -1 else (rows,)
        if self.block > 0:
            scales = (rows, columns // self.block)
        arrays: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight": (weight, (rows, columns // 2 if self.packed else columns)),
            "weight_scale": (self.scales, scales),
        }
        if self.double_scaled:
            arrays["weight_scale_2"] = ("F32", ())
        return arrays

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of a weight of `shape`, scales included."""
        return sum(DTYPES[dtype].bits // 8 * math.prod(dims) for dtype, dims in self.layout(shape).values())

    def bits_per_parameter(self, shape: tuple[int, int]) -> float:
        """Return the stored bits per weight, scales included."""
        return 8 * self.nbytes(shape) / math.prod(shape)


FORMATS: Mapping[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Format("int8", "int8", 0, "F32"),
        Format("int8-smoothquant", "int8", 0, "F32", activations="int8", smoothed=True),
        Format("int4", "int4", 32, "F16"),
        Format("int4-block128", "int4", 128, "F16"),
        Format("fp8", "e4m3", -1, "F32", activations="e4m3"),
        Format("fp8-per-channel", "e4m3", 0, "F32", activations="e4m3"),
        Format("nvfp4", "e2m1", 16, "F8_E4M3", activations="e2m1"),
        Format("nvfp4-weight-only", "e2m1", 16, "F8_E4M3"),
        Format("mxfp4", "e2m1", 32, "F8_E8M0"),
    )
}


def get_format(name: str) -> Format:
    """Return the format `name`. Raises RequestError, with the known names, if there is none."""
    if name not in FORMATS:
        raise RequestError(f"there is no weight format {name!r}", f"known: {', '.join(FORMATS)}", "quant")
    return FORMATS[name]


# Checkpoints have more formats than llmc writes. A systematic name is one of these, with a
# suffix for each property that differs: name -> (element, block, activations).
_KINDS = {"int8": ("int8", 0, ""), "int4": ("int4", 32, ""), "fp8": ("e4m3", -1, "e4m3"),
          "nvfp4": ("e2m1", 16, "e2m1"), "mxfp4": ("e2m1", 32, "")}  # fmt: skip
_INPUTS = {"-weight-only": "", "-fp8-inputs": "e4m3"}


def systematic_format(element: str, block: int, scales: str, activations: str = "") -> Format:
    """Return the format of a checkpoint's weight, with a systematic name.

    The names in FORMATS are systematic, except int8-smoothquant, which is the name of a method. Other
    systematic names are int4-block64, fp8-per-channel-weight-only and nvfp4-fp8-inputs.
    """
    kinds = [name for name, defaults in _KINDS.items() if defaults[0] == element]
    kind = kinds[scales == "F8_E8M0"] if len(kinds) > 1 else kinds[0]
    _, default_block, default_activations = _KINDS[kind]
    granularity = "" if block == default_block else f"-block{block}" if block else "-per-channel"
    if activations == default_activations:
        inputs = ""
    else:
        inputs = next(suffix for suffix, dtype in _INPUTS.items() if dtype == activations)
    return Format(f"{kind}{granularity}{inputs}", element, block, scales, activations)
