"""Compare the tensor names and shapes of a checkpoint with those that the model expects."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from llmc.runtime.errors import CheckpointError

_COMPARED = 50  # unused names that a missing one is compared with; each comparison is slow


class Shaped(Protocol):
    """A tensor, or a quantized module that stands for one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def compare_names(
    expected: Mapping[str, Sequence[int]], tensors: Mapping[str, Shaped], unused: Iterable[str] = ()
) -> None:
    """Check that `tensors` has what the model expects.

    expected: name -> shape; tied parameters once
    tensors: the checkpoint's tensors, by their names in the model
    unused: the names of tensors that the model lacks, for the message

    Raises CheckpointError with a short difference: layers are collapsed, and a missing name is paired with
    the nearest unused one.
    """
    missing = collapse(name for name in expected if name not in tensors)
    extra = collapse(unused)
    shapes: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name in expected:
        if name in tensors and tuple(expected[name]) != tensors[name].shape:
            shapes[str(list(tensors[name].shape)), str(list(expected[name]))].append(name)
    facts: list[str] = []
    for name in missing:
        near = difflib.get_close_matches(name, extra[:_COMPARED], n=1, cutoff=0.8)
        facts.append(f"no {name}" + (f" (it has {near[0]})" if near else ""))
        extra = [other for other in extra if other not in near]
    facts += [
        f"{name} is {got}, not {want}" for (got, want), names in shapes.items() for name in collapse(names)
    ]
    if facts:
        facts += [f"unexpected {name}" for name in extra]
        more = [f"and {len(facts) - 6} more differences"] if len(facts) > 6 else []
        raise CheckpointError(
            "the checkpoint does not fit its config.json: " + "; ".join(facts[:6] + more),
            hint="config.json and the weights are of different models or versions; download both again",
        )


def collapse(names: Iterable[str]) -> list[str]:
    """Merge names that differ only in numbers: `model.layers.{0-27}.mlp.gate_proj.weight`."""
    groups: defaultdict[str, list[list[int]]] = defaultdict(list)
    for name in names:
        parts = name.split(".")
        numbers = [int(part) for part in parts if part.isdecimal()]
        groups[".".join("#" if part.isdecimal() else part for part in parts)].append(numbers)
    collapsed = []
    for template, rows in groups.items():
        pieces = template.split("#")
        columns = [_braced(set(column)) for column in zip(*rows, strict=True)]
        collapsed.append("".join(a + b for a, b in zip(pieces, [*columns, ""], strict=True)))
    return collapsed


def ranges(numbers: Iterable[int]) -> list[str]:
    """Return the runs of consecutive numbers: [0, 1, 2, 5] -> ["0-2", "5"]."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return [f"{first}-{last}" if last > first else str(first) for first, last in runs]


def _braced(numbers: set[int]) -> str:
    """Format numbers: {3} -> "3", {0, 1, 2, 5} -> "{0-2,5}". At most four runs are shown."""
    runs = ranges(numbers)
    text = ",".join(runs[:4]) + (",..." if len(runs) > 4 else "")
    return text if len(numbers) == 1 else "{" + text + "}"
