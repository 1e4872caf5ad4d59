"""Compare an engine's logits and greedy text with the reference, and measure the quantization loss."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.compiler import texts
from llmc.compiler.verify import loss
from llmc.compiler.verify.difference import Difference, scaled
from llmc.compiler.verify.engine_logits import blocks_for, in_chunks, ragged
from llmc.compiler.verify.evaluation_states import EvaluationStates
from llmc.compiler.verify.job import MIN_TOP1, Findings, Job
from llmc.compiler.verify.kv_cache_loss import kv_cache_loss, load_quantized
from llmc.compiler.verify.load import load
from llmc.compiler.verify.reference import Reference
from llmc.compiler.verify.verification_texts import TEXTS
from llmc.runtime.backends.base import EngineFile
from llmc.runtime.engine import Engine
from llmc.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from llmc.compiler.verify.reference import Head
    from llmc.runtime.backends.base import Backend

# The most tokens of each text in fp32. They cross the borders of KV blocks of 32 tokens.
_LENGTHS = (70, 45, 33)
# The same in 16 bits: 400 positions, so that one position is 0.25 % of the top-1 agreement. The first text
# passes position 256, from which on rotary rows are products of two others.
_LENGTHS_16BIT = (300, 60, 40)
STEPS = 6  # steps of `compare`, for the progress bar
_NEW_TOKENS = 24  # of a greedy continuation
_BLOCKS = 64  # KV blocks for the greedy continuations
# A near tie is a difference of two logits of at most this times transformers' rms error in 16 bits. That is
# 2.8 standard deviations of such a difference.
_NEAR_TIE = 4
_TOLERANCE_16BIT = 2  # times transformers' largest error in 16 bits
# With activation quantization, top-1 agreement may be this much below that of transformers in 16 bits, or
# this many standard deviations of the difference between two counts of such rare positions.
_TOP1_SLACK = 0.01
_TOP1_DEVIATIONS = 3
# In fp32 with activation quantization, the rms difference from the reference may be this much of what the
# quantization changes, or this much of what a small disturbance changes in the reference.
_ACTIVATION_RATIO = 0.5
_DISTURBED_RATIO = 1.5
_UNRELATED_RATIO = 1.2  # never more: two unrelated roundings are the square root of 2 apart


class _Evaluation:
    """The unquantized reference on the evaluation text, which quantized models are compared with."""

    def __init__(self, found: EvaluationStates) -> None:
        self.text, self.windows, self.states = found.text, found.windows, found.states
        self.head: Head = found.reference.head()

    def of_fp32_engine(self, job: Job, backend: Backend) -> dict[str, Any]:
        """Measure the loss of an engine that computes in fp32."""
        return self._of_quantization(job, (in_chunks(backend, ids) for ids in self.windows))

    def of_reference(self, job: Job, quantized: Reference) -> dict[str, Any]:
        """Measure the loss of quantization alone: both models run in transformers in fp32."""
        states = [quantized.states(ids) for ids in self.windows]
        return self._of_quantization(job, loss.rows_of(quantized.head(), states))

    def of_16bit_engine(self, backend: Backend, near_tie: float) -> dict[str, Any]:
        """Measure the loss of a 16-bit engine, which includes that of its 16-bit arithmetic."""
        difference = self._difference(in_chunks(backend, ids) for ids in self.windows)
        return loss.record(difference, near_tie, bool(self.text))

    def _of_quantization(self, job: Job, others: Iterable[Iterable[np.ndarray]]) -> dict[str, Any]:
        difference = self._difference(others)
        figures = {"text_sha256": texts.sha256(self.text)} if self.text else {"text": "random tokens"}
        figures |= {"reference": job.reference_weights}
        return figures | loss.record(difference, 2 * scaled(job.tolerance, difference.scale), bool(self.text))

    def _difference(self, others: Iterable[Iterable[np.ndarray]]) -> Difference:
        return loss.measure(self.head, self.states, self.windows, others)


@dataclass
class _Expected:
    """The results of the reference, kept after its model is freed."""

    #: Logits of each sequence, float32 [length, vocabulary].
    logits: list[np.ndarray]
    #: The logits with activation quantization, if `logits` are without it; else empty.
    quantized_logits: list[np.ndarray]
    #: The same after a small disturbance of the embeddings; else empty.
    disturbed_logits: list[np.ndarray]
    #: Whether the engine's greedy continuations are those of the reference.
    greedy_equal: bool
    #: The evaluation of the engine; None for unquantized models.
    evaluation: _Evaluation | None
    #: Fields of `Findings.details`.
    details: dict[str, Any]


Continuation = tuple[list[int], list[int]]  # a prompt and the greedy tokens after it


def compare(
    job: Job, on_step: Callable[[int], None] = lambda done: None, early: EvaluationStates | None = None
) -> Findings:
    """Compare an engine with its checkpoint in this process.

    on_step: called with the number of steps that are done, of STEPS
    early: the unquantized reference on the evaluation text, if it ran before

    The engine, the reference in fp32 and the reference in 16 bits run one after the other, so that only one
    of them is in memory at a time, and the reference of `early`. An engine in fp32 runs first: one step of
    the reference tells whether whole greedy continuations are its own.
    """
    sequences = _sequences(job)
    on_step(0)
    if job.dtype == "fp32":
        logits, continuations = _run_fp32_engine(job, sequences)
        on_step(1)
        expected = _run_reference(job, sequences, continuations, on_step, early)
        difference = Difference.between(expected.logits, logits)
        findings = _findings_fp32(job, difference) | {"greedy_equal": expected.greedy_equal}
        if expected.evaluation:
            gc.collect()
            backend = _load_engine(job, blocks_for(expected.evaluation.windows), job.quantizing_engine)
            expected.details["quantization_loss"] = expected.evaluation.of_fp32_engine(job, backend)
            del backend
    else:
        continuations = []
        expected = _run_reference(job, sequences, [], on_step, early)
        reference_error = Difference.between(expected.logits, _in_16_bits(job, sequences))
        on_step(4)
        logits = _run_16bit_engine(job, sequences, expected, reference_error)
        difference = Difference.between(expected.logits, logits)
        findings = _findings_16bit(job, difference, reference_error) | {"greedy_equal": None}
    on_step(5)
    details = expected.details | findings.pop("details", {})
    if job.quantizing_engine:
        more, details["activation_quantization"] = _compare_quantizing_engine(job, sequences, expected)
        findings |= more
    if job.kv_engine:
        gc.collect()
        quantized = ragged(load_quantized(job, blocks_for(sequences)), sequences)
        details["kv_cache_loss"] = kv_cache_loss(logits, quantized, job.kv_dtype)
    on_step(STEPS)
    if job.windows:
        longest = max(len(ids) for ids in sequences)
        details["window_crossed"] = all(window < longest for window in job.windows)
    return Findings(
        max_logit_error=difference.largest,
        positions=sum(len(ids) for ids in sequences),
        greedy_tokens=sum(len(new) for _, new in continuations),
        details=details,
        **findings,
    )


def _run_reference(
    job: Job,
    sequences: Sequence[Sequence[int]],
    continuations: Sequence[Continuation],
    on_step: Callable[[int], None],
    early: EvaluationStates | None,
) -> _Expected:
    model, found = _load_reference(job, early)
    evaluation = _Evaluation(found) if found else None
    on_step(2)
    model.use_weights(job.quantized)
    if not job.quantizing_engine:
        model.quantize_activations(job.quantized)
    logits = [model.logits(ids) for ids in sequences]
    greedy_equal = all(model.continues_with(prompt, new) for prompt, new in continuations)
    on_step(3)
    quantized_logits, disturbed_logits = [], []
    if job.quantizing_engine:
        model.quantize_activations(job.quantized)
        quantized_logits = [model.logits(ids) for ids in sequences]
        disturbed_logits = [model.disturbed_logits(ids) for ids in sequences]
    details = {}
    if evaluation and job.dtype != "fp32":
        details["quantization_loss"] = evaluation.of_reference(job, model)
    on_step(4)
    model.drop_layers()
    return _Expected(logits, quantized_logits, disturbed_logits, greedy_equal, evaluation, details)


def _load_reference(job: Job, early: EvaluationStates | None) -> tuple[Reference, EvaluationStates | None]:
    """Return the reference in fp32, and its results on the evaluation text if the engine is quantized."""
    if job.quantized and early is not None and early.evaluation == job.evaluation:
        return early.reference, early
    model = Reference(job.checkpoint, "fp32", job.reference_weights, job.max_seq_len)
    return model, EvaluationStates.of(job.evaluation, model) if job.quantized else None


def _run_fp32_engine(job: Job, sequences: Sequence[list[int]]) -> tuple[list[np.ndarray], list[Continuation]]:
    """Return the engine's logits of each sequence, and its greedy continuations of the first two."""
    backend = _load_engine(job, _BLOCKS + blocks_for(sequences))
    logits = ragged(backend, sequences)
    prompts = [ids[:count] for ids, count in zip(sequences, (12, 7), strict=False)]
    prompts = [ids for ids in prompts if len(ids) < job.max_seq_len]
    params = [
        SamplingParams(max_tokens=min(_NEW_TOKENS, job.max_seq_len - len(ids)), ignore_eos=True)
        for ids in prompts
    ]
    engine = Engine(backend, None, (), job.max_seq_len, max_batch_tokens=16, max_sequences=4)
    outputs = engine.generate(prompts, params)
    return logits, [(ids, list(output.token_ids)) for ids, output in zip(prompts, outputs, strict=True)]


