"""What a legal graph is, stage by stage, as code.

TRACED      as the tracer wrote it: [1, T, ...] tensors, operators `llmc.Traced*`.
PAGED       attention reads and writes a paged KV cache: no `llmc.TracedAttention`, no `llmc.TracedRope`.
PACKED      no batch axis: every activation is [T, ...] and T is the tokens of all sequences end to end.
CANONICAL   standard ONNX operators and `llmc.PagedAttention` only; logits for the wanted rows only.
"""

from __future__ import annotations

import enum

import onnx_ir as ir

from llmc.plugins.paged_attention.spec import STEP_INPUTS


class Stage(enum.Enum):
    """How far the graph has come. Each stage includes the demands of those before it."""

    TRACED = "traced"
    PAGED = "paged"
    PACKED = "packed"
    CANONICAL = "canonical"


# fmt: off
ELEMENTWISE = frozenset((
    "Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "Identity", "Max", "Min",
    "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Swish", "Tanh",
))
STRUCTURAL = frozenset((
    "Concat", "Expand", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
))
# fmt: on
_CANONICAL = (
    ELEMENTWISE
    | STRUCTURAL
    | {
        "Gemm",
        "LayerNormalization",
        "MatMul",
        "RMSNormalization",
        "RotaryEmbedding",
        "Softmax",
    }
)
_TRACED = {"TracedLinear", "TracedRMSNorm", "TracedRope", "TracedAttention"}
_GONE = {
    Stage.TRACED: set(),
    Stage.PAGED: {"TracedRope", "TracedAttention"},
    Stage.PACKED: {"TracedRope", "TracedAttention"},
    Stage.CANONICAL: _TRACED,
}
_PACKED_INPUTS = ("input_ids", "position_ids", *STEP_INPUTS)


def module_of(node: ir.Node) -> str:
    """The checkpoint module that `node` was traced from, or the node's own name."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    names = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    modules = [name.removeprefix("model.") for name in names[:-1] if name]
    return modules[-1] if modules else (node.name or node.op_type)


def check(model: ir.Model, stage: Stage) -> list[str]:
    """The ways in which `model` violates `stage`, most telling first; empty when it is legal."""
    problems: list[str] = []
    for node in model.graph:
        where = f"operator {node.op_type} of module {module_of(node)}"
        if node.domain == "llmc":
            if node.op_type not in _TRACED | {"PagedAttention"} or node.op_type in _GONE[stage]:
                problems.append(f"{where} is not allowed here")
        elif node.domain != "" or node.op_type not in _CANONICAL:
            problems.append(f"{where} is outside the operators llmc knows")
        if stage in (Stage.PACKED, Stage.CANONICAL):
            problems += [
                f"{where} still has a batch axis: {value.name} {value.shape}"
                for value in node.outputs
                if value.shape is not None and len(value.shape) > 1 and value.shape[0] == 1 and _varies(value)
            ]
    if stage in (Stage.PACKED, Stage.CANONICAL):
        inputs = {value.name for value in model.graph.inputs}
        problems += [f"graph input {name} is missing" for name in _PACKED_INPUTS if name not in inputs]
    if stage is Stage.CANONICAL:
        if [value.name for value in model.graph.outputs][:1] != ["logits"]:
            problems.append("the first graph output is not `logits`")
        if "logits_index" not in {value.name for value in model.graph.inputs}:
            problems.append("graph input logits_index is missing")
    return problems


def _varies(value: ir.Value) -> bool:
    """Whether the shape depends on the number of tokens."""
    return value.shape is not None and any(not isinstance(dim, int) for dim in value.shape)
