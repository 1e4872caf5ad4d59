"""The process that `verify.py` starts: a Job as JSON on stdin, Findings as a JSON line on stdout."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llmc.compiler.verify import Findings, Job
from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import Backend
from llmc.runtime.batch import Batch
from llmc.runtime.engine import Engine
from llmc.runtime.sampling import SamplingParams

TEXTS = (
    "The engine was built in the morning and had to prove itself before noon. Nobody in the workshop "
    "doubted the drawings, but the old foreman had seen too many machines that ran well on paper. So they "
    "fed it the same ten questions they had put to the first machine, and wrote down every answer, digit "
    "by digit, in two columns.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "In 1687, 3 of the 12 towns paid £45.50; the other 9 paid nothing at all.",
)
_LENGTHS = (70, 45, 33)  # tokens of each text at most: crosses blocks of 32, and a block's edge
_CHUNKS = ((37, 5, 32), (9, 1, 1), (1, 32, 0))  # tokens a sequence gets in the first steps; then one a step
_NEW_TOKENS = 24
_BLOCKS = 64


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def _sequences(job: Job) -> list[list[int]]:
    """Token ids of the texts, or random ones without a tokenizer; one longer than the smallest window."""
    lengths = [min(length, job.max_seq_len) for length in _LENGTHS]
    rng = np.random.default_rng(0)
    random = [rng.integers(0, job.vocab_size, length).tolist() for length in lengths]
    tokenizer = Path(job.checkpoint) / "tokenizer.json"
    if not tokenizer.is_file():
        sequences = random
    else:
        from tokenizers import Tokenizer

        encoder = Tokenizer.from_file(str(tokenizer))
        sequences = [
            [token for token in encoder.encode(text).ids if token < job.vocab_size][:length] or fallback
            for text, length, fallback in zip(TEXTS, lengths, random, strict=True)
        ]
    window = min(job.windows, default=0)
    long = min(window + 40, job.max_seq_len)
    if window > 0 and len(sequences[0]) < long <= 1100:
        sequences[0] = (sequences[0] * (long // len(sequences[0]) + 1))[:long]
    return sequences


def _reference(
    job: Job, sequences: list[list[int]], prompts: list[list[int]]
) -> tuple[list[np.ndarray], list[list[int]]]:
    """transformers' fp32 logits [len, vocab] of each sequence, and its greedy continuations."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            job.checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    logits, continuations = [], []
    with torch.no_grad():
        for ids in sequences:
            logits.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy())
        for ids in prompts:
            tokens, cache = torch.tensor([ids]), None
            new: list[int] = []
            for _ in range(min(_NEW_TOKENS, job.max_seq_len - len(ids))):
                output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                new.append(int(output.logits[0, -1].argmax()))
                tokens = torch.tensor([new[-1:]])
            continuations.append(new)
    return logits, continuations


def _engine_logits(backend: Backend, sequences: list[list[int]]) -> list[np.ndarray]:
    """The engine's logits of every position, computed in ragged chunks over shuffled blocks."""
    blocks = iter(np.random.default_rng(1).permutation(backend.num_blocks).tolist())
    size = backend.block_size
    tables = [[next(blocks) for _ in range(-(-len(ids) // size))] for ids in sequences]
    past = [0] * len(sequences)
    rows: list[list[np.ndarray]] = [[] for _ in sequences]
    step = 0
    while any(done < len(ids) for done, ids in zip(past, sequences, strict=True)):
        wanted = _CHUNKS[step] if step < len(_CHUNKS) else [8 if len(ids) > 100 else 1 for ids in sequences]
        chunks = [
            (s, min(count, len(sequences[s]) - past[s]))
            for s, count in enumerate(wanted)
            if count and past[s] < len(sequences[s])
        ]
        step += 1
        if not chunks:
            continue
        logits = backend.forward(_batch(sequences, past, tables, chunks, size))
        start = 0
        for s, count in chunks:
            rows[s].append(logits[start : start + count].copy())
            past[s] += count
            start += count
    return [np.concatenate(row) for row in rows]


def _batch(
    sequences: list[list[int]],
    past: list[int],
    tables: list[list[int]],
    chunks: list[tuple[int, int]],
    size: int,
) -> Batch:
    ids = [token for s, count in chunks for token in sequences[s][past[s] : past[s] + count]]
    positions = [p for s, count in chunks for p in range(past[s], past[s] + count)]
    used = [tables[s][: -(-(past[s] + count) // size)] for s, count in chunks]

    def i32(values: Any) -> np.ndarray:
        return np.ascontiguousarray(values, np.int32)

    return Batch(
        input_ids=i32(ids),
        position_ids=i32(positions),
        query_start=i32(np.cumsum([0, *(count for _, count in chunks)])),
        past_lengths=i32([past[s] for s, _ in chunks]),
        block_indices=i32([block for table in used for block in table]),
        block_begins=i32(np.cumsum([0, *(len(table) for table in used)])),
        logits_index=i32(range(len(ids))),
    )


def main() -> None:
    job = Job(**json.load(sys.stdin))
    sequences = _sequences(job)
    prompts = [ids[:count] for ids, count in zip(sequences, (12, 7), strict=False)]
    _say(done=0, total=3)
    reference, continuations = _reference(job, sequences, prompts)
    gc.collect()
    _say(done=1, total=3)
    blocks = _BLOCKS + sum(-(-len(ids) // 32) for ids in sequences)
    backend = load_backend(job.backend, Path(job.engine), blocks)
    _say(done=2, total=3)
    got = _engine_logits(backend, sequences)
    engine = Engine(backend, None, (), job.max_seq_len, max_batch_tokens=16, max_sequences=4)
    params = [SamplingParams(max_tokens=max(1, len(new)), ignore_eos=True) for new in continuations]
    greedy = [list(output.token_ids) for output in engine.generate(prompts, params)]
    _say(done=3, total=3)

    scale = max(float(np.abs(logits).max()) for logits in reference)
    tolerance = job.tolerance * max(1.0, scale / 10)
    error, agreed, positions = 0.0, 0, 0
    for expected, logits in zip(reference, got, strict=True):
        error = max(error, float(np.abs(expected - logits).max()))
        best = expected.max(axis=-1)
        chosen = np.take_along_axis(expected, logits.argmax(axis=-1)[:, None], axis=-1)[:, 0]
        agreed += int((chosen >= best - 2 * tolerance).sum())
        positions += len(expected)
    longest = max(len(ids) for ids in sequences)
    findings = Findings(
        max_logit_error=error if np.isfinite(error) else float(np.finfo(np.float32).max),
        tolerance=tolerance,
        top1_agreement=agreed / positions,
        positions=positions,
        greedy_equal=greedy == continuations,
        greedy_tokens=sum(len(new) for new in continuations),
        details={"window_crossed": all(window < longest for window in job.windows)} if job.windows else {},
    )
    _say(**asdict(findings))


if __name__ == "__main__":
    main()
