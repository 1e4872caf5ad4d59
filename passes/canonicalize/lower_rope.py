"""LowerRope: move rotary embedding in front of the head transpose, as the standard operator.

before  x [1,T,H,D] -> Transpose -> TracedRope(cos, sin [1,T,R]) -> [1,H,T,D]
after   x -> Reshape [T,H,1,D] -> RotaryEmbedding(cos, sin [T,1,R]) -> Reshape [1,T,H,D] -> Transpose

R = half the rotated width. The operator (ONNX RotaryEmbedding-23) sees every token as a batch entry, so the
tokens stay the first axis. SinkTransposes and PageAttention remove the Transpose that is left.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage, module_of

HEADS_FIRST = [0, 2, 1, 3]  # [1, T, H, D] <-> [1, H, T, D]


class LowerRope:
    """Replace TracedRope by RotaryEmbedding. Counts one match per rotated tensor (query or key)."""

    name = "lower-rope"
    requires = Stage.TRACED
    ensures = Stage.TRACED

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        angles: dict[ir.Value, ir.Value] = {}  # cos or sin [1, T, R] -> [T, 1, R]
        for node in list(model.graph):
            if node.op_type == "TracedRope":
                _lower(node, angles)
                matches.count += 1
        edit.remove_unused(model)
        return matches


def _lower(node: ir.Node, angles: dict[ir.Value, ir.Value]) -> None:
    x, cos, sin = (edit.operand(node, index) for index in range(3))
    _, heads, _, width = edit.dims(x)
    half = edit.dims(cos)[-1]
    name = f"{module_of(node)}.{node.outputs[0].name}"
    rows = edit.reshape(node, token_major(node, x), [-1, heads, 1, width], f"{name}.rows")
    for angle in (cos, sin):
        if angle not in angles:
            before = _after(angle.producer())
            angles[angle] = edit.reshape(before, angle, [-1, 1, half], f"{angle.name}.rows")
    attributes = {"interleaved": int(edit.attribute(node, "interleaved"))}
    if 2 * half != width:
        attributes |= {"rotary_embedding_dim": 2 * half, "num_heads": heads}
    inputs = [rows, angles[cos], angles[sin]]
    shape = [-1, heads, 1, width]
    rotated = edit.insert(node, "RotaryEmbedding", inputs, attributes, f"{name}.rotated", shape)
    back = edit.reshape(node, rotated, [1, -1, heads, width], f"{name}.tokens")
    perm = {"perm": HEADS_FIRST}
    edit.replace(node, edit.insert(node, "Transpose", [back], perm, f"{name}.heads", [1, heads, -1, width]))


def _after(node: ir.Node | None) -> ir.Node:
    """Return the node that follows `node` in the graph's order."""
    assert node is not None
    assert node.graph is not None
    order = iter(node.graph)
    return next(following for other in order if other is node for following in order)


def token_major(before: ir.Node, x: ir.Value) -> ir.Value:
    """Return the value [1, T, H, D] whose head transpose is `x` [1, H, T, D]. Insert one if there is none."""
    producer = x.producer()
    if producer is not None and is_head_transpose(producer):
        return edit.operand(producer, 0)
    _, heads, tokens, width = edit.dims(x)
    shape = [1, tokens, heads, width]
    return edit.insert(before, "Transpose", [x], {"perm": HEADS_FIRST}, f"{x.name}.tokens", shape)


def is_head_transpose(node: ir.Node | None) -> bool:
    """Return whether `node` swaps the axes of tokens and heads."""
    if node is None or node.op_type != "Transpose":
        return False
    return list(node.attributes["perm"].as_ints()) == HEADS_FIRST
