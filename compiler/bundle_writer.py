"""Write a bundle atomically: a directory with its final name is always complete.

Everything goes into `.NAME.llmc.tmp-<pid>` beside the output; the last step renames it. A build that fails,
is interrupted or is terminated removes its directory. If it is killed, the next build of the same output
removes the directory, and restores the old bundle if that had been renamed already.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from llmc.runtime.bundle.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    FileRecord,
    Manifest,
    path_fault,
)
from llmc.runtime.bundle.reader import is_litter, sha256_of_file
from llmc.runtime.errors import BuildError

_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BundleWriter:
    """A context manager that creates a bundle: write files to `writer.path(...)`, then call `finish`.

    Leaving the context without `finish` removes the files that were written, and nothing else.
    Raises BuildError if the output cannot be written, or exists and may not be replaced.
    """

    def __init__(self, output: Path, force: bool = False) -> None:
        self.output = Path(os.path.abspath(output))
        self._force = force
        self._pid = os.getpid()
        self._directory = self._beside("tmp")
        self._aside = self._beside("old")
        self._hashes: dict[str, FileRecord] = {}
        self._needed = 0
        self._cleanup = contextlib.ExitStack()
        self._signals: list[BaseException] = []

    def __enter__(self) -> BundleWriter:
        with contextlib.ExitStack() as stack:  # an exception before the end undoes what was done
            self._signals = stack.enter_context(_signals_as_exceptions())
            try:
                self.output.parent.mkdir(parents=True, exist_ok=True)
                self._clear_dead_builds()
                self._refuse_output()
                self._directory.mkdir()
            except OSError as error:
                hint = "choose another place with `--output`"
                raise BuildError(f"cannot write {self.output}: {error.strerror or error}", hint) from error
            stack.callback(shutil.rmtree, self._directory, ignore_errors=True)
            lock = os.open(self._directory, os.O_RDONLY)
            stack.callback(os.close, lock)
            _lock(lock)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if os.getpid() != self._pid:
            return  # a forked child: the files are its parent's
        with self._cleanup:
            out_of_space = isinstance(error, OSError) and error.errno in _OUT_OF_SPACE
            written = _size_of(self._directory) if out_of_space else 0
        if self._signals and isinstance(error, Exception):
            raise self._signals[0] from None
        if out_of_space:
            self._out_of_space(error, max(self._needed, written))

    def path(self, relative: str) -> Path:
        """Return the path to write the bundle's file `relative` to, and create its parent directory."""
        if (fault := path_fault(relative)) or relative == MANIFEST_NAME:
            raise BuildError(f"bundle file {relative!r}: {fault or 'the manifest is written by finish()'}")
        path = self._directory / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def temporary_directory(self) -> tempfile.TemporaryDirectory[str]:
        """Return a directory for scratch files. If the build is killed, the next one removes it."""
        return tempfile.TemporaryDirectory(dir=self._directory)

    def add_hash(self, relative: str, sha256: str, nbytes: int) -> None:
        """Record a file's hash that the caller has computed, so that `finish` need not read the file."""
        self._hashes[relative] = FileRecord(nbytes, sha256)

    def discard(self, relative: str) -> None:
        """Remove a file from the bundle, and the directories that this leaves empty."""
        path = self.path(relative)
        path.unlink()
        self._hashes.pop(relative, None)
        for parent in path.parents:
            if parent == self._directory or any(parent.iterdir()):
                break
            parent.rmdir()

    def check_disk_space(self, nbytes: int) -> None:
        """Raise BuildError unless the disk has room for `nbytes` more bytes. Call it before a long write."""
        self._needed = _size_of(self._directory) + nbytes
        if shutil.disk_usage(self._directory).free < nbytes:
            self._out_of_space(None, nbytes)

    def finish(self, manifest: Manifest) -> Path:
        """Complete the bundle and return its path. Fills in the manifest's `files` and `weights.bytes`.

        Raises BundleError if the manifest violates the format.
        """
        files = {name: self._record(name) for name in sorted(_files_in(self._directory))}
        if absent := sorted(set(self._hashes) - set(files)):
            raise BuildError(f"bundle file {absent[0]!r} was hashed and is not on disk")
        nbytes = sum(files[name].bytes for name in manifest.weights.files if name in files)
        weights = replace(manifest.weights, bytes=nbytes)
        data = replace(manifest, files=files, weights=weights).to_json()
        with open(self._directory / MANIFEST_NAME, "xb") as file:
            file.write(data)
        for root, _, names in os.walk(self._directory, topdown=False):
            for name in [*names, "."]:
                _sync(Path(root, name))
        self._publish()
        return self.output

    def _record(self, relative: str) -> FileRecord:
        path = self._directory / relative
        if path.is_symlink() or not path.is_file():
            raise BuildError(f"bundle file {relative!r} is not a regular file")
        size, known = path.stat().st_size, self._hashes.get(relative)
        if known is None:
            return FileRecord(size, sha256_of_file(path))
        if known.bytes != size:
            raise BuildError(f"bundle file {relative!r}: {known.bytes} bytes were hashed, {size} are on disk")
        return known

    def _publish(self) -> None:
        try:
            if os.path.lexists(self.output):
                self._refuse_output()  # it may have changed since the build began
                os.rename(self.output, self._aside)
            os.rename(self._directory, self.output)
        except BaseException as error:
            if os.path.lexists(self._aside) and not os.path.lexists(self.output):
                os.rename(self._aside, self.output)
            if isinstance(error, OSError):
                raise BuildError(f"cannot write {self.output}: {error.strerror or error}") from error
            raise
        _sync(self.output.parent)
        shutil.rmtree(self._aside, ignore_errors=True)

    def _refuse_output(self) -> None:
        if not os.path.lexists(self.output):
            return
        if not self._force:
            raise BuildError(
                f"{self.output} exists", "replace it with `--force`, or choose another `--output`"
            )
        if reason := _why_not_replaceable(self.output):
            hint = "llmc replaces only bundles: remove it yourself, or choose another `--output`"
            raise BuildError(f"{self.output} is not replaced: {reason}", hint)

    def _clear_dead_builds(self) -> None:
        pattern = re.compile(re.escape(f".{self.output.name}.") + r"(tmp|old)-(\d+)")
        for entry in sorted(self.output.parent.iterdir()):
            match = pattern.fullmatch(entry.name)
            if match is None or not _is_abandoned(entry, int(match[2])):
                continue
            if match[1] == "old" and not os.path.lexists(self.output):
                os.rename(entry, self.output)  # killed between the two renames of `_publish`
            else:
                shutil.rmtree(entry, ignore_errors=True)

    def _beside(self, kind: str) -> Path:
        """Return a path beside the output, so that the rename stays within one file system."""
        return self.output.parent / f".{self.output.name}.{kind}-{self._pid}"

    def _out_of_space(self, error: BaseException | None, needed: int) -> NoReturn:
        free = shutil.disk_usage(self.output.parent).free
        message = f"no space for {self.output}" + (
            f": {os.strerror(error.errno)}" if isinstance(error, OSError) and error.errno else ""
        )
        hint = (
            f"free some space in {self.output.parent}, or choose another disk with `--output`: "
            f"it needs at least {needed:,} bytes; {free:,} are available"
        )
        raise BuildError(message, hint) from error


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[list[BaseException]]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that the cleanup runs as it does for Ctrl-C.

    Yields the list of the exceptions that signals raised. Libraries may turn them, and KeyboardInterrupt,
    into errors of their own, as torch does in C++.
    """
    received: list[BaseException] = []

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        error = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        received.append(error)
        raise error

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread can set handlers
        return
    defaults = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    handled = {number: default for number, default in defaults.items() if signal.getsignal(number) is default}
    for number in handled:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, default in handled.items():
            signal.signal(number, default)


def _lock(descriptor: int) -> bool:
    """Take the lock that marks a build directory as in use. Return False if another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # other errors: no locks on this disk
    return True


