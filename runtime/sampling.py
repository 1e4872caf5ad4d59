"""Sampling of the next token, with the same filters in the same order as transformers' `generate`.

The order is repetition penalty, temperature, top-k, top-p, min-p. Greedy decoding (temperature 0) applies
only the repetition penalty. Filters only remove tokens, so after top-k the others work on the few remaining
ones instead of the whole vocabulary.
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
    """The sampling options of one request. The constructor raises RequestError for an invalid value."""

    #: Maximum number of tokens to generate, at least 1.
    max_tokens: int = 128
    #: Divides the logits. 0: greedy decoding.
    temperature: float = 0.0
    #: Keep the k most likely tokens, and all that tie with the last of them. 0: keep all.
    top_k: int = 0
    #: Keep the smallest set of most likely tokens whose probability reaches top_p. 1: keep all.
    top_p: float = 1.0
    #: Keep tokens at least min_p times as likely as the most likely one. 0: keep all.
    min_p: float = 0.0
    #: Divides positive logits of tokens already seen, and multiplies negative ones. 1: off.
    repetition_penalty: float = 1.0
    #: Makes the draws of this request reproducible, independent of other requests. None: random.
    seed: int | None = None
    #: Strings that end the output, or one such string. The output does not include them.
    stop: tuple[str, ...] = ()
    #: Continue after an end-of-sequence token.
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _plain(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            types, allowed, hint = _LIMITS[field.name]
            wrong_type = not isinstance(value, types) or (isinstance(value, bool) and types is not bool)
            if wrong_type or not allowed(value):
                raise RequestError(f"{field.name} is {value!r}", f"{field.name} must be {hint}", field.name)


def _plain(name: str, value: Any) -> Any:
    """Return the value of a field, with numpy numbers as Python numbers and stop strings as a tuple."""
    if isinstance(value, np.generic):
        return value.item()
    if name == "stop":
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
    return value


# Field -> its type, a predicate for valid values, and a description of them for the hint.
_LIMITS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "max_tokens": (int, lambda v: v >= 1, "a whole number of at least 1"),
    # The bounds of temperature and repetition penalty keep float32 arithmetic finite.
    "temperature": ((int, float), lambda v: 0 <= v <= 1e6, "0 (greedy) or a positive number, at most 1e6"),
    "top_k": (int, lambda v: v >= 0, "a whole number; 0 turns it off"),
    "top_p": ((int, float), lambda v: 0 <= v <= 1, "between 0 and 1; 1 turns it off"),
    "min_p": ((int, float), lambda v: 0 <= v <= 1, "between 0 and 1; 0 turns it off"),
    "repetition_penalty": (
        (int, float),
        lambda v: 1e-6 <= v <= 1e6,
        "a positive number, from 1e-6 to 1e6; 1 turns it off",
    ),
    "seed": ((int, type(None)), lambda v: v is None or v >= 0, "a whole number of at least 0, or none"),
    "stop": (
        tuple,
        lambda v: all(isinstance(text, str) and text for text in v),
        'a non-empty string, or a list of them, such as ["\\n\\n"]',
    ),
    "ignore_eos": (bool, lambda v: True, "true or false"),
}


def candidates_needed(params: Iterable[SamplingParams], most: int) -> int:
    """Return how many of a row's largest logits, with ties, decide its next token, for all rows.

    most: the largest number that the backend can select.
    Returns 1 if all rows are decoded greedily: the first of the largest logits is enough. Sampling with
    top_k 1 also needs the ties, so it counts as 2. Returns 0 if a row needs all its logits, or more than
    `most`.
    """
    needed = 0
    for row in params:
        count = 1 if row.temperature == 0.0 else row.top_k and max(2, row.top_k)
        if row.repetition_penalty != 1.0 or not 0 < count <= most:
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
    """Return the next token.

    logits: float32 [V]. They are not changed.
    token_ids: all tokens so far, prompt and output, for the repetition penalty.
    rng: sampling takes exactly one number, greedy decoding none.
    ids: the token ids of `logits`, ascending. They must include the candidates that `candidates_needed` asks
    for, so that the result is the same as with all logits. None: the logits are complete.
    Raises BackendError if the maximum of the logits is NaN or infinite.
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
    """Apply temperature, top-k, top-p and min-p. Return the remaining tokens and their weights.

    Token ids are int64 [C], or None for the whole vocabulary in order. Weights are float32 [C]: probabilities
    up to a common factor, so that the largest is 1.
    """
    ids: np.ndarray | None = None
    if 0 < params.top_k < len(logits):
        ids = largest(logits, params.top_k)
        logits = logits[ids]
    top = logits.max()
    _check_finite(top)
    # The maximum is subtracted first, so that a tiny temperature does not overflow.
    with np.errstate(over="ignore"):
        weights = np.exp((logits - top) / np.float32(max(params.temperature, 1e-30)))
    if params.top_p < 1.0:
        ids, weights = _keep(ids, weights, _nucleus(weights, params.top_p))
    if params.min_p > 0.0:
        ids, weights = _keep(ids, weights, np.flatnonzero(weights >= params.min_p))
    return ids, weights


