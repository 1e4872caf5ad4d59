"""The verification step of a build: compare an engine with its checkpoint and check the figures.

The comparison runs in a child process (`child.py`), one model after the other.
docs/explanation/fidelity.md states the bounds, in fp32 and in 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint.safetensors import read_header
from llmc.compiler.child_process import Child, Started
from llmc.compiler.plan import BuildPlan
from llmc.compiler.progress import Progress
from llmc.compiler.targets.base import VerificationFiles
from llmc.compiler.verify.engine_weights import ActivationQuantization, EngineWeight
from llmc.compiler.verify.job import MIN_TOP1, VERIFICATION, Findings, Job
from llmc.passes.quantize.matrix import QuantizedMatrix
from llmc.runtime.bundle.manifest import Verification
from llmc.runtime.errors import VerificationError
from llmc.runtime.memory import available_memory, private_memory
from llmc.runtime.native.program import Matrix, Program

MAX_RMS_RATIO = 1.5  # bound of Findings.rms_ratio; 0.9 to 1.0 were measured
ACTIVATION_EFFECT = (0.75, 1.25)  # bounds of Findings.activation_effect


def verify_build(
    plan: BuildPlan,
    files: VerificationFiles,
    matrices: Sequence[QuantizedMatrix],
    writer: BundleWriter,
    tokenizer: Path | None,
    progress: Progress,
    process: Child | Started = VERIFICATION,
) -> Verification:
    """Compare the engine that `files` describe with the checkpoint, and return the record for the manifest.

    matrices: the quantized matrices of the graph
    writer: the bundle, which has the graphs and the weights
    tokenizer: the bundle's tokenizer.json, if it has one
    process: the process that compares

    Raises VerificationError and BuildError as `run` does.
    """
    geometry, resolved = plan.geometry, plan.resolved
    job = Job(
        checkpoint=str(plan.checkpoint.path),
        engine=str(writer.path(files.graph)),
        backend=files.backend,
        max_seq_len=plan.sizes.max_seq_len,
        vocab_size=geometry.vocab_size,
        windows=sorted({layer.window for layer in geometry.layers if layer.window}),
        tolerance=plan.checkpoint.logit_tolerance,
        needed_bytes=plan.sizes.verification_bytes,
        tokenizer=str(tokenizer or ""),
        dtype=resolved.dtype,
        compared=files.stand_in,
        quantized=engine_weights(plan, matrices, files, writer),
        reference_weights="dequantized" if plan.checkpoint.prequantized else "checkpoint",
        kv_engine=str(writer.path(files.kv_graph)) if files.kv_graph else "",
        kv_dtype=resolved.kv_dtype if files.kv_graph else "",
        quantizing_engine=str(writer.path(files.quantizing_graph)) if files.quantizing_graph else "",
        ranks=files.ranks,
        stages=files.stages,
    )
    return run(job, progress, process)


def run(job: Job, progress: Progress, process: Child | Started = VERIFICATION) -> Verification:
    """Run the comparison and return its record for the manifest.

    Raises VerificationError if the engine does not reproduce the checkpoint, and BuildError if the comparison
    itself fails. If this machine lacks the memory, the record says that the model is not verified.
    """
    available = available_memory()
    if available is not None and isinstance(process, Started):
        available += private_memory(process.pid)
    need = f"{job.needed_bytes / 2**30:.1f} GiB"
    if available is not None and job.needed_bytes > available:
        reason = f"verification needs about {need} of memory, {available / 2**30:.1f} GiB were available"
        progress.note(f"not verified: {reason}")
        return Verification(status="skipped", reason=f"verification needs about {need} of memory")
    progress.note(f"verification needs about {need} of memory")
    findings = compare_in_child(job, progress, process)
    if wrong := faults(findings, job.dtype):
        raise VerificationError(
            f"the engine does not reproduce the checkpoint: {', '.join(wrong)}",
            "this model's numbers do not fit into fp16; build with --dtype bf16"
            if job.dtype == "fp16" and not math.isfinite(findings.max_logit_error + findings.tolerance)
            else "please report this with the model's config.json; no bundle was written",
        )
    import transformers

    return Verification(
        status="passed",
        reference=f"transformers {transformers.__version__}, eager attention, fp32" + _weights(job),
        max_logit_error=_round_up(findings.max_logit_error),
        tolerance=_round_up(findings.tolerance),
        top1_agreement=findings.top1_agreement,
        greedy_tokens_equal=findings.greedy_equal,
        tokens_compared=findings.positions,
        details={
            **({"compared": job.compared} if job.compared else {}),
            **({"greedy_tokens": findings.greedy_tokens} if findings.greedy_equal is not None else {}),
            **findings.details,
        },
    )


def _weights(job: Job) -> str:
    if job.reference_weights == "dequantized":
        return ", on the dequantized weights"
    return ", on the quantized weights" if job.quantized else ""


def faults(findings: Findings, dtype: str) -> list[str]:
    """Return all figures as text if any is out of bounds or NaN; else an empty list."""
    error, bound = findings.max_logit_error, findings.tolerance
    share, least = findings.top1_agreement, findings.least_top1
    least = MIN_TOP1[dtype] if least is None else least
    measured = [
        (error <= bound, f"max logit error {error:.2e} (tolerance {bound:.2e})"),
        (share >= least, f"top-1 agreement {share:.4f} (at least {least:g})"),
    ]
    if (ratio := findings.rms_ratio) is not None:
        text = f"rms error {ratio:.2f} times that of transformers in {dtype} (at most {MAX_RMS_RATIO:g})"
        measured.append((ratio <= MAX_RMS_RATIO, text))
    if (ratio := findings.activation_ratio) is not None:
        effect, most = findings.activation_effect, findings.activation_bound
        assert effect is not None and most is not None
        least, largest = ACTIVATION_EFFECT
        text = f"activation quantization: rms error {ratio:.2f} of its effect (at most {most:.2f})"
        measured += [
            (ratio <= most, text),
            (
                least <= effect <= largest,
                f"effect {effect:.2f} times that in transformers ({least:g} to {largest:g})",
            ),
        ]
    if (equal := findings.greedy_equal) is not None:
        measured.append((equal, f"greedy text {'equal' if equal else 'different'}"))
    if not _is_finite(findings.details):
        measured.append((False, "logits of the evaluation text that are not finite"))
    return [] if all(good for good, _ in measured) else [text for _, text in measured]


def _is_finite(figures: Any) -> bool:
    """Return whether every number in nested dicts is finite."""
    if isinstance(figures, dict):
        return all(map(_is_finite, figures.values()))
    return not isinstance(figures, float) or math.isfinite(figures)


def _round_up(error: float) -> float:
    """Round up to two significant digits: further digits depend on the machine."""
    if error == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(error)) - 1)
    return float(f"{math.ceil(error / unit) * unit:.1e}")


def compare_in_child(job: Job, progress: Progress, process: Child | Started = VERIFICATION) -> Findings:
    """Run the comparison in a child process. Raises BuildError if the process fails."""
    return Findings(**process.run({"build": job.to_json()}, progress))


def engine_weights(
    plan: BuildPlan, matrices: Sequence[QuantizedMatrix], files: VerificationFiles, writer: BundleWriter
) -> dict[str, EngineWeight]:
    """Map each quantized weight of the checkpoint to the engine's quantized weight, as the engine reads it.

    For a pre-quantized checkpoint, only layers with activation quantization are listed, without arrays.
    """
    if not matrices:
        return {}
    file = writer.path(files.weights)
    header = read_header(file)
    packed: Mapping[str, Matrix] = {}
    if files.backend == "native":
        packed = Program.from_json(writer.path(files.program or files.graph).read_bytes()).matrices
    weights = {}
    for matrix in matrices:
        arrays = {array: matrix.initializer(array) for array in matrix.format.layout(matrix.shape)}
        tiles = packed.get(arrays["weight"])
        if tiles is not None:
            arrays = {"weight": arrays["weight"]}
        quantization, first = None, 0
        if kind := matrix.format.activations:
            scale = float(header[matrix.initializer("input_scale")].read().reshape(()))
            module = plan.quantization.quantized()[matrix.modules[0]] if plan.quantization else None
            factor = module.pre_quant_scale.name if module and module.pre_quant_scale else ""
            if matrix.format.smoothed:
                factor = matrix.initializer("pre_quant_scale")
            quantization = ActivationQuantization(kind, scale, (str(file), factor) if factor else None)
        for weight, rows in zip(matrix.weights, matrix.rows, strict=True):
            stored = {} if plan.checkpoint.prequantized else arrays
            if stored or quantization:
                span = (first, first + rows)
                weights[weight] = EngineWeight(
                    matrix.format.name, str(file), stored, span, quantization, tiles if stored else None
                )
            first += rows
    return weights
