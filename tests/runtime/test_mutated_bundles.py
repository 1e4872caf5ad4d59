"""A bundle with mutated files runs, or is refused in one line. Nothing else of the machine is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc.compiler.driver import compile_model
from llmc.compiler.request import BuildRequest
from support.mutated_bundles import Server, copy, mutate, signal_name

MUTATIONS = max(10, settings.default.max_examples // 10)  # `make fuzz`: 100 a round


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    home = tmp_path_factory.mktemp("home")
    server = Server(home)
    yield server, home
    server.close()


BUNDLES: dict[str, dict[str, Any]] = {
    "native": {},
    "native-int4": {"quant": "int4", "kv_dtype": "int8"},
    "two-ranks": {"tp": 2},
    "openvino": {"engine": "openvino"},
}


@pytest.fixture(scope="module", params=BUNDLES)
def built(
    request: pytest.FixtureRequest,
    checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    output = tmp_path_factory.mktemp("built") / "x.llmc"
    options = BUNDLES[request.param]
    return compile_model(BuildRequest(str(checkpoint("llama-tiny")), output, verify=False, **options)).path


@pytest.mark.slow
@settings(max_examples=MUTATIONS, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_a_mutated_bundle_runs_or_is_refused(seed: int, server: tuple[Server, Path], built: Path) -> None:
    run, home = server[0].run, server[1]
    path = copy(built, home / "mutated.llmc")
    what = mutate(path, seed)
    page = ("report", str(path), "--output", str(home / "page.html"), "--force")
    text = ("run", str(path), "Once", "--max-tokens", "2", "--kv-memory", "8MB")
    for command in (text, page, ("inspect", str(path), "--program")):
        answer = run(*command, writable=home)
        assert answer["code"] in (0, 1, 2), (what, signal_name(answer["code"]), answer["err"])
        assert answer["opened"] == [], what
        if answer["code"]:
            kinds = [line.partition(":")[0] for line in answer["err"].splitlines()]
            assert kinds == ["error", "hint"], (what, answer["err"])
