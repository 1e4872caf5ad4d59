"""The ONNX model that TensorRT's parser is given: operators of llmc become TensorRT's, the rest stays."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from llmc.passes.legalize.tensorrt_boundary import to_tensorrt
from llmc.passes.spec import MODULE
from llmc.plugins.paged_attention import tensorrt_plugin
from llmc.plugins.round_fp4 import body
from llmc.runtime.errors import BuildError

ROUNDED = """
<ir_version: 10, opset_import: ["" : 23, "llmc" : 1]>
g (bfloat16[T, 32] x, float s) => (bfloat16[T, 32] z) {
    [first] y = llmc.RoundFP4(x, s)
    [second] z = llmc.RoundFP4(y, s)
}
"""
ATTENTION = """
<ir_version: 10, opset_import: ["" : 23, "llmc" : 1]>
g (float16[T, 8] q, float16[T, 8] k) => (float16[T, 8] out) {
    [sum] qk = Add(q, k)
    [attention] out = llmc.PagedAttention <num_heads: int = 2, scale: float = 0.5> (qk, k)
}
"""


def graph(text: str) -> ir.Model:
    model = ir.from_onnx_text(text)
    for node in model.graph:
        node.metadata_props[MODULE] = f"model.{node.name}"
    return model


def test_attention_names_its_plugin_and_keeps_its_attributes() -> None:
    exported = to_tensorrt(graph(ATTENTION))
    add, attention = exported.graph.node
    assert (add.op_type, list(add.input)) == ("Add", ["q", "k"])
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in attention.attribute}
    assert attributes.pop("plugin_namespace") == tensorrt_plugin.NAMESPACE.encode()
    assert attributes.pop("plugin_version") == tensorrt_plugin.VERSION.encode()
    assert attributes == {"num_heads": 2, "scale": 0.5}
    assert attention.domain == "llmc"


def test_fp4_rounding_is_tensorrts_own_and_no_body_is_left() -> None:
    model = graph(ROUNDED)
    function = body.function()
    model.functions[function.identifier()] = function
    exported = to_tensorrt(model)
    assert not exported.functions
    kinds = [node.op_type for node in exported.graph.node]
    assert kinds == 2 * ["TRT_FP4DynamicQuantize", "DequantizeLinear", "DequantizeLinear", "Cast"]
    quantize, scales, values, cast = exported.graph.node[:4]
    assert quantize.domain == "trt"
    assert list(quantize.input) == ["x", "s"]
    assert list(scales.input) == [quantize.output[1], "s"]
    assert list(values.input) == [quantize.output[0], scales.output[0]]
    assert [a.i for a in cast.attribute if a.name == "to"] == [onnx.TensorProto.BFLOAT16]
    assert ("trt", 1) in {(opset.domain, opset.version) for opset in exported.opset_import}
    assert model.functions, "the graph itself is unchanged"


def test_each_node_keeps_the_module_that_messages_name() -> None:
    exported = to_tensorrt(graph(ROUNDED))
    modules = [node.metadata_props[0].value for node in exported.graph.node]
    assert modules == 4 * ["model.first"] + 4 * ["model.second"]


def test_the_same_graph_gives_the_same_bytes() -> None:
    first, second = (to_tensorrt(graph(ROUNDED)).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_an_operator_without_a_counterpart_is_refused() -> None:
    model = graph(ATTENTION.replace("PagedAttention", "Experts"))
    with pytest.raises(BuildError, match=r"no operator llmc\.Experts"):
        to_tensorrt(model)
