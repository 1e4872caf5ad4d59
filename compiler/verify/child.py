"""The verification process of `llmc build` and `llmc verify`: compares an engine with its checkpoint.

The task is {"build": Job} from a build, or {"measure": Question} from `llmc verify`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llmc.compiler.child_process import Messages, serve


def handle(task: dict[str, Any], messages: Messages) -> dict[str, Any]:
    """Carry out the task and return its result. Heavy libraries are imported only here."""
    if "build" in task:
        from llmc.compiler.verify.compare import STEPS, compare
        from llmc.compiler.verify.job import Job

        return asdict(compare(Job.from_json(task["build"]), lambda done: messages.bar(done, STEPS)))
    from llmc.compiler.verify.job import Question
    from llmc.compiler.verify.measure import measure

    return measure(Question(**task["measure"]), messages.bar)


if __name__ == "__main__":
    serve(handle)
