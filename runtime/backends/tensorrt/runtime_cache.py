"""The kernels that TensorRT-RTX compiles when an engine runs, kept on disk for the next start.

An engine of TensorRT-RTX holds its kernels as source text. Without this file every start compiles them again.
TensorRT calls the compiled kernels a runtime cache. One file serves one engine on one GPU model.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from pathlib import Path

from llmc.runtime.cache_directory import cache_directory

MAX_BYTES = 1 << 30  # of all files; the least recently used are removed first
_MAGIC = b"llmc runtime cache 1\n"
_SUFFIX = ".runtime-cache"
_DIGEST_BYTES = hashlib.sha256().digest_size


class RuntimeCacheFile:
    """A file with the compiled kernels of an engine.

    TensorRT gets its contents only if their checksum is right. A file that is missing, damaged or too large
    is ignored, and the next `write` replaces it. An error of the disk never makes a start fail.
    """

    def __init__(self, plan_sha256: str, sm: int, gpu: str, version: str) -> None:
        """Derive the file's name.

        plan_sha256: the hash of the engine file. sm, gpu: the GPU's SM and name. version: TensorRT's version.
        """
        key = "\n".join((plan_sha256, str(sm), gpu, version))
        folder = cache_directory("tensorrt")
        self.path: Path | None = None
        if folder is not None:
            self.path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}{_SUFFIX}"
        self._known = b""  # the checksum of the file's contents

    def read(self) -> bytes | None:
        """Return the contents that were written last, or None."""
        if self.path is None:
            return None
        try:
            if self.path.stat().st_size > MAX_BYTES:
                return None
            data = self.path.read_bytes()
            os.utime(self.path)
        except OSError:
            return None
        start = len(_MAGIC) + _DIGEST_BYTES
        digest, contents = data[len(_MAGIC) : start], data[start:]
        if not data.startswith(_MAGIC) or hashlib.sha256(contents).digest() != digest:
            return None
        self._known = digest
        return contents

    def write(self, contents: bytes) -> None:
        """Replace the file atomically, unless it holds `contents`.

        Then remove the oldest files of other engines until all files take at most MAX_BYTES.
        """
        digest = hashlib.sha256(contents).digest()
        data = _MAGIC + digest + contents
        if self.path is None or digest == self._known or len(data) > MAX_BYTES:
            return
        with contextlib.suppress(OSError):  # with a read-only home the next start compiles again
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft = self.path.with_suffix(f".tmp-{os.getpid()}-{threading.get_ident()}")
            try:
                draft.write_bytes(data)
                os.replace(draft, self.path)
            finally:
                draft.unlink(missing_ok=True)
            self._known = digest
            self._remove_oldest()

    def _remove_oldest(self) -> None:
        assert self.path is not None
        total = 0
        files = [(path.stat(), path) for path in self.path.parent.iterdir()]
        for entry, path in sorted(files, key=lambda file: (file[1] != self.path, -file[0].st_mtime_ns)):
            total += entry.st_size
            if total > MAX_BYTES:
                path.unlink(missing_ok=True)
