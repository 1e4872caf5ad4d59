"""Sampling of the next token: the same filters, in the same order, as transformers' `generate`.

Repetition penalty, temperature, top-k, top-p, min-p. Greedy decoding (temperature 0) applies the
repetition penalty too and nothing else. Every filter only ever removes tokens, so after top-k the
others work on the few survivors instead of on the whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from llmc.runtime.errors import BackendError, RequestError


@dataclass(frozen=True)
class SamplingParams:
    """The sampling options of one request. Every value is checked here, once.

    max_tokens: tokens to generate at most, at least 1.
    temperature: divides the logits; 0 is greedy decoding.
    top_k: keep the k most likely tokens (and all that tie with the last of them); 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all.
    min_p: keep tokens at least min_p times as likely as the most likely one; 0 keeps all.
    repetition_penalty: divides positive and multiplies negative logits of tokens already seen; 1 is off.
    seed: makes the draws of this request reproducible, whatever runs beside it.
    stop: strings that end the output; the output stops before them.
    ignore_eos: go on after an end-of-sequence token.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind, allowed, hint = _LIMITS[field.name]
            wrong_kind = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
            if wrong_kind or not allowed(value):
                raise RequestError(f"{field.name} is {value!r}", f"{field.name} must be {hint}")


# For every field: the type it must have, which values are allowed, and that in words.
_LIMITS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "max_tokens": (int, lambda v: v >= 1, "a whole number of at least 1"),
    "temperature": ((int, float), lambda v: 0 <= v < math.inf, "0 (greedy) or a positive number"),
    "top_k": (int, lambda v: v >= 0, "a whole number; 0 turns it off"),
    "top_p": ((int, float), lambda v: 0 <= v <= 1, "between 0 and 1; 1 turns it off"),
    "min_p": ((int, float), lambda v: 0 <= v <= 1, "between 0 and 1; 0 turns it off"),
    "repetition_penalty": ((int, float), lambda v: 0 < v < math.inf, "a positive number; 1 turns it off"),
    "seed": ((int, type(None)), lambda v: v is None or v >= 0, "a whole number of at least 0, or none"),
    "stop": (
        tuple,
        lambda v: all(isinstance(text, str) and text for text in v),
        'a tuple of non-empty strings, such as ("\\n\\n",)',
    ),
    "ignore_eos": (bool, lambda v: True, "true or false"),
}


def candidates_needed(params: Iterable[SamplingParams], most: int) -> int:
    """How many of its largest logits, with all that tie with the last of them, decide each row's next token.

    1 if all rows are decoded greedily: then the first of the largest is enough. Sampling among the top 1
    needs those that tie with it too, so it counts as 2. 0: a row needs all its logits, or more than `most`.
    """
    needed = 0
    for one in params:
        count = 1 if one.temperature == 0.0 else one.top_k and max(2, one.top_k)
        if one.repetition_penalty != 1.0 or not 0 < count <= most:
            return 0
        needed = max(needed, count)
    return needed


def sample(
    logits: np.ndarray,
    params: SamplingParams,
    token_ids: Sequence[int],
    rng: np.random.Generator,
    ids: np.ndarray | None = None,
) -> int:
    """The next token for float32 `logits[V]`, which are left as they are.

    `token_ids` are all tokens so far, prompt and output: the repetition penalty looks at them.
    `ids`: the tokens that `logits` are of, ascending, those that `candidates_needed` says or more of them;
    the token is the one that all logits would give. None: they are all logits, in order.
    Sampling takes exactly one number from `rng`, greedy decoding none.
    Raises BackendError when the logits hold no usable maximum (NaN, or infinite).
    """
    if params.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, params.repetition_penalty, token_ids)
    if params.temperature == 0.0:
        index = int(logits.argmax())
        _check_finite(logits[index])
    else:
        kept, weights = candidates(logits, params)
        index = _draw(weights, rng.random())
        index = index if kept is None else int(kept[index])
    return index if ids is None else int(ids[index])