def penalize_repetition(logits: np.ndarray, penalty: float, token_ids: Sequence[int]) -> np.ndarray:
    """Return a copy of float32 `logits[V]` in which each of `token_ids` is less likely (penalty > 1)."""
    seen = np.array(token_ids, np.int64)
    seen = seen[seen < len(logits)]  # an embedding table can have more rows than there are logits
    scores = logits[seen]
    penalized = logits.copy()
    penalized[seen] = np.where(scores < 0, scores * np.float32(penalty), scores / np.float32(penalty))
    return penalized


def largest(logits: np.ndarray, count: int) -> np.ndarray:
    """Return the indices, ascending, of the `count` largest and of all that tie with the last of them.

    Raises BackendError if the maximum of the logits is NaN or infinite.
    """
    # The logits are laid out in 64 rows. The column maxima bound the last of the largest from below, and only
    # columns that reach the bound matter: 0.05 ms for 150,000 logits. A partition of them all takes 2 ms.
    columns = len(logits) // 64
    if count <= columns:
        covered = 64 * columns
        peaks = logits[:covered].reshape(64, columns).max(axis=0)
        _check_finite(peaks.max())  # the comparison below would drop a NaN silently
        reached = np.flatnonzero(peaks >= np.partition(peaks, -count)[-count])
        near = (reached + columns * np.arange(64)[:, None]).ravel()
        near = np.concatenate([near, np.arange(covered, len(logits))])
    else:
        near = np.arange(len(logits))
    values = logits[near]
    _check_finite(values.max())
    return np.sort(near[values >= np.partition(values, -count)[-count]])


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Return the indices into `weights`, ascending, of the tokens that top-p keeps: at least one.

    A token is removed if it and all less likely tokens together reach at most 1 - top_p.
    """
    total = float(weights.sum(dtype=np.float64))
    outside = (1.0 - top_p) * total
    # Tokens below outside / V cannot reach `outside` even together, so that long tail is not sorted.
    head = np.flatnonzero(weights >= min(1.0, outside / len(weights)))
    values = weights[head]
    ordered = np.sort(values)
    tail = total - float(ordered.sum(dtype=np.float64))
    reached = tail + np.cumsum(ordered, dtype=np.float64)
    removed = min(int(np.searchsorted(reached, outside, side="right")), len(ordered) - 1)
    kept = np.flatnonzero(values >= ordered[removed])
    tied = len(kept) - (len(ordered) - removed)  # kept tokens that equal the last removed one
    if tied:
        kept = np.setdiff1d(kept, np.flatnonzero(values == ordered[removed])[:tied])
    return head[kept]


def _draw(weights: np.ndarray, uniform: float) -> int:
    """Draw an index in proportion to its weight, with `uniform` from [0, 1)."""
    # Sums of short pieces come first: adding 150,000 weights one by one takes 4 ms, this 0.1 ms.
    pieces = np.add.reduceat(weights, np.arange(0, len(weights), 256), dtype=np.float64).cumsum()
    target = uniform * pieces[-1]
    piece = _first_above(pieces, target)
    start = piece * 256
    within = np.cumsum(weights[start : start + 256], dtype=np.float64)
    return start + _first_above(within, target - (pieces[piece - 1] if piece else 0.0))


def _first_above(cumulative: np.ndarray, target: float) -> int:
    """Return the first index whose cumulative weight exceeds `target`, or with rounding errors the last."""
    return int(np.searchsorted(cumulative, min(target, np.nextafter(cumulative[-1], 0.0)), side="right"))


def _keep(
    ids: np.ndarray | None, weights: np.ndarray, kept: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray]:
    return (kept if ids is None else ids[kept]), weights[kept]


def _check_finite(top: np.floating) -> None:
    """Raise BackendError unless the maximum is finite. A NaN anywhere makes the maximum NaN."""
    if not math.isfinite(top):
        raise BackendError(
            f"the engine computed logits whose maximum is {top}",
            "its numbers overflowed: rebuild with a wider dtype (bfloat16 or float32)",
        )
