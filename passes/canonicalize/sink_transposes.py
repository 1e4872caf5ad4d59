"""SinkTransposes: move head transposes behind the operators that commute with them.

before  x [1,T,H,D] -> Transpose -> TracedRMSNorm -> [1,H,T,D]
after   x -> TracedRMSNorm -> Transpose

Norms work on the features of a head, operators in `_AXES` on one axis, and those in ELEMENTWISE on none.
Gemma 3 transposes first and Qwen 3 normalizes first; StableLM has a norm for every head. After this pass,
PageAttention sees one form.

A second transpose that undoes the first is removed. A Gather of heads (Falcon) moves before its transpose.
An Unsqueeze that adds the axis of a single head (multi-query attention) becomes such a transpose.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.canonicalize.lower_rope import HEADS_FIRST, is_head_transpose
from llmc.passes.contract import Matches
from llmc.passes.spec import ELEMENTWISE, Stage

_NORMS = {"TracedRMSNorm", "LayerNormalization"}
_AXES = {"Concat", "Split"}  # operators that work along the axis of their attribute


class SinkTransposes:
    """Move operators in front of head transposes. Counts one match per moved operator."""

    name = "sink-transposes"
    requires = Stage.TRACED
    ensures = Stage.TRACED

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        for node in list(model.graph):
            if _adds_head(node):
                _transpose_instead(node)
            elif _reads_one_head(node):
                transpose = edit.operand(node, 0).producer()
                assert transpose is not None
                node.replace_input_with(0, edit.operand(transpose, 0))
            elif _follows_transpose(node):
                _merge(node)
            elif _gathers_of_transpose(node):
                _gather_first(node)
            elif _commutes(node):
                _move(node)
                matches.count += 1
        edit.remove_unused(model)
        return matches


def _adds_head(node: ir.Node) -> bool:
    """Return whether `node` adds the axis of a single head: [1, T, C] or [1, T] to [1, 1, T, C]."""
    shape = edit.dims(node.outputs[0]) if node.op_type == "Unsqueeze" else []
    return len(shape) == 4 and shape[:3] == [1, 1, -1]


def _transpose_instead(node: ir.Node) -> None:
    x, name, width = edit.operand(node, 0), str(node.outputs[0].name), edit.dims(node.outputs[0])[-1]
    while (before := x.producer()) is not None and before.op_type == "Unsqueeze":
        x = edit.operand(before, 0)  # the elements keep their order
    rows = edit.reshape(node, x, [1, -1, 1, width], f"{name}.tokens")
    perm = {"perm": HEADS_FIRST}
    edit.replace(node, edit.insert(node, "Transpose", [rows], perm, f"{name}.heads", [1, 1, -1, width]))


def _reads_one_head(node: ir.Node) -> bool:
    """Return whether `node` reshapes the transpose of a single head, which keeps the elements in order."""
    if node.op_type != "Reshape" or not is_head_transpose(edit.operand(node, 0).producer()):
        return False
    return edit.dims(edit.operand(node, 0))[1] == 1


def _perm(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints())


def _reads_transpose(node: ir.Node) -> bool:
    producer = edit.operand(node, 0).producer()
    return producer is not None and producer.op_type == "Transpose"


def _follows_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and _reads_transpose(node)


def _merge(node: ir.Node) -> None:
    """Make one transpose of two, or none if the second undoes the first."""
    first = edit.operand(node, 0).producer()
    assert first is not None
    x, output = edit.operand(first, 0), node.outputs[0]
    perm = [_perm(first)[axis] for axis in _perm(node)]
    if perm == sorted(perm):
        edit.replace(node, x)
    else:
        name, shape = f"{output.name}.merged", edit.dims(output)
        edit.replace(node, edit.insert(node, "Transpose", [x], {"perm": perm}, name, shape))


def _gathers_of_transpose(node: ir.Node) -> bool:
    """Return whether `node` gathers constant indices along the first axis of a transpose."""
    if node.op_type != "Gather" or not _reads_transpose(node):
        return False
    index = edit.operand(node, 1)
    axis = edit.attribute(node, "axis") if "axis" in node.attributes else 0
    return axis == 0 and index.is_initializer() and len(edit.dims(index)) == 1


def _gather_first(node: ir.Node) -> None:
    """Gather along the transposed axis, and transpose the result."""
    transpose = edit.operand(node, 0).producer()
    assert transpose is not None
    x, index, perm = edit.operand(transpose, 0), edit.operand(node, 1), _perm(transpose)
    output, shape = node.outputs[0], edit.dims(edit.operand(transpose, 0))
    shape[perm[0]] = edit.dims(index)[0]
    gathered = edit.insert(node, "Gather", [x, index], {"axis": perm[0]}, f"{output.name}.gathered", shape)
    name = f"{output.name}.transposed"
    edit.replace(node, edit.insert(node, "Transpose", [gathered], {"perm": perm}, name, edit.dims(output)))


def _commutes(node: ir.Node) -> bool:
    """Return whether `node` reads head transposes and could read what they read instead."""
    transposed = [is_head_transpose(value.producer()) for value in node.inputs if value is not None]
    if not any(transposed):
        return False
    if node.op_type in _NORMS or node.op_type == "Slice":
        return transposed[0] and _works_on_features(node)
    if node.op_type == "Split":
        return True
    if node.op_type == "Concat":
        return all(transposed)
    others = [v for v in node.inputs if v is not None and not is_head_transpose(v.producer())]
    return node.op_type in ELEMENTWISE and all(
        value.is_initializer() and len(edit.dims(value)) < 2 for value in others
    )


def _works_on_features(node: ir.Node) -> bool:
    """Return whether a norm or a slice is along the last axis alone."""
    if node.op_type == "Slice":
        axes = edit.numbers(node.inputs[3]) if len(node.inputs) > 3 else None
        return axes in ([3], [-1])
    return "axis" not in node.attributes or edit.attribute(node, "axis") in (3, -1)


def _move(node: ir.Node) -> None:
    """Let `node` read what the head transposes read, and transpose its results."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    inputs = list(node.inputs)
    for index, value in enumerate(inputs):
        producer = value.producer() if value is not None else None
        if producer is not None and is_head_transpose(producer):
            inputs[index] = edit.operand(producer, 0)
    attributes = dict(node.attributes)
    if node.op_type in _AXES:
        axis = node.attributes["axis"].as_int() % len(HEADS_FIRST)
        attributes["axis"] = ir.AttrInt64("axis", HEADS_FIRST[axis])
    outputs = []
    for old in node.outputs:
        shape = edit.dims(old)
        token_major = [edit.TOKENS if shape[axis] == -1 else shape[axis] for axis in HEADS_FIRST]
        outputs.append(ir.Value(name=f"{old.name}.tokens", shape=ir.Shape(token_major), type=old.type))
    moved = ir.Node(node.domain, node.op_type, inputs, attributes.values(), outputs=outputs)
    moved.name = outputs[0].name
    moved.metadata_props.update(node.metadata_props)
    graph.insert_before(node, moved)
    perm = {"perm": HEADS_FIRST}
    for old, new in zip(list(node.outputs), outputs, strict=True):
        heads = edit.insert(node, "Transpose", [new], perm, f"{old.name}.heads", edit.dims(old))
        ir.convenience.replace_all_uses_with(old, heads, replace_graph_outputs=True)
    graph.remove(node, safe=True)
