"""The cache directories of llmc. Their contents can always be recomputed."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory(name: str) -> Path | None:
    """Return `$XDG_CACHE_HOME/llmc/NAME`, or None without a home directory. It may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    return Path(base, "llmc", name) if os.path.isabs(base) else None
