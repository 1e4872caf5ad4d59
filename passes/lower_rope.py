"""LowerRope: rotary embedding moves in front of the head transpose and becomes the standard operator.

before  x [1,T,H,D] -> Transpose -> TracedRope(cos, sin [1,T,R]) -> [1,H,T,D]
after   x -> Reshape [T,H,1,D] -> RotaryEmbedding(cos, sin [T,1,R]) -> Reshape [1,T,H,D] -> Transpose

Every token is its own batch entry for the operator (ONNX RotaryEmbedding-23), so that tokens stay the
first axis and nothing is moved in memory.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage, module_of


HEADS_FIRST = [0, 2, 1, 3]  # [1, T, H, D] <-> [1, H, T, D]


class LowerRope:
    """See the module's docstring. Counts one match per rotated tensor (query or key)."""

    name = "lower-rope"
    requires = Stage.TRACED
    ensures = Stage.TRACED

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        angles: dict[ir.Value, ir.Value] = {}
        for node in list(model.graph):
            if node.op_type == "TracedRope":
                self._lower(node, angles)
                matches.count += 1
        edit.remove_unused(model)
        return matches

    def _lower(self, node: ir.Node, angles: dict[ir.Value, ir.Value]) -> None:
        x, cos, sin = node.inputs
        assert x is not None and cos is not None and sin is not None
        assert x.shape is not None and cos.shape is not None
        _, heads, _, width = (dim if isinstance(dim, int) else -1 for dim in x.shape)
        half = cos.shape[-1]
        assert isinstance(half, int)
        base = f"{module_of(node)}.{node.outputs[0].name}"
        source = token_major(node, x)
        rows = edit.reshape(node, source, [-1, heads, 1, width], f"{base}.rows")
        for angle in (cos, sin):
            if angle not in angles:
                producer = angle.producer()
                assert producer is not None
                after = _next(producer)
                angles[angle] = edit.reshape(after, angle, [-1, 1, half], f"{angle.name}.rows")
        attributes: dict[str, object] = {"interleaved": int(edit.attribute(node, "interleaved"))}
        if 2 * half != width:
            attributes |= {"rotary_embedding_dim": 2 * half, "num_heads": heads}
        rotated = edit.insert(
            node,
            "RotaryEmbedding",
            [rows, angles[cos], angles[sin]],
            attributes,
            f"{base}.rotated",
            [edit.TOKENS, heads, 1, width],
            x.dtype,
        )
        back = edit.reshape(node, rotated, [1, -1, heads, width], f"{base}.tokens")
        result = edit.insert(
            node, "Transpose", [back], {"perm": HEADS_FIRST}, f"{base}.heads", [1, heads, edit.TOKENS, width], x.dtype
        )
        edit.replace(node, result)


def _next(node: ir.Node) -> ir.Node:
    """The node that follows `node` in the graph's order."""
    assert node.graph is not None
    order = iter(node.graph)
    return next(following for other in order if other is node for following in order)


def token_major(before: ir.Node, x: ir.Value) -> ir.Value:
    """The value [1, T, H, D] whose head transpose is `x` [1, H, T, D]; a Transpose is inserted if there is none."""
    producer = x.producer()
    if producer is not None and is_head_transpose(producer):
        source = producer.inputs[0]
        assert source is not None
        return source
    assert x.shape is not None
    _, heads, _, width = x.shape
    shape = [1, edit.TOKENS, heads, width]
    return edit.insert(before, "Transpose", [x], {"perm": HEADS_FIRST}, f"{x.name}.tokens", shape, x.dtype)


def is_head_transpose(node: ir.Node) -> bool:
    """Whether `node` swaps the axes of tokens and heads."""
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == HEADS_FIRST
