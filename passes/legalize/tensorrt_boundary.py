"""The ONNX model for TensorRT's parser, with llmc's operators replaced by TensorRT's.

    llmc.PagedAttention   gets plugin_namespace and plugin_version, by which the parser finds the plugin
    llmc.RoundFP4(x, s)   becomes Cast(DequantizeLinear(q, DequantizeLinear(scales, s))), where q and scales
                          are the outputs of TRT_FP4DynamicQuantize(x, s)
    function bodies       are removed, because the parser would take the body in place of the plugin

Custom operators of the parser: https://github.com/onnx/onnx-tensorrt (TensorRT-RTX 1.7.1 builds
TRT_FP4DynamicQuantize for SM120). That parser refuses a function that is called twice, so the pass puts the
operators into the graph itself.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.logger import G_LOGGER

from llmc.passes.spec import MODULE
from llmc.plugins.paged_attention import spec as paged_attention
from llmc.plugins.paged_attention import tensorrt_plugin
from llmc.plugins.round_fp4 import spec as round_fp4
from llmc.runtime.errors import BuildError

_TRT = "trt"  # the domain of the parser's custom operators
_FP8 = onnx.TensorProto.FLOAT8E4M3FN


def to_tensorrt(model: ir.Model) -> onnx.ModelProto:
    """Return a legalized graph in the form for TensorRT's parser, without the weights. `model` is unchanged.

    Raises BuildError for an llmc operator that TensorRT lacks.
    """
    source = ir.to_proto(model)
    G_LOGGER.severity = G_LOGGER.ERROR  # graphsurgeon warns of every type that numpy lacks
    graph = gs.import_onnx(source)
    graph.functions.clear()
    for node in list(graph.nodes):
        if node.domain == paged_attention.DOMAIN:
            if node.op not in _REPLACE:
                raise BuildError(f"TensorRT has no operator llmc.{node.op}", "please report this")
            _REPLACE[node.op](graph, node)
    graph.cleanup().toposort()
    exported = gs.export_onnx(graph)
    _keep_modules(source, exported)
    return exported


def _name_plugin(graph: gs.Graph, node: gs.Node) -> None:
    del graph
    node.attrs["plugin_namespace"] = tensorrt_plugin.NAMESPACE
    node.attrs["plugin_version"] = tensorrt_plugin.VERSION


def _quantize_fp4(graph: gs.Graph, node: gs.Node) -> None:
    x, global_scale = node.inputs
    codes, scales, wide, values = (
        gs.Variable(f"{node.name}.{name}") for name in ("codes", "scales", "wide_scales", "values")
    )
    blocks = {"axis": -1, "block_size": round_fp4.BLOCK}
    dtype = x.dtype if isinstance(x.dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(x.dtype))
    result = node.outputs[0]
    node.outputs.clear()
    graph.nodes += [
        gs.Node(
            "TRT_FP4DynamicQuantize",
            f"{node.name}.quantize",
            {**blocks, "scale_type": _FP8},
            [x, global_scale],
            [codes, scales],
            domain=_TRT,
        ),
        gs.Node("DequantizeLinear", f"{node.name}.dequantize_scales", {}, [scales, global_scale], [wide]),
        gs.Node("DequantizeLinear", f"{node.name}.dequantize", blocks, [codes, wide], [values]),
        gs.Node("Cast", node.name, {"to": int(dtype)}, [values], [result]),
    ]
    if not any(opset.domain == _TRT for opset in graph.import_domains):
        graph.import_domains.append(onnx.helper.make_opsetid(_TRT, 1))


_REPLACE: dict[str, Callable[[gs.Graph, gs.Node], None]] = {
    paged_attention.NAME: _name_plugin,
    round_fp4.NAME: _quantize_fp4,
}


def _keep_modules(source: onnx.ModelProto, exported: onnx.ModelProto) -> None:
    """Restore each node's module, which graphsurgeon drops and error messages name."""
    modules = {node.name: list(node.metadata_props) for node in source.graph.node}
    for node in exported.graph.node:
        name = next((name for name in (node.name, node.name.rpartition(".")[0]) if name in modules), None)
        for prop in modules[name] if name else ():
            if prop.key == MODULE:
                node.metadata_props.add(key=MODULE, value=prop.value)
