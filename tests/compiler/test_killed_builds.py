"""Builds killed at random moments leave no half bundle, no process, and no file after the next build."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc import cli
from llmc.cli.main import INTERRUPTED
from llmc.compiler.bundle_writer import BundleWriter
from llmc.runtime.bundle.reader import Bundle
from support.waiting import LONG, wait_until

KILLS = max(3, settings.default.max_examples // 50)  # `make fuzz`: 20 a round
_CLI = Path(cli.__file__).parent
_MARK = "LLMC_TEST_OF_KILLED_BUILDS"  # an environment variable, by which the processes of a build are found


def processes(mark: str) -> list[int]:
    """The processes that have `mark` in their environment; a dead one that waits for its parent has none."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@settings(max_examples=KILLS, suppress_health_check=list(HealthCheck))
@given(
    sent=st.sampled_from([signal.SIGTERM, signal.SIGINT, signal.SIGKILL]),
    moment=st.floats(0, 1),
    replace=st.booleans(),
)
def test_a_build_killed_at_a_random_moment(
    sent: signal.Signals,
    moment: float,
    replace: bool,
    checkpoint: Callable[[str], Path],
    bundle: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    work = tmp_path_factory.mktemp("killed")
    seconds = moment * _duration(checkpoint, work)
    output, scratch, mark = work / "out" / "x.llmc", work / "tmp", str(random.getrandbits(64))
    scratch.mkdir()
    output.parent.mkdir()
    if replace:
        subprocess.run(["cp", "-r", str(bundle("llama-tiny")), str(output)], check=True)
    command = [sys.executable, "-m", "llmc", "build", str(checkpoint("llama-tiny"))]
    build = subprocess.Popen(
        [*command, "-o", str(output), "--force"],
        env={**os.environ, "TMPDIR": str(scratch), _MARK: mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        build.wait(seconds)
    except subprocess.TimeoutExpired:
        build.send_signal(sent)
    _, said = build.communicate(timeout=LONG)
    if f'"{_CLI}' in said or "Traceback" not in said:  # else Python was interrupted before it ran llmc
        assert build.returncode in (0, -sent, 128 + sent, INTERRUPTED), said
        assert "Traceback" not in said
    wait_until(lambda: not processes(mark))
    if output.exists():
        Bundle.open(output).verify()
    if sent != signal.SIGKILL:
        assert [path.name for path in output.parent.iterdir()] in ([], ["x.llmc"])
    with BundleWriter(output, force=True) as writer:  # the next build
        assert sorted(os.listdir(output.parent)) == sorted({writer._directory.name, *_bundles(output)})
    assert os.listdir(scratch) == []
    if replace:
        Bundle.open(output).verify()


def _bundles(output: Path) -> set[str]:
    return {output.name} if output.exists() else set()


_seconds: list[float] = []


def _duration(checkpoint: Callable[[str], Path], work: Path) -> float:
    """The seconds of a build that nothing kills, measured once."""
    if not _seconds:
        start = time.monotonic()
        command = [sys.executable, "-m", "llmc", "build", str(checkpoint("llama-tiny"))]
        subprocess.run([*command, "-o", str(work / "whole.llmc")], check=True, capture_output=True)
        _seconds.append(time.monotonic() - start)
    return _seconds[0]
