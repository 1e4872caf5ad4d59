"""Activation ranges, compared with brute force on the raw values; the table's file, and damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.compiler.calibrate.ranges import ClipRanges, clip_ranges, ranges
from llmc.compiler.calibrate.run_layers import LayerInputs
from llmc.compiler.calibrate.table import CalibrationTable, Source
from llmc.runtime.errors import CheckpointError, RequestError

SOURCE = Source.of("a text", [[1, 2], [3]], {"model_type": "llama"})


def inputs(kind: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((500, 128)).astype(np.float32)
    if kind == "outliers":
        x[:, 7] *= 40
        x[3, 11] = -900
    return x * np.float32(0.037)


def error_at(x: np.ndarray, clip: float) -> float:
    """Return the mean squared error of saturating E4M3 at a scale of clip / 448, in float64."""
    scale = np.float32(clip / 448)
    codes = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return float(np.square(codes.astype(np.float64) * scale - x).mean())


def int8_error_at(x: np.ndarray, clip: float) -> float:
    """Return the mean squared error of int8 at a scale of clip / 127, in float64."""
    scale = np.float32(clip / 127)
    codes = np.clip(np.round(x / scale), -127, 127)
    return float(np.square(codes.astype(np.float64) * scale - x).mean())


@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_mse_range_for_int8(kind: str) -> None:
    x = inputs(kind)
    found, fp8 = clip_ranges(x, "int8"), clip_ranges(x)
    assert (found.max, found.percentile) == (fp8.max, fp8.percentile)
    least = min(int8_error_at(x, found.max * ratio) for ratio in np.linspace(1 / 64, 1, 800))
    assert int8_error_at(x, found.mse) <= 1.02 * least
    assert int8_error_at(x, found.mse) <= int8_error_at(x, fp8.mse)


@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_ranges_against_brute_force(kind: str) -> None:
    x = inputs(kind)
    found = clip_ranges(x)
    assert found.max == np.abs(x).max()
    quantile = np.quantile(np.abs(x), 0.9999, method="inverted_cdf")
    assert found.percentile == pytest.approx(quantile, rel=2**-11)
    least = min(error_at(x, found.max * ratio) for ratio in np.linspace(1 / 64, 1, 800))
    assert error_at(x, found.mse) <= 1.02 * least
    assert error_at(x, found.mse) <= error_at(x, found.max)


def test_ranges_of_zeros_and_of_one_value() -> None:
    assert clip_ranges(np.zeros((3, 4), np.float32)) == ClipRanges(0.0, 0.0, 0.0)
    one = clip_ranges(np.full((3, 4), -2.5, np.float32))
    assert one.max == one.percentile == 2.5
    assert error_at(np.full(3, 2.5, np.float32), one.mse) < 1e-10


def test_fused_layers_share_ranges() -> None:
    x, y = inputs("normal"), inputs("outliers")
    entries, kv = ranges(LayerInputs(4, {("a.q", "a.k"): x, ("a.o",): y}, keys=x - 1, values=y))
    assert entries["a.q"] == entries["a.k"] == clip_ranges(x)
    assert entries["a.o"] == clip_ranges(y)
    assert kv == (np.abs(x - 1).max(), np.abs(y).max())


def table() -> CalibrationTable:
    layer = LayerInputs(0, {("m.q", "m.k"): inputs("outliers")}, inputs("normal"), inputs("normal"))
    entries, kv = ranges(layer)
    return CalibrationTable(entries, {0: kv}, SOURCE)


def test_table_round_trips_through_its_file() -> None:
    written = table()
    text = written.to_json()
    read = CalibrationTable.from_json(text)
    assert read == written
    assert read.to_json() == text
    assert read.source.tokens == 3
    exact = np.abs(inputs("outliers")).max()
    assert read.amax("m.k", "max") == float(f"{exact:.6g}") == pytest.approx(exact, rel=1e-5)
    assert max(len(f"{figure}".replace(".", "").strip("0")) for figure in read.kv[0]) <= 6


def test_amax_of_an_unknown_module_or_method() -> None:
    with pytest.raises(RequestError, match="no calibration method 'best'") as raised:
        table().amax("m.q", "best")
    assert raised.value.hint == "known: max, percentile, mse"
    with pytest.raises(RequestError, match=r"no module m\.qq") as raised:
        table().amax("m.qq", "max")
    assert raised.value.hint == "it has m.q"


def changed(path: str, value: Any) -> str:
    """Return the file's text with the field at `path` set to `value`, or removed by Ellipsis."""
    data = json.loads(table().to_json())
    *parents, last = path.split("/")
    place = data
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 2, "format must be 1, got 2"),
        ("format", True, "format must be 1"),
        ("kv", ..., "the whole.kv is missing"),
        ("more", 1, "the whole.more is unknown"),
        ("source/text_sha256", "abc", "source.text_sha256 must be 64"),
        ("source/tokens", 0, "source.tokens must be a positive integer"),
        ("activations", {}, "activations must be an object with at least one field"),
        ("activations/m.q/max", ..., r"activations\[m.q\].max is missing"),
        ("activations/m.q/min", 1.0, r"activations\[m.q\].min is unknown"),
        ("activations/m.q/max", -1.0, r"activations\[m.q\].max must be a finite number, 0 or more, got -1"),
        ("activations/m.q/mse", float("nan"), r"activations\[m.q\].mse must be a finite number"),
        ("activations/m.q/mse", float("inf"), r"activations\[m.q\].mse must be a finite number"),
        ("activations/m.q/mse", "1", r"activations\[m.q\].mse must be a finite number"),
        ("activations/m.q", [1, 2, 3], r"activations\[m.q\] must be an object"),
        ("kv/x", {"key": 1, "value": 1}, r"kv\[x\] must be the number of a layer"),
        ("kv/0/key", None, r"kv\[0\].key must be a finite number"),
    ],
)  # fmt: skip
def test_damaged_file_is_refused_with_the_field(path: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        CalibrationTable.from_json(changed(path, value))
    assert raised.value.hint


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:50], "is not JSON"),
        (lambda text: "[" * 100_000, "is not JSON"),
        (lambda text: "[]", "must be an object"),
        (lambda text: text.replace('"format": 1', '"format": 1, "format": 1'), "a key appears twice"),
    ],
)
def test_non_table_is_refused(damage: Callable[[str], str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CalibrationTable.from_json(damage(table().to_json()))


def test_non_finite_figures_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"activations\[m\] must be a finite number"):
        CalibrationTable({"m": ClipRanges(float("nan"), 1.0, 1.0)}, {}, SOURCE)
