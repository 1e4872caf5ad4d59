"""The findings of `llmc check`. docs/reference/check-findings.md explains every kind."""

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
    """A fault or a warning about one tensor, module or file."""

    #: One of KINDS.
    kind: str
    #: The name of the tensor, the module or the file.
    tensor: str
    #: The fact, to be printed after `tensor`.
    what: str
    #: Whether the tensor is suspicious but usable.
    warning: bool = False
