"""Calibrations of earlier builds, kept on disk: another build of the same checkpoint runs no layer.

    $XDG_CACHE_HOME/llmc/calibration/KEY.moments   the second moments, one after the other: float32, each the
                                                   rows of the lower triangle
                                     KEY.json      what the layers are, and the checksum of KEY.moments

A file that is missing, damaged or of another shape is ignored, and the next calibration replaces it. An error
of the disk never makes a build fail. A build gives the same bytes with and without the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llmc.compiler.calibrate.ranges import ClipRanges
from llmc.compiler.calibrate.statistics import Group, LayerStatistics
from llmc.runtime.cache_directory import cache_directory

MOST_BYTES = 4 << 30  # of all files; the least recently used are removed first
_FREE_BYTES = 4 << 30  # that stay free on the disk
_INDEX, _MOMENTS = ".json", ".moments"
_MOST_INDEX_BYTES = 64 << 20
_BLOCK = 1 << 20
_OLD_SECONDS = 24 * 3600


def calibration_key(
    graph: bytes, files: Mapping[str, str], sequences: Sequence[Sequence[int]], software: Mapping[str, Any]
) -> str:
    """Return the sha256 of what the statistics follow from.

    graph: the graph that runs, serialized
    files: sha256 of the checkpoint's files, by name
    sequences: the token ids
    software: the versions of llmc and its libraries
    """
    hashed = {
        "graph": hashlib.sha256(graph).hexdigest(),
        "files": dict(files),
        "tokens": [list(ids) for ids in sequences],
        "software": dict(software),
    }
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


class CalibrationCache:
    """The files of one calibration. key: see `calibration_key`."""

    def __init__(self, key: str) -> None:
        folder = cache_directory("calibration")
        self._path: Path | None = None if folder is None else folder / key

    def load(self, columns: Mapping[Group, int]) -> Iterator[LayerStatistics] | None:
        """Return the statistics of every layer, or None if they are not there.

        columns: fused linear layers whose second moment is wanted -> the size of their input; those outside
            of the decoder layers are ignored
        """
        if self._path is None:
            return None
        index, moments = self._file(_INDEX), self._file(_MOMENTS)
        try:
            if index.stat().st_size > _MOST_INDEX_BYTES:
                return None
            layers, checksum = _parse(json.loads(index.read_bytes()))
            sizes = {moment.group: moment.columns for layer in layers for moment in layer.moments}
            modules = {module for layer in layers for module in layer.ranges}
            wanted = {group: size for group, size in columns.items() if modules.intersection(group)}
            if not wanted.items() <= sizes.items():
                return None
            last = max((moment.stop for layer in layers for moment in layer.moments), default=0)
            if moments.stat().st_size != last or _sha256(moments) != checksum:
                return None
            os.utime(index)
        except (OSError, ValueError, RecursionError):
            return None
        return (layer.read(moments) for layer in layers)

    def keep(self, statistics: Iterable[LayerStatistics]) -> Iterator[LayerStatistics]:
        """Yield `statistics`, and write them to the files once all were yielded."""
        draft = self._draft()
        try:
            for layer in statistics:
                if draft is not None and not draft.add(layer):
                    draft.remove()
                    draft = None
                yield layer
                del layer
            if draft is not None:
                draft.finish()
                with contextlib.suppress(OSError):
                    self._remove_oldest()
        finally:
            if draft is not None:
                draft.remove()

    def _file(self, suffix: str) -> Path:
        assert self._path is not None
        return self._path.with_name(self._path.name + suffix)

    def _draft(self) -> _Draft | None:
        if self._path is None:
            return None
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return _Draft(self._path)
        except OSError:  # with a read-only home the next build calibrates again
            return None

    def _remove_oldest(self) -> None:
        assert self._path is not None
        total = 0
        entries = [(path.stat().st_mtime_ns, path) for path in self._path.parent.glob(f"*{_INDEX}")]
        for _, index in sorted(entries, reverse=True):
            moments = index.with_suffix(_MOMENTS)
            total += index.stat().st_size + (moments.stat().st_size if moments.exists() else 0)
            if total > MOST_BYTES:
                index.unlink(missing_ok=True)
                moments.unlink(missing_ok=True)
        for draft in self._path.parent.glob("*.tmp-*"):  # of builds that were killed
            if time.time() - draft.stat().st_mtime > _OLD_SECONDS:
                draft.unlink(missing_ok=True)


class _Draft:
    """Files that get their names when all layers are in them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        suffix = f".tmp-{os.getpid()}-{threading.get_ident()}"
        self._drafts = {end: path.with_name(path.name + end + suffix) for end in (_MOMENTS, _INDEX)}
        self._layers: list[dict[str, Any]] = []
        self._digest = hashlib.sha256()
        self._stream: BinaryIO = self._drafts[_MOMENTS].open("wb")

    def add(self, layer: LayerStatistics) -> bool:
        """Write one layer. Returns whether it is written: the disk may be full, or the limit reached."""
        nbytes = sum(2 * len(moment) * (len(moment) + 1) for moment in layer.moments.values())
        try:
            free = shutil.disk_usage(self._path.parent).free
            if self._stream.tell() + nbytes > MOST_BYTES or free < nbytes + _FREE_BYTES:
                return False
            for moment in layer.moments.values():
                if not np.array_equal(moment, moment.T):  # the other half would be lost
                    return False
                data = np.concatenate([row[: i + 1] for i, row in enumerate(moment)]).data
                self._digest.update(data)
                self._stream.write(data)
        except OSError:
            return False
        self._layers.append(
            {
                "layer": layer.layer,
                "ranges": {module: astuple(entry) for module, entry in layer.ranges.items()},
                "kv": layer.kv,
                "moments": [[list(group), len(moment)] for group, moment in layer.moments.items()],
            }
        )
        return True

    def finish(self) -> None:
        """Give the files their names."""
        with contextlib.suppress(OSError):
            self._stream.close()
            index = {"layers": self._layers, "sha256": self._digest.hexdigest()}
            self._drafts[_INDEX].write_text(json.dumps(index), "utf-8")
            for end, draft in self._drafts.items():
                os.replace(draft, self._path.with_name(self._path.name + end))

    def remove(self) -> None:
        """Remove the files that have no name yet."""
        with contextlib.suppress(OSError):
            self._stream.close()
            for draft in self._drafts.values():
                draft.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Moment:
    """The place of one second moment in the file."""

    group: Group
    columns: int
    start: int  # in bytes

    @property
    def count(self) -> int:
        return self.columns * (self.columns + 1) // 2

    @property
    def stop(self) -> int:
        return self.start + 4 * self.count

    def read(self, file: Path) -> np.ndarray:
        triangle = np.fromfile(file, np.float32, self.count, offset=self.start)
        moment = np.empty((self.columns, self.columns), np.float32)
        first = 0
        for row in range(self.columns):
            values = triangle[first : first + row + 1]
            moment[row, : row + 1] = values
            moment[: row + 1, row] = values
            first += row + 1
        return moment