def _is_abandoned(directory: Path, pid: int) -> bool:
    """Return whether the build that made `directory` has ended: no process has its pid or its lock.

    The lock covers builds in other containers, and pids that were reused.
    """
    if pid != os.getpid():
        try:
            os.kill(pid, 0)
            return False
        except (PermissionError, OverflowError):
            return False
        except ProcessLookupError:
            pass
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return _lock(descriptor)
    finally:
        os.close(descriptor)


def _why_not_replaceable(directory: Path) -> str:
    """Return why `--force` must not replace `directory`; "" if it holds a bundle and nothing else.

    The bundle may be damaged, or newer than this llmc: only its list of files is read.
    """
    if directory.is_symlink() or not directory.is_dir():
        return "it is a symbolic link" if directory.is_symlink() else "it is not a directory"
    try:
        with open(directory / MANIFEST_NAME, "rb", opener=_open_regular) as file:
            tree = json.loads(file.read(MAX_MANIFEST_BYTES))
        files = {*tree["files"], MANIFEST_NAME} if tree["format_version"] else set()
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return f"it has no readable {MANIFEST_NAME}, so it is not a bundle"
    unlisted = sorted(name for name in _files_in(directory) - files if not is_litter(name))
    return f"it holds {unlisted[0]!r}, which is not part of a bundle" if unlisted else ""


def _open_regular(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)  # never blocks on a pipe


def _files_in(directory: Path) -> set[str]:
    """Return everything under `directory` that is not a directory, as relative POSIX paths."""
    paths: set[str] = set()
    for root, directories, names in os.walk(directory):
        links = [name for name in directories if os.path.islink(os.path.join(root, name))]
        paths.update(Path(root, name).relative_to(directory).as_posix() for name in [*names, *links])
    return paths


def _size_of(directory: Path) -> int:
    return sum(os.lstat(directory / name).st_size for name in _files_in(directory))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
