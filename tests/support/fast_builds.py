"""Builds for tests that are not about child processes: they verify in this process, 5 s faster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from llmc.compiler.verify import verify_build
from llmc.compiler.verify.job import Findings, Job
from support.traces import share_traces


def verify_in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Let builds compare the engine with the checkpoint here, as long as `patch` lasts.

    Without the child, the process has torch and transformers already. The job is written and read back as
    for the child.
    """

    def in_this_process(job: Job, *_: object) -> Findings:
        from llmc.compiler.verify.compare import compare

        return compare(Job.from_json(job.to_json()))

    @contextlib.contextmanager
    def start() -> Iterator[Any]:
        yield SimpleNamespace(prepare=lambda data: None)

    patch.setattr(verify_build, "compare_in_child", in_this_process)
    patch.setattr("llmc.compiler.driver.VERIFICATION", SimpleNamespace(start=start))


@contextlib.contextmanager
def fast_builds() -> Iterator[None]:
    """Let builds verify in this process and share traces."""
    with pytest.MonkeyPatch.context() as patch:
        share_traces(patch)
        verify_in_this_process(patch)
        yield
