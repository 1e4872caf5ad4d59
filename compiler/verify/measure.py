"""Measure a bundle's engine on a text, alone or against the checkpoint in transformers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmc.compiler import texts
from llmc.compiler.verify import loss
from llmc.compiler.verify.difference import scaled
from llmc.compiler.verify.engine_logits import blocks_for, in_chunks
from llmc.compiler.verify.job import Question
from llmc.compiler.verify.load import load
from llmc.runtime.backends.base import Backend, EngineFile


def measure(
    question: Question, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Return the figures of `loss.record`; without a checkpoint the engine's "perplexity" and "positions".

    on_progress: called with the number of steps that are done, and of all steps

    Raises RequestError for a text that is too short.
    """
    windows = _windows(question)
    steps, done = (2 if question.checkpoint else 1) * len(windows), 0

    def step() -> None:
        nonlocal done
        done += 1
        on_progress(done, steps)

    on_progress(0, steps)
    if not question.checkpoint:
        backend = _load(question, windows)
        perplexity = loss.perplexity(windows, (in_chunks(backend, ids) for ids in windows))
        return {"perplexity": perplexity, "positions": sum(map(len, windows))}
    from llmc.compiler.verify.reference import Reference

    reference = Reference(question.checkpoint, "fp32", question.reference_weights, question.max_seq_len)
    states = []
    for ids in windows:
        states.append(reference.states(ids))
        step()
    head = reference.head()
    reference.drop_layers()
    gc.collect()
    backend = _load(question, windows)
    engine_logits = (in_chunks(backend, ids) for ids in windows)
    difference = loss.measure(head, states, windows, engine_logits, step)
    near_tie = 2 * scaled(question.tolerance, difference.scale)
    figures = loss.record(difference, near_tie, bool(question.tokenizer))
    return {"reference": question.reference_weights} | figures


def _windows(question: Question) -> list[list[int]]:
    if not question.tokenizer:
        return texts.random_windows(question.vocab_size, question.max_seq_len)
    most = texts.MAX_WINDOWS_OF_FILE if question.text else texts.MAX_WINDOWS
    text = texts.read_text(Path(question.text) if question.text else texts.EVALUATION_TEXT)
    tokenizer = Path(question.tokenizer)
    return texts.windows_of(text, tokenizer, question.vocab_size, question.max_seq_len, most)


def _load(question: Question, windows: list[list[int]]) -> Backend:
    blocks = blocks_for([max(windows, key=len)])
    engine = EngineFile(question.backend, Path(question.engine), question.kv_dtype)
    return load(engine, blocks, question.ranks, question.stages)
