"""The reader of bundles. It checks the manifest, the list of files and their bytes before anything is used.

Hashing gigabytes at every start would take seconds. So the reader records the identity of each hashed file
(device, inode, size, mtime, ctime), and hashes it again only when the identity changes.
FORMAT.md, "What opening guarantees", says which damage this finds.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shlex
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmc.runtime.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from llmc.runtime.cache_directory import cache_directory
from llmc.runtime.cpus import available_cpus
from llmc.runtime.errors import BundleError

Identity = list[int]  # device, inode, size, mtime_ns, ctime_ns

_CHUNK = 2**20
_HASH_THREADS = 8
_TICK_NS = 2 * 10**9  # the coarsest timestamps in use (FAT); most file systems have milliseconds
_SAFE_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # no links, no blocking on pipes
_COPY_AGAIN = "copy the bundle again, or rebuild it with `llmc build --force`"
# Files that file managers, file systems and download tools put into directories. No listed file can have such
# a name, and llmc reads none of them. FORMAT.md lists them.
_LITTER = re.compile(
    r"\.DS_Store|\._.*|\.localized|\.cache|\.directory|\.nfs.*|\.fuse_hidden.*|Thumbs\.db|desktop\.ini|@eaDir"
)
# Files of a repository that holds a bundle. They are ignored at the top of a bundle, unless listed.
_REPOSITORY = re.compile(r"\.git|\.gitattributes|\.gitignore|README\.md|LICENSE(\.txt|\.md)?")
_DOWNLOAD_CACHE = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)")


@dataclass(frozen=True)
class Bundle:
    """An open bundle."""

    #: The directory: an absolute path without symbolic links.
    path: Path
    #: The checked manifest.
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify_hashes: bool = True) -> Bundle:
        """Open and check the bundle at `path`. Raises BundleError, naming the file, for every fault.

        The manifest, the set of files and their sizes are always checked. With `verify_hashes`, the sha256 of
        every file that has changed since it was last hashed here is checked too.
        """
        root = Path(path)
        data = _read_manifest(root)
        root = root.resolve()
        bundle = cls(root, Manifest.from_json(data))
        identities = bundle._check_files()
        if verify_hashes:
            bundle._check_hashes(identities, _load_stamps(root))
        return bundle

    def verify(self) -> None:
        """Hash every file now, also those whose identity is recorded. Raises BundleError."""
        self._check_hashes(self._check_files(), {})

    @property
    def name(self) -> str:
        """The name of the directory, without ".llmc"."""
        return self.path.name.removesuffix(".llmc")

    def engine_path(self, rank: int = 0) -> Path:
        """Return the engine file of `rank`. Raises BundleError if the bundle has none."""
        for engine in self.manifest.engines:
            if engine.rank == rank:
                return self.path / engine.file
        raise BundleError(f"{self.path}: no engine for rank {rank}, it has {len(self.manifest.engines)}")

    @property
    def tokenizer_dir(self) -> Path | None:
        """The directory of the tokenizer; None if the bundle was built without one."""
        has_one = any(name.startswith("tokenizer/") for name in self.manifest.files)
        return self.path / "tokenizer" if has_one else None

    def _check_files(self) -> dict[str, Identity]:
        """Check that exactly the listed files exist, with their sizes. Return the identity of each."""
        listed = self.manifest.files
        directories = {"", *(str(parent) for name in listed for parent in _parents(name))}
        identities = {}
        for name, entry in _walk(self.path, directories):
            if name not in listed and (is_litter(name) or _REPOSITORY.fullmatch(name)):
                continue
            if stat.S_ISLNK(entry.st_mode):
                raise _symbolic_link(self.path, name)
            if name not in listed:
                raise BundleError(f"{self.path}: {name!a} is not in the manifest", "remove it")
            if not stat.S_ISREG(entry.st_mode):
                raise BundleError(f"{self.path}: {name!r} is not a regular file", _COPY_AGAIN)
            if entry.st_size != listed[name].bytes:
                sizes = f"{entry.st_size} bytes, the manifest says {listed[name].bytes}"
                raise BundleError(f"{self.path}: {name!r} has {sizes}", _COPY_AGAIN)
            identities[name] = _identity(entry)
        for name in listed:
            if name not in identities:
                raise BundleError(f"{self.path}: {name!r} is missing", _COPY_AGAIN)
        return identities

    def _check_hashes(self, identities: dict[str, Identity], known: dict[str, object]) -> None:
        stamps = {
            name: [*identity, self.manifest.files[name].sha256] for name, identity in identities.items()
        }
        changed = {name for name, stamp in stamps.items() if known.get(name) != stamp}
        if not changed:
            return
        started = time.time_ns()
        _hash_all(self, sorted(changed, key=lambda name: (-identities[name][2], name)), identities)
        # A file that is written and hashed in one tick of the clock can be written again with the same mtime.
        fresh = {name for name in changed if max(identities[name][3:5]) + _TICK_NS >= started}
        _save_stamps(self.path, {name: stamp for name, stamp in stamps.items() if name not in fresh})


def sha256_of_file(path: Path, identity: Identity | None = None, stop: threading.Event | None = None) -> str:
    """Return the sha256 of a file as hexadecimal digits, in bounded memory.

    identity: the expected identity. stop: ends the reading early; the result is then meaningless.
    Raises BundleError if the file's identity differs from `identity`.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0, opener=lambda name, _: os.open(name, _SAFE_OPEN)) as file:
        before = os.fstat(file.fileno())
        while (count := file.readinto(buffer)) and not (stop and stop.is_set()):
            digest.update(buffer[:count])
        if identity and not identity == _identity(before) == _identity(os.fstat(file.fileno())):
            raise BundleError(f"{path} changed while it was read", "wait until nothing writes to the bundle")
    return digest.hexdigest()


