"""The process that `verify.py` starts: a Job as JSON on stdin, Findings as a JSON line on stdout."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.compiler.quantize.formats import get_format
from llmc.compiler.quantize.quantizer import dequantize, quantize
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
    "by digit, in two columns. Where the columns agreed, an apprentice drew a line under them; where they "
    "did not, he called out, and everybody stopped. He called out twice. The first time it was his own "
    "hand: he had read a seven for a one. The second time a wheel had been filed too far, by less than the "
    "width of a hair, and the answer was wrong only in its last place. 'Nobody will ever see that,' said the "
    "young engineer. 'I have seen it,' said the foreman, 'and tomorrow it will be in the place before the "
    "last.' They took the wheel out, and it was evening when the columns agreed from top to bottom.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n"
    "\n\nclass Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
    "        self.items.append(item)\n\n    def pop(self):\n        if not self.items:\n"
    "            raise IndexError('pop from an empty stack')\n        return self.items.pop()\n\n\n"
    "for n in (1, 10, 90):\n    print(f'{n:>3}: {fibonacci(n)}')\n",
    "In 1687, 3 of the 12 towns paid £45.50; the other 9 paid nothing at all. By 1701 the debt was £1,204, "
    "of which Ashford owed 38 %, Brampton 21 %, and the rest was lost. Question: who paid first? Answer: the "
    "three that had a market, because the king's men came there every Tuesday and Friday.",
)
_LENGTHS = (70, 45, 33)  # tokens of each text at most: crosses blocks of 32, and a block's edge
_LENGTHS_16BIT = (200, 120, 80)  # 400: one position is a quarter of a percent
_CHUNKS = ((37, 5, 32), (9, 1, 1), (1, 32, 0))  # tokens a sequence gets in the first steps
_SINGLE_STEPS, _LATER_CHUNK = 20, 32  # then one a step, then this many
STEPS = 4
_TORCH = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_NEW_TOKENS = 24
_BLOCKS = 64
_NEAR_TIE = 4  # times transformers' rms error in 16 bits: 2.8 deviations of the difference of two logits
_TOLERANCE_16BIT = 2  # times transformers' largest error


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


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
        sequences = [
            [token for token in encoder.encode(text).ids if token < job.vocab_size][:length] or fallback
            for text, length, fallback in zip(TEXTS, lengths, random, strict=True)
        ]
    window = min(job.windows, default=0)
    long = min(window + 40, job.max_seq_len)
    if window > 0 and len(sequences[0]) < long <= 1100:
        sequences[0] = (sequences[0] * (long // len(sequences[0]) + 1))[:long]
    return sequences


def _transformers(
    job: Job, dtype: str, sequences: list[list[int]], prompts: list[list[int]], rounded: bool = False
) -> tuple[list[np.ndarray], list[list[int]]]:
    """transformers' logits fp32 [len, vocab] of each sequence, computed in `dtype`, and its greedy
    continuations of the prompts. `rounded`: with the weights of `job.quantized` as the engine has them."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            job.checkpoint, dtype=getattr(torch, _TORCH[dtype]), attn_implementation="eager"
        ).eval()
    if rounded:
        for name, parameter in model.named_parameters():
            if form := job.quantized.get(name):
                arrays = quantize(parameter.detach().numpy(), get_format(form), name)
                parameter.data = torch.from_numpy(dequantize(arrays, get_format(form)))
    logits, continuations = [], []
    with torch.no_grad():
        for ids in sequences:
            logits.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy())
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
        later = 1 if step < len(_CHUNKS) + _SINGLE_STEPS else _LATER_CHUNK
        wanted = _CHUNKS[step] if step < len(_CHUNKS) else (later,) * len(sequences)
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


@dataclass(frozen=True)
class Difference:
    """How far logits are from the reference's, over all positions and the whole vocabulary.

    kl: KL divergence from the reference's distribution, mean over positions, in nats.
    shortfall [positions]: how far below its own best logit the reference has the token that is best here;
    0 where both choose the same.
    """

    largest: float
    rms: float
    kl: float
    shortfall: np.ndarray

    @classmethod
    def between(cls, reference: list[np.ndarray], logits: list[np.ndarray]) -> Difference:
        largest, squares, kl, shortfall = [], [], [], []
        for expected, got in zip(reference, logits, strict=True):
            for row, other in zip(expected, got, strict=True):  # row by row: a vocabulary may be large
                error = (other - row).astype(np.float64)
                largest.append(np.abs(error).max())
                squares.append(np.square(error).mean())
                shortfall.append(row.max() - row[other.argmax()])
                weights = np.exp((row - row.max()).astype(np.float64))
                weights /= weights.sum()
                kl.append(np.log(weights @ np.exp(error - error.max())) + error.max() - weights @ error)
        return cls(
            float(np.max(largest)),
            float(np.sqrt(np.mean(squares))),
            max(0.0, float(np.mean(kl))),  # what rounding leaves of 0 may be negative
            np.array(shortfall),
        )

    def summary(self) -> dict[str, float]:
        """For the record: two digits, as more would be the noise of this machine."""
        figures = {"max_logit_error": self.largest, "rms_logit_error": self.rms, "mean_kl": self.kl}
        shown = {name: float(f"{figure:.1e}") for name, figure in figures.items()}
        return shown | {"top1_agreement_without_ties": round(float((self.shortfall == 0).mean()), 4)}


