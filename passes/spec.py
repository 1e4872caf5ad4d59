"""The definition of a legal graph at each stage, as executable checks.

TRACED           the tracer's output: [1, T, ...] tensors, operators `llmc.Traced*`.
PAGED            attention reads and writes a paged KV cache: no `llmc.TracedAttention`, no `llmc.TracedRope`.
PACKED           no batch axis: every activation is [T, ...] and T is the tokens of all sequences end to end.
CANONICAL        standard ONNX operators, `llmc.PagedAttention`, `llmc.Experts`, `llmc.GroupedTopK` and
                 `llmc.HeadLinear` only; logits for the wanted rows only.
QUANTIZED        also QuantizeLinear, DequantizeLinear, `llmc.RoundFP4`; quantized caches have scales. One of
                 several ranks has collectives.
FOR_NATIVE       for the native engine: what `compiler/targets/native/lower.py` takes; no function bodies.
FOR_OPENVINO     for OpenVINO: `llmc.PagedAttention` has its body; activations are quantized to INT8 only.
FOR_ONNXRUNTIME  for ONNX Runtime: every llmc operator has its body; no 4-bit floats, no quantized caches.
FOR_TENSORRT     for TensorRT: no function bodies; logits in fp32.
ORACLE           a stand-in for a TensorRT engine, as FOR_ONNXRUNTIME, with casts to 16 bits.

At every stage, every initializer has data or a Parameter.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

import onnx_ir as ir

from llmc.passes.parameter import parameter
from llmc.plugins.collectives.spec import OF_RANKS, SEND
from llmc.plugins.experts.spec import NAME as EXPERTS
from llmc.plugins.grouped_top_k.spec import NAME as GROUPED_TOP_K
from llmc.plugins.head_linear.spec import NAME as HEAD_LINEAR
from llmc.plugins.paged_attention.spec import NAME as ATTENTION
from llmc.plugins.paged_attention.spec import QUANTIZED_CACHES, STEP_INPUTS
from llmc.plugins.round_fp4.spec import NAME as ROUND_FP4

ROUNDS_ONCE = "llmc.rounds_once"  # metadata of an RMSNormalization that scales in fp32 and rounds the product
MODULE = "llmc.module"  # metadata of a node in a finalized graph: the checkpoint's module


class Stage(enum.Enum):
    """A stage of the graph. The checks of the first five also accept graphs of later stages."""

    TRACED = "traced"
    PAGED = "paged"
    PACKED = "packed"
    CANONICAL = "canonical"
    QUANTIZED = "quantized"
    FOR_NATIVE = "for-native"
    FOR_OPENVINO = "for-openvino"
    FOR_ONNXRUNTIME = "for-onnxruntime"
    FOR_TENSORRT = "for-tensorrt"
    ORACLE = "oracle"


# fmt: off
ELEMENTWISE = frozenset((
    "Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "Identity",
    "Log", "Max", "Min",
    "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Swish", "Tanh",
))
STRUCTURAL = frozenset((
    "Concat", "Expand", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
))
_SAME_DTYPE = frozenset(("Add", "Concat", "Div", "Gemm", "MatMul", "Max", "Min", "Mul", "Sub"))
_LAYERS = frozenset((
    "Gemm", "LayerNormalization", "MatMul", "RMSNormalization", "ReduceSum", "RotaryEmbedding",
    "Softmax", "TopK",
))
# fmt: on
_CANONICAL = ELEMENTWISE | STRUCTURAL | _LAYERS
# For NumberTokens, GatherRows and FoldExpands.
TRACED_ONLY = frozenset(("GatherElements", "GatherND", "Range", "Shape", "Tile"))
_QUANTIZED = _CANONICAL | {"QuantizeLinear", "DequantizeLinear"}
_UNPACKED = _QUANTIZED | {"BitwiseAnd", "BitShift"}  # to unpack 4-bit codes from bytes
_ONNX_OPERATORS = {
    Stage.TRACED: _CANONICAL | TRACED_ONLY,
    Stage.CANONICAL: _CANONICAL,
    Stage.QUANTIZED: _UNPACKED,
    Stage.FOR_NATIVE: _QUANTIZED,
    Stage.FOR_OPENVINO: _QUANTIZED,
    Stage.FOR_ONNXRUNTIME: _UNPACKED,
    Stage.FOR_TENSORRT: _QUANTIZED,
    Stage.ORACLE: _UNPACKED,
}
_ON_CPU = {ATTENTION, EXPERTS, GROUPED_TOP_K, HEAD_LINEAR}
_LAYERS_OF_TRACE = {"TracedLinear", "TracedHeadLinear", "TracedRMSNorm", "TracedExperts", *_ON_CPU}
_LLMC_OPERATORS = {
    Stage.TRACED: _LAYERS_OF_TRACE | {"TracedRope", "TracedAttention"},
    Stage.PAGED: _LAYERS_OF_TRACE,
    Stage.PACKED: _LAYERS_OF_TRACE,
    Stage.CANONICAL: _ON_CPU,
    Stage.FOR_OPENVINO: {ATTENTION},
    Stage.FOR_TENSORRT: {ATTENTION, ROUND_FP4, *OF_RANKS},
}
_BEFORE_PACKED = (Stage.TRACED, Stage.PAGED)
_FINAL = (Stage.FOR_NATIVE, Stage.FOR_OPENVINO, Stage.FOR_ONNXRUNTIME, Stage.FOR_TENSORRT, Stage.ORACLE)
_WITH_BODIES = (Stage.FOR_OPENVINO, Stage.FOR_ONNXRUNTIME, Stage.ORACLE)
_PACKED_INPUTS = ("input_ids", "position_ids", *STEP_INPUTS)
_FP4, _INT8 = ir.DataType.FLOAT4E2M1, ir.DataType.INT8
_CACHE_TYPES = frozenset(ir.DataType[cache.onnx] for cache in QUANTIZED_CACHES.values())


def module_of(node: ir.Node) -> str:
    """Return the checkpoint module that `node` was traced from, or the name of the node."""
    if MODULE in node.metadata_props:
        return node.metadata_props[MODULE]
    modules = _modules(node)
    return modules[-1] if modules else (node.name or node.op_type)


def in_module(node: ir.Node) -> bool:
    """Return whether the trace says which module `node` is from."""
    return MODULE in node.metadata_props or bool(_modules(node))


def _modules(node: ir.Node) -> list[str]:
    """Return the modules around `node`, outermost first. The last scope is that of the node itself."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    names = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    return [
        name.removeprefix("model.") for name in names[:-1] if name and not name.startswith("_empty_nn_module")
    ]


