"""The proof: an engine's logits and greedy text against those of the reference, and what rounding loses."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.compiler import texts
from llmc.compiler.verify import loss
from llmc.compiler.verify.difference import Difference, scaled
from llmc.compiler.verify.engine_logits import blocks_for, in_chunks, ragged
from llmc.compiler.verify.job import MIN_TOP1, Findings, Job
from llmc.compiler.verify.kv_cache_loss import kv_cache_loss, load_quantized
from llmc.compiler.verify.proof_texts import TEXTS
from llmc.compiler.verify.reference import Reference
from llmc.runtime.backends import load_backend
from llmc.runtime.engine import Engine
from llmc.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    import torch

    from llmc.compiler.verify.reference import Head
    from llmc.runtime.backends.base import Backend

_LENGTHS = (70, 45, 33)  # tokens of each text at most: crosses blocks of 32, and a block's edge
# 400: one position is a quarter of a percent. 300: from 256 on, rotary rows are products of two others.
_LENGTHS_16BIT = (300, 60, 40)
STEPS = 6
_BLOCKS = 64
_NEAR_TIE = 4  # times transformers' rms error in 16 bits: 2.8 deviations of the difference of two logits
_TOLERANCE_16BIT = 2  # times transformers' largest error
_TOP1_SLACK = 0.01  # below transformers' own agreement, where layers round their inputs


class _Evaluation:
    """The evaluation text through the reference that rounds nothing, to be compared with what comes after."""

    def __init__(self, job: Job, reference: Reference) -> None:
        tokenizer = Path(job.checkpoint) / "tokenizer.json"
        self.text = texts.read_text(texts.EVALUATION_TEXT) if tokenizer.is_file() else ""
        self.windows = (
            texts.windows_of(self.text, tokenizer, job.vocab_size, job.max_seq_len)
            if self.text
            else texts.random_windows(job.vocab_size, job.max_seq_len)
        )
        self.states: list[torch.Tensor] = [reference.states(ids) for ids in self.windows]
        self.head: Head = reference.head()

    def of_rounding(self, job: Job, rounded: Reference) -> dict[str, Any]:
        """What the rounded weights and inputs alone lose: both sides in transformers, in fp32."""
        others = loss.rows_of(rounded.head(), [rounded.states(ids) for ids in self.windows])
        difference = loss.measure(self.head, self.states, self.windows, others)
        about = {"text_sha256": texts.sha256(self.text)} if self.text else {"text": "random tokens"}
        about |= {"reference": job.reference_weights}
        return about | loss.record(difference, 2 * scaled(job.tolerance, difference.scale), bool(self.text))

    def of_engine(self, backend: Backend, near_tie: float) -> dict[str, Any]:
        """What an engine in 16 bits loses, its own rounding included."""
        others = (in_chunks(backend, ids) for ids in self.windows)
        return loss.record(
            loss.measure(self.head, self.states, self.windows, others), near_tie, bool(self.text)
        )


def compare(job: Job, on_step: Callable[[int], None] = lambda done: None) -> Findings:
    """Does the job in this process. `on_step`: how many of STEPS are done.

    Of the reference in fp32, that in 16 bits and the engine only one is in memory at a time.
    """
    exact = job.dtype == "fp32"
    sequences = _sequences(job)
    prompts = [ids[:count] for ids, count in zip(sequences, (12, 7), strict=False)] if exact else []
    on_step(0)
    model = Reference(job.checkpoint, "fp32", job.reference_weights)
    evaluated = _Evaluation(job, model) if job.quantized else None
    on_step(1)
    model.round(job.quantized)
    if not job.rounding_engine:
        model.round_inputs(job.quantized)
    reference = [model.logits(ids) for ids in sequences]
    continuations = [model.continuation(ids, job.max_seq_len) for ids in prompts]
    on_step(2)
    details: dict[str, Any] = {}
    rounded: list[np.ndarray] = []
    if job.rounding_engine:
        model.round_inputs(job.quantized)
        rounded = [model.logits(ids) for ids in sequences]
    if evaluated:
        details["quantization_loss"] = evaluated.of_rounding(job, model)
    model.drop_decoder()
    if exact:
        evaluated = None
    del model
    gc.collect()
    on_step(3)
    own = None if exact else Difference.between(reference, _in_16_bits(job, sequences))
    gc.collect()
    on_step(4)
    blocks = (_BLOCKS if exact else 0) + blocks_for(sequences)
    backend = load_backend(job.backend, Path(job.engine), blocks)
    on_step(5)
    logits = ragged(backend, sequences)
    difference = Difference.between(reference, logits)
    found = _findings_16bit(job, difference, own) if own else _findings_fp32(job, difference)
    details |= found.pop("details", {})
    if exact:
        engine = Engine(backend, None, (), job.max_seq_len, max_batch_tokens=16, max_sequences=4)
        params = [SamplingParams(max_tokens=max(1, len(new)), ignore_eos=True) for new in continuations]
        greedy = [list(output.token_ids) for output in engine.generate(prompts, params)]
        found["greedy_equal"] = greedy == continuations
    elif evaluated and own:
        near_tie = _near_tie(own)
        details["quantization_loss"]["engine"] = evaluated.of_engine(backend, near_tie)
    if job.rounding_engine:
        del backend
        gc.collect()
        backend = load_backend(job.backend, Path(job.rounding_engine), blocks)
        off = Difference.between(rounded, ragged(backend, sequences))
        whole = Difference.between(reference, rounded)
        found["rounding_ratio"] = off.rms / max(whole.rms, 1e-30)
        details["input_rounding"] = {"changes": whole.summary(), "engine": off.summary()}
    if job.kv_engine:
        del backend
        gc.collect()
        quantized = ragged(load_quantized(job, blocks), sequences)
        details["kv_cache_loss"] = kv_cache_loss(logits, quantized, job.kv_dtype)
    on_step(STEPS)
    if job.windows:
        longest = max(len(ids) for ids in sequences)
        details["window_crossed"] = all(window < longest for window in job.windows)
    return Findings(
        max_logit_error=difference.largest,
        positions=len(difference.shortfall),
        greedy_tokens=sum(len(new) for new in continuations),
        details=details,
        **({"greedy_equal": None} | found),
    )


def _sequences(job: Job) -> list[list[int]]:
    """Token ids of the texts, or random ones without a tokenizer; one longer than the smallest window."""
    wanted = _LENGTHS if job.dtype == "fp32" else _LENGTHS_16BIT
    lengths = [min(length, job.max_seq_len) for length in wanted]
    rng = np.random.default_rng(0)
    random = [rng.integers(0, job.vocab_size, length).tolist() for length in lengths]
    tokenizer = Path(job.checkpoint) / "tokenizer.json"
    if not tokenizer.is_file():
        sequences = random
    else:
        from tokenizers import Tokenizer

        encoder = Tokenizer.from_file(str(tokenizer))
        encoder.no_truncation()
        encoder.no_padding()
        sequences = [
            [token for token in encoder.encode(text).ids if token < job.vocab_size][:length] or fallback
            for text, length, fallback in zip(TEXTS, lengths, random, strict=True)
        ]
    window = min(job.windows, default=0)
    long = min(max(wanted[0], window + 40 if window else 0), job.max_seq_len)
    if len(sequences[0]) < long <= 1100:
        sequences[0] = (sequences[0] * (long // len(sequences[0]) + 1))[:long]
    return sequences


def _in_16_bits(job: Job, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """transformers' logits in the engine's dtype, with the engine's weights."""
    model = Reference(job.checkpoint, job.dtype, job.reference_weights)
    model.round(job.quantized)
    model.round_inputs(job.quantized)
    return [model.logits(ids) for ids in sequences]


