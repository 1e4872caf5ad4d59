"""Findings of `llmc check`: one tensor or setting each.

docs/reference/check-findings.md explains every kind.
"""

from __future__ import annotations

from dataclasses import dataclass

# The sections of docs/reference/check-findings.md.
KINDS = (
    "config",
    "format",
    "missing",
    "shape",
    "dtype",
    "value",
    "magnitude",
    "exclude",
    "unclaimed",
    "fused",
)


@dataclass(frozen=True)
class Finding:
    """kind: one of KINDS; tensor: its name (or a module's, or a file's); warning: suspicious, but usable."""

    kind: str
    tensor: str
    what: str
    warning: bool = False
