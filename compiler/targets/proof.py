"""The verification step of a build, as every target asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.compiler import verify
from llmc.compiler.progress import Progress
from llmc.runtime.bundle.manifest import Verification

if TYPE_CHECKING:
    from llmc.compiler.driver import Plan


def prove(plan: Plan, graph: Path, backend: str, progress: Progress, **criteria: Any) -> Verification:
    """Compares `graph`, run by `backend`, with the checkpoint. `criteria`: fields of `verify.Job`.

    Raises VerificationError when it computes something else.
    """
    if not plan.request.verify:
        return Verification(status="skipped", reason="switched off with --no-verify")
    job = verify.Job(
        checkpoint=str(plan.checkpoint.path),
        engine=str(graph),
        backend=backend,
        max_seq_len=plan.max_seq_len,
        vocab_size=plan.geometry.vocab_size,
        windows=sorted({layer.window for layer in plan.geometry.layers if layer.window}),
        tolerance=plan.recipe.logit_tolerance,
        needed_bytes=plan.verification_bytes,
        quantized=_formats(plan),
        **criteria,
    )
    return verify.run(job, progress)


def _formats(plan: Plan) -> dict[str, str]:
    """Quantized weight of the checkpoint -> the name of its format."""
    modules = plan.quantization.quantized() if plan.quantization else {}
    return {f"{name}.weight": module.format.name for name, module in modules.items() if module.format}
