"""The compilation settings of a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Compile-time constants and launch shape of one kernel for one SM."""

    constants: Mapping[str, int]
    num_warps: int
    num_stages: int
