"""Quantizers: every code and scale, compared with encoders written from the specifications; properties."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmc.compiler.checkpoint.safetensors import read_header
from llmc.compiler.quantize.round_to_nearest import absmax, dequantize, quantize
from llmc.compiler.quantize.scales import global_scale, round_up
from llmc.passes.quantize.elements import E2M1_VALUES, decode, encode, pack, unpack
from llmc.passes.quantize.formats import FORMATS, Format, get_format
from llmc.runtime.dtypes import numpy_dtype
from llmc.runtime.errors import CheckpointError, RequestError, UnsupportedError

TALES = Path(__file__).parents[2] / "model_zoo/llama/tales/model.safetensors"
NAMES = list(FORMATS)
DISTINCT = [name for name in NAMES if name != "nvfp4-weight-only"]  # the same weights as nvfp4
SEARCHED = [(name, s) for name in DISTINCT for s in ("amax", "mse") if (name, s) != ("fp8", "mse")]


# The specifications as tables: the value of every non-negative code, ascending.


def minifloat(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """Return the values of a float without infinities by IEEE 754: an exponent field of 0 means subnormal."""
    values = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits + (exponent > 0)
        values.append(fraction * 2.0 ** (max(exponent, 1) - bias))
    return np.array(values)  # float64: exact


E2M1 = minifloat(2, 1, bias=1)
E4M3 = minifloat(4, 3, bias=7)[:-1]  # S.1111.111 is NaN


def test_tables_equal_the_specifications() -> None:
    assert np.array_equal(E2M1, [0, 0.5, 1, 1.5, 2, 3, 4, 6])  # OCP MX 1.0, FP4
    assert (E4M3[0x7E], E4M3[0x08], E4M3[0x07], E4M3[0x01]) == (  # OFP8 1.0, table 1
        448,
        2.0**-6,
        7 * 2.0**-9,
        2.0**-9,
    )


def reference_code(x: float, table: np.ndarray) -> int:
    """Encode one value: to nearest, ties to the even code, saturating; the sign is above the table's bits."""
    distances = abs(table - abs(float(x)))
    nearest = np.flatnonzero(distances == distances.min()).tolist()
    code = nearest[0] if len(nearest) == 1 else next(code for code in nearest if code % 2 == 0)
    return code | (1 << (len(table) - 1).bit_length() if np.signbit(x) else 0)


def reference_integer(x: float, low: int, high: int) -> int:
    return max(low, min(high, round(float(x))))  # (Python's round: ties to even)


ENCODERS: dict[str, Callable[[float], int]] = {
    "int8": lambda x: reference_integer(x, -127, 127),
    "int4": lambda x: reference_integer(x, -8, 7),
    "e4m3": lambda x: reference_code(x, E4M3),
    "e2m1": lambda x: reference_code(x, E2M1),
}


def midpoints(table: np.ndarray) -> np.ndarray:
    """Return every value, every midpoint, their float32 neighbors, and some beyond the largest value."""
    exact = sorted({*table, *((a + b) / 2 for a, b in pairwise(table)), table[-1] * 2})
    points = np.array(exact, np.float32)
    near = np.concatenate([points, np.nextafter(points, np.inf), np.nextafter(points, -np.inf)])
    near = near.astype(np.float32)
    return np.concatenate([near, -near])


INTEGERS = np.arange(129.0)
HARD = {"int8": INTEGERS, "int4": INTEGERS[:10], "e4m3": E4M3, "e2m1": E2M1}


@pytest.mark.parametrize("codes", ENCODERS)
def test_encode_is_bit_exact(codes: str) -> None:
    random = np.random.default_rng(0).standard_normal(2000) * HARD[codes][-1] / 3
    values = np.concatenate([midpoints(HARD[codes]), random.astype(np.float32)])
    bits = encode(values, codes)
    if codes == "e4m3":
        bits = bits.view(np.uint8)
    assert bits.tolist() == [ENCODERS[codes](x) for x in values]


