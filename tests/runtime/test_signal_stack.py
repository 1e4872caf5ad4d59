"""Engines of OpenVINO leave the thread a signal stack that exists."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")

TWO_ENGINES = """
import os, signal, sys
from pathlib import Path
from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import EngineFile, LoadOptions
from llmc.runtime.bundle.reader import Bundle

engine = EngineFile("openvino", Bundle.open(sys.argv[1]).engine_path(), "fp32")
first, second = (load_backend(engine, LoadOptions(kv_blocks=1)) for _ in range(2))
del first
del second
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("options", [[], ["-X", "faulthandler"]], ids=["no signal stack", "a signal stack"])
def test_a_signal_is_handled_after_engines_are_freed(bundle: Callable[..., Path], options: list[str]) -> None:
    command = [sys.executable, *options, "-c", TWO_ENGINES, str(bundle("llama-tiny", "openvino"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
