"""The calibration of an earlier build is used again: with the same bytes, and only if it is the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmc.compiler.calibrate import cache as module
from llmc.compiler.calibrate import run_layers
from llmc.compiler.calibrate.cache import CalibrationCache, calibration_key
from llmc.compiler.calibrate.ranges import ClipRanges
from llmc.compiler.calibrate.statistics import LayerStatistics, second_moment
from llmc.compiler.driver import compile_model
from llmc.compiler.request import BuildRequest

GROUPS = {("a", "b"): 4, ("c",): 3}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "cache_directory", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr(module, "_FREE_BYTES", 0)
    return tmp_path / "cache" / "calibration"


def layers() -> Iterator[LayerStatistics]:
    rng = np.random.default_rng(0)
    for layer in range(2):
        names = {group: tuple(f"{layer}.{name}" for name in group) for group in GROUPS}
        x = {group: rng.standard_normal((9, size)).astype(np.float32) for group, size in GROUPS.items()}
        ranges = {name: ClipRanges(3.0, 2.5, 1 / 3) for group in names.values() for name in group}
        moments = {names[group]: second_moment(x[group]) for group in GROUPS}
        yield LayerStatistics(layer, ranges, (1.5, 0.1), moments)


def wanted(layer: int = 0) -> dict[tuple[str, ...], int]:
    return {tuple(f"{layer}.{name}" for name in group): size for group, size in GROUPS.items()}


def test_what_is_kept_is_loaded(folder: Path) -> None:
    assert CalibrationCache("k").load({}) is None
    written = list(CalibrationCache("k").keep(layers()))
    found = CalibrationCache("k").load(wanted(0) | wanted(1) | {("lm_head",): 7})
    assert found is not None
    for one, other in zip(written, found, strict=True):
        assert (one.layer, one.ranges, one.kv) == (other.layer, other.ranges, other.kv)
        assert list(one.moments) == list(other.moments)
        assert all(np.array_equal(one.moments[group], other.moments[group]) for group in one.moments)
    assert sorted(path.name for path in folder.iterdir()) == ["k.json", "k.moments"]
    assert CalibrationCache("other").load({}) is None
    assert CalibrationCache("k").load({("0.a", "0.b"): 5}) is None  # another size
    assert CalibrationCache("k").load({("0.a",): 4}) is None  # fused differently


def test_an_unfinished_calibration_leaves_nothing(folder: Path) -> None:
    statistics = CalibrationCache("k").keep(layers())
    next(statistics)
    assert list(folder.iterdir())
    statistics.close()  # type: ignore[attr-defined]
    assert not list(folder.iterdir())


def damaged(index: dict[str, object]) -> Iterator[object]:
    """Yield indexes that no build writes."""
    layer: dict[str, object] = index["layers"][0]  # type: ignore[index]
    yield {**index, "more": 1}
    yield {**index, "sha256": 5}
    yield {**index, "layers": {}}
    yield [index]
    for name, values in {
        "layer": (1, "0", None),
        "ranges": ([], {"0.a": [1.0, 2.0]}, {"0.a": [1.0, 2.0, -1.0]}, {"0.a": [1.0, 2.0, "1"]}),
        "kv": ([1.0], [1.0, float("nan")], None),
        "moments": (
            [[["0.a", "0.b"], 2**40]],
            [[["0.a", "0.b"], -4]],
            [["0.a", 4]],
            [[[1], 4]],
            [[["0.a"]]],
            5,
        ),
    }.items():
        for value in values:
            yield {**index, "layers": [{**layer, name: value}, *index["layers"][1:]]}  # type: ignore[index]
        yield {**index, "layers": [{key: value for key, value in layer.items() if key != name}]}


def test_damaged_files_are_ignored(folder: Path) -> None:
    list(CalibrationCache("k").keep(layers()))
    index, moments = folder / "k.json", folder / "k.moments"
    good, data = json.loads(index.read_text()), moments.read_bytes()
    for bad in damaged(good):
        index.write_text(json.dumps(bad))
        assert CalibrationCache("k").load({}) is None, bad
    for text in ("", "{", "[" * 100_000, "\0"):
        index.write_text(text)
        assert CalibrationCache("k").load({}) is None
    index.write_text(json.dumps(good))
    for bad_data in (data[:-4], data + bytes(4), data[:-1] + bytes([data[-1] ^ 1]), b""):
        moments.write_bytes(bad_data)
        assert CalibrationCache("k").load({}) is None
    moments.unlink()
    assert CalibrationCache("k").load({}) is None
    list(CalibrationCache("k").keep(layers()))  # and are replaced
    assert CalibrationCache("k").load(wanted()) is not None


def test_the_least_recently_used_files_go_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for second, key in enumerate("abc"):
        list(CalibrationCache(key).keep(layers()))
        os.utime(folder / f"{key}.json", (second, second))
    monkeypatch.setattr(module, "MOST_BYTES", 2 * sum(path.stat().st_size for path in folder.glob("a.*")) + 9)
    assert CalibrationCache("a").load({}) is not None
    list(CalibrationCache("d").keep(layers()))
    assert {path.stem for path in folder.iterdir()} == {"a", "d"}


def test_a_full_disk_or_a_read_only_home_does_not_fail_the_build(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FREE_BYTES", 1 << 62)
    assert len(list(CalibrationCache("k").keep(layers()))) == 2
    assert not list(folder.iterdir())
    folder.rmdir()
    folder.write_text("not a directory")
    assert len(list(CalibrationCache("k").keep(layers()))) == 2
    assert CalibrationCache("k").load({}) is None


def test_a_second_build_runs_no_layer_and_has_the_same_bytes(
    folder: Path, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = BuildRequest(str(checkpoint("llama-tiny")), tmp_path / "a.llmc", quant="int4", verify=False)
    first = compile_model(request).path
    runs: list[object] = []
    run = run_layers.Piece.__call__
    monkeypatch.setattr(run_layers.Piece, "__call__", lambda *args: (runs.append(1), run(*args))[1])
    again = compile_model(replace(request, output=tmp_path / "b.llmc")).path
    for file in ("weights/packed.safetensors", "calibration.json", "rank0.program.json"):
        assert (first / file).read_bytes() == (again / file).read_bytes()
    compile_model(replace(request, output=tmp_path / "c.llmc", quant="fp8"))
    assert not runs


def test_the_key_follows_from_graph_checkpoint_and_tokens() -> None:
    keys = {
        calibration_key(graph, {"model.safetensors": sha256}, [ids, [7]], {"llmc": version})
        for graph in (b"a", b"b")
        for sha256 in ("0", "1")
        for ids in ([1, 2], [1, 3])
        for version in ("1", "2")
    }
    assert len(keys) == 16
