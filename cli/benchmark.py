"""A result of `llmc bench`, as `llmc report` shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A result of `llmc bench --json`. The figures are medians, defined in `bench.Measurement`."""

    #: A description of the prompts.
    workload: str
    #: A description of the processor.
    machine: str
    seconds: float
    first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
