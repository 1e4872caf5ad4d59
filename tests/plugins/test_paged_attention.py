"""llmc.PagedAttention: every implementation against the numpy reference, on ragged mixtures of steps."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import openvino as ov
import pytest

from llmc.passes.legalize.widen_quantized_caches import WidenQuantizedCaches
from llmc.plugins.paged_attention import body, reference, spec
from llmc.runtime.backends.openvino import attention
from llmc.runtime.errors import BackendError
from support.passes import set_kv_scales

TOLERANCE = 5e-6  # fp32, values of order 1
EXACT = {
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}
STEPS = {  # (past, new) tokens of each sequence
    "prefill": ([0, 0, 0], [70, 5, 33]),
    "mixed": ([70, 31, 64, 0, 32], [1, 40, 1, 9, 1]),
    "decode": ([1, 31, 32, 33, 95], [1, 1, 1, 1, 1]),
    "one token": ([0], [1]),
}
SHAPES = {  # num_heads, num_kv_heads, D, Dv, window, softcap
    "plain": (4, 4, 64, 64, 0, 0.0),
    "grouped": (8, 2, 64, 64, 0, 0.0),
    "one kv head": (4, 1, 128, 128, 0, 0.0),
    "small heads": (8, 4, 8, 8, 0, 0.0),
    "wide keys": (4, 2, 64, 32, 0, 0.0),
    "window": (4, 2, 64, 64, 24, 0.0),
    "window of one": (4, 2, 32, 32, 1, 0.0),
    "softcap": (4, 2, 64, 64, 0, 5.0),
    "softcap and window": (4, 2, 32, 32, 33, 5.0),
}


LATENT = {  # num_heads, num_kv_heads, D, value_width, window, softcap
    "latent": (16, 1, 48, 32, 0, 0.0),
    "latent, two kv heads and a window": (4, 2, 40, 40, 24, 0.0),
}


def make_step(shape: tuple[Any, ...], past: list[int], new: list[int]) -> dict[str, np.ndarray]:
    heads, kv_heads, width, value_width, *_ = shape
    rng = np.random.default_rng(sum(past) + sum(new) + width)
    tokens, blocks = sum(new), 24
    free = rng.permutation(blocks).tolist()
    tables = [
        [free.pop() for _ in range(-(-(p + n) // spec.BLOCK_SIZE))] for p, n in zip(past, new, strict=True)
    ]

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size, dtype=np.float32)

    return {
        "query": normal(tokens, heads * width),
        "key": normal(tokens, kv_heads * width),
        "value": normal(tokens, kv_heads * value_width),
        "key_cache": normal(blocks, kv_heads, spec.BLOCK_SIZE, width),
        "value_cache": normal(blocks, kv_heads, spec.BLOCK_SIZE, value_width),
        "query_start": np.cumsum([0, *new]).astype(np.int32),
        "past_lengths": np.array(past, np.int32),
        "block_indices": np.array([block for table in tables for block in table], np.int32),
        "block_begins": np.cumsum([0, *map(len, tables)]).astype(np.int32),
    }


def attributes(shape: tuple[Any, ...]) -> dict[str, Any]:
    heads, kv_heads, width, _, window, softcap = shape
    return {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "scale": width**-0.5,
        "window": window,
        "softcap": softcap,
    }


def make_model(
    shape: tuple[Any, ...],
    largest: tuple[float, float] | None = None,
    sinks: bool = False,
    latent: bool = False,
    chunk: int | None = None,
) -> bytes:
    """A graph of one PagedAttention node, with its function body; `largest` keys and values: FP8 caches."""
    heads, kv_heads, width, value_width, *_ = shape
    cache = ["blocks", kv_heads, spec.BLOCK_SIZE]
    sizes: dict[str, list[int | str]] = {
        "query": ["T", heads * width],
        "key": ["T", kv_heads * width],
        "value": ["T", kv_heads * value_width],
        "key_cache": [*cache, width],
        "value_cache": [*cache, value_width],
    }
    inputs = [
        ir.Value(name=n, shape=ir.Shape(s), type=ir.TensorType(ir.DataType.FLOAT)) for n, s in sizes.items()
    ]
    inputs += [
        ir.Value(name=n, shape=ir.Shape([s]), type=ir.TensorType(ir.DataType.INT32))
        for n, s in spec.STEP_INPUTS.items()
    ]
    if sinks:
        one = ir.Value(name="sinks", shape=ir.Shape([heads]), type=ir.TensorType(ir.DataType.FLOAT))
        inputs.append(one)
    outputs = [
        ir.Value(name=name, shape=ir.Shape(size), type=ir.TensorType(ir.DataType.FLOAT))
        for name, size in (
            ("output", ["T", heads * value_width]),
            ("key_cache_out", sizes["key_cache"]),
            ("value_cache_out", sizes["value_cache"]),
        )
    ]
    settings, given = attributes(shape), inputs
    if chunk is not None:
        settings["chunk"] = chunk
    if latent:
        settings["value_width"] = value_width
        inputs, outputs = [each for each in inputs if "value" not in str(each.name)], outputs[:2]
        given = [each if each in inputs else None for each in given]  # type: ignore[misc]
    node = ir.node(spec.NAME, given, settings, domain=spec.DOMAIN, outputs=outputs)
    opsets = {"": 23, spec.DOMAIN: spec.ABI_VERSION}
    graph = ir.Graph(inputs, outputs, nodes=[node], opset_imports=opsets, name="one")
    model = ir.Model(
        graph, ir_version=10, functions=[body.function(sinks, latent=latent, chunks=chunk is not None)]
    )
    if largest:
        for cache in inputs[3:5]:
            cache.name = f"{cache.name}.0"
        set_kv_scales(model, {0: largest})
        assert inputs[3].dtype == outputs[2].dtype == ir.DataType.FLOAT8E4M3FN
        WidenQuantizedCaches()(model)
    return ir.to_proto(model).SerializeToString()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_function_body_is_the_reference(shape: tuple[Any, ...]) -> None:
    model = make_model(shape)
    onnx.checker.check_model(onnx.load_from_string(model))
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for past, new in STEPS.values():
        step = make_step(shape, past, new)
        output, keys, values = session.run(None, step)
        expected = reference.paged_attention(**step, **attributes(shape))
        assert np.abs(output - expected).max() < TOLERANCE
        assert np.array_equal(keys, step["key_cache"])
        assert np.array_equal(values, step["value_cache"])


@pytest.mark.parametrize("chunk", [0, 1, 24, 64])
def test_the_function_body_hides_other_chunks(chunk: int) -> None:
    shape = SHAPES["grouped"]
    model = make_model(shape, chunk=chunk)
    onnx.checker.check_model(onnx.load_from_string(model))
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for past, new in STEPS.values():
        step = make_step(shape, past, new)
        output, *_ = session.run(None, step)
        expected = reference.paged_attention(**step, **attributes(shape), chunk=chunk)
        assert np.abs(output - expected).max() < TOLERANCE


@pytest.mark.parametrize("shape", LATENT.values(), ids=LATENT.keys())
def test_the_function_body_of_latent_attention_is_the_reference(shape: tuple[Any, ...]) -> None:
    """And the reference is attention whose values are stored, too."""
    model = make_model(shape, latent=True)
    onnx.checker.check_model(onnx.load_from_string(model))
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for past, new in STEPS.values():
        step = make_step(shape, past, new)
        _, kv_heads, width, value_width, *_ = shape
        key_cache = step["key_cache"].copy()
        step["value"] = step["key"].reshape(-1, kv_heads, width)[..., :value_width].reshape(sum(new), -1)
        step["value_cache"] = step["key_cache"][..., :value_width].copy()
        expected = reference.paged_attention(**step, **attributes(shape))
        step |= {"value": None, "value_cache": None, "key_cache": key_cache}
        again = reference.paged_attention(**step, **attributes(shape), value_width=value_width)
        assert np.array_equal(again, expected)
        given = {name: array for name, array in step.items() if array is not None}
        output, keys = session.run(None, given)
        assert np.abs(output - expected).max() < TOLERANCE
        assert np.array_equal(keys, step["key_cache"])


@pytest.mark.parametrize("name", ["grouped", "softcap and window"])
def test_the_function_body_with_sinks_is_the_reference(name: str) -> None:
    shape = SHAPES[name]
    model = make_model(shape, sinks=True)
    onnx.checker.check_model(onnx.load_from_string(model))
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    sinks = np.linspace(-3, 6, shape[0]).astype(np.float32)  # from almost nothing to most of the softmax
    for past, new in STEPS.values():
        step = make_step(shape, past, new)
        output, *_ = session.run(None, step | {"sinks": sinks})
        expected = reference.paged_attention(**step, **attributes(shape), sinks=sinks)
        assert np.abs(output - expected).max() < TOLERANCE


def e4m3(x: np.ndarray, scale: float) -> np.ndarray:
    """Codes of x / scale by torch, saturated."""
    torch = pytest.importorskip("torch")
    scaled = torch.from_numpy(x / np.float32(scale)).clamp(-448, 448)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("name", ["grouped", "wide keys", "softcap and window"])
def test_fp8_caches_hold_codes_and_attention_reads_codes_times_scale(name: str) -> None:
    """The reference against itself on keys and values that torch rounded; the body against the reference."""
    shape, largest = SHAPES[name], (2.5, 1.0)  # some of the values are larger: they saturate
    scales = [np.float32(amax / 448) for amax in largest]
    session = onnxruntime.InferenceSession(make_model(shape, largest), providers=["CPUExecutionProvider"])
    for past, new in STEPS.values():
        step, rounded = make_step(shape, past, new), make_step(shape, past, new)
        for role, scale in zip(("key", "value"), scales, strict=True):
            rounded[role] = e4m3(step[role], scale).astype(np.float32) * scale
            codes = e4m3(step[f"{role}_cache"], scale)
            step[f"{role}_cache"], rounded[f"{role}_cache"] = codes, codes.astype(np.float32) * scale
        given = {n.replace("_cache", "_cache.0"): a.copy() for n, a in rounded.items()}
        fresh = {role: step[role] for role in ("key", "value")}
        kwargs = attributes(shape) | {"key_scale": scales[0], "value_scale": scales[1]}
        got = reference.paged_attention(**step, **kwargs)
        expected = reference.paged_attention(**rounded, **attributes(shape))
        assert np.abs(got - expected).max() < TOLERANCE
        output, keys, values = session.run(None, given | fresh)
        assert np.abs(output - expected).max() < TOLERANCE
        for cache, held, scale in (("key", keys, scales[0]), ("value", values, scales[1])):
            codes = step[f"{cache}_cache"]
            assert codes.dtype == ml_dtypes.float8_e4m3fn
            assert np.array_equal(codes.astype(np.float32) * scale, rounded[f"{cache}_cache"])
            assert np.array_equal(held, rounded[f"{cache}_cache"])
            assert np.abs(codes.astype(np.float32)).max() == 448


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_openvino_computes_the_reference_and_writes_the_cache_in_place(shape: tuple[Any, ...]) -> None:
    core = ov.Core()
    core.add_extension(attention.extension())
    if shape[-1]:
        with pytest.raises(RuntimeError, match="no softcap"):
            core.read_model(make_model(shape))
        return
    model = core.read_model(make_model(shape))
    model = ov.Model([model.output("output")], model.get_parameters(), "one")
    request = core.compile_model(model, "CPU", EXACT).create_infer_request()
    for past, new in STEPS.values():
        step = make_step(shape, past, new)
        given = {name: array.copy() for name, array in step.items()}
        for name, array in given.items():
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        request.infer()
        expected = reference.paged_attention(**step, **attributes(shape))
        assert np.abs(request.get_output_tensor(0).data - expected).max() < TOLERANCE
        for name in ("key_cache", "value_cache"):
            assert np.array_equal(written(given[name], step, past, new), written(step[name], step, past, new))
            others = np.setdiff1d(np.arange(len(given[name])), step["block_indices"])
            assert np.array_equal(given[name][others], step[name][others]), "other sequences' blocks"


def written(cache: np.ndarray, step: dict[str, np.ndarray], past: list[int], new: list[int]) -> np.ndarray:
    """The entries of the cache that hold tokens. (OpenVINO clears the rest of a block that it writes.)"""
    rows = []
    for s, length in enumerate(p + n for p, n in zip(past, new, strict=True)):
        table = step["block_indices"][step["block_begins"][s] : step["block_begins"][s + 1]]
        rows.append(np.concatenate([cache[block] for block in table], axis=1)[:, :length])
    return np.concatenate(rows, axis=1)


def test_sequences_may_share_prefix_blocks() -> None:
    shape = SHAPES["grouped"]
    step = make_step(shape, [32, 32], [3, 1])
    step["block_indices"][2] = step["block_indices"][0]  # both read the same first block
    expected = reference.paged_attention(**{n: a.copy() for n, a in step.items()}, **attributes(shape))
    session = onnxruntime.InferenceSession(make_model(shape), providers=["CPUExecutionProvider"])
    assert np.abs(session.run(None, step)[0] - expected).max() < TOLERANCE


def test_the_reference_is_plain_causal_attention_when_nothing_is_cached() -> None:
    torch = pytest.importorskip("torch")
    shape = SHAPES["grouped"]
    step = make_step(shape, [0], [40])
    heads, kv_heads, width, *_ = shape

    def heads_first(name: str, count: int) -> Any:
        return torch.from_numpy(step[name]).reshape(40, count, width).transpose(0, 1)[None]

    expected = torch.nn.functional.scaled_dot_product_attention(
        heads_first("query", heads),
        heads_first("key", kv_heads),
        heads_first("value", kv_heads),
        is_causal=True,
        enable_gqa=True,
    )
    got = reference.paged_attention(**step, **attributes(shape))
    assert np.abs(got - expected[0].transpose(0, 1).reshape(40, -1).numpy()).max() < TOLERANCE


@pytest.mark.parametrize(("cache", "wrong"), [("f32", 1e-3), ("u8", 6e-2)])
def test_the_self_test_passes_here_and_notices_a_wrong_answer(
    cache: str, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EXACT | {"KV_CACHE_PRECISION": cache}
    attention.self_test(ov.Core(), config)
    right = attention._expected
    monkeypatch.setattr(attention, "_expected", lambda *args: right(*args) + wrong)
    with pytest.raises(BackendError, match="differs from its reference"):
        attention.self_test(ov.Core(), config)
