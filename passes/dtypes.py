"""ONNX element types by their safetensors names, from the table in `runtime/dtypes.py`."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from llmc.runtime.dtypes import numpy_dtype

# The element types of weights and scales, by their safetensors names.
ONNX: Mapping[str, ir.DataType] = {
    name: ir.DataType.from_numpy(numpy_dtype(name))
    for name in ("F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "I64", "I32", "I8", "U8")
}
SAFETENSORS: Mapping[ir.DataType, str] = {dtype: name for name, dtype in ONNX.items()}
