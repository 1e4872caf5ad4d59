"""The verification's own process: what it says on stdout and stderr beside its messages does no harm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmc.compiler import child_process
from llmc.compiler.progress import Silent
from llmc.runtime.errors import BuildError

TASK = {"measure": {"no such": "field"}}  # not a task: the child fails with a traceback


def test_a_child_that_says_much_on_stderr_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python lists every import there, more than a pipe holds."""
    monkeypatch.setenv("PYTHONVERBOSE", "1")
    with pytest.raises(BuildError, match="the verification process failed with exit code 1"):
        child_process.run_child(TASK, Silent(), "")


def test_what_libraries_print_goes_to_stderr(tmp_path: Path) -> None:
    """oneDNN and others can be asked to print to stdout, past Python."""
    script = tmp_path / "child.py"
    script.write_text(
        "import os\n"
        "from llmc.compiler.verify import child\n"
        "child._measure = lambda data: os.write(1, b'from a library\\n') and {'found': data}\n"
        "child.main()\n"
    )
    ran = subprocess.run(
        [sys.executable, str(script)], input='{"measure": 5}', capture_output=True, text=True, check=True
    )
    assert ran.stdout == '{"found": 5}\n'
    assert "from a library" in ran.stderr
