"""16-bit weights stay 16-bit in the file; the graph widens them, which changes no value.

    before  Gemm(x, W)              Gather(E, ids)              W, E: fp32
    after   Gemm(x, Cast(W, fp32))  Cast(Gather(E, ids), fp32)  W, E: bf16 or fp16, as in the checkpoint
    or      Gemm(x * 2^-k, Cast(W * 2^k))  Cast(Gather(E * 2^k, ids)) * 2^-k       bf16 that fits fp16 so

OpenVINO multiplies with such weights directly, widening them in registers, so that decoding reads half the
bytes (`runtime/backends/openvino/backend.py`). Arithmetic stays fp32 throughout, and a power of two changes
no bit of it. (The inputs of layers are multiplied: behind a product OpenVINO would compute it more slowly.)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.weights.exact_fp16 import EXPONENT, exponent
from llmc.passes import edit
from llmc.passes.canonicalize.fuse_linears import JOIN

_NARROW = {"BF16": ir.DataType.BFLOAT16, "F16": ir.DataType.FLOAT16}


def keep_stored_dtype(model: ir.Model, tensors: Mapping[str, TensorRef]) -> None:
    """Gives the matrices of a canonical fp32 graph the dtype they have in the checkpoint. In place.

    Of those that become fp16 the initializer's `meta` has the power of two (`exact_fp16.EXPONENT`).
    """
    for weight in list(model.graph.initializers.values()):
        refs = [tensors[name] for name in str(weight.name).split(JOIN) if name in tensors]
        dtypes = {ref.dtype for ref in refs}
        narrow = _NARROW.get(dtypes.pop()) if len(dtypes) == 1 else None
        fp32 = weight.dtype == ir.DataType.FLOAT  # not so a quantized one
        if narrow is None or not fp32 or weight.const_value is not None or not _only_read_as_matrix(weight):
            continue
        power = 0
        multiplied = any(node.op_type == "Gemm" for node, _ in weight.uses())
        if narrow == ir.DataType.BFLOAT16 and multiplied and (found := exponent(refs)) is not None:
            narrow, power = ir.DataType.FLOAT16, found
            weight.meta[EXPONENT] = power
        weight.type = ir.TensorType(narrow)  # a new one: a clone of the graph shares its types
        for node, index in list(weight.uses()):
            if node.op_type == "Gather":
                _widen_output(node, narrow, power)
                continue
            node.replace_input_with(index, _wide(node, weight))
            if power:
                x = edit.operand(node, 0)
                name = f"{node.outputs[0].name}.input"
                scaled = edit.insert(node, "Mul", [x, _factor(node, power)], {}, name, edit.dims(x))
                node.replace_input_with(0, scaled)


def _factor(node: ir.Node, power: int) -> ir.Value:
    """2 to the -power."""
    assert isinstance(node.graph, ir.Graph)
    return edit.constant(node.graph, np.array(2.0**-power, np.float32), f"two_to_{-power}")


def _only_read_as_matrix(weight: ir.Value) -> bool:
    places = {"Gemm": 1, "Gather": 0}
    return all(places.get(node.op_type) == index for node, index in weight.uses())


def _wide(before: ir.Node, weight: ir.Value) -> ir.Value:
    name, to = f"{weight.name}.wide", ir.DataType.FLOAT
    value = edit.insert(before, "Cast", [weight], {"to": to.value}, name, edit.dims(weight))
    value.dtype = to
    return value


def _widen_output(gather: ir.Node, narrow: ir.DataType, power: int) -> None:
    rows = gather.outputs[0]
    uses = list(rows.uses())
    after = uses[0].node
    rows.type = ir.TensorType(narrow)
    wide = edit.insert(
        after, "Cast", [rows], {"to": ir.DataType.FLOAT.value}, f"{rows.name}.wide", edit.dims(rows)
    )
    wide.dtype = ir.DataType.FLOAT
    if power:
        wide = edit.insert(
            after, "Mul", [wide, _factor(gather, power)], {}, f"{rows.name}.scaled", edit.dims(rows)
        )
    for node, index in uses:
        node.replace_input_with(index, wide)
