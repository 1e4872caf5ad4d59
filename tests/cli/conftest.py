"""Builds of these tests share their traces: most tests are about what comes after the trace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _shared_traces() -> Iterator[None]:
    from support.traces import share_traces

    with pytest.MonkeyPatch.context() as patch:
        share_traces(patch)
        yield
