"""The conversion of `llmc.PagedAttention` to OpenVINO's PagedAttention.

The operator is private to OpenVINO ("no backward compatibility is guaranteed"). The input list below is that
of OpenVINO 2026.4, so the dependency is pinned, and `self_test` compares the operator with numpy at start-up.
The operator has no softcap. Graphs that need one run in ONNX Runtime.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as ops
from openvino.frontend.onnx import ConversionExtension
from openvino.op import Parameter, _PagedAttentionExtension

from llmc.plugins.paged_attention.spec import BLOCK_SIZE
from llmc.runtime.errors import BackendError

SUPPORTED_VERSION = "2026.4"
_TEST_SCALE = 0.25  # of the attention scores in the self-test
_TOLERANCE = {"f32": 1e-5, "u8": 5e-2}  # absolute, for the outputs of the self-test, which are about 1


def extension() -> ConversionExtension:
    """Return the extension that converts `llmc.PagedAttention` nodes when OpenVINO reads a model."""
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
    # The caches are updated in place, so the node's outputs for them are only placeholders.
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
    """Return a PagedAttention of OpenVINO that is equivalent to `llmc.PagedAttention` without softcap."""

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
    """Return the longest context of the step: the maximum over sequences of past + new tokens."""
    first = ops.constant(np.array([0], np.int32))
    one = ops.constant(np.array([1], np.int32))
    end = ops.constant(np.array([np.iinfo(np.int32).max], np.int32))
    minus = ops.constant(np.array([-1], np.int32))
    new = ops.subtract(
        ops.slice(query_start, one, end, one, first), ops.slice(query_start, first, minus, one, first)
    )
    return ops.reduce_max(ops.add(past_lengths, new), first, keep_dims=False).output(0)


def self_test(core: ov.Core, config: dict[str, Any]) -> None:
    """Compare a prefill and then a ragged step (a decode and a prefill) with numpy.

    The cache has the precision of `config`. `_TOLERANCE` allows for its rounding.
    Raises BackendError if the results of the installed OpenVINO differ.
    """
    heads, kv_heads, size, blocks = 2, 1, 32, 3
    widths = [heads * size, kv_heads * size, kv_heads * size]
    parameters = [Parameter(ov.Type.f32, ov.PartialShape([-1, width])) for width in widths]
    parameters += [
        Parameter(ov.Type.f32, ov.PartialShape([-1, kv_heads, BLOCK_SIZE, size])) for _ in range(2)
    ]
    parameters += [Parameter(ov.Type.i32, ov.PartialShape([-1])) for _ in range(4)]
    output = paged_attention(
        *(p.output(0) for p in parameters), num_kv_heads=kv_heads, scale=_TEST_SCALE, window=0
    )
    model = ov.Model([ops.result(output)], parameters, "self_test")
    compiled = core.compile_model(model, "CPU", config)
    request = compiled.create_infer_request()
    for port in compiled.inputs[3:5]:
        shape = [blocks, *(dim.get_length() for dim in list(port.get_partial_shape())[1:])]
        cache = ov.Tensor(port.get_element_type(), ov.Shape(shape))
        cache.data[:] = 0
        request.set_tensor(port, cache)

    rng = np.random.default_rng(0)
    known = [np.zeros((2, 0, size), np.float32) for _ in range(2)]  # the keys and values of each sequence
    error = 0.0
    for new, tables in (([33], [[2, 0]]), ([1, 5], [[2, 0], [1]])):
        arrays = [rng.standard_normal((sum(new), width), dtype=np.float32) for width in widths]
        past = [known[s].shape[1] for s in range(len(new))]
        begins = np.cumsum([0] + [len(table) for table in tables])
        step = [np.cumsum([0, *new]), past, np.concatenate(tables), begins]
        for index, array in zip((0, 1, 2, 5, 6, 7, 8), [*arrays, *step], strict=True):
            dtype = np.float32 if index < 3 else np.int32
            request.set_input_tensor(index, ov.Tensor(np.ascontiguousarray(array, dtype)))
        request.infer()
        expected = _expected(arrays, known, new)
        error = max(error, float(np.abs(request.get_output_tensor(0).data - expected).max()))
    if not error < _TOLERANCE[config["KV_CACHE_PRECISION"]]:
        raise BackendError(
            f"OpenVINO {ov.__version__}'s PagedAttention differs from its reference by {error:.1e}",
            f"llmc needs OpenVINO {SUPPORTED_VERSION}: pip install 'openvino=={SUPPORTED_VERSION}.*'",
        )


def _expected(arrays: list[np.ndarray], known: list[np.ndarray], new: list[int]) -> np.ndarray:
    """Compute the step in numpy, fp32. Append keys and values to `known`: [2, tokens, width] per sequence."""
    query, *key_value = arrays
    rows, start = [], 0
    for s, count in enumerate(new):
        past = known[s].shape[1]
        known[s] = np.concatenate(
            [known[s], [rows_of[start : start + count] for rows_of in key_value]], axis=1
        )
        for row in range(count):
            keys, values = known[s][:, : past + row + 1]
            for q in query[start + row].reshape(-1, keys.shape[1]):
                scores = keys @ q * _TEST_SCALE
                weights = np.exp(scores - scores.max())
                rows.append(weights @ values / weights.sum())
        start += count
    return np.stack(rows).reshape(start, -1)
