"""16-bit weights stay 16-bit in the file; the graph widens them, which changes no value.

    before  Gemm(x, W)              Gather(E, ids)              W, E: fp32
    after   Gemm(x, Cast(W, fp32))  Cast(Gather(E, ids), fp32)  W, E: bf16 or fp16, as in the checkpoint

OpenVINO multiplies with such weights directly, widening them in registers, so that decoding reads half the
bytes (`runtime/backends/openvino.py`). Arithmetic stays fp32 throughout.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from llmc.compiler.safetensors_index import TensorRef
from llmc.passes import edit
from llmc.passes.fuse_linears import JOIN

_NARROW = {"BF16": ir.DataType.BFLOAT16, "F16": ir.DataType.FLOAT16}


def keep_stored_dtype(model: ir.Model, tensors: Mapping[str, TensorRef]) -> None:
    """Gives the matrices of a canonical fp32 graph the dtype they have in the checkpoint. In place."""
    for weight in list(model.graph.initializers.values()):
        dtypes = {tensors[name].dtype for name in str(weight.name).split(JOIN) if name in tensors}
        narrow = _NARROW.get(dtypes.pop()) if len(dtypes) == 1 else None
        fp32 = weight.dtype == ir.DataType.FLOAT  # not so a quantized one
        if narrow is None or not fp32 or weight.const_value is not None or not _only_read_as_matrix(weight):
            continue
        weight.type = ir.TensorType(narrow)  # a new one: a clone of the graph shares its types
        for node, index in list(weight.uses()):
            if node.op_type == "Gather":
                _widen_output(node, narrow)
            else:
                node.replace_input_with(index, _wide(node, weight))


def _only_read_as_matrix(weight: ir.Value) -> bool:
    places = {"Gemm": 1, "Gather": 0}
    return all(places.get(node.op_type) == index for node, index in weight.uses())


def _wide(before: ir.Node, weight: ir.Value) -> ir.Value:
    name, to = f"{weight.name}.wide", ir.DataType.FLOAT
    value = edit.insert(before, "Cast", [weight], {"to": to.value}, name, edit.dims(weight))
    value.dtype = to
    return value


def _widen_output(gather: ir.Node, narrow: ir.DataType) -> None:
    rows = gather.outputs[0]
    uses = list(rows.uses())
    graph = gather.graph
    assert isinstance(graph, ir.Graph)
    wide = ir.Value(name=f"{rows.name}.wide", shape=rows.shape, type=ir.TensorType(ir.DataType.FLOAT))
    cast = ir.node("Cast", [rows], {"to": ir.DataType.FLOAT.value}, outputs=[wide], name=wide.name)
    cast.metadata_props.update(gather.metadata_props)
    graph.insert_after(gather, cast)
    rows.type = ir.TensorType(narrow)
    for node, index in uses:
        node.replace_input_with(index, wide)
