"""What every part of the check is given, and what it gives back."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

# One result: a `name`, a `status` (passed, failed, measured, absent) and whatever was found. JSON.
Row = dict[str, Any]


def failure(name: str, error: Exception) -> Row:
    """The result of what raised."""
    said = "".join(traceback.format_exception(error))
    return {"name": name, "status": "failed", "error": f"{type(error).__name__}: {error}", "traceback": said}


@dataclass(frozen=True)
class Options:
    """seed: of all random inputs. share: (index, count), for a part that several processes run at once."""

    seed: int
    quick: bool = False
    engine: str | None = None
    share: tuple[int, int] = (0, 1)
