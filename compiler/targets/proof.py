"""The verification step of a build, as every target asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.compiler import verify
from llmc.compiler.progress import Progress
from llmc.compiler.quantize.stored import StoredWeight
from llmc.compiler.weights import WEIGHTS_FILE
from llmc.passes.fuse_linears import JOIN
from llmc.runtime.bundle.manifest import Verification

if TYPE_CHECKING:
    from llmc.compiler.driver import Plan


def prove(plan: Plan, graph: Path, backend: str, progress: Progress, **criteria: Any) -> Verification:
    """Compares `graph`, run by `backend`, with the checkpoint. `criteria`: fields of `verify.Job`.

    The weights lie beside the graph. Raises VerificationError when it computes something else.
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
        quantized=stored_weights(plan, graph.parent / WEIGHTS_FILE),
        **criteria,
    )
    return verify.run(job, progress)


def stored_weights(plan: Plan, file: Path) -> dict[str, StoredWeight]:
    """Quantized weight of the checkpoint -> where its rounded version lies in `file`."""
    if plan.quantization is None:
        return {}
    heights = {f"{name}.weight": module.shape[0] for name, module in plan.quantization.quantized().items()}
    found = {}
    for name, source in plan.sources.items():
        if source.array != "weight":
            continue
        arrays = {"weight": name, "weight_scale": JOIN.join(f"{part}_scale" for part in source.parts)}
        first = 0
        for part in source.parts:
            rows = (first, first + heights[part])
            found[part] = StoredWeight(source.form.name, str(file), arrays, rows)
            first = rows[1]
    return found