@dataclass(frozen=True)
class _Layer:
    """A layer in the index."""

    layer: int
    ranges: dict[str, ClipRanges]
    kv: tuple[float, float]
    moments: list[_Moment]

    def read(self, file: Path) -> LayerStatistics:
        moments = {moment.group: moment.read(file) for moment in self.moments}
        return LayerStatistics(self.layer, self.ranges, self.kv, moments)


def _parse(index: Any) -> tuple[list[_Layer], str]:
    """Return the layers and the checksum. Raises ValueError for anything that `_Draft` does not write."""
    record = _object(index, "layers", "sha256")
    layers: list[_Layer] = []
    end = 0
    for entry in _list(record["layers"]):
        fields = _object(entry, "layer", "ranges", "kv", "moments")
        if fields["layer"] != len(layers) or not isinstance(fields["ranges"], dict):
            raise ValueError
        moments = []
        for moment in _list(fields["moments"]):
            group, columns = _list(moment, 2)
            if not isinstance(columns, int) or not 0 < columns < 1 << 20:
                raise ValueError
            if not all(isinstance(module, str) for module in _list(group)):
                raise ValueError
            moments.append(_Moment(tuple(group), columns, end))
            end = moments[-1].stop
        ranges = {
            module: ClipRanges(*map(_figure, _list(figures, 3)))
            for module, figures in fields["ranges"].items()
        }
        key, value = map(_figure, _list(fields["kv"], 2))
        layers.append(_Layer(fields["layer"], ranges, (key, value), moments))
    if not isinstance(record["sha256"], str):
        raise ValueError
    return layers, record["sha256"]


def _object(value: Any, *names: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(names):
        raise ValueError
    return value


def _list(value: Any, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise ValueError
    return value


def _figure(value: Any) -> float:
    if type(value) is not float or not math.isfinite(value) or value < 0:
        raise ValueError
    return value


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
