"""The cache key of a build: a hash of its inputs, options and versions.

A build is skipped if its output exists and records the same key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc import __version__
from llmc.compiler.checkpoint import hub
from llmc.compiler.request import BuildRequest
from llmc.runtime.bundle.manifest import Manifest

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

FIELD = "build_sha256"  # in `verification.details` of the manifest
_LIBRARIES = (
    *("torch", "transformers", "tokenizers", "numpy", "ml-dtypes", "safetensors"),
    *("onnx", "onnx-ir", "onnxscript", "openvino", "onnxruntime"),
)
_GPU_LIBRARIES = ("onnx-graphsurgeon", "tensorrt", "tensorrt-rtx", "triton")
# Fields of BuildRequest that are hashed by content instead, or do not change the bundle.
_NO_OPTIONS = ("checkpoint", "output", "revision", "calibration", "force")
_PACKAGES = ("compiler", "passes", "plugins", "runtime", "model_zoo")
_SUFFIXES = (".py", ".toml", ".txt")


def build_key(request: BuildRequest, name: str, files: Mapping[str, str]) -> str:
    """Return the sha256 of a build's inputs, options and versions.

    name: the checkpoint's name in the manifest
    files: sha256 of the checkpoint's files, by name
    """
    options = {field.name: getattr(request, field.name) for field in fields(request)}
    calibration = request.calibration
    hashed: dict[str, Any] = {
        "options": {key: value for key, value in options.items() if key not in _NO_OPTIONS},
        "calibration": hashlib.sha256(calibration.read_bytes()).hexdigest() if calibration else None,
        "checkpoint": {"name": name, "files": dict(files)},
        **software(request.target),
    }
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def software(target: str) -> dict[str, Any]:
    """Return the versions and the hash of the code that a build for `target` depends on."""
    libraries = _LIBRARIES + (() if target == "cpu" else _GPU_LIBRARIES)
    versions = {"llmc": __version__, **{library: _version(library) for library in libraries}}
    return {"versions": versions, "code": _code()}


def recorded_key(manifest: Manifest) -> str | None:
    """Return the key in a manifest; None if an older llmc wrote it."""
    key = manifest.verification.details.get(FIELD)
    return key if isinstance(key, str) else None


def source_name(checkpoint: str, path: Path) -> str:
    """Return the checkpoint's name without this machine's paths: the hub id, or the directory's own name."""
    repository = None if Path(checkpoint).exists() else hub.parse(checkpoint)
    return repository.id if repository else path.resolve().name


@lru_cache(maxsize=1)
def _code() -> str:
    """Return the sha256 of llmc's source files. In a clone they change while the version stays the same."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for name, data in sorted(_files(resources.files(f"llmc.{package}"), package)):
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _files(directory: Traversable, name: str) -> list[tuple[str, bytes]]:
    """Return (path, content) of every source file under `directory`. Paths begin with `name`."""
    files = []
    for entry in directory.iterdir():
        path = f"{name}/{entry.name}"
        if entry.is_dir():
            files += _files(entry, path)
        elif Path(entry.name).suffix in _SUFFIXES:
            files.append((path, entry.read_bytes()))
    return files


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
