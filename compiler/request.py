"""What a build is asked to do: one frozen object from the command line to the driver."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmc.runtime.errors import BuildError

TARGETS = ("cpu",)
DTYPES = ("auto", "fp32")


@dataclass(frozen=True)
class BuildRequest:
    """checkpoint: a directory or a hub id. output: the bundle to write.

    dtype: what the engine computes in; `auto` is fp32 on the CPU, where nothing else is exact.
    max_seq_len: prompt and answer together, in tokens; None is the model's own context.
    verify: compare the engine with transformers, and fail the build when they differ.
    force: replace an existing bundle.
    Raises BuildError for a value that means nothing.
    """

    checkpoint: str
    output: Path
    target: str = "cpu"
    dtype: Literal["auto", "fp32"] = "auto"
    max_seq_len: int | None = None
    revision: str | None = None
    verify: bool = True
    force: bool = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise BuildError(f"there is no target {self.target!r}", f"known targets: {', '.join(TARGETS)}")
        if self.dtype not in DTYPES:
            raise BuildError(f"there is no dtype {self.dtype!r}", f"known dtypes: {', '.join(DTYPES)}")
        if self.max_seq_len is not None and self.max_seq_len < 1:
            raise BuildError(f"--max-seq-len is {self.max_seq_len}", "give a number of tokens, at least 1")
