"""A bundle with mutated files runs, or is refused in one line. Nothing else of the machine is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.mutated_bundles import Server, copy, mutate, signal_name


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    home = tmp_path_factory.mktemp("home")
    server = Server(home)
    yield server, home
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", "openvino"])
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_a_mutated_bundle_runs_or_is_refused(
    seed: int, engine: str, server: tuple[Server, Path], bundle: Callable[..., Path]
) -> None:
    run, home = server[0].run, server[1]
    path = copy(bundle("llama-tiny", engine), home / "mutated.llmc")
    what = mutate(path, seed)
    answer = run("run", str(path), "Once", "--max-tokens", "2", "--kv-memory", "8MB", writable=home)
    assert answer["code"] in (0, 1, 2), (what, signal_name(answer["code"]), answer["err"])
    assert answer["opened"] == [], what
    if answer["code"]:
        kinds = [line.partition(":")[0] for line in answer["err"].splitlines()]
        assert kinds == ["error", "hint"], (what, answer["err"])