@pytest.mark.parametrize(("codes", "dtype"), [("e4m3", "float8_e4m3fn"), ("e2m1", "float4_e2m1fn")])
def test_decode_agrees_with_ml_dtypes(codes: str, dtype: str) -> None:
    every = np.arange(256 if codes == "e4m3" else 16, dtype=np.uint8).view(getattr(ml_dtypes, dtype))
    ours = decode(every if codes == "e4m3" else every.view(np.uint8), codes)
    np.testing.assert_array_equal(ours, every.astype(np.float32))
    assert np.array_equal(np.signbit(ours), np.signbit(every.astype(np.float32)))
    table = E4M3 if codes == "e4m3" else E2M1
    np.testing.assert_array_equal(ours[: len(table)], table)


def test_first_code_is_in_the_low_nibble() -> None:
    assert pack(np.array([[1, 2, -8, 7]], np.int8)).tolist() == [[0x21, 0x78]]
    assert unpack(np.array([[0x21, 0x78]], np.uint8), "int4").tolist() == [[1, 2, -8, 7]]
    every = np.arange(256, dtype=np.uint8).reshape(2, 128)
    for codes in ("int4", "e2m1"):
        np.testing.assert_array_equal(pack(unpack(every, codes)), every)


def test_packing_equals_onnx() -> None:
    from onnx import TensorProto, helper, numpy_helper

    array = np.array([1, -8, 7, 0, -1, 3], np.int8)
    proto = helper.make_tensor("x", TensorProto.INT4, [6], array)
    stored = TensorProto(name="y", data_type=TensorProto.INT4, dims=[6], raw_data=pack(array).tobytes())
    np.testing.assert_array_equal(numpy_helper.to_array(stored), numpy_helper.to_array(proto))


# Whole matrices, compared with a loop over blocks that is written from the formulas in FORMATS' docstring.


