"""GPTQ: quantize a column at a time, and let the remaining columns compensate for the error.

Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323. The loss is tr(D H D^T): D [out, in] is the error
of the weights, H = X^T X / tokens the second moment of the layer's inputs X. It is computed in the form of
LDLQ (Chee, Cai, Kuleshov, De Sa 2023, arXiv:2307.13304, theorem 6: the same codes), which inverts nothing.
With H = M diag(d) M^T, M unit upper triangular, the loss of rounding w to q is

    sum over j of d_j (v_j - q_j)^2,    v_j = w_j + sum over k < j of (w_k - q_k) M_kj

so each q_j, in the order of the columns, is v_j rounded to nearest.

The scale of a block of columns is chosen from `scales.candidates`, after the feedback of the columns before
it: the candidate whose codes, with the feedback within the block, have the least loss. If a row has a single
scale, it is chosen for the original weights by the squared error weighted with diag(H).

Measured on model_zoo/llama/tales, top-1 agreement with fp32 and mean KL on 8,192 held-out tokens, lm_head
left out (2026-11-26):

                                              H from               int4             nvfp4-weight-only
    round to nearest, least squared error                          91.86 % 0.0120   93.41 % 0.0101
    GPTQ, scales by squared error             its training text    94.93 % 0.0054   95.53 % 0.0047
          squared error weighted with diag(H)                      95.21 % 0.0054   95.57 % 0.0047
          loss with feedback                                       95.26 % 0.0052   95.69 % 0.0044
          loss with feedback                  calibrate/text       94.62 % 0.0053   95.76 % 0.0045

(16,384 tokens of its training text, 5,748 of calibrate/text. A quarter of a percent is noise.)
"""

from __future__ import annotations

import numpy as np

from llmc.compiler.quantize import round_to_nearest, scales
from llmc.compiler.quantize.second_moment import Factors
from llmc.passes.quantize import elements
from llmc.passes.quantize.formats import Format

_WIDTH = 128  # columns that are rounded before the feedback of all columns before them is computed
_ROWS = 1024  # rows at a time: the errors of 7 candidates for a block of 32 columns take 0.9 MB of cache


def gptq(
    rows: np.ndarray, factors: Factors, fmt: Format, name: str, *, amax: float | None = None
) -> dict[str, np.ndarray]:
    """Quantize a weight so that the layer's output changes little.

    rows: the weight, [out, in], of any float dtype
    factors: M and d of the second moment of the layer's inputs
    fmt: the format to quantize to
    name: the weight's name, for errors
    amax: as in `round_to_nearest.quantize`

    Returns the arrays of `fmt.layout`, as `round_to_nearest.quantize` does, and raises its errors.
    """
    wide, global_scale = round_to_nearest.prepare(rows, fmt, name, amax)

    parts = [
        _quantize_rows(wide[first : first + _ROWS], factors, fmt, global_scale, name)
        for first in range(0, len(wide), _ROWS)
    ]
    codes, stored = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return round_to_nearest.assemble(codes, global_scale if fmt.block == -1 else stored, global_scale, fmt)


