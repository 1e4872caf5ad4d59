"""The check that the libraries in a manifest's `target.requires` are installed, for CPU engines.

`tensorrt/checks.py` has the rule for TensorRT: exactly the version of the build.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import metadata

from llmc.runtime.errors import BackendError, BundleError
from llmc.runtime.installation import install_hint

# Libraries whose interface changes between releases. Others may be newer than the build's.
_SAME_RELEASE = ("openvino",)
_VERSION = re.compile(r"\d{1,9}(?:\.\d{1,9}){0,7}")


def check_requirements(
    requires: Mapping[str, str], name: str, installed: Callable[[str], str | None] | None = None
) -> None:
    """Raise BackendError, naming every library, unless the installed ones are what the engine needs.

    requires: library -> version, such as "2026.4".
    name: the bundle's name, for messages.
    installed: returns the version of a library, or None if it is missing. The default asks the installation.

    openvino must be of the same release: 2026.4 accepts 2026.4.1, not 2026.5. Any other library may be newer.
    Raises BundleError if a version in `requires` is not a number.
    """
    faults, extras = [], []  # the extra that installs a library has its name
    for library, wanted in sorted(requires.items()):
        if not _VERSION.fullmatch(wanted):
            raise BundleError(
                f"{name} needs {library} {wanted!r}, which is not a version", "build the bundle again"
            )
        version = (installed or _installed)(library)
        need = f"{library} {wanted}" + ("" if library in _SAME_RELEASE else " or newer")
        if version is None:
            faults.append(f"it needs {need}, which is not installed")
            extras.append(library)
        elif not _fits(_numbers(version), _numbers(wanted), library in _SAME_RELEASE):
            faults.append(f"it needs {need}, and {version} is installed")
            extras.append(library)
    if faults:
        raise BackendError(
            f"{name} cannot run here: {'; '.join(faults)}",
            f"{install_hint(','.join(extras))}, or build the bundle again with this llmc",
        )


def _fits(installed: tuple[int, ...], wanted: tuple[int, ...], same_release: bool) -> bool:
    padded = installed + (0,) * (len(wanted) - len(installed))
    return padded[: len(wanted)] == wanted if same_release else padded >= wanted


def _numbers(version: str) -> tuple[int, ...]:
    match = _VERSION.match(version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _installed(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
