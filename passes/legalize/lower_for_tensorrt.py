"""From the canonical graph to the ONNX file that TensorRT's parser takes, strongly typed.

Nearly all of the canonical graph is taken as it is (TensorRT-RTX 1.7.1, 2026-11-23): RotaryEmbedding over
[T, heads, 1, D] without position ids, RMSNormalization (statistics in fp32, rounded before the weight, as
Llama does), Gather with int32 indices, Split, Gemm. What is changed:

PagedAttention   names its plugin; the file carries no function body, which the parser would take instead
norm(x, w + 1)   Gemma: transformers adds, normalizes and scales in fp32 and rounds once, so does the graph
rotary tables    become products of small ones (`tensorrt_rope.py`)
logits           leave in fp32: numpy and every sampler want that, and widening is exact
dimensions       of inputs are unnamed, but T: with more names their order in the engine changes from build to
                 build, and no other name joins two tensors of one standard operator
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from llmc.passes import edit
from llmc.passes.geometry import attention_nodes
from llmc.passes.legalize.factor_rotary_tables import factor_rotary_tables
from llmc.passes.legalize.finalize import finish
from llmc.passes.spec import module_of
from llmc.plugins.paged_attention import tensorrt_plugin as plugin
from llmc.plugins.round_fp4 import body as round_fp4
from llmc.plugins.round_fp4 import spec as round_fp4_spec
from llmc.runtime.errors import BuildError

DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def lower_for_tensorrt(model: ir.Model, dtype: str) -> None:
    """Turns a canonical graph that was traced in `dtype` ("fp16" or "bf16") into TensorRT's. In place.

    Raises BuildError if the graph computes in another dtype.
    """
    wanted = DTYPES[dtype]
    for node in attention_nodes(model):
        if (found := edit.operand(node, 0).dtype) != wanted:
            raise BuildError(f"{module_of(node)} computes in {found}, the TensorRT engine in {dtype}")
        node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", plugin.NAMESPACE)
        node.attributes["plugin_version"] = ir.AttrString("plugin_version", plugin.VERSION)
    for node in list(model.graph):
        if node.op_type == "RMSNormalization":
            _widen_offset_norm(node)
    factor_rotary_tables(model.graph)
    _widen_logits(model.graph)
    _keep_one_symbol(model.graph)
    model.functions.clear()
    if any(node.op_type == round_fp4_spec.NAME for node in model.graph):
        function = round_fp4.tensorrt_function(wanted)
        model.functions[function.identifier()] = function
        model.graph.opset_imports["trt"] = 1
    edit.remove_unused(model)
    finish(model)


def without_functions(model: ir.Model) -> ir.Model:
    """A copy of a lowered graph for the parser, the operators of our own in TensorRT's.

    The parser (1.7.1) would name the layers of every instance of a function alike, and refuse the second.
    """
    inlined = model.clone()
    common.InlinePass()(inlined)
    return inlined


def _keep_one_symbol(graph: ir.Graph) -> None:
    for value in (*graph.inputs, *graph.outputs):
        sizes = list(value.shape or [])
        known = [dim if isinstance(dim, int) or dim.value == edit.TOKENS else None for dim in sizes]
        value.shape = ir.Shape(known)


def _widen_offset_norm(node: ir.Node) -> None:
    """norm(x, Add(w, c)) -> Cast(norm(Cast(x, fp32), Add(Cast(w, fp32), c)))."""
    x, scale = edit.operand(node, 0), edit.operand(node, 1)
    add = scale.producer()
    if add is None or add.op_type != "Add":
        return
    weight, offset = edit.operand(add, 0), edit.operand(add, 1)
    name, graph = node.name or str(node.outputs[0].name), node.graph
    assert isinstance(graph, ir.Graph)
    assert weight.dtype is not None
    assert offset.const_value is not None
    one = edit.constant(graph, offset.const_value.numpy().astype("float32"), f"{offset.name}_wide")
    wide_weight = _cast(node, weight, ir.DataType.FLOAT, f"{name}.wide_weight")
    wide_scale = edit.insert(node, "Add", [wide_weight, one], {}, f"{name}.wide_scale", edit.dims(weight))
    wide_x = _cast(node, x, ir.DataType.FLOAT, f"{name}.wide_x")
    settings = {key: edit.attribute(node, key) for key in ("axis", "epsilon")}
    shape = list(x.shape or [])
    wide = edit.insert(node, "RMSNormalization", [wide_x, wide_scale], settings, f"{name}.wide", shape)
    edit.replace(node, _cast(node, wide, weight.dtype, f"{name}.rounded"))


def _widen_logits(graph: ir.Graph) -> None:
    logits = graph.outputs[0]
    if logits.dtype == ir.DataType.FLOAT:
        return
    last = logits.producer()
    assert last is not None
    narrow, logits.name = logits, "logits_narrow"
    wide = _cast(last, narrow, ir.DataType.FLOAT, "logits")
    graph.outputs[0] = wide


def _cast(near: ir.Node, x: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    """Cast(x, dtype), inserted before `near`; `finish` puts the nodes in order."""
    value = edit.insert(near, "Cast", [x], {"to": dtype.value}, name, list(x.shape or []))
    value.dtype = dtype
    return value