def _quantize_rows(
    rows: np.ndarray, factors: Factors, fmt: Format, global_scale: np.float32, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes [n, in] and stored scales [n, blocks] of some rows of a weight, float32 [n, in]."""
    unit, pivots = factors.unit, factors.pivots
    weight = np.ascontiguousarray(rows.T)  # [in, n]: the work is by column
    codes = np.empty(weight.shape, elements.encode(weight[:0], fmt.element).dtype)
    errors = np.empty_like(weight)
    chosen: list[np.ndarray] = []  # the scales of each block, [n]
    multipliers = np.full(len(rows), global_scale)
    if fmt.block == 0:
        candidates = _candidates(weight, fmt, global_scale, name)
        losses = np.stack([_weighted_error(weight, scale, factors.diagonal, fmt) for scale in candidates])
        chosen.append(_best(candidates, losses))
        multipliers = scales.effective(chosen[0], global_scale)
    block = fmt.block if fmt.block > 0 else _WIDTH
    for first in range(0, len(weight), block):
        if first % _WIDTH == 0:
            start = first  # the feedback of the columns before `start`, on the next ones, in one product
            before = unit[:start, start : start + max(_WIDTH, block)].T @ errors[:start]
        span, inner = slice(first, first + block), unit[first : first + block, first : first + block]
        columns = weight[span]
        feedback = before[first - start : first - start + block]
        if first > start:
            feedback = feedback + unit[start:first, span].T @ errors[start:first]
        if fmt.block > 0:
            candidates = _candidates(_free(columns, feedback, inner), fmt, global_scale, name)
            candidate_multipliers = scales.effective(candidates, global_scale)
            losses = _losses(columns, feedback, inner, pivots[span], candidate_multipliers, fmt.element)
            chosen.append(_best(candidates, losses))
            multipliers = scales.effective(chosen[-1], global_scale)
        codes[span], errors[span] = _round(columns, feedback, inner, multipliers, fmt.element)
    stored = np.stack(chosen, axis=1) if chosen else np.empty((len(rows), 0))
    return np.ascontiguousarray(codes.T), stored


def _free(columns: np.ndarray, feedback: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Return the targets [width, n] if no column of the block were rounded.

    Each column still compensates for the feedback of those before it. The arguments are those of `_round`.
    """
    moved = feedback.copy()  # M^T moved = feedback
    for j in range(1, len(moved)):
        moved[j] -= np.einsum("k,kn->n", inner[:j, j], moved[:j])
    return columns + moved


def _losses(
    columns: np.ndarray,
    feedback: np.ndarray,
    inner: np.ndarray,
    pivots: np.ndarray,
    multipliers: np.ndarray,
    element: str,
) -> np.ndarray:
    """Return the loss of rounding a block of columns with each candidate's scales, [candidates, n].

    The loss is relative to the square of the first candidate.

    pivots: the part of d for these columns, [width]
    multipliers: the multipliers of the codes, float32 [candidates, n]

    The other arguments are those of `_round`. Weights and errors are in units of the multipliers.
    """
    errors = np.empty((len(columns), *multipliers.shape), np.float32)
    losses = np.zeros_like(multipliers)
    target, moved = np.empty_like(losses), np.empty_like(losses)
    for j, wanted in enumerate(columns + feedback):
        np.divide(wanted, multipliers, out=target)
        if j:
            target += np.einsum("k,kcn->cn", inner[:j, j], errors[:j], out=moved)
        code = elements.nearest(target, element)
        np.divide(columns[j], multipliers, out=errors[j])
        errors[j] -= code
        target -= code
        target *= target
        target *= pivots[j]
        losses += target
    losses *= np.square(multipliers / multipliers[0])
    return losses


def _round(
    columns: np.ndarray, feedback: np.ndarray, inner: np.ndarray, multipliers: np.ndarray, element: str
) -> tuple[np.ndarray, np.ndarray]:
    """Round columns, one after the other.

    columns: the weights, float32 [width, n]
    feedback: the feedback of the columns before these, float32 [width, n]
    inner: the part of M for these columns, [width, width]
    multipliers: the multipliers of the codes, float32 [n]

    Returns the codes and the errors w - q, both [width, n].
    """
    target = columns + feedback
    codes = np.empty(target.shape, elements.encode(target[:0], element).dtype)
    errors = np.empty_like(target)
    for j, column in enumerate(target):
        if j:
            column += np.einsum("k,kn->n", inner[:j, j], errors[:j])
        codes[j] = elements.encode(column / multipliers, element)
        errors[j] = columns[j] - elements.decode(codes[j], element) * multipliers
    return codes, errors


def _candidates(columns: np.ndarray, fmt: Format, global_scale: np.float32, name: str) -> np.ndarray:
    """Return the stored scales [candidates, n] to try for a block of columns [width, n]."""
    first = round_to_nearest.first_scales(columns.T[:, None, :], fmt, global_scale, name)
    return np.stack([first, *scales.candidates(first, fmt)])[..., 0]


def _best(tried: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return the scales [n] of `tried` [candidates, n] with the least loss; the first on ties."""
    return np.take_along_axis(tried, losses.argmin(0)[None], 0)[0]


def _weighted_error(columns: np.ndarray, stored: np.ndarray, weights: np.ndarray, fmt: Format) -> np.ndarray:
    multipliers = stored.astype(np.float32)
    difference = elements.nearest(columns / multipliers, fmt.element) * multipliers - columns
    return np.einsum("i,io,io->o", weights, difference, difference)
