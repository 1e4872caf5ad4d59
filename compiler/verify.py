"""Proves an engine against its checkpoint: the same tokens through transformers and through the engine.

Runs in a process of its own (`verify_child.py`), one model after the other, so that a build's own memory
stays small and a crash of an engine is a message. What is compared: the logits of every position of
several texts, fed to the engine as ragged prefill chunks and mixed steps; and, in fp32, greedy continuations.
What must hold, in fp32 and in 16 bits, is stated in docs/fidelity.md.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from llmc.compiler.progress import Progress
from llmc.runtime.bundle.manifest import Verification
from llmc.runtime.errors import BuildError, VerificationError

MIN_TOP1 = {"fp32": 1.0, "fp16": 0.99, "bf16": 0.99}  # dtype that the engine computes in -> least agreement
MAX_RMS_RATIO = 1.5  # 16 bits: the engine's rms error over transformers' own; 0.9 to 1.0 were measured
_BASE_BYTES = 900 << 20  # torch, transformers and an engine, without weights


@dataclass(frozen=True)
class Job:
    """What the child is asked to compare.

    tolerance: see `recipe.Recipe`; of fp32 only, as 16 bits are measured against transformers in the same
    dtype. dtype: what the engine computes in, "fp32", "fp16" or "bf16". compared: what stands in for the
    engine, for the record; empty where it is the engine itself. quantized: weight -> format; the engine must
    then reproduce the checkpoint with these weights rounded, and what the rounding loses is recorded.
    kv_engine: the engine with its KV cache in kv_dtype, whose loss against `engine` is recorded; "" for none.
    """

    checkpoint: str
    engine: str
    backend: str
    max_seq_len: int
    vocab_size: int
    windows: list[int]
    tolerance: float
    needed_bytes: int
    dtype: str = "fp32"
    compared: str = ""
    quantized: dict[str, str] = field(default_factory=dict)
    kv_engine: str = ""
    kv_dtype: str = ""


@dataclass(frozen=True)
class Findings:
    """What the child measured.

    max_logit_error: absolute, over all positions and the whole vocabulary; tolerance: scaled to the
    logits; top1_agreement: share of positions where the engine's best token is the reference's, or as
    good as it within what rounding hides; greedy_equal: None in 16 bits, where texts part at the first near
    tie; rms_ratio: the engine's rms error over that of transformers in the same dtype, None in fp32.
    """

    max_logit_error: float
    tolerance: float
    top1_agreement: float
    positions: int
    greedy_equal: bool | None
    greedy_tokens: int
    rms_ratio: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


def memory_needed(weight_bytes: int) -> int:
    """Bytes that verification needs for weights of `weight_bytes` in fp32, whatever the engine's dtype: once
    for transformers, then once more, packed or widened, for the engine, plus slack.

    The two never live at the same time; the engine's copy comes on top of pages of its file, which the
    kernel may drop.
    """
    return _BASE_BYTES + int(weight_bytes * 1.25)


def available_memory() -> int | None:
    """Bytes that can be used without swapping, or None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:
        return None
    return None


def run(job: Job, progress: Progress) -> Verification:
    """Runs the comparison and returns its record for the manifest.

    Raises VerificationError when the engine does not reproduce the checkpoint, and BuildError when the
    comparison itself breaks. A model too large for this machine is recorded as not verified.
    """
    available = available_memory()
    need = f"{job.needed_bytes / 2**30:.1f} GiB"
    if available is not None and job.needed_bytes > available:
        reason = f"verification needs about {need} of memory, {available / 2**30:.1f} GiB were available"
        progress.note(f"not verified: {reason}")
        return Verification(status="skipped", reason=f"verification needs about {need} of memory")
    progress.note(f"verification needs about {need} of memory")
    findings = _run_child(job, progress)
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
        reference=f"transformers {transformers.__version__}, eager attention, fp32"
        + (", on the quantized weights" if job.quantized else ""),
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


def faults(findings: Findings, dtype: str) -> list[str]:
    """Everything that was measured, if any of it is out of bounds. NaN is."""
    error, bound = findings.max_logit_error, findings.tolerance
    share, least = findings.top1_agreement, MIN_TOP1[dtype]
    measured = [
        (error <= bound, f"max logit error {error:.2e} (tolerance {bound:.2e})"),
        (share >= least, f"top-1 agreement {share:.4f} (at least {least:g})"),
    ]
    if (ratio := findings.rms_ratio) is not None:
        text = f"rms error {ratio:.2f} times that of transformers in {dtype} (at most {MAX_RMS_RATIO:g})"
        measured.append((ratio <= MAX_RMS_RATIO, text))
    if (equal := findings.greedy_equal) is not None:
        measured.append((equal, f"greedy text {'equal' if equal else 'different'}"))
    return [] if all(good for good, _ in measured) else [text for _, text in measured]


def _round_up(error: float) -> float:
    """Two digits: more would record the noise of the machine that built the bundle."""
    if error == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(error)) - 1)
    return float(f"{math.ceil(error / unit) * unit:.1e}")


def _run_child(job: Job, progress: Progress) -> Findings:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "llmc.compiler.verify_child"]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stdin and child.stdout and child.stderr
    result: dict[str, Any] | None = None
    try:
        child.stdin.write(json.dumps(asdict(job)))
        child.stdin.close()
        for line in child.stdout:
            message = json.loads(line)
            if "done" in message:
                progress.bar(message["done"], message["total"])
            else:
                result = message
        complaint = child.stderr.read().strip().splitlines()
        code = child.wait()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        child.stderr.close()
    if code != 0 or result is None:
        how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        last = complaint[-1] if complaint else "no message"
        raise BuildError(
            f"the verification process {how}: {last}",
            "it may have run out of memory; --no-verify builds without the proof"
            if code == -9
            else "no bundle was written; please report this",
        )
    return Findings(**result)
