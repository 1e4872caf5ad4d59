"""The element types of tensors: their names in safetensors, numpy and llmc, and their sizes.

torch and config.json use numpy's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class Dtype(NamedTuple):
    """One element type."""

    #: The name in safetensors files.
    safetensors: str
    #: The size of one element in bits.
    bits: int
    #: The name in numpy and ml_dtypes; "" for types narrower than a byte, which are read as packed bytes.
    numpy: str = ""
    #: The name in llmc's options and manifests; "" for types that they do not use.
    name: str = ""


DTYPES: Mapping[str, Dtype] = {
    dtype.safetensors: dtype
    for dtype in (
        Dtype("BOOL", 8, "bool"),
        Dtype("U8", 8, "uint8"),
        Dtype("I8", 8, "int8", "int8"),
        Dtype("U16", 16, "uint16"),
        Dtype("I16", 16, "int16"),
        Dtype("U32", 32, "uint32"),
        Dtype("I32", 32, "int32"),
        Dtype("U64", 64, "uint64"),
        Dtype("I64", 64, "int64"),
        Dtype("F16", 16, "float16", "fp16"),
        Dtype("F32", 32, "float32", "fp32"),
        Dtype("F64", 64, "float64"),
        Dtype("C64", 64, "complex64"),
        Dtype("BF16", 16, "bfloat16", "bf16"),
        Dtype("F8_E4M3", 8, "float8_e4m3fn", "fp8"),
        Dtype("F8_E5M2", 8, "float8_e5m2"),
        Dtype("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
        Dtype("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
        Dtype("F8_E8M0", 8, "float8_e8m0fnu"),
        Dtype("F6_E2M3", 6),
        Dtype("F6_E3M2", 6),
        Dtype("F4", 4, "", "fp4"),
    )
}
BY_NAME: Mapping[str, Dtype] = {dtype.name: dtype for dtype in DTYPES.values() if dtype.name}
BY_NUMPY: Mapping[str, Dtype] = {dtype.numpy: dtype for dtype in DTYPES.values() if dtype.numpy}
FLOATS = ("F64", "F32", "F16", "BF16")  # the types of unquantized weights, by their safetensors names


def numpy_dtype(safetensors: str) -> np.dtype:
    """Return the numpy dtype of a safetensors dtype. Types narrower than a byte are packed in uint8."""
    import ml_dtypes  # noqa: F401  (registers its types with numpy)
    import numpy as np

    return np.dtype(DTYPES[safetensors].numpy or "uint8")
