"""Fixtures that several test files share: zoo checkpoints and bundles, made once a session."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Property tests try the same examples everywhere and always; `make fuzz` searches with new seeds.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.register_profile(
    "fuzz", derandomize=False, deadline=None, database=None, max_examples=1000, print_blob=True
)
settings.load_profile("fixed")  # `pytest --hypothesis-profile=...` comes later and wins

# Tiny models: more threads of torch's only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--native-libraries", type=Path, help="test the native engine's libraries of this folder"
    )


def pytest_configure(config: pytest.Config) -> None:
    if folder := config.getoption("--native-libraries"):
        from llmc.plugins.cpu import library

        library.LIBRARIES = folder.resolve()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write failures at once to the file that `fuzz.py` names: it may end before pytest prints them."""
    file = os.environ.get("LLMC_TEST_FAILURES")
    if report.failed and file and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(file, "a", encoding="utf-8") as failures:
            failures.write(f"{report.nodeid}\n{report.longreprtext}\n")


SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Handle SIGINT as in a terminal. It is ignored in a job that a shell started in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signal_handlers(interruptible: None) -> Iterator[None]:
    """Fail a test that leaves a signal handler behind: a later test of signals would fail instead."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.fixture(autouse=True, scope="session")
def no_calibration_cache() -> Iterator[None]:
    """Let every build calibrate: a test of two builds would compare one calibration with itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmc.compiler.calibrate.cache.cache_directory", lambda name: None)
        yield


@pytest.fixture
def fast_builds() -> Iterator[None]:
    """Let builds verify in this process and share traces: for tests that are not about child processes."""
    from support import fast_builds

    with fast_builds.fast_builds():
        yield


@pytest.fixture
def own_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each build trace its model: for tests that compare two builds."""
    from llmc.compiler.trace import export
    from support import traces

    monkeypatch.setattr(export, "trace", traces.trace)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """zoo name -> directory of a random checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        from llmc.compiler import zoo

        return root / name if (root / name).exists() else zoo.make(name, root / name)

    return get


@pytest.fixture(scope="session")
def bundle(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """zoo name and engine (None: the default) -> its bundle for the CPU, built once and not verified."""
    root = tmp_path_factory.mktemp("bundles")

    def get(name: str, engine: str | None = None) -> Path:
        from llmc.compiler.driver import compile_model
        from llmc.compiler.request import BuildRequest
        from support.traces import share_traces

        path = root / (engine or "default") / f"{name}.llmc"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with pytest.MonkeyPatch.context() as patch:
                share_traces(patch)
                compile_model(BuildRequest(str(checkpoint(name)), path, engine=engine, verify=False))
        return path

    return get


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real trained checkpoint, where the machine has one."""
    path = SHARED / "checkpoints" / "stories260K"
    if not path.is_dir():
        pytest.skip("the trained checkpoint stories260K is not on this machine")
    return path
