"""FusePartialRope: rotate the first features of every head with one operator.

before  Concat(TracedRope(Slice(x, 0:2R)), Slice(x, 2R:)) along the last axis
after   TracedRope(x), which rotates the first 2R features and leaves the rest unchanged

Phi, StableLM and Persimmon slice in the attention module. GLM and Phi 3 slice in `apply_rotary_pos_emb`,
which the trace replaces as a whole. GPT-J rotates [1, T, H, D], before the head transpose.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.canonicalize.lower_rope import HEADS_FIRST, is_head_transpose
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage, module_of


class FusePartialRope:
    """Fuse slices around a TracedRope into it. Counts one match per rotated tensor."""

    name = "fuse-partial-rope"
    requires = Stage.TRACED
    ensures = Stage.TRACED

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        for node in list(model.graph):
            if node.op_type != "Concat" or len(node.inputs) != 2:
                continue
            outer = rope = edit.operand(node, 0).producer()
            if outer is not None and is_head_transpose(outer):
                rope = edit.operand(outer, 0).producer()
            if rope is None or rope.op_type != "TracedRope":
                continue
            by_token = rope is not outer
            x = _whole(node, rope, by_token)
            if x is None:
                matches.near_misses.append(f"{module_of(node)}: rope of a part that is not the first")
                continue
            _fuse(node, rope, x, by_token)
            matches.count += 1
        edit.remove_unused(model)
        return matches


def _fuse(concat: ir.Node, rope: ir.Node, x: ir.Value, by_token: bool) -> None:
    """Replace `concat` by a TracedRope over `x`, between head transposes if `x` is [1, T, H, D]."""
    name, shape = f"{concat.outputs[0].name}.rope", edit.dims(x)
    heads = [shape[axis] for axis in HEADS_FIRST]
    perm = {"perm": HEADS_FIRST}
    if by_token:
        x = edit.insert(concat, "Transpose", [x], perm, f"{name}.heads", heads)
    inputs = [x, *rope.inputs[1:]]
    settings = {"interleaved": edit.attribute(rope, "interleaved")}
    rotated = edit.insert(concat, "TracedRope", inputs, settings, name, edit.dims(x), "llmc")
    if by_token:
        rotated = edit.insert(concat, "Transpose", [rotated], perm, f"{name}.tokens", shape)
    edit.replace(concat, rotated)


def _whole(concat: ir.Node, rope: ir.Node, by_token: bool) -> ir.Value | None:
    """Return the value whose first features `rope` rotates and whose other features `concat` appends.

    by_token: whether the value is [1, T, H, D], with head transposes around `rope`.
    """
    rotated = edit.operand(rope, 0)
    if by_token:
        transpose = rotated.producer()
        if transpose is None or not is_head_transpose(transpose):
            return None
        rotated = edit.operand(transpose, 0)
    first, second = _part(rotated), _part(edit.operand(concat, 1))
    if first is None or second is None or first[0] is not second[0]:
        return None
    width = edit.dims(first[0])[-1]
    end = 2 * edit.dims(edit.operand(rope, 1))[-1]
    return first[0] if first[1:] == (0, end) and second[1:] == (end, width) else None


def _part(value: ir.Value) -> tuple[ir.Value, int, int] | None:
    """Return (x, begin, end) if `value` is x[..., begin:end], or None."""
    node = value.producer()
    if node is None or node.op_type not in ("Slice", "Split"):
        return None
    x = edit.operand(node, 0)
    width, last_axis = edit.dims(x)[-1], len(edit.dims(x)) - 1
    numbers = [edit.numbers(operand) or [] for operand in node.inputs[1:]]
    if node.op_type == "Split":
        if node.attributes["axis"].as_int() % (last_axis + 1) != last_axis or not numbers or not numbers[0]:
            return None
        begin = sum(numbers[0][: list(node.outputs).index(value)])
        return x, begin, begin + edit.dims(value)[-1]
    if [len(values) for values in numbers[:3]] != [1, 1, 1]:
        return None
    (begin,), (end,), (axis,) = numbers[:3]
    if axis % (last_axis + 1) != last_axis or (numbers[3:] and numbers[3] != [1]):
        return None
    begin, end = (bound + width if bound < 0 else min(bound, width) for bound in (begin, end))
    return x, begin, end
