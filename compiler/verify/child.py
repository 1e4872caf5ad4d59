"""The verification process: it compares an engine with its checkpoint, for `llmc build` and `llmc verify`.

The task is {"prove": a Job} or {"measure": a Question}.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llmc.compiler.child_process import Messages, serve


def handle(task: dict[str, Any], messages: Messages) -> dict[str, Any]:
    """Carry out the task. Its libraries are imported here: importing this module stays cheap."""
    if "prove" in task:
        from llmc.compiler.verify.compare import STEPS, compare
        from llmc.compiler.verify.job import Job

        return asdict(compare(Job.from_json(task["prove"]), lambda done: messages.bar(done, STEPS)))
    from llmc.compiler.verify.job import Question
    from llmc.compiler.verify.measure import measure

    return measure(Question(**task["measure"]), messages.bar)


if __name__ == "__main__":
    serve(handle)
