"""Rows about modules as lines of text, the layers that differ in their number alone in one row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of `head` and `rows`, in columns. The first cell of a row is a module's name.

    model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj -> model.layers.0-1.mlp.up_proj
    """
    merged: dict[tuple[str, ...], list[int]] = {}
    for name, *cells in rows:
        number = _LAYER.search(name)
        layers = merged.setdefault((_LAYER.sub("{}", name, count=1), *cells), [])
        if number:
            layers.append(int(number.group()))
    named = [(name.replace("{}", _ranges(layers), 1), *cells) for (name, *cells), layers in merged.items()]
    widths = [max(len(row[column]) for row in [head, *named]) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *named]
    ]


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
