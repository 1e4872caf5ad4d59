"""No library of llmc sends telemetry: its files do not appear, and its switches are off before its import."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.waiting import LONG

ROOT = Path(__file__).parents[2]


def run(code: str, home: Path, **variables: str) -> str:
    """Run `code` in a process that knows no switch, with an empty home directory."""
    environment = {
        name: value for name, value in os.environ.items() if "TELEMETRY" not in name and name != "CI"
    }
    environment |= {"HOME": str(home), "TMPDIR": str(home), **variables}
    environment.pop("XDG_CACHE_HOME", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=LONG
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module", ["llmc.runtime.backends.onnxruntime", "llmc.compiler.calibrate.subgraph", "llmc.runtime.load"]
)
def test_onnxruntime_writes_nothing_to_the_home_directory(module: str, tmp_path: Path) -> None:
    code = f"import {module}, onnxruntime as ort; ort.SessionOptions(); print(ort.__version__)"
    assert run(code, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variable", ["ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"])
@pytest.mark.parametrize("before", [{}, {"ORT_DISABLE_TELEMETRY": "0", "HF_HUB_DISABLE_TELEMETRY": "0"}])
def test_child_processes_inherit_the_switches(variable: str, before: dict[str, str], tmp_path: Path) -> None:
    child = f"import os; print(os.environ[{variable!r}])"
    code = f"import llmc, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    assert run(code, tmp_path, **before) == "1"


def test_huggingface_hub_finds_its_telemetry_off(tmp_path: Path) -> None:
    code = "import llmc; from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    assert run(code, tmp_path) == "True"


def test_openvino_uses_the_stub_that_sends_nothing(tmp_path: Path) -> None:
    """Its converter sends an event when it is imported."""
    code = (
        "import llmc, openvino, sys\n"
        "from openvino.tools import ovc\n"
        "loaded = [name for name in sys.modules if name.startswith('openvino_telemetry.')]\n"
        "print(type(ovc.telemetry).__module__, loaded)"
    )
    assert run(code, tmp_path) == "openvino.tools.ovc.telemetry_stub []"
    assert list(tmp_path.iterdir()) == []


def test_only_modules_of_llmc_import_the_engines() -> None:
    """`llmc/__init__.py` runs before each of them; it must not import an engine itself, even indirectly."""
    first = (ROOT / "runtime/_llmc/__init__.py", ROOT / "runtime/__init__.py", ROOT / "runtime/telemetry.py")
    for file in first:
        imported = {
            name.partition(".")[0]
            for node in ast.walk(ast.parse(file.read_text("utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
        }
        assert imported <= {"__future__", "importlib", "os", "sys", "typing", "llmc"}, file