def check(model: ir.Model, stage: Stage) -> list[str]:
    """Return how `model` violates `stage`, most important first. The list is empty for a legal graph."""
    problems: list[str] = []
    for node in model.graph:
        where = f"operator {node.op_type} of module {module_of(node)}"
        problems += [f"{where} {problem}" for problem in _node_problems(node, stage)]
    problems += _interface_problems(model.graph, stage)
    problems += [
        f"initializer {value.name} has neither data nor a Parameter"
        for value in model.graph.initializers.values()
        if value.const_value is None and parameter(value) is None
    ]
    problems += _dtype_problems(model, stage)
    if stage in _FINAL:
        problems += _function_problems(model, stage)
    return problems


def _node_problems(node: ir.Node, stage: Stage) -> Iterator[str]:
    if node.domain == "llmc":
        if node.op_type not in _LLMC_OPERATORS.get(stage, {*_ON_CPU, ROUND_FP4, *OF_RANKS}):
            yield "is not allowed here"
    elif node.domain != "" or node.op_type not in _ONNX_OPERATORS.get(stage, _CANONICAL):
        yield "is outside the operators llmc knows"
    dtypes = {value.dtype for value in node.inputs if value is not None and value.dtype is not None}
    if node.op_type in _SAME_DTYPE and len(dtypes) > 1:
        yield f"mixes the element types {' and '.join(sorted(str(dtype) for dtype in dtypes))}"
    if stage not in _BEFORE_PACKED:
        for value in node.outputs:
            if value.shape is not None and len(value.shape) > 1 and value.shape[0] == 1 and _varies(value):
                yield f"still has a batch axis: {value.name} {value.shape}"
    if node.op_type == ATTENTION and stage in (Stage.QUANTIZED, *_FINAL):
        quantized = any(value is not None and value.dtype in _CACHE_TYPES for value in node.inputs)
        if quantized and not {"key_scale", "value_scale"} <= node.attributes.keys():
            yield "has a quantized cache without scales"
        if quantized and stage in _WITH_BODIES:
            yield "has a quantized cache, which this engine's file cannot hold"


def _interface_problems(graph: ir.Graph, stage: Stage) -> Iterator[str]:
    if stage in _BEFORE_PACKED:
        return
    inputs = {value.name for value in graph.inputs}
    wanted = _PACKED_INPUTS if stage is Stage.PACKED else (*_PACKED_INPUTS, "logits_index")
    yield from (f"graph input {name} is missing" for name in wanted if name not in inputs)
    if stage is Stage.PACKED:
        return
    first = next(iter(graph.outputs), None)
    sends = any(node.op_type == SEND for node in graph)  # a stage of a pipeline, which may have no logits
    if first is None or (first.name != "logits" and not sends):
        yield "the first graph output is not `logits`"
    elif stage in _FINAL and first.name == "logits" and first.dtype != ir.DataType.FLOAT:
        yield f"the logits are {first.dtype}, not fp32"


def _dtype_problems(model: ir.Model, stage: Stage) -> Iterator[str]:
    if stage in (Stage.FOR_ONNXRUNTIME, Stage.ORACLE):
        for value in model.graph.initializers.values():
            if value.dtype == _FP4:
                yield f"initializer {value.name} is FP4, which ONNX Runtime lacks"
    if stage is Stage.FOR_OPENVINO:
        for node in model.graph:
            if node.op_type == "QuantizeLinear" and node.outputs[0].dtype != _INT8:
                yield f"{module_of(node)} quantizes its activations to {node.outputs[0].dtype}"


def _function_problems(model: ir.Model, stage: Stage) -> Iterator[str]:
    used = {node.op_identifier() for node in model.graph if node.domain == "llmc"}
    if stage in _WITH_BODIES:
        missing = sorted(used - model.functions.keys())
        yield from (f"operator {name} has no function body" for _, name, _ in missing)
    elif model.functions:
        yield "there are function bodies, which the parser would take in place of plugins"


def _varies(value: ir.Value) -> bool:
    """Return whether the shape depends on the number of tokens."""
    return value.shape is not None and any(not isinstance(dim, int) for dim in value.shape)
