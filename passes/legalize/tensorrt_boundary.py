"""The ONNX model for TensorRT's parser, with llmc's operators replaced by TensorRT's.

    llmc.PagedAttention   gets plugin_namespace and plugin_version, by which the parser finds the plugin
    llmc.RoundFP4(x, s)   becomes Cast(DequantizeLinear(q, DequantizeLinear(scales, s))), where q and scales
                          are the outputs of TRT_FP4DynamicQuantize(x, s)
    llmc.AllReduce(x)     gets them too
    llmc.AllGather(x)     becomes Reshape(Transpose(llmc.AllGather(x))), because the plugin's output is
                          [ranks, N, W]
    llmc.Send(x)          gets them too. Its output is one number, the graph output `sent.N`
    llmc.Recv()           becomes Recv(input_ids), whose length is that of the received rows, with their width
                          and dtype as attributes
    Recv, collectives,    get the result of the one before as another input, unless it precedes them anyway:
    Send                  first every Recv, then the collectives, then every Send
    function bodies       are removed, because the parser would take the body in place of the plugin

Custom operators of the parser: https://github.com/onnx/onnx-tensorrt (TensorRT-RTX 1.7.1 builds
TRT_FP4DynamicQuantize for SM120). That parser refuses a function that is called twice, so the pass puts the
operators into the graph itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.logger import G_LOGGER

from llmc.passes.shard.stages import unread_inputs
from llmc.passes.spec import MODULE
from llmc.plugins.collectives import spec as collectives
from llmc.plugins.operator import DOMAIN, OPERATORS
from llmc.plugins.paged_attention import spec as paged_attention
from llmc.plugins.round_fp4 import spec as round_fp4
from llmc.runtime.errors import BuildError

_TRT = "trt"  # the domain of the parser's custom operators
_FP8 = onnx.TensorProto.FLOAT8E4M3FN
#: The place of an exchange with other ranks in the order of a step.
_PHASES = {
    collectives.RECV: 0,
    collectives.ALL_REDUCE: 1,
    collectives.ALL_GATHER: 1,
    collectives.SEND: 2,
}


def to_tensorrt(model: ir.Model) -> onnx.ModelProto:
    """Return a legalized graph in the form for TensorRT's parser, without the weights. `model` is unchanged.

    Raises BuildError for an llmc operator that TensorRT lacks.
    """
    source = ir.to_proto(model)
    G_LOGGER.severity = G_LOGGER.ERROR  # graphsurgeon warns of every type that numpy lacks
    graph = gs.import_onnx(source)
    graph.functions.clear()
    lacks = unread_inputs(model)
    graph.inputs = [value for value in graph.inputs if value.name not in lacks]
    _order_exchanges(graph)
    for node in list(graph.nodes):
        if node.domain == DOMAIN:
            if node.op not in _REPLACE:
                raise BuildError(f"TensorRT has no operator llmc.{node.op}", "please report this")
            _REPLACE[node.op](graph, node)
    graph.cleanup().toposort()
    exported = gs.export_onnx(graph)
    _keep_modules(source, exported)
    return exported


def _name_plugin(graph: gs.Graph, node: gs.Node) -> None:
    del graph
    node.attrs["plugin_namespace"] = DOMAIN
    node.attrs["plugin_version"] = str(OPERATORS[node.op].abi)


def _order_exchanges(graph: gs.Graph) -> None:
    """Let each collective or transfer depend on the one before: every rank's engine runs them in one order.

    Nothing that is received depends on this rank. Nothing that a rank computes depends on what it sends.
    """
    nodes = [node for node in graph.nodes if node.domain == DOMAIN and node.op in _PHASES]
    nodes.sort(key=lambda node: (_PHASES[node.op], int(node.attrs["sequence"])))
    for node in nodes:
        if node.op == collectives.RECV:
            node.inputs = [graph.tensors()["input_ids"]]
    for before, node in itertools.pairwise(nodes):
        if not _precedes(before, node):
            node.inputs.append(before.outputs[0])


def _precedes(first: gs.Node, node: gs.Node) -> bool:
    """Return whether `node` depends on `first`."""
    seen, waiting = set(), [node]
    while waiting:
        for tensor in waiting.pop().inputs:
            for producer in tensor.inputs:
                if producer is first:
                    return True
                if id(producer) not in seen:
                    seen.add(id(producer))
                    waiting.append(producer)
    return False


def _gather_columns(graph: gs.Graph, node: gs.Node) -> None:
    """Put the parts of the ranks side by side: [ranks, N, W] to [N, ranks x W]."""
    _name_plugin(graph, node)
    (result,) = node.outputs
    width = int(result.shape[-1])
    parts, rows = (gs.Variable(f"{node.name}.{name}", result.dtype) for name in ("parts", "rows"))
    shape = gs.Constant(f"{node.name}.shape", np.array([-1, width], np.int64))
    node.outputs = [parts]
    graph.nodes += [
        gs.Node("Transpose", f"{node.name}.transpose", {"perm": [1, 0, 2]}, [parts], [rows]),
        gs.Node("Reshape", f"{node.name}.reshape", {}, [rows, shape], [result]),
    ]


def _send(graph: gs.Graph, node: gs.Node) -> None:
    """Send any number of numbers. TensorRT would remove a node without an output of the graph."""
    _name_plugin(graph, node)
    (sent,) = node.outputs
    sent.name, sent.shape = f"{collectives.SENT}{node.attrs['sequence']}", [1]


def _receive(graph: gs.Graph, node: gs.Node) -> None:
    """Receive rows of numbers, and give them their shape."""
    _name_plugin(graph, node)
    (result,) = node.outputs
    first, *rest = result.shape
    del first
    width = math.prod(map(int, rest))
    node.attrs |= {"width": width, "dtype": _onnx_type(result)}
    if len(rest) == 1:
        return
    rows = gs.Variable(f"{node.name}.rows", result.dtype)
    shape = gs.Constant(f"{node.name}.shape", np.array([-1, *map(int, rest)], np.int64))
    node.outputs = [rows]
    graph.nodes.append(gs.Node("Reshape", f"{node.name}.reshape", {}, [rows, shape], [result]))


def _onnx_type(tensor: gs.Variable) -> int:
    """Return the number of a tensor's type in ONNX."""
    dtype = tensor.dtype
    return int(dtype) if isinstance(dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _quantize_fp4(graph: gs.Graph, node: gs.Node) -> None:
    x, global_scale = node.inputs
    codes, scales, wide, values = (
        gs.Variable(f"{node.name}.{name}") for name in ("codes", "scales", "wide_scales", "values")
    )
    blocks = {"axis": -1, "block_size": round_fp4.BLOCK}
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
        gs.Node("Cast", node.name, {"to": _onnx_type(x)}, [values], [result]),
    ]
    if not any(opset.domain == _TRT for opset in graph.import_domains):
        graph.import_domains.append(onnx.helper.make_opsetid(_TRT, 1))


_REPLACE: dict[str, Callable[[gs.Graph, gs.Node], None]] = {
    paged_attention.NAME: _name_plugin,
    round_fp4.NAME: _quantize_fp4,
    collectives.ALL_REDUCE: _name_plugin,
    collectives.ALL_GATHER: _gather_columns,
    collectives.SEND: _send,
    collectives.RECV: _receive,
}


def _keep_modules(source: onnx.ModelProto, exported: onnx.ModelProto) -> None:
    """Restore each node's module, which graphsurgeon drops and error messages name."""
    modules = {node.name: list(node.metadata_props) for node in source.graph.node}
    for node in exported.graph.node:
        name = next((name for name in (node.name, node.name.rpartition(".")[0]) if name in modules), None)
        for prop in modules[name] if name else ():
            if prop.key == MODULE:
                node.metadata_props.add(key=MODULE, value=prop.value)
