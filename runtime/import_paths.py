"""Where a child process imports its packages from, if it starts without this process's environment."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def import_paths(*packages: str) -> list[str]:
    """Return the directories of `packages`, for the `sys.path` of a child, without importing them.

    A child that starts with `python -I` imports nothing from the working directory or from PYTHONPATH.
    """
    places = []
    for name in packages:
        spec = find_spec(name)
        places += [Path(place).absolute() for place in (spec and spec.submodule_search_locations) or ()]
    # An editable installation keeps llmc under another name. Its import hook finds it without a path.
    return list(dict.fromkeys(str(place.parent) for place in places if place.name in packages))