def _run_16bit_engine(
    job: Job, sequences: Sequence[list[int]], expected: _Expected, reference_error: Difference
) -> list[np.ndarray]:
    """Return the engine's logits of each sequence. Add its quantization loss to `expected.details`.

    reference_error: the error of transformers in the engine's dtype
    """
    gc.collect()
    backend = _load_engine(job, blocks_for(sequences))
    if expected.evaluation:
        loss_of_engine = expected.evaluation.of_16bit_engine(backend, _near_tie(reference_error))
        expected.details["quantization_loss"]["engine"] = loss_of_engine
    return ragged(backend, sequences)


def _load_engine(job: Job, blocks: int, file: str = "") -> Backend:
    """Load the engine of `file`; by default that of the job."""
    return load(EngineFile(job.backend, Path(file or job.engine)), blocks, job.ranks, job.stages)


def _compare_quantizing_engine(
    job: Job, sequences: Sequence[Sequence[int]], expected: _Expected
) -> tuple[dict[str, float], dict[str, Any]]:
    """Compare the engine with activation quantization with the reference that quantizes its activations.

    Returns fields of Findings, and the record for `details`. Differences are relative to the one that
    activation quantization makes in the reference.
    """
    gc.collect()
    logits = ragged(_load_engine(job, blocks_for(sequences), job.quantizing_engine), sequences)
    change = Difference.between(expected.logits, expected.quantized_logits)
    error = Difference.between(expected.quantized_logits, logits)
    disturbed = Difference.between(expected.quantized_logits, expected.disturbed_logits)
    effect = max(change.rms, 1e-30)
    findings = {
        "activation_ratio": error.rms / effect,
        "activation_bound": min(
            max(_ACTIVATION_RATIO, _DISTURBED_RATIO * disturbed.rms / effect), _UNRELATED_RATIO
        ),
        "activation_effect": Difference.between(expected.logits, logits).rms / effect,
    }
    return findings, {
        "changes": change.summary(),
        "engine": error.summary(),
        "transformers_disturbed": disturbed.summary(),
    }


