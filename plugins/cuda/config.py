"""The compilation settings of a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Compile-time constants and launch shape of one kernel for one SM."""

    #: Name of a `tl.constexpr` parameter -> its value.
    constants: Mapping[str, int]
    #: Warps per thread block.
    num_warps: int
    #: Stages of software pipelining.
    num_stages: int