def _perplexity(sequences: list[list[int]], logits: list[np.ndarray]) -> float:
    """exp of the mean negative log likelihood of each token after the first, given those before it."""
    losses = []
    for ids, rows in zip(sequences, logits, strict=True):
        for row, following in zip(rows, ids[1:], strict=False):
            losses.append(
                np.log(np.exp((row - row.max()).astype(np.float64)).sum()) + row.max() - row[following]
            )
    return float(f"{np.exp(np.mean(losses)):.4g}")


def _findings_fp32(job: Job, reference: list[np.ndarray], difference: Difference) -> dict[str, Any]:
    scale = max(float(np.abs(logits).max()) for logits in reference)
    tolerance = job.tolerance * max(1.0, scale / 10)
    return {
        "tolerance": tolerance,
        "top1_agreement": float((difference.shortfall <= 2 * tolerance).mean()),
    }


def _findings_16bit(job: Job, difference: Difference, own: Difference) -> dict[str, Any]:
    """`own`: what transformers itself loses in that dtype. Where that is not finite, nothing passes."""
    known = np.isfinite(own.largest)
    near_tie = _NEAR_TIE * own.rms if known else np.nan
    return {
        "tolerance": _TOLERANCE_16BIT * own.largest if known else np.nan,
        "top1_agreement": float((difference.shortfall <= near_tie).mean()),
        "rms_ratio": difference.rms / max(own.rms, 1e-30),
        "details": {
            "dtype": job.dtype,
            "near_tie": float(f"{near_tie:.1e}"),
            "engine": difference.summary(),
            f"transformers_{job.dtype}": own.summary(),
        },
    }


def compare(job: Job, on_step: Callable[[int], None] = lambda done: None) -> Findings:
    """Does the job in this process. `on_step`: how many of STEPS are done."""
    exact = job.dtype == "fp32"
    sequences = _sequences(job)
    prompts = [ids[:count] for ids, count in zip(sequences, (12, 7), strict=False)] if exact else []
    on_step(0)
    reference, continuations = _transformers(job, "fp32", sequences, prompts, rounded=bool(job.quantized))
    gc.collect()
    on_step(1)
    own = None
    if not exact:
        own = Difference.between(reference, _transformers(job, job.dtype, sequences, [])[0])
        gc.collect()
    on_step(2)
    blocks = (_BLOCKS if exact else 0) + sum(-(-len(ids) // 32) for ids in sequences)
    backend = load_backend(job.backend, Path(job.engine), blocks)
    on_step(3)
    logits = _engine_logits(backend, sequences)
    difference = Difference.between(reference, logits)
    found = _findings_16bit(job, difference, own) if own else _findings_fp32(job, reference, difference)
    if exact:
        engine = Engine(backend, None, (), job.max_seq_len, max_batch_tokens=16, max_sequences=4)
        params = [SamplingParams(max_tokens=max(1, len(new)), ignore_eos=True) for new in continuations]
        greedy = [list(output.token_ids) for output in engine.generate(prompts, params)]
        found["greedy_equal"] = greedy == continuations
    on_step(STEPS)
    details: dict[str, Any] = found.pop("details", {})
    if job.quantized:
        original, _ = _transformers(job, "fp32", sequences, [])
        details["quantization_loss"] = Difference.between(original, reference).summary() | {
            "perplexity": _perplexity(sequences, reference),
            "perplexity_unquantized": _perplexity(sequences, original),
        }
    if job.kv_engine:
        from llmc.compiler.kv_cache_loss import kv_cache_loss

        del backend
        quantized = _engine_logits(load_backend(job.backend, Path(job.kv_engine), blocks), sequences)
        details["kv_cache_loss"] = kv_cache_loss(logits, quantized, job.kv_dtype)
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


def main() -> None:
    job = Job(**json.load(sys.stdin))
    _say(**asdict(compare(job, lambda done: _say(done=done, total=STEPS))))


if __name__ == "__main__":
    main()
