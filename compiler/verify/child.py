"""The verification process of `llmc build` and `llmc verify`: compares an engine with its checkpoint.

The task is {"build": Job} from a build, or {"measure": Question} from `llmc verify`. A build may have it
prepare for an Evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmc.compiler.child_process import Messages, serve

if TYPE_CHECKING:
    from llmc.compiler.verify.evaluation_states import EvaluationStates


class Verification:
    """Carries out one task. Heavy libraries are imported only here."""

    def __init__(self) -> None:
        self._early: EvaluationStates | None = None

    def prepare(self, evaluation: Mapping[str, Any]) -> None:
        """Import torch and transformers, and run the unquantized reference if `evaluation` is not empty."""
        from llmc.compiler.verify.evaluation_states import EvaluationStates
        from llmc.compiler.verify.job import Evaluation

        if evaluation:
            self._early = EvaluationStates.early(Evaluation(**evaluation))

    def handle(self, task: dict[str, Any], messages: Messages) -> Mapping[str, Any]:
        """Carry out the task and return its result."""
        if "build" in task:
            from llmc.compiler.verify.compare import STEPS, compare
            from llmc.compiler.verify.job import Job

            job = Job.from_json(task["build"])
            return asdict(compare(job, lambda done: messages.bar(done, STEPS), self._early))
        from llmc.compiler.verify.job import Question
        from llmc.compiler.verify.measure import measure

        return measure(Question(**task["measure"]), messages.bar)


if __name__ == "__main__":
    verification = Verification()
    serve(verification.handle, verification.prepare)
