"""`llmc.PagedAttention` as an ONNX function body of standard operators (opset 23).

Any ONNX runtime can execute a graph that contains this function. Builds are verified with it, and it runs
graphs that OpenVINO's attention cannot express. It scores every token of a step against every cached token of
the step, and masks out the other sequences. It computes in fp32.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxscript
from onnxscript import opset23 as op

from llmc.plugins.paged_attention.spec import ABI_VERSION, BLOCK_SIZE, DOMAIN, SINKS

_INT64, _FLOAT = 7, 1  # TensorProto.DataType


# mypy: disable-error-code="no-untyped-def,name-defined"
@onnxscript.script(onnxscript.values.Opset(DOMAIN, ABI_VERSION), default_opset=op)
def PagedAttention(
    query,
    key,
    value,
    key_cache,
    value_cache,
    query_start,
    past_lengths,
    block_indices,
    block_begins,
    sinks,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int,
    softcap: float,
):
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    block_size = op.Constant(value_int=BLOCK_SIZE)
    first = op.Constant(value_ints=[0])
    second = op.Constant(value_ints=[1])
    last = op.Constant(value_ints=[-1])
    end = op.Constant(value_ints=[9223372036854775807])
    starts = op.Cast(query_start, to=7)
    blocks = op.Cast(block_indices, to=7)
    begins = op.Cast(block_begins, to=7)
    kv_heads = op.Constant(value_int=num_kv_heads)
    kv_heads_1 = op.Unsqueeze(kv_heads, first)
    heads_1 = op.Unsqueeze(op.Constant(value_int=num_heads), first)
    group_1 = op.Div(heads_1, kv_heads_1)

    # The sequence and the position of each token.
    tokens_1 = op.Shape(query, start=0, end=1)
    token = op.Range(zero, op.Squeeze(tokens_1, first), one)
    ends = op.Unsqueeze(op.Slice(starts, second, end, first), first)
    ended = op.Cast(op.LessOrEqual(ends, op.Unsqueeze(token, second)), to=7)
    token_sequence = op.ReduceSum(ended, second, keepdims=0)
    past = op.Gather(op.Cast(past_lengths, to=7), token_sequence)
    position = op.Add(past, op.Sub(token, op.Gather(starts, token_sequence)))

    # New keys and values go to (block, head, offset).
    entry = op.Add(op.Gather(begins, token_sequence), op.Div(position, block_size))
    shape = op.Concat(tokens_1, kv_heads_1, axis=0)
    block_place = op.Expand(op.Unsqueeze(op.Gather(blocks, entry), second), shape)
    head_place = op.Expand(op.Unsqueeze(op.Range(zero, kv_heads, one), first), shape)
    offset_place = op.Expand(op.Unsqueeze(op.Mod(position, block_size), second), shape)
    place = op.Concat(
        op.Unsqueeze(block_place, last),
        op.Unsqueeze(head_place, last),
        op.Unsqueeze(offset_place, last),
        axis=-1,
    )
    new_shape = op.Concat(tokens_1, kv_heads_1, last, axis=0)
    key_cache_out = op.ScatterND(key_cache, place, op.Reshape(key, new_shape))
    value_cache_out = op.ScatterND(value_cache, place, op.Reshape(value, new_shape))

    # All cached keys and values of the step, [num_kv_heads, L, D], with L = 32 * blocks of the step.
    key_shape = op.Concat(kv_heads_1, last, op.Shape(key_cache, start=3, end=4), axis=0)
    value_shape = op.Concat(kv_heads_1, last, op.Shape(value_cache, start=3, end=4), axis=0)
    step_keys = op.Reshape(op.Transpose(op.Gather(key_cache_out, blocks), perm=[1, 0, 2, 3]), key_shape)
    step_values = op.Reshape(op.Transpose(op.Gather(value_cache_out, blocks), perm=[1, 0, 2, 3]), value_shape)

    # Their sequences and positions.
    slot = op.Range(zero, op.Mul(op.Squeeze(op.Shape(block_indices), first), block_size), one)
    slot_entry = op.Div(slot, block_size)
    slot_ends = op.Unsqueeze(op.Slice(begins, second, end, first), first)
    slot_ended = op.Cast(op.LessOrEqual(slot_ends, op.Unsqueeze(slot_entry, second)), to=7)
    slot_sequence = op.ReduceSum(slot_ended, second, keepdims=0)
    slot_position = op.Sub(slot, op.Mul(op.Gather(begins, slot_sequence), block_size))

    # Scores [num_kv_heads, group, T, L].
    grouped = op.Reshape(query, op.Concat(tokens_1, kv_heads_1, group_1, last, axis=0))
    heads_first = op.Transpose(op.Cast(grouped, to=1), perm=[1, 2, 0, 3])
    flat = op.Reshape(heads_first, op.Concat(kv_heads_1, last, op.Shape(key_cache, start=3, end=4), axis=0))
    keys_last = op.Transpose(op.Cast(step_keys, to=1), perm=[0, 2, 1])
    raw = op.Mul(op.MatMul(flat, keys_last), op.Constant(value_float=scale))
    scored = op.Reshape(raw, op.Concat(kv_heads_1, group_1, tokens_1, last, axis=0))
    cap = op.Constant(value_float=softcap)
    no_cap = op.Constant(value_float=0.0)
    if cap > no_cap:  # noqa: SIM108 (the script's own control flow: becomes an If node)
        scores = op.Mul(op.Tanh(op.Div(scored, cap)), cap)
    else:
        scores = op.Identity(scored)

    # A token sees its own sequence up to itself, within its window.
    distance = op.Sub(op.Unsqueeze(position, second), op.Unsqueeze(slot_position, first))
    own = op.Equal(op.Unsqueeze(token_sequence, second), op.Unsqueeze(slot_sequence, first))
    width = op.Constant(value_int=window)
    near = op.Or(op.LessOrEqual(width, zero), op.Less(distance, width))
    visible = op.And(op.And(own, op.GreaterOrEqual(distance, zero)), near)
    hidden = op.Constant(value_float=-3.0e38)
    masked = op.Where(visible, scores, hidden)

    # The sink of a head is a last column, without a value.
    one_1 = op.Constant(value_ints=[1])
    of_heads = op.Reshape(op.Cast(sinks, to=1), op.Concat(kv_heads_1, group_1, one_1, one_1, axis=0))
    sink_column = op.Expand(of_heads, op.Concat(kv_heads_1, group_1, tokens_1, one_1, axis=0))
    shares = op.Softmax(op.Concat(masked, sink_column, axis=-1), axis=-1)
    weights = op.Slice(shares, first, last, last)

    weights_flat = op.Reshape(weights, op.Concat(kv_heads_1, last, op.Shape(slot), axis=0))
    mixed = op.MatMul(weights_flat, op.Cast(step_values, to=1))
    split = op.Reshape(mixed, op.Concat(kv_heads_1, group_1, tokens_1, last, axis=0))
    merged = op.Reshape(op.Transpose(split, perm=[2, 0, 1, 3]), op.Concat(tokens_1, last, axis=0))
    output = op.CastLike(merged, query)
    return output, key_cache_out, value_cache_out


def function(sinks: bool = False, *, latent: bool = False, chunks: bool = False) -> ir.Function:
    """Return the function body as an `onnx_ir.Function`, to be stored in a model that uses the operator.

    sinks: whether the nodes have the optional input
    latent: whether they have the attribute value_width, and no values
    chunks: whether they have the attribute chunk
    """
    body: Any = PagedAttention
    made = ir.serde.deserialize_function(body.to_function_proto())
    if not sinks:
        (softmax,) = (node for node in made if node.op_type == "Softmax")
        ((cut, _),) = softmax.outputs[0].uses()
        joined = softmax.inputs[0]
        assert joined is not None
        concat = joined.producer()
        assert concat is not None
        softmax.replace_input_with(0, concat.inputs[0])
        ir.convenience.replace_all_uses_with(cut.outputs[0], softmax.outputs[0])
        _remove_unused(made)
        del made.inputs[SINKS:]
    if latent:
        _take_values_from_keys(made)
    if chunks:
        _hide_other_chunks(made)
    return made


def _take_values_from_keys(function: ir.Function) -> None:
    """Make values of the first `value_width` numbers of keys. The nodes leave out values and their cache."""
    mixed = [node for node in function if node.op_type == "MatMul"][-1]
    cast = mixed.inputs[1].producer()  # type: ignore[union-attr]
    scores = next(node for node in function if node.op_type == "MatMul")
    flat_keys = scores.inputs[1].producer()  # type: ignore[union-attr]
    assert cast is not None
    assert flat_keys is not None
    keys = flat_keys.inputs[0].producer().inputs[0]  # type: ignore[union-attr]
    name, last = "value_width", ir.Value(name="latent_axis")
    width, width_1, zero = (ir.Value(name=f"latent_{part}") for part in ("width", "end", "begin"))
    function.attributes.add(ir.Attr(name, ir.AttributeType.INT, None))
    nodes = [
        ir.node("Constant", [], {"value_ints": [0]}, outputs=[zero]),
        ir.node("Constant", [], {"value_ints": [-1]}, outputs=[last]),
        ir.Node("", "Constant", [], [ir.RefAttr("value_int", name, ir.AttributeType.INT)], outputs=[width]),
        ir.node("Unsqueeze", [width, zero], outputs=[width_1]),
        ir.node("Slice", [keys, zero, width_1, last]),
    ]
    function.insert_before(cast, nodes)
    cast.replace_input_with(0, nodes[-1].outputs[0])
    function.outputs.pop()  # the cache of the values
    _remove_unused(function)


def _hide_other_chunks(function: ir.Function) -> None:
    """Hide keys of other chunks than the query's, unless the attribute `chunk` is 0."""
    name = "chunk"
    where = next(node for node in function if node.op_type == "Where")
    not_later = next(node for node in function if node.op_type == "GreaterOrEqual")
    distance = not_later.inputs[0].producer()  # type: ignore[union-attr]
    assert distance is not None
    size, zero, one, divisor, any_chunk, same, near, visible = (
        ir.Value(name=f"chunk_{part}")
        for part in ("size", "zero", "one", "divisor", "any", "same", "near", "visible")
    )
    numbers = [ir.Value(name=f"chunk_of_{part}") for part in ("query", "key")]
    function.attributes.add(ir.Attr(name, ir.AttributeType.INT, None))
    nodes = [
        ir.Node("", "Constant", [], [ir.RefAttr("value_int", name, ir.AttributeType.INT)], outputs=[size]),
        ir.node("Constant", [], {"value_int": 0}, outputs=[zero]),
        ir.node("Constant", [], {"value_int": 1}, outputs=[one]),
        ir.node("Max", [size, one], outputs=[divisor]),
        *(
            ir.node("Div", [position, divisor], outputs=[number])
            for position, number in zip(distance.inputs, numbers, strict=True)
        ),
        ir.node("Equal", numbers, outputs=[same]),
        ir.node("LessOrEqual", [size, zero], outputs=[any_chunk]),
        ir.node("Or", [any_chunk, same], outputs=[near]),
        ir.node("And", [where.inputs[0], near], outputs=[visible]),
    ]
    function.insert_before(where, nodes)
    where.replace_input_with(0, visible)


def _remove_unused(function: ir.Function) -> None:
    """Remove the nodes whose outputs nothing reads."""
    for node in reversed(list(function)):
        if not any(list(output.uses()) or output.is_graph_output() for output in node.outputs):
            function.remove(node, safe=True)