def reference_quantize(w: np.ndarray, fmt: Format) -> dict[str, np.ndarray]:
    """Quantize with search="amax", one float32 operation at a time."""
    f32 = np.float32
    rows, columns = w.shape
    size = {-1: columns, 0: columns}.get(fmt.block, fmt.block)
    over = f32(1)
    if fmt.name.startswith("nvfp4"):
        over = abs(w).max() / f32(2688) if w.any() else f32(1)
    shared = abs(w).max() / f32(448) if w.any() else f32(1)
    scales = np.zeros((rows, columns // size), numpy_dtype(fmt.scales))
    bits = np.zeros((rows, columns), np.int64)
    for row in range(rows):
        for block in range(columns // size):
            x = w[row, block * size : (block + 1) * size]
            if fmt.block == -1:
                scale = shared
            elif not x.any():
                scale = f32(1)
            elif fmt.element == "int8":
                scale = abs(x).max() / f32(127)
            elif fmt.element == "int4":
                exact = max(x.max() / f32(7), x.min() / f32(-8))
                scale = min(s for s in EVERY_FP16 if s >= exact)
            elif fmt.element == "e4m3":
                scale = abs(x).max() / f32(448)
            elif fmt.name == "mxfp4":
                exact = abs(x).max() / f32(6)
                scale = f32(next(2.0**e for e in range(-127, 128) if 2.0**e >= exact))
            else:
                exact = min(max(abs(x).max() / (f32(6) * over), f32(2**-9)), f32(448))
                scale = f32(E4M3[reference_code(float(exact), E4M3)])
            scales[row, block] = scale
            effective = scale * over
            bits[row, block * size : (block + 1) * size] = [ENCODERS[fmt.element](v / effective) for v in x]
    if fmt.packed:
        weight = np.array(
            [[(a & 15) + 16 * (b & 15) for a, b in zip(r[::2], r[1::2], strict=True)] for r in bits.tolist()]
        ).astype(np.uint8)
    else:
        weight = bits.astype(np.uint8 if fmt.element == "e4m3" else np.int8)
    arrays = {"weight": weight, "weight_scale": scales}
    if fmt.block <= 0:
        arrays["weight_scale"] = scales[0, 0] if fmt.block else scales[:, 0]
    if fmt.name.startswith("nvfp4"):
        arrays["weight_scale_2"] = np.asarray(over)
    return arrays


with np.errstate(all="ignore"):
    EVERY_FP16 = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)


def matrix(rows: int = 5, columns: int = 256, seed: int = 0) -> np.ndarray:
    """Draw normal values with an outlier, a row and a block of zeros, and a row a million times smaller."""
    w = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    w[0, 3] *= 20
    w[1] = 0
    w[2, :128] = 0
    w[3:4] *= 1e-6
    return w


@pytest.mark.parametrize("scale", [1.0, 0.02, 30.0])
@pytest.mark.parametrize("name", NAMES)
def test_matrix_is_bit_exact(name: str, scale: float) -> None:
    w = matrix() * np.float32(scale)
    fmt = FORMATS[name]
    ours, slow = quantize(w, fmt, "w"), reference_quantize(w, fmt)
    assert ours.keys() == slow.keys()
    for key, expected in slow.items():
        assert ours[key].tobytes() == expected.tobytes(), key


@pytest.mark.parametrize("name", NAMES)
def test_arrays_match_the_layout(name: str) -> None:
    fmt = FORMATS[name]
    arrays = quantize(matrix(), fmt, "w")
    assert {key: (array.dtype, array.shape) for key, array in arrays.items()} == {
        key: (numpy_dtype(dtype), shape) for key, (dtype, shape) in fmt.layout((5, 256)).items()
    }
    assert sum(array.nbytes for array in arrays.values()) == fmt.nbytes((5, 256))


@pytest.mark.parametrize(
    ("name", "bits"),
    [("int8", 8.03125), ("int4", 4.5), ("int4-block128", 4.125), ("nvfp4", 4.5), ("fp8", 8), ("mxfp4", 4.25)],
)
def test_bits_per_parameter(name: str, bits: float) -> None:
    assert FORMATS[name].bits_per_parameter((4096, 1024)) == pytest.approx(bits, abs=1e-4)


@pytest.mark.parametrize(("name", "search"), SEARCHED)
def test_blocks_of_rows_concatenate_to_the_matrix(name: str, search: str) -> None:
    fmt, w = FORMATS[name], matrix(7)
    chunks = [w[:3], w[3:4], w[4:]]
    amax = absmax(chunks, "w")
    assert amax == abs(w).max()
    parts = [quantize(chunk, fmt, "w", amax=amax, search=search) for chunk in chunks]
    for key, whole in quantize(w, fmt, "w", search=search).items():
        if whole.ndim:
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), whole)
        else:
            assert all(part[key] == whole for part in parts)


# Properties of any matrix.

normal = st.floats(-1, 1, width=32).map(lambda x: 0.0 if abs(x) < 1e-30 else x)
weights = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(128)), elements=normal)
magnitudes = st.sampled_from([1e-12, 1e-3, 1.0, 1e3])


