"""The one place that knows OpenVINO's PagedAttention: how its inputs are built from `llmc.PagedAttention`.

The operator is private to OpenVINO ("no backward compatibility is guaranteed"): the input list below is
that of 2026.4, which is why the dependency is pinned, and `self_test` compares it with plain numpy at
start-up. It has no softcap; graphs that need one run elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as ops
from openvino.frontend.onnx import ConversionExtension
from openvino.op import Parameter, _PagedAttentionExtension

from llmc.runtime.errors import BackendError

BLOCK_SIZE = 32
SUPPORTED_VERSION = "2026.4"


def extension() -> ConversionExtension:
    """Converts ONNX nodes `llmc.PagedAttention` when OpenVINO reads a model."""
    return ConversionExtension("PagedAttention", "llmc", _convert)


def _convert(node: Any) -> list[ov.Output]:
    inputs = [node.get_input(index) for index in range(9)]
    if node.get_attribute("softcap"):
        raise BackendError("OpenVINO's PagedAttention has no softcap", "rebuild the bundle with this llmc")
    output = paged_attention(
        *inputs,
        num_kv_heads=int(node.get_attribute("num_kv_heads")),
        scale=float(node.get_attribute("scale")),
        window=int(node.get_attribute("window")),
    )
    # The caches are written in place; the node's outputs for them only have to exist until they are dropped.
    return [output, *(ops.shape_of(cache).output(0) for cache in inputs[3:5])]


def paged_attention(
    query: ov.Output,
    key: ov.Output,
    value: ov.Output,
    key_cache: ov.Output,
    value_cache: ov.Output,
    query_start: ov.Output,
    past_lengths: ov.Output,
    block_indices: ov.Output,
    block_begins: ov.Output,
    *,
    num_kv_heads: int,
    scale: float,
    window: int,
) -> ov.Output:
    """OpenVINO's PagedAttention with the meaning of `llmc.PagedAttention` (without softcap)."""

    def i32(values: int | list[int]) -> ov.Output:
        return ops.constant(np.array(values, np.int32)).output(0)

    def f32(values: float | list[float]) -> ov.Output:
        return ops.constant(np.array(values, np.float32)).output(0)

    unused_i32, unused_f32 = i32([]), f32([])
    inputs = [
        query,
        key,
        value,
        key_cache,
        value_cache,
        past_lengths,
        query_start,
        block_indices,
        block_begins,
        f32(scale),
        i32(window),
        unused_f32,  # alibi slopes
        _max_context(query_start, past_lengths),
        unused_i32,  # score aggregation window
        unused_i32,  # 14-16: cache rotation
        unused_i32,
        unused_f32,
        unused_f32,  # 17-19: sparse prefill (threshold, block, stride)
        i32(64),
        i32(8),
        unused_f32,  # sinks
        i32(0),  # 21-24: cache eviction
        unused_i32,
        unused_i32,
        unused_i32,
        unused_i32,  # token types
        ops.constant(np.array([], np.uint8)).output(0),  # query-query bias
        unused_i32,
    ]
    node = _PagedAttentionExtension(inputs)
    info = node.get_rt_info()
    info["num_k_heads"] = info["num_v_heads"] = num_kv_heads
    info["k_head_size"] = key.get_partial_shape()[1].get_length() // num_kv_heads
    info["v_head_size"] = value.get_partial_shape()[1].get_length() // num_kv_heads
    return node.output(0)


def _max_context(query_start: ov.Output, past_lengths: ov.Output) -> ov.Output:
    """The longest context of the step: max over sequences of past + new tokens."""
    first = ops.constant(np.array([0], np.int32))
    one = ops.constant(np.array([1], np.int32))
    end = ops.constant(np.array([np.iinfo(np.int32).max], np.int32))
    minus = ops.constant(np.array([-1], np.int32))
    new = ops.subtract(
        ops.slice(query_start, one, end, one, first), ops.slice(query_start, first, minus, one, first)
    )
    return ops.reduce_max(ops.add(past_lengths, new), first, keep_dims=False).output(0)


def self_test(core: ov.Core, config: dict[str, Any]) -> None:
    """Runs one ragged step (a decode and a prefill) and compares it with numpy.

    Raises BackendError when the installed OpenVINO computes something else.
    """
    heads, kv_heads, size, blocks = 2, 1, 32, 3
    dims = {"query": heads * size, "key": kv_heads * size, "value": kv_heads * size}
    parameters = [Parameter(ov.Type.f32, ov.PartialShape([-1, dim])) for dim in dims.values()]
    parameters += [
        Parameter(ov.Type.f32, ov.PartialShape([-1, kv_heads, BLOCK_SIZE, size])) for _ in range(2)
    ]
    parameters += [Parameter(ov.Type.i32, ov.PartialShape([-1])) for _ in range(4)]
    output = paged_attention(*(p.output(0) for p in parameters), num_kv_heads=kv_heads, scale=0.25, window=0)
    model = ov.Model([ops.result(output)], parameters, "self_test")
    request = core.compile_model(model, "CPU", config).create_infer_request()

    rng = np.random.default_rng(0)
    past, new, tables = [33, 0], [1, 5], [[2, 0], [1]]
    tokens = sum(new)
    arrays = [rng.standard_normal((tokens, dim), dtype=np.float32) for dim in dims.values()]
    caches = [np.zeros((blocks, kv_heads, BLOCK_SIZE, size), np.float32) for _ in range(2)]
    for position in range(past[0]):
        for cache in caches:
            cache[tables[0][position // BLOCK_SIZE], 0, position % BLOCK_SIZE] = rng.standard_normal(size)
    begins = np.cumsum([0] + [len(table) for table in tables])
    step = [np.cumsum([0, *new]), past, np.concatenate(tables), begins]
    expected = _expected(arrays, caches, past, new, tables)
    for index, array in enumerate([*arrays, *caches, *(np.asarray(s, np.int32) for s in step)]):
        request.set_input_tensor(index, ov.Tensor(np.ascontiguousarray(array)))
    request.infer()
    error = float(np.abs(request.get_output_tensor(0).data - expected).max())
    if not error < 1e-5:
        raise BackendError(
            f"OpenVINO {ov.__version__}'s PagedAttention differs from its reference by {error:.1e}",
            f"llmc needs OpenVINO {SUPPORTED_VERSION}: pip install 'openvino=={SUPPORTED_VERSION}.*'",
        )


def _expected(
    arrays: list[np.ndarray],
    caches: list[np.ndarray],
    past: list[int],
    new: list[int],
    tables: list[list[int]],
) -> np.ndarray:
    query, key, value = arrays
    heads = query.shape[1] // key.shape[1]
    rows, start = [], 0
    for before, count, table in zip(past, new, tables, strict=True):
        span = slice(start, start + count)
        keys, values = (np.concatenate([*(cache[block, 0] for block in table)])[:before] for cache in caches)
        keys, values = np.concatenate([keys, key[span]]), np.concatenate([values, value[span]])
        for row in range(count):
            visible = before + row + 1
            for q in query[start + row].reshape(heads, -1):
                scores = keys[:visible] @ q * 0.25
                weights = np.exp(scores - scores.max())
                rows.append(weights @ values[:visible] / weights.sum())
        start += count
    return np.stack(rows).reshape(start, -1)
