"""Match modules with the entries of `ignore`, `exclude_modules`, `modules_to_not_convert` and `targets`."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable


def matches(module: str, entries: Iterable[str]) -> bool:
    """Return whether one of `entries` matches `module`. An entry is one of:

    * the whole name of the module, or the name of a module that contains it ("model.visual")
    * the end of its name ("lm_head", "mlp.gate")
    * shell wildcards (ModelOpt)
    * `re:` and a regular expression for the start of its name (compressed-tensors)

    Class names ("Linear") match nothing: a checkpoint has no classes.
    """
    return any(_matches(module, entry) for entry in entries)


def _matches(module: str, entry: str) -> bool:
    if entry.startswith("re:"):
        try:
            return re.match(entry[3:], module) is not None
        except re.error:
            return False
    if any(char in entry for char in "*?["):
        return fnmatch.fnmatchcase(module, entry)
    return f".{module}.".startswith(f".{entry}.") or f".{module}.".endswith(f".{entry}.")
