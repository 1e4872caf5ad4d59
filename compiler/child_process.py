"""Runs `child.py`: one JSON object to its stdin; from its stdout progress, then one JSON object."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from llmc.compiler.progress import Progress
from llmc.runtime.errors import BuildError, LlmcError, RequestError


def run_child(task: Mapping[str, Any], progress: Progress, out_of_memory: str) -> dict[str, Any]:
    """What the child found. `out_of_memory`: the hint for a child that the kernel killed.

    Raises RequestError with the child's message for a text it cannot use; BuildError where it breaks.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    result: dict[str, Any] | None = None
    with tempfile.TemporaryFile("w+", errors="replace") as stderr:  # (a pipe that nobody reads would fill up)
        child = subprocess.Popen(
            [sys.executable, "-m", "llmc.compiler.verify.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
        )
        assert child.stdin and child.stdout
        try:
            with contextlib.suppress(BrokenPipeError):  # a child that is gone already says why on stderr
                child.stdin.write(json.dumps(task))
                child.stdin.close()
            for line in child.stdout:
                message = json.loads(line)
                if "done" in message:
                    progress.bar(message["done"], message["total"])
                else:
                    result = message
            code = child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        stderr.seek(0)
        complaint = stderr.read().strip().splitlines()
    if code == 0 and result is not None and "error" in result:
        raise _error(result["error"])
    if code != 0 or result is None:
        how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        last = complaint[-1] if complaint else "no message"
        raise BuildError(
            f"the verification process {how}: {last}",
            f"it may have run out of memory; {out_of_memory}" if code == -9 else "please report this",
        )
    return result


def _error(said: Mapping[str, str]) -> LlmcError:
    kind = RequestError if said["kind"] == "RequestError" else BuildError
    return kind(said["message"], said["hint"])