def _hash_all(bundle: Bundle, names: list[str], identities: dict[str, Identity]) -> None:
    from concurrent.futures import ThreadPoolExecutor, as_completed  # not needed by a warm start

    stop = threading.Event()
    with ThreadPoolExecutor(min(_HASH_THREADS, available_cpus())) as pool:
        jobs = {
            pool.submit(sha256_of_file, bundle.path / name, identities[name], stop): name for name in names
        }
        try:
            for job in as_completed(jobs):
                name = jobs[job]
                expected, actual = bundle.manifest.files[name].sha256, job.result()
                if actual != expected:
                    contents = f"sha256 {actual[:12]}..., the manifest says {expected[:12]}..."
                    raise BundleError(f"{bundle.path}: {name!r} is damaged: {contents}", _COPY_AGAIN)
        except OSError as error:
            raise BundleError(
                f"{bundle.path}: cannot read {name!r}: {error.strerror}", _COPY_AGAIN
            ) from error
        finally:
            stop.set()  # after an error or Ctrl-C the other files need not be read
            for job in jobs:
                job.cancel()


def _read_manifest(root: Path) -> bytes:
    hint = "`llmc build CHECKPOINT -o NAME.llmc` makes one"
    if not root.is_dir():
        fact = "is not a directory" if os.path.lexists(root) else "does not exist"
        backups = sorted(root.absolute().parent.glob(f".{glob.escape(root.name)}.old-*")) if root.name else []
        if backups:
            hint = f"a build was killed while replacing it: mv {backups[0]} {root}"
        raise BundleError(f"not a bundle: {root} {fact}", hint)
    try:
        with open(root / MANIFEST_NAME, "rb", opener=lambda name, _: os.open(name, _SAFE_OPEN)) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        if (root / "config.json").exists():
            hint = f"it looks like a checkpoint: compile it with `llmc build {root} -o NAME.llmc`"
        raise BundleError(f"not a bundle: {root} has no {MANIFEST_NAME}", hint) from None
    except OSError as error:
        if (root / MANIFEST_NAME).is_symlink():
            raise _symbolic_link(root, MANIFEST_NAME) from error
        raise BundleError(f"{root}: cannot read {MANIFEST_NAME}: {error.strerror}", _COPY_AGAIN) from error
    raise BundleError(f"{root}: {MANIFEST_NAME} is not a regular file", _COPY_AGAIN)


def is_litter(name: str) -> bool:
    """Return whether a file manager, a file system or a download tool made the file or directory `name`."""
    return any(_LITTER.fullmatch(part) for part in name.split("/"))


def _symbolic_link(root: Path, name: str) -> BundleError:
    """Return the error for a link. The hint has the command that gets regular files instead.

    The download cache of Hugging Face stores a repository as links. The engines refuse weights behind links.
    """
    path = root.absolute()
    for part in path.parts:
        if match := _DOWNLOAD_CACHE.fullmatch(part):
            repository, folder = (
                f"{match['owner']}/{match['name']}",
                f"{match['name'].removesuffix('.llmc')}.llmc",
            )
            revision = f" --revision {path.name}" if path.parent.name == "snapshots" else ""
            command = f"hf download {shlex.quote(repository)}{revision} --local-dir {shlex.quote(folder)}"
            break
    else:
        command = (
            f"cp -rL {shlex.quote(str(path))} {shlex.quote(path.name.removesuffix('.llmc') + '-copy.llmc')}"
        )
        if path.parent.name == "snapshots":
            command += "`, or download it again with `hf download ORG/NAME --local-dir NAME.llmc"
    return BundleError(
        f"{root}: {name!a} is a symbolic link, and the engines read regular files only",
        f"get regular files with `{command}`",
    )


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _walk(root: Path, directories: set[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Yield everything under `root` except the manifest and `directories`. Enters only these, no links."""
    pending = [""]
    try:
        while pending:
            prefix = pending.pop()
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    name = f"{prefix}/{entry.name}" if prefix else entry.name
                    if entry.is_dir(follow_symlinks=False) and name in directories:
                        pending.append(name)
                    elif name != MANIFEST_NAME:
                        yield name, entry.stat(follow_symlinks=False)
    except OSError as error:
        raise BundleError(f"{root}: cannot read {prefix or root}: {error.strerror}", _COPY_AGAIN) from error


def _identity(entry: os.stat_result) -> Identity:
    return [entry.st_dev, entry.st_ino, entry.st_size, entry.st_mtime_ns, entry.st_ctime_ns]


def _stamp_file(root: Path) -> Path | None:
    """Return the file that records the identities of a bundle's files, or None without a home directory."""
    folder = cache_directory("verified")
    key = hashlib.sha256(os.fsencode(root)).hexdigest()
    return folder / f"{key}.json" if folder else None


def _load_stamps(root: Path) -> dict[str, object]:
    """Return file name -> [*identity, sha256]. Empty if no record exists or can be read."""
    path = _stamp_file(root)
    try:
        stamps = json.loads(path.read_bytes()) if path else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def _save_stamps(root: Path, stamps: Mapping[str, object]) -> None:
    path = _stamp_file(root)
    if path is None:
        return
    with contextlib.suppress(OSError):  # with a read-only home the next start is slower
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_suffix(f".tmp-{os.getpid()}-{threading.get_ident()}")
        draft.write_text(json.dumps(stamps))
        os.replace(draft, path)
