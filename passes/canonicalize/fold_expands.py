"""FoldExpands: remove broadcasts to the number of tokens, and repetitions of keys and values for every query.

before  y = Add(x [1,T,C], Expand(b [C], shape of x))
after   y = Add(x, b), which broadcasts

before  TracedAttention(q [1,Hq,T,D], k, v), where k and v are
        Transpose(Reshape(Expand(x [1,T,H,1,D]) [1,T,H,Hq/H,D])) to heads first, and may be rotated after that
after   TracedAttention(q, k, v) with H heads of keys and values: the cache is smaller

An Expand that remains gets a constant shape with 1 for the tokens, which leaves that axis unchanged.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.canonicalize.lower_rope import HEADS_FIRST, is_head_transpose
from llmc.passes.contract import Matches
from llmc.passes.spec import ELEMENTWISE, TRACED_ONLY, Stage, in_module, module_of
from llmc.runtime.errors import UnsupportedError


class FoldExpands:
    """Fold broadcasts.

    Counts one match per operand that is read unexpanded, per attention whose heads were repeated, and per
    Expand that gets a constant shape.
    """

    name = "fold-expands"
    requires = Stage.TRACED
    ensures = Stage.TRACED

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        for node in list(model.graph):
            if node.op_type in ELEMENTWISE:
                matches.count += _read_unexpanded(node)
            elif node.op_type == "TracedAttention" and not node.attributes.get_int("value_width", 0):
                matches.count += _read_fewer_heads(node)
        edit.remove_unused(model)
        for node in model.graph:
            if node.op_type == "Expand" and edit.numbers(node.inputs[1]) is None:
                matches.count += _fix_shape(model.graph, node)
        edit.remove_unused(model)
        _refuse_traced_only(model.graph)
        return matches


def _read_unexpanded(node: ir.Node) -> int:
    """Let `node` read the operand of an Expand, if another operand has the result's shape.

    Returns the number of operands that were replaced.
    """
    shape, count = node.outputs[0].shape, 0
    for index, value in enumerate(node.inputs):
        producer = value.producer() if value is not None else None
        others = [other for other in node.inputs if other is not None and other is not value]
        if producer is not None and producer.op_type == "Expand" and any(o.shape == shape for o in others):
            node.replace_input_with(index, edit.operand(producer, 0))
            count += 1
    return count


def _read_fewer_heads(node: ir.Node) -> int:
    """Let attention read keys and values before they are repeated. Return 1, or 0 if nothing repeats them."""
    unrepeated = [_before_repetition(edit.operand(node, index)) for index in (1, 2)]
    if (
        unrepeated[0] is None
        or unrepeated[1] is None
        or edit.dims(unrepeated[0])[2] != edit.dims(unrepeated[1])[2]
    ):
        return 0
    for index, source in zip((1, 2), unrepeated, strict=True):
        assert source is not None
        node.replace_input_with(index, _fewer_heads(node, edit.operand(node, index), source))
    return 1


def _before_repetition(value: ir.Value) -> ir.Value | None:
    """Return the value [1, T, H, 1, D] that is repeated to `value` [1, Hq, T, D]; None if there is none."""
    node = value.producer()
    if node is not None and node.op_type == "TracedRope":
        node = edit.operand(node, 0).producer()
    if node is None or not is_head_transpose(node):
        return None
    reshape = edit.operand(node, 0).producer()
    expand = edit.operand(reshape, 0).producer() if reshape is not None else None
    if reshape is None or reshape.op_type != "Reshape" or expand is None or expand.op_type != "Expand":
        return None
    source, heads = edit.operand(expand, 0), edit.dims(value)[1]
    before, after = edit.dims(source), edit.dims(expand.outputs[0])
    if len(before) != 5 or before[3] != 1 or after[2] * after[3] != heads or after[4] != before[4]:
        return None
    return source if before[2] == after[2] else None


def _fewer_heads(node: ir.Node, value: ir.Value, source: ir.Value) -> ir.Value:
    """Insert the head transpose, and the rotation of `value`, of a source [1, T, H, 1, D] before `node`."""
    _, _, heads, _, width = edit.dims(source)
    name, shape = f"{value.name}.once", [1, heads, -1, width]
    rows = edit.reshape(node, source, [1, -1, heads, width], f"{name}.rows")
    transposed = edit.insert(node, "Transpose", [rows], {"perm": HEADS_FIRST}, f"{name}.heads", shape)
    rope = value.producer()
    if rope is None or rope.op_type != "TracedRope":
        return transposed
    settings = {"interleaved": edit.attribute(rope, "interleaved")}
    return edit.insert(node, "TracedRope", [transposed, *rope.inputs[1:]], settings, name, shape, "llmc")


def _fix_shape(graph: ir.Graph, node: ir.Node) -> int:
    """Make the target shape of an Expand constant, with 1 for the tokens. Return 1.

    Return 0, and change nothing, if the operand has another rank or lacks the token axis.
    """
    before, after = edit.dims(edit.operand(node, 0)), edit.dims(node.outputs[0])
    if len(before) != len(after):
        return 0
    if any(old != -1 and new == -1 for old, new in zip(before, after, strict=True)):
        return 0  # it creates the token axis
    node.replace_input_with(1, edit.shape_constant(graph, [1 if dim == -1 else dim for dim in after]))
    return 1


def _refuse_traced_only(graph: ir.Graph) -> None:
    """Raise UnsupportedError for an operator that only a traced graph may have."""
    for node in graph:
        if node.op_type not in TRACED_ONLY:
            continue
        user = node  # the shape of an input belongs to no module
        while not in_module(user) and (users := user.outputs[0].consumers()):
            user = users[0]
        raise UnsupportedError(
            f"operator {node.op_type} of module {module_of(user)} is outside the operators llmc knows",
            "llmc cannot lower this architecture yet; `llmc zoo list` shows the families it knows",
        )
