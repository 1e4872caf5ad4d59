"""Rounded inputs: against ml_dtypes, and against a reference that rounds one value at a time."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from llmc.passes.quantize.fake_quantize import round_e2m1, round_e4m3, round_int8

# Every positive value of E4M3 by its code: subnormals of 2^-9, then 8 steps an octave; 0x7F is NaN.
E4M3 = [(code & 7) * 2.0**-9 if code < 8 else (8 + code % 8) * 2.0 ** (code // 8 - 10) for code in range(127)]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def nearest(value: float, grid: list[float]) -> float:
    """The nearest of `grid`, on a tie the one with the even code, beyond the end the last."""
    size = min(abs(value), grid[-1])
    code = min(range(len(grid)), key=lambda code: (abs(grid[code] - size), code % 2))
    return math.copysign(grid[code], value)


def f32(value: float) -> float:
    return float(np.float32(value))


def test_the_grid_of_this_test_is_e4m3() -> None:
    codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    assert codes.astype(np.float32).tolist() == E4M3


def values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Of many magnitudes, some of them exactly between two codes."""
    x = rng.standard_normal(shape) * np.exp(rng.uniform(-6, 6, shape))
    ties = (rng.integers(0, 16, shape) + 0.5) / 2.0 ** rng.integers(0, 10, shape)
    return np.where(rng.random(shape) < 0.3, ties, x).astype(np.float32)


def test_e4m3_is_what_ml_dtypes_rounds_to() -> None:
    x = values(np.random.default_rng(0), (50, 40))
    for scale in (1.0, 0.02, 2.0**-7):
        codes = np.clip(x / np.float32(scale), -448, 448).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(round_e4m3(x, scale), codes.astype(np.float32) * np.float32(scale))


def test_e4m3_one_value_at_a_time() -> None:
    x = values(np.random.default_rng(1), (400,))
    expected = [f32(nearest(f32(float(one) / f32(0.02)), E4M3) * f32(0.02)) for one in x]
    assert round_e4m3(x, 0.02).tolist() == expected


def test_e4m3_saturates_and_keeps_the_shape() -> None:
    x = np.array([[[1e6, -1e6, 448, 464.0]]], np.float32)
    got = round_e4m3(x, 1.0)
    assert got.dtype == np.float32
    assert got.tolist() == [[[448, -448, 448, 448]]]


def test_int8_one_value_at_a_time() -> None:
    x = values(np.random.default_rng(6), (600,))
    expected = []
    for one in x:
        quotient = f32(float(one) / f32(0.02))
        code = max(-128, min(127, round(quotient)))  # (Python's round: ties to even)
        expected.append(f32(code * f32(0.02)))
    assert round_int8(x, 0.02).tolist() == expected


def test_int8_saturates_as_onnx_does_and_keeps_the_shape() -> None:
    x = np.array([[[1e6, -1e6, 127.4, -128.6, 0.5, 1.5]]], np.float32)
    got = round_int8(x, 1.0)
    assert got.dtype == np.float32
    assert got.tolist() == [[[127, -128, 127, -128, 0, 2]]]


@pytest.mark.parametrize("global_scale", [1.0, 0.0028, 0.3])
def test_e2m1_one_block_at_a_time(global_scale: float) -> None:
    x = values(np.random.default_rng(2), (7, 3, 48))
    expected = []
    over = f32(global_scale)
    for block in x.reshape(-1, 16):
        amax = float(np.abs(block).max())
        scale = f32(nearest(f32(f32(amax / 6) / over), E4M3) * over)
        for one in block:
            expected.append(f32(nearest(f32(float(one) / scale), E2M1) * scale) if scale else 0.0)
    assert round_e2m1(x, global_scale).reshape(-1).tolist() == expected


def test_e2m1_of_zeros_of_tiny_and_of_huge_blocks() -> None:
    x = np.zeros((3, 16), np.float32)
    x[1] = 1e-5  # a block scale of 1e-5 / 6 is below half of E4M3's smallest, 2^-9
    x[2, :2] = 1e6, -3000.0  # the block scale saturates at 448, the value at 6 of it
    got = round_e2m1(x, 1.0)
    assert not got[:2].any()
    assert got[2].tolist() == [6 * 448, -6 * 448] + [0] * 14
    with pytest.raises(ValueError, match="multiple of the block"):
        round_e2m1(np.ones((2, 24), np.float32), 1.0)


def test_values_that_fit_come_back_exactly() -> None:
    x = np.tile(np.array([0, 0.5, -1, 1.5, 2, -3, 4, 6], np.float32), (4, 4)) * np.float32(0.25)
    np.testing.assert_array_equal(round_e2m1(x, 2.0**-6), x)
    np.testing.assert_array_equal(round_e4m3(x, 2.0**-6), x)
