"""Compiled kernels on disk: what a start reads is what an earlier one wrote, or nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from llmc.runtime.backends.tensorrt import runtime_cache
from llmc.runtime.backends.tensorrt.runtime_cache import RuntimeCacheFile
from llmc.runtime.cache_directory import cache_directory

KEY: dict[str, Any] = {"plan_sha256": "ab" * 32, "sm": 89, "gpu": "NVIDIA L40", "version": "1.7.1.116"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "llmc" / "tensorrt"


def file(**changes: Any) -> RuntimeCacheFile:
    return RuntimeCacheFile(**KEY | changes)


def path_of(one: RuntimeCacheFile) -> Path:
    assert one.path is not None
    return one.path


def test_the_next_start_reads_what_this_one_wrote(folder: Path) -> None:
    assert file().read() is None
    file().write(b"kernels")
    assert file().read() == b"kernels"
    file().write(b"more kernels")
    assert file().read() == b"more kernels"
    assert path_of(file()).parent == folder
    assert len(list(folder.iterdir())) == 1  # no drafts
    assert folder.stat().st_mode & 0o077 == 0


def test_another_engine_gpu_or_version_has_another_file() -> None:
    file().write(b"kernels")
    for change in ({"plan_sha256": "cd" * 32}, {"sm": 86}, {"gpu": "NVIDIA L4"}, {"version": "1.8.0.1"}):
        assert file(**change).read() is None


def test_a_damaged_file_counts_as_none_and_is_replaced() -> None:
    file().write(b"kernels" * 100)
    path = path_of(file())
    whole = path.read_bytes()
    flipped = bytearray(whole)
    for damaged in (b"", whole[:5], whole[:60], whole[:-1], whole + b"x", b"another format" + whole):
        path.write_bytes(damaged)
        assert file().read() is None
    for place in (0, 30, 200):
        flipped[place] ^= 1
        path.write_bytes(flipped)
        flipped[place] ^= 1
        assert file().read() is None
    one = file()
    one.read()
    one.write(b"kernels" * 100)
    assert file().read() == b"kernels" * 100


def test_unchanged_kernels_are_not_written_again() -> None:
    file().write(b"kernels")
    one = file()
    one.read()
    path_of(one).unlink()
    one.write(b"kernels")
    assert not path_of(one).exists()


def test_an_interrupted_write_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file().write(b"kernels")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    file().write(b"other kernels")
    assert file().read() == b"kernels"
    assert len(list(folder.iterdir())) == 1


def test_the_directory_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_cache, "MAX_BYTES", 1100)
    for sm in (80, 86, 89):
        file(sm=sm).write(bytes(300))
        os.utime(path_of(file(sm=sm)), (sm, sm))
    assert file(sm=80).read()  # used last now
    file(sm=120).write(bytes(300))
    assert {sm for sm in (80, 86, 89, 120) if file(sm=sm).read()} == {80, 89, 120}
    file(sm=120).write(bytes(1101))  # too large: not kept
    assert file(sm=120).read() == bytes(300)
    path_of(file(sm=80)).write_bytes(bytes(1101))
    assert file(sm=80).read() is None


def test_a_disk_that_refuses_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where a directory should be")
    file().write(b"kernels")
    assert file().read() is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home
    assert cache_directory("tensorrt") is None
    file().write(b"kernels")
    assert file().read() is None
