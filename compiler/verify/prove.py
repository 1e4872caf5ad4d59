"""The verification step of a build, as every target asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.compiler import verify
from llmc.compiler.checkpoint.safetensors import read_header
from llmc.compiler.progress import Progress
from llmc.compiler.verify.engine_weights import ActivationQuantization, EngineWeight
from llmc.compiler.weights.write import WEIGHTS_FILE
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
        quantized=engine_weights(plan, graph.parent / WEIGHTS_FILE),
        reference_weights="dequantized" if plan.stored else "checkpoint",
        **criteria,
    )
    return verify.run(job, progress)


def engine_weights(plan: Plan, file: Path) -> dict[str, EngineWeight]:
    """Quantized weight of the checkpoint -> where its rounded version lies in `file`.

    Of a checkpoint that came quantized, only the layers that round their inputs, and no versions.
    """
    header = read_header(file) if plan.matrices else {}
    found = {}
    for matrix in plan.matrices:
        arrays = {array: matrix.initializer(array) for array in matrix.format.layout(matrix.shape)}
        rounding, first = None, 0
        if kind := matrix.format.activations:
            scale = float(header[matrix.initializer("input_scale")].read())
            module = plan.quantization.quantized()[matrix.modules[0]] if plan.quantization else None
            factor = module.pre_quant_scale.name if module and module.pre_quant_scale else ""
            if matrix.format.smoothed:
                factor = matrix.initializer("pre_quant_scale")
            rounding = ActivationQuantization(kind, scale, (str(file), factor) if factor else None)
        for weight, rows in zip(matrix.weights, matrix.rows, strict=True):
            span = (first, first + rows)
            if not plan.stored:
                found[weight] = EngineWeight(matrix.format.name, str(file), arrays, span, rounding)
            elif rounding:
                found[weight] = EngineWeight(matrix.format.name, str(file), {}, span, rounding)
            first += rows
    return found