def _sequences(job: Job) -> list[list[int]]:
    """Return token ids of the texts; random ids without a tokenizer.

    The first sequence is longer than the smallest attention window, if the context allows and at most 1,100
    tokens are needed.
    """
    wanted = _LENGTHS if job.dtype == "fp32" else _LENGTHS_16BIT
    lengths = [min(length, job.max_seq_len) for length in wanted]
    rng = np.random.default_rng(0)
    random = [rng.integers(0, job.vocab_size, length).tolist() for length in lengths]
    if not job.tokenizer:
        sequences = random
    else:
        encoder = texts.Encoder(Path(job.tokenizer), job.vocab_size)
        sequences = [
            list(chain(*encoder.encode(text)))[:length] or fallback
            for text, length, fallback in zip(TEXTS, lengths, random, strict=True)
        ]
    window = min(job.windows, default=0)
    long = min(max(wanted[0], window + 40 if window else 0), job.max_seq_len)
    if len(sequences[0]) < long <= 1100:
        sequences[0] = (sequences[0] * (long // len(sequences[0]) + 1))[:long]
    return sequences


def _in_16_bits(job: Job, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Return transformers' logits in the engine's dtype, with the engine's weights."""
    model = Reference(job.checkpoint, job.dtype, job.reference_weights, job.max_seq_len)
    model.use_weights(job.quantized)
    model.quantize_activations(job.quantized)
    return [model.logits(ids) for ids in sequences]


def _findings_fp32(job: Job, difference: Difference) -> dict[str, Any]:
    tolerance = scaled(job.tolerance, difference.scale)
    return {"tolerance": tolerance, "top1_agreement": difference.agreement(2 * tolerance)}


def _findings_16bit(job: Job, difference: Difference, reference_error: Difference) -> dict[str, Any]:
    """Return fields of Findings for a 16-bit engine.

    reference_error: the error of transformers in that dtype. If it is not finite, the bounds are NaN and the
        engine fails.
    """
    near_tie = _near_tie(reference_error)
    findings: dict[str, Any] = {}
    # With activation quantization, a tiny error that moves a value to the next code becomes a large one.
    if any(weight.input for weight in job.quantized.values()):
        least = least_top1_like(reference_error.agreement(near_tie), reference_error.top1_gap.size)
        findings["least_top1"] = min(MIN_TOP1[job.dtype], least)
    return findings | {
        "tolerance": _TOLERANCE_16BIT * reference_error.largest
        if np.isfinite(reference_error.largest)
        else np.nan,
        "top1_agreement": difference.agreement(near_tie),
        "rms_ratio": difference.rms / max(reference_error.rms, 1e-30),
        "details": {
            "dtype": job.dtype,
            "near_tie": float(f"{near_tie:.1e}"),
            "engine": difference.summary(),
            f"transformers_{job.dtype}": reference_error.summary(),
        },
    }


def least_top1_like(agreement: float, positions: int) -> float:
    """Return the least top-1 agreement of an engine that is as exact as transformers in 16 bits.

    agreement: that of transformers, 0 to 1, counted at `positions`. Both counts are chance: the variance of
        the number of positions that disagree is about that number (Poisson), and at least about 1.
    """
    deviation = math.sqrt(2 * max((1 - agreement) * positions, 1)) / positions
    return agreement - max(_TOP1_SLACK, _TOP1_DEVIATIONS * deviation)


def _near_tie(reference_error: Difference) -> float:
    return _NEAR_TIE * reference_error.rms if np.isfinite(reference_error.largest) else float("nan")
