"""GPTQ, compared with the paper's algorithm in float64 and with rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.compiler.calibrate.statistics import second_moment
from llmc.compiler.quantize import scales
from llmc.compiler.quantize.gptq import gptq
from llmc.compiler.quantize.round_to_nearest import dequantize, quantize
from llmc.compiler.quantize.second_moment import factorize, output_error
from llmc.passes.quantize import elements
from llmc.passes.quantize.formats import FORMATS, Format, get_format
from llmc.runtime.errors import BuildError, CheckpointError, UnsupportedError

NAMES = list(FORMATS)
OUT, IN = 48, 384  # three blocks of 128


def weights(seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    array = (rng.standard_normal((OUT, IN)) * rng.uniform(0.5, 2, (OUT, 1)) / 20).astype(np.float32)
    array[5] = 0
    return array


def inputs(tokens: int = 1500) -> np.ndarray:
    """Draw correlated inputs of different magnitudes, like activations."""
    rng = np.random.default_rng(2)
    mixed = rng.standard_normal((tokens, IN)) @ (rng.standard_normal((IN, IN)) * 0.05 + np.eye(IN))
    return (mixed * rng.lognormal(0, 0.7, IN)).astype(np.float32)


def nearest(rows: np.ndarray, fmt: Format) -> dict[str, np.ndarray]:
    return quantize(rows, fmt, "w", search="amax" if fmt.block == -1 else "mse")


def reference_gptq(
    rows: np.ndarray, second_moment: np.ndarray, fmt: Format, stored: np.ndarray, global_scale: np.float32
) -> np.ndarray:
    """Compute algorithm 1 of arXiv:2210.17323, without its lazy batches, dequantized, in float64.

    The scales, `stored` [out, blocks], are given, because llmc does not choose them as the paper does.
    """
    damped = second_moment.astype(np.float64)
    damped += 0.01 * np.trace(damped) / len(damped) * np.eye(len(damped))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T  # H^-1 = U^T U
    left = rows.astype(np.float64)
    rounded = np.zeros_like(left)
    for j in range(left.shape[1]):
        factors = scales.effective(stored[:, j // fmt.block if fmt.block > 0 else 0], global_scale)
        code = elements.encode(left[:, j].astype(np.float32) / factors, fmt.element)
        rounded[:, j] = elements.decode(code, fmt.element) * factors
        left[:, j:] -= np.outer((left[:, j] - rounded[:, j]) / upper[j, j], upper[j, j:])
    return rounded.astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_codes_equal_the_papers_algorithm(name: str) -> None:
    fmt, rows, second = get_format(name), weights(), second_moment(inputs())
    arrays = gptq(rows, factorize(second, "w"), fmt, "w")
    stored = arrays["weight_scale"]
    if fmt.block <= 0:  # one scale for each row, or for all rows
        stored = np.broadcast_to(stored.reshape(-1, 1), (OUT, 1))
    global_scale = np.float32(arrays.get("weight_scale_2", 1))
    expected = reference_gptq(rows, second, fmt, stored, global_scale)
    found = dequantize(arrays, fmt)
    assert (
        found != expected
    ).mean() < 0.01  # float32 puts a few on the other side of a tie; then on from there
    assert output_error(rows, found, second) <= 1.01 * output_error(rows, expected, second)


@pytest.mark.parametrize("name", NAMES)
def test_output_error_is_below_round_to_nearest(name: str) -> None:
    fmt, rows, x = get_format(name), weights(), inputs()
    second = second_moment(x)
    plain, better = nearest(rows, fmt), gptq(rows, factorize(second, "w"), fmt, "w")
    for array, (dtype, shape) in fmt.layout((OUT, IN)).items():
        assert better[array].dtype == plain[array].dtype, dtype
        assert better[array].shape == plain[array].shape == shape
    assert list(better) == list(plain)
    found = dequantize(better, fmt)
    assert not found[5].any()
    error = np.linalg.norm(x @ (rows - found).T) / np.linalg.norm(x @ rows.T)
    assert output_error(rows, found, second) == pytest.approx(error, rel=1e-3)
    assert output_error(rows, found, second) < 0.9 * output_error(rows, dequantize(plain, fmt), second)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("second", [np.eye(IN), np.zeros((IN, IN))], ids=["identity", "zero"])
def test_independent_inputs_are_rounded_to_nearest(name: str, second: np.ndarray) -> None:
    fmt, rows = get_format(name), weights()
    found = gptq(rows, factorize(second.astype(np.float32), "w"), fmt, "w")
    for array, expected in nearest(rows, fmt).items():
        assert np.array_equal(found[array], expected), array


def test_global_scale_of_fused_layers() -> None:
    rows = weights()
    for name in ("fp8", "nvfp4"):
        fmt = get_format(name)
        found = gptq(rows, factorize(second_moment(inputs()), "w"), fmt, "w", amax=3.0)
        key = "weight_scale" if name == "fp8" else "weight_scale_2"
        assert found[key] == scales.global_scale(3.0, fmt)


def test_unseen_inputs_are_rounded_to_nearest() -> None:
    x, fmt = inputs(), get_format("fp8")
    x[:, [3, 200]] = 0
    rows = weights()
    found, expected = gptq(rows, factorize(second_moment(x), "w"), fmt, "w"), nearest(rows, fmt)
    assert np.array_equal(found["weight"][:, [3, 200]], expected["weight"][:, [3, 200]])


def test_fewer_tokens_than_inputs_are_enough() -> None:
    x, rows, fmt = inputs(tokens=40), weights(), get_format("int4")
    second = second_moment(x)
    error = output_error(rows, dequantize(gptq(rows, factorize(second, "w"), fmt, "w"), fmt), second)
    assert error < 0.5 * output_error(rows, dequantize(nearest(rows, fmt), fmt), second)


def test_invalid_moments_and_weights_are_refused() -> None:
    rows, second = weights(), second_moment(inputs())
    with pytest.raises(UnsupportedError, match=r"tensor a\.b cannot be stored as int4-block128: 96 columns"):
        gptq(rows[:, :96], factorize(second[:96, :96], "a.b"), get_format("int4-block128"), "a.b")
    with pytest.raises(CheckpointError, match=r"tensor a\.b has NaN"):
        gptq(np.where(rows == rows[0, 0], np.nan, rows), factorize(second, "a.b"), get_format("int8"), "a.b")
    with pytest.raises(CheckpointError, match=r"inputs of a\.b are infinite or NaN"):
        factorize(np.where(second == second[0, 0], np.inf, second), "a.b")
    with pytest.raises(BuildError, match=r"inputs of a\.b are linearly dependent"):
        factorize(np.ones((IN, IN), np.float32), "a.b", damping=0)


def test_output_error_by_hand() -> None:
    second = np.diag([1.0, 4.0]).astype(np.float32)
    rows = np.array([[3.0, 2.0]], np.float32)  # 9 + 16
    assert output_error(rows, np.array([[3.0, 1.0]], np.float32), second) == pytest.approx(2 / 5)
    assert output_error(rows * 0, rows * 0, second) == 0.0
