"""Plan which matrices of a graph stay in the checkpoint's 16-bit dtype, without changing a value."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.weights.exact_fp16 import exponent
from llmc.passes.legalize.keep_16bit_weights import Narrow, NarrowPlan, read_as_matrix
from llmc.passes.parameter import Parameter, parameters

_NARROW = {"BF16": "bf16", "F16": "fp16"}


def narrow_plan(
    model: ir.Model, tensors: Mapping[str, TensorRef], *, bf16_as_fp16: bool = True
) -> NarrowPlan:
    """Return the plan for the fp32 matrices of a quantized graph.

    tensors: the checkpoint's tensors, by name
    bf16_as_fp16: store the bf16 weights of a Gemm as fp16 times a power of two if that is exact
        (`exact_fp16.py`)
    """
    narrowed = {}
    for weight, record in parameters(model):
        if weight.dtype == ir.DataType.FLOAT and read_as_matrix(weight):
            narrow = _narrow(weight, record, tensors, bf16_as_fp16)
            if narrow is not None:
                narrowed[record.file_name] = narrow
    return NarrowPlan(narrowed)


def _narrow(
    weight: ir.Value, record: Parameter, tensors: Mapping[str, TensorRef], as_fp16: bool
) -> Narrow | None:
    refs = [tensors[source.tensor] for source in record.sources if source.tensor in tensors]
    dtypes = {ref.dtype for ref in refs}
    dtype = _NARROW.get(dtypes.pop()) if len(dtypes) == 1 else None
    if dtype is None:
        return None
    multiplied = any(node.op_type == "Gemm" for node, _ in weight.uses())
    if as_fp16 and dtype == "bf16" and multiplied and (power := exponent(refs)) is not None:
        return Narrow("fp16", power)
    return Narrow(dtype)