def _findings_fp32(job: Job, difference: Difference) -> dict[str, Any]:
    tolerance = scaled(job.tolerance, difference.scale)
    return {"tolerance": tolerance, "top1_agreement": difference.agreement(2 * tolerance)}


def _findings_16bit(job: Job, difference: Difference, own: Difference) -> dict[str, Any]:
    """`own`: what transformers itself loses in that dtype. Where that is not finite, nothing passes."""
    near_tie = _near_tie(own)
    found: dict[str, Any] = {}
    if any(one.input for one in job.quantized.values()):  # errors are whole codes, few and large
        found["least_top1"] = min(MIN_TOP1[job.dtype], own.agreement(near_tie) - _TOP1_SLACK)
    return found | {
        "tolerance": _TOLERANCE_16BIT * own.largest if np.isfinite(own.largest) else np.nan,
        "top1_agreement": difference.agreement(near_tie),
        "rms_ratio": difference.rms / max(own.rms, 1e-30),
        "details": {
            "dtype": job.dtype,
            "near_tie": float(f"{near_tie:.1e}"),
            "engine": difference.summary(),
            f"transformers_{job.dtype}": own.summary(),
        },
    }


def _near_tie(own: Difference) -> float:
    return _NEAR_TIE * own.rms if np.isfinite(own.largest) else float("nan")
