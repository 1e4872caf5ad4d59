"""The process that `process.py` starts: a task as JSON on stdin; progress, then one JSON object on stdout.

A process of its own keeps a build's memory small, and makes a message of an engine's crash.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any, TextIO

from llmc.runtime.errors import LlmcError

_messages: TextIO = sys.stdout


def _say(**message: Any) -> None:
    print(json.dumps(message), file=_messages, flush=True)


def main() -> None:
    global _messages
    _messages = os.fdopen(os.dup(1), "w")  # stdout is for messages alone:
    os.dup2(2, 1)  # what libraries print goes to stderr
    task = json.load(sys.stdin)
    try:
        _say(**_prove(task["prove"]) if "prove" in task else _measure(task["measure"]))
    except LlmcError as error:
        _say(error={"kind": type(error).__name__, "message": error.message, "hint": error.hint})


def _prove(data: dict[str, Any]) -> dict[str, Any]:
    from llmc.compiler.verify.compare import STEPS, compare
    from llmc.compiler.verify.job import Job

    return asdict(compare(Job.from_json(data), lambda done: _say(done=done, total=STEPS)))


def _measure(data: dict[str, Any]) -> dict[str, Any]:
    from llmc.compiler.verify.job import Question
    from llmc.compiler.verify.measure import measure

    return measure(Question(**data), lambda done, total: _say(done=done, total=total))


if __name__ == "__main__":
    main()