def candidates(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray]:
    """The tokens that temperature, top-k, top-p and min-p leave, and their weights.

    Returns token ids (int64 [C], None standing for all of them in order) and float32 weights [C]:
    probabilities up to one common factor, the largest of them 1.
    """
    ids: np.ndarray | None = None
    if 0 < params.top_k < len(logits):
        ids = _largest(logits, params.top_k)
        logits = logits[ids]
    top = logits.max()
    _check_finite(top)
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    with np.errstate(over="ignore"):
        weights = np.exp((logits - top) / np.float32(max(params.temperature, 1e-30)))
    if params.top_p < 1.0:
        ids, weights = _keep(ids, weights, _nucleus(weights, params.top_p))
    if params.min_p > 0.0:
        ids, weights = _keep(ids, weights, np.flatnonzero(weights >= params.min_p))
    return ids, weights


def penalize_repetition(logits: np.ndarray, penalty: float, token_ids: Sequence[int]) -> np.ndarray:
    """A copy of float32 `logits[V]` with those of `token_ids` made less likely (penalty > 1), each once."""
    seen = np.array(token_ids, np.int64)
    seen = seen[seen < len(logits)]  # an embedding table may have more rows than there are logits
    scores = logits[seen]
    penalized = logits.copy()
    penalized[seen] = np.where(scores < 0, scores * np.float32(penalty), scores / np.float32(penalty))
    return penalized


def _largest(logits: np.ndarray, count: int) -> np.ndarray:
    """Indices, ascending, of the `count` largest and of all that tie with the least of them."""
    # Column maxima of the logits, laid out in 64 rows, bound it from below, and only columns that
    # reach the bound matter: 0.05 ms for 150,000 logits, where a partition of them all takes 2 ms.
    columns = len(logits) // 64
    if count <= columns:
        rest = 64 * columns
        peaks = logits[:rest].reshape(64, columns).max(axis=0)
        _check_finite(peaks.max())  # the comparison below would silently drop a NaN
        reached = np.flatnonzero(peaks >= np.partition(peaks, -count)[-count])
        near = (reached + columns * np.arange(64)[:, None]).ravel()
        near = np.concatenate([near, np.arange(rest, len(logits))])
    else:
        near = np.arange(len(logits))
    values = logits[near]
    _check_finite(values.max())
    return np.sort(near[values >= np.partition(values, -count)[-count]])


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices into `weights`, ascending, of the tokens top-p keeps: at least the most likely one.

    A token goes when it and all less likely ones together reach at most 1 - top_p.
    """
    total = float(weights.sum(dtype=np.float64))
    outside = (1.0 - top_p) * total
    # Tokens below outside / V cannot reach `outside` even together: no need to sort that long tail.
    head = np.flatnonzero(weights >= min(1.0, outside / len(weights)))
    values = weights[head]
    ordered = np.sort(values)
    tail = total - float(ordered.sum(dtype=np.float64))
    reached = tail + np.cumsum(ordered, dtype=np.float64)
    gone = min(int(np.searchsorted(reached, outside, side="right")), len(ordered) - 1)
    kept = np.flatnonzero(values >= ordered[gone])
    tied = len(kept) - (len(ordered) - gone)  # kept ones that equal the last one gone
    if tied:
        kept = np.setdiff1d(kept, np.flatnonzero(values == ordered[gone])[:tied])
    return head[kept]


def _draw(weights: np.ndarray, uniform: float) -> int:
    """The index that `uniform` from [0, 1) falls on when every index is as wide as its weight."""
    # Sums of short pieces first: adding up 150,000 weights one by one takes 4 ms, this 0.1 ms.
    pieces = np.add.reduceat(weights, np.arange(0, len(weights), 256), dtype=np.float64).cumsum()
    target = uniform * pieces[-1]
    piece = _first_above(pieces, target)
    start = piece * 256
    within = np.cumsum(weights[start : start + 256], dtype=np.float64)
    return start + _first_above(within, target - (pieces[piece - 1] if piece else 0.0))


def _first_above(cumulative: np.ndarray, target: float) -> int:
    """The first index whose cumulative weight exceeds `target`; rounding never leads past the last."""
    return int(np.searchsorted(cumulative, min(target, np.nextafter(cumulative[-1], 0.0)), side="right"))


def _keep(
    ids: np.ndarray | None, weights: np.ndarray, kept: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray]:
    return (kept if ids is None else ids[kept]), weights[kept]


def _check_finite(top: np.floating) -> None:
    """A NaN anywhere makes NaN the maximum, so one look at the maximum is enough."""
    if not math.isfinite(top):
        raise BackendError(
            f"the engine computed logits whose maximum is {top}",
            "its numbers overflowed: rebuild with a wider dtype (bfloat16 or float32)",
        )
