"""The options and the results of a part of the check."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

# One result as JSON: a `name`, a `status` (passed, failed, measured, absent) and other fields.
Row = dict[str, Any]


def failure(name: str, error: Exception) -> Row:
    """Return the result of a part that raised `error`."""
    trace = "".join(traceback.format_exception(error))
    return {"name": name, "status": "failed", "error": f"{type(error).__name__}: {error}", "traceback": trace}


@dataclass(frozen=True)
class Options:
    """The options of a run."""

    #: The seed of all random inputs.
    seed: int
    #: Fewer cases.
    quick: bool = False
    #: The path of a TensorRT bundle to load and run.
    engine: str | None = None
    #: (index, count) of this process, for a part that several processes run at once.
    share: tuple[int, int] = (0, 1)
