"""Format a quantization plan as lines of text. Layers that differ only in their number share a row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmc.compiler.quantize.prequantized_plan import PrequantizedPlan
    from llmc.passes.quantize.plan import QuantPlan

from llmc.compiler.checkpoint.names import ranges

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def plan_lines(plan: QuantPlan) -> list[str]:
    """Return the plan as a table, with equal layers in one row, and a line with the size of the weights."""
    rows = []
    for module in plan.modules:
        if module.format:
            what, bits = module.format.name, module.format.bits_per_parameter(module.shape)
        else:
            what, bits = module.reason, float(plan.stored_bits)
        size = f"{module.shape[0]} x {module.shape[1]}"
        rows.append((module.name, size, f"{bits:.3f}".rstrip("0").rstrip("."), what))
    mib = 2**20
    return [
        *table(("modules", "out x in", "bits", "format, or why not"), rows),
        f"{len(plan.quantized())} of {len(plan.modules)} matrices in {plan.formats}: "
        f"{plan.bits_per_parameter:.2f} bits per parameter, {plan.bytes_after / mib:.1f} MiB "
        f"(before: {plan.stored_bits}, {plan.bytes_before / mib:.1f} MiB)",
    ]


def prequantized_plan_lines(plan: PrequantizedPlan) -> list[str]:
    """Return `plan_lines` for a pre-quantized checkpoint, with its producer and notes."""
    made_by = f", written by {plan.producer}" if plan.producer else ""
    return [*plan_lines(plan), f"codes and scales of the checkpoint: {plan.recipe}{made_by}", *plan.notes]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table. The first cell of a row is a module's name; equal layers are merged.
    model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj -> model.layers.0-1.mlp.up_proj
    """
    merged: dict[tuple[str, ...], list[int]] = {}
    for name, *cells in rows:
        number = _LAYER.search(name)
        layers = merged.setdefault((_LAYER.sub("{}", name, count=1), *cells), [])
        if number:
            layers.append(int(number.group()))
    named = [
        (name.replace("{}", ",".join(ranges(layers)), 1), *cells) for (name, *cells), layers in merged.items()
    ]
    widths = [max(len(row[column]) for row in [head, *named]) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *named]
    ]