def step_bound(fmt: Format, w: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Return the largest error that rounding may cause to each weight."""
    over = arrays.get("weight_scale_2", np.float32(1))
    stored = arrays["weight_scale"].astype(np.float64)
    size = w.shape[1] if fmt.block <= 0 else fmt.block
    scale = np.repeat((stored * over).reshape(-1, w.shape[1] // size), size, 1)
    if fmt.element in ("int8", "int4"):
        bound = scale / 2
    elif fmt.element == "e4m3":  # half of 2^-3 of the value's power of two; of 2^-9 below 2^-6
        bound = np.maximum(abs(w) / 16, scale * 2.0**-10)
    else:  # half of the gap 4..6; a subnormal block scale, rounded by up to a half, saturates more
        subnormal = np.repeat((stored < 2.0**-6).reshape(-1, w.shape[1] // size), size, 1)
        bound = scale * np.where(subnormal, 3, 1)
    return bound + abs(w) * 1e-6 + 1e-37


@pytest.mark.parametrize("name", DISTINCT)
@settings(max_examples=40)
@given(w=weights, magnitude=magnitudes)
def test_error_is_at_most_half_a_step(name: str, w: np.ndarray, magnitude: float) -> None:
    w = w * np.float32(magnitude)
    arrays = quantize(w, FORMATS[name], "w")
    error = abs(dequantize(arrays, FORMATS[name]).astype(np.float64) - w)
    if name in ("int4", "int4-block128"):  # the smallest fp16 is 6e-8
        assert (error <= np.maximum(step_bound(FORMATS[name], w, arrays), 2.0**-25)).all()
    else:
        assert (error <= step_bound(FORMATS[name], w, arrays)).all()


@pytest.mark.parametrize(("name", "search"), SEARCHED)
@settings(max_examples=10)
@given(w=weights)
def test_representable_weights_are_kept(name: str, search: str, w: np.ndarray) -> None:
    """Quantizing again gives the same codes, and the same values up to the last bit of an fp32 scale."""
    fmt = FORMATS[name]
    once = quantize(w, fmt, "w", search=search)
    values = dequantize(once, fmt)
    if fmt.name.startswith(
        "nvfp4"
    ):  # below, a rounded block scale may be off by half, and the first time clipped
        dull = once["weight_scale"].astype(np.float32) < 2.0**-6
        values[np.repeat(dull, 16, axis=1)] = 0
        # and the largest weight, which the global scale comes from, may have been clipped itself
        amax: float | None = max(abs(w).max(), abs(values).max())
    else:
        amax = None
    again = quantize(values, fmt, "w", search=search, amax=amax)
    np.testing.assert_allclose(dequantize(again, fmt), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name, search in SEARCHED if search == "mse"])
@settings(max_examples=25)
@given(w=weights)
def test_search_is_never_worse(name: str, w: np.ndarray) -> None:
    fmt = FORMATS[name]
    size = fmt.block or w.shape[1]

    def error(search: str) -> Any:
        difference = dequantize(quantize(w, fmt, "w", search=search), fmt).astype(np.float64) - w
        return (difference**2).reshape(-1, size).sum(1)

    assert (error("mse") <= error("amax") * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize(("name", "gain"), [("int4", 0.92), ("int4-block128", 0.85), ("nvfp4", 0.78)])
def test_search_helps_normal_weights(name: str, gain: float) -> None:
    w = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    squared = {
        search: ((dequantize(quantize(w, FORMATS[name], "w", search=search), FORMATS[name]) - w) ** 2).mean()
        for search in ("amax", "mse")
    }
    assert squared["mse"] < gain * squared["amax"]


@pytest.mark.parametrize(("name", "search"), SEARCHED)
def test_zeros(name: str, search: str) -> None:
    arrays = quantize(np.zeros((3, 256), np.float32), FORMATS[name], "w", search=search)
    assert not arrays.pop("weight").any()
    assert all((scale == 1).all() for scale in arrays.values())


@pytest.mark.parametrize(("name", "search"), SEARCHED)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e30])
def test_extreme_magnitudes_stay_finite(name: str, search: str, size: float) -> None:
    w = (np.random.default_rng(0).standard_normal((3, 256)) * size).astype(np.float32)
    if size == 1e30 and name.startswith("int4"):
        with pytest.raises(UnsupportedError, match=r"tensor big .* does not fit F16"):
            quantize(w, FORMATS[name], "big", search=search)
        return
    values = dequantize(quantize(w, FORMATS[name], "w", search=search), FORMATS[name])
    assert np.isfinite(values).all()
    assert (abs(values) <= abs(w).max() * 1.5).all()


@pytest.mark.parametrize("columns", [1, 7, 33])
@pytest.mark.parametrize("name", ["int8", "fp8", "fp8-per-channel"])
def test_odd_sizes(name: str, columns: int) -> None:
    w = np.random.default_rng(0).standard_normal((3, columns)).astype(np.float32)
    np.testing.assert_allclose(
        dequantize(quantize(w, FORMATS[name], "w"), FORMATS[name]), w, rtol=0.07, atol=0.02
    )


@pytest.mark.parametrize("name", ["int4", "int4-block128", "nvfp4"])
def test_partial_block_is_refused(name: str) -> None:
    with pytest.raises(
        UnsupportedError, match=r"tensor a\.weight .* 40 columns are not a multiple"
    ) as caught:
        quantize(np.ones((2, 40), np.float32), FORMATS[name], "a.weight")
    assert "--exclude" in caught.value.hint


@pytest.mark.parametrize("shape", [(0, 32), (2, 0), (32,), (1, 2, 32)])
def test_other_ranks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedError, match="tensor t cannot"):
        quantize(np.ones(shape, np.float32), FORMATS["int8"], "t")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_nonfinite_weights_are_refused(name: str, value: float, word: str, dtype: type) -> None:
    w = np.ones((2, 128), dtype)
    w[1, 5] = value
    with pytest.raises(CheckpointError, match=f"tensor l.0.weight has {word}"):
        quantize(w, FORMATS[name], "l.0.weight")
    with pytest.raises(CheckpointError, match=f"tensor l.0.weight has {word}"):
        absmax([w], "l.0.weight")


def test_amax_below_the_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller than its weight"):
        quantize(np.ones((1, 16), np.float32), FORMATS["nvfp4"], "w", amax=0.5)
    with pytest.raises(ValueError, match="no search 'mse'"):
        quantize(np.ones((1, 16), np.float32), FORMATS["fp8"], "w", search="mse")


def test_shared_global_scale() -> None:
    """Fused layers share weight_scale_2, and have the values of one matrix."""
    q, k = matrix(4, seed=1), matrix(3, seed=2) * np.float32(0.1)
    for name in ("fp8", "nvfp4"):
        fmt, amax = FORMATS[name], absmax([q, k], "q|k")
        parts = [dequantize(quantize(part, fmt, "w", amax=amax), fmt) for part in (q, k)]
        both = np.concatenate([q, k])
        np.testing.assert_array_equal(np.concatenate(parts), dequantize(quantize(both, fmt, "w"), fmt))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "fp8-per-channel"])
def test_scale_dtypes(name: str, dtype: str) -> None:
    fmt = FORMATS[name].with_scales(dtype)
    w = matrix()
    w[3] = 1
    arrays = quantize(w, fmt, "w")
    assert arrays["weight_scale"].dtype == numpy_dtype(dtype)
    assert (abs(dequantize(arrays, fmt) - w) <= step_bound(fmt, w, arrays)).all()


def test_nvfp4_scales_are_e4m3() -> None:
    with pytest.raises(ValueError, match="cannot have F16 scales"):
        FORMATS["nvfp4"].with_scales("F16")


@given(st.floats(2.0**-100, 2.0**13, width=32), st.sampled_from(["F16", "BF16", "F32"]))
def test_round_up_gives_the_next_value(x: float, dtype: str) -> None:
    up = round_up(np.array([x], np.float32), dtype)
    below = np.nextafter(up, np.zeros(1, up.dtype)).astype(np.float32)
    assert below[0] < np.float32(x) <= up.astype(np.float32)[0]


def test_nvfp4_follows_modelopt() -> None:
    """weight_scale_2 is amax / (6 x 448), the largest block scale 448, and a value code x scale x scale_2."""
    w = np.tile(np.array([6, -6, 4, 3, 2, 1.5, 1, 0.5] * 2, np.float32), (1, 2)) / 8
    w[0, 16:] /= 4
    arrays = quantize(w, FORMATS["nvfp4"], "w")
    assert arrays["weight_scale_2"] == np.float32(0.75 / 2688) == global_scale(0.75, FORMATS["nvfp4"])
    assert arrays["weight_scale"].astype(np.float32).tolist() == [[448, 112]]
    assert arrays["weight"][0, :4].tolist() == [0xF7, 0x56, 0x34, 0x12]
    np.testing.assert_allclose(dequantize(arrays, FORMATS["nvfp4"]), w, rtol=1e-6)
    assert E2M1_VALUES[0xF] == -6


def test_weight_only_formats_differ_in_activations_alone() -> None:
    both = FORMATS["nvfp4"], FORMATS["nvfp4-weight-only"]
    assert replace(both[0], name=both[1].name, activations="") == both[1]


@pytest.mark.parametrize(
    ("name", "search", "relative"),
    [
        ("int8", "amax", 0.0071),
        ("fp8", "amax", 0.0265),
        ("fp8-per-channel", "amax", 0.0262),
        ("int4", "amax", 0.0925),
        ("int4", "mse", 0.0875),
        ("int4-block128", "amax", 0.1125),
        ("int4-block128", "mse", 0.1020),
        ("nvfp4", "amax", 0.0955),
        ("nvfp4", "mse", 0.0820),
    ],
)
def test_error_of_trained_weights(name: str, search: str, relative: float) -> None:
    """The relative L2 error of the trained checkpoint's layers, which the choices in formats.py rest on."""
    error = total = 0.0
    for ref in read_header(TALES).values():
        if ".layers." not in ref.name or len(ref.shape) != 2 or ref.shape[1] % 128:
            continue
        w = ref.read().astype(np.float32)
        difference = dequantize(quantize(w, FORMATS[name], ref.name, search=search), FORMATS[name]) - w
        error += float((difference**2).sum(dtype=np.float64))
        total += float((w**2).sum(dtype=np.float64))
    assert relative * 0.98 < (error / total) ** 0.5 < relative


def test_unknown_format() -> None:
    with pytest.raises(RequestError, match="'int3'") as caught:
        get_format("int3")
    assert "nvfp4-weight-only" in caught.value.hint


def dequantize_linear(arrays: dict[str, np.ndarray], fmt: Format, shape: tuple[int, int]) -> Any:
    """Dequantize the arrays by onnx's reference evaluator: scales to fp32, then DequantizeLinear."""
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    types = {"int8": TensorProto.INT8, "int4": TensorProto.INT4, "e2m1": TensorProto.FLOAT4E2M1}
    types["e4m3"] = TensorProto.FLOAT8E4M3FN
    stored = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "F8_E4M3": TensorProto.FLOAT8E4M3FN}
    stored["F8_E8M0"] = TensorProto.FLOAT8E8M0

    def tensor(name: str, dtype: int, dims: tuple[int, ...], key: str) -> Any:
        return TensorProto(name=name, data_type=dtype, dims=dims, raw_data=arrays[key].tobytes())

    scale = arrays["weight_scale"]
    tensors = [
        tensor("w", types[fmt.element], shape, "weight"),
        tensor("s", stored[fmt.scales], scale.shape, "weight_scale"),
    ]
    if fmt.name.startswith("nvfp4"):
        tensors.append(tensor("g", TensorProto.FLOAT, (), "weight_scale_2"))
        nodes = [helper.make_node("DequantizeLinear", ["s", "g"], ["wide"])]
    else:
        nodes = [helper.make_node("Cast", ["s"], ["wide"], to=TensorProto.FLOAT)]
    blocked = {"axis": 1, "block_size": fmt.block} if fmt.block > 0 else {"axis": 0}
    nodes.append(helper.make_node("DequantizeLinear", ["w", "wide"], ["y"], **blocked))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "dequantize", [], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    return ReferenceEvaluator(model).run(None, {})[0]


@pytest.mark.parametrize("name", NAMES)
def test_dequantize_equals_onnx(name: str) -> None:
    w, fmt = matrix(), FORMATS[name]
    arrays = quantize(w, fmt, "w")
    np.testing.assert_array_equal(dequantize_linear(arrays, fmt, (5, 256)), dequantize(arrays, fmt))
