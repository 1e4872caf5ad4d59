"""What rounding loses: logits against those of the reference, window by window. That is the checkpoint; of
one that came quantized it is a model with its dequantized weights, and inputs that are not rounded.

No more than a few rows of logits exist at a time: of the reference only the last hidden states are kept, and
the last matrix is applied to them when the other side's logits are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.compiler.verify.difference import Difference, DifferenceMeter, log_softmax, two_digits

if TYPE_CHECKING:
    import torch

    from llmc.compiler.verify.reference import Head

_ROWS = 64  # of the last matrix's output at a time


def measure(
    head: Head,
    states: Sequence[torch.Tensor],
    windows: Sequence[Sequence[int]],
    others: Iterable[Iterable[np.ndarray]],
    on_window: Callable[[], None] = lambda: None,
) -> Difference:
    """The reference's `states` [tokens, hidden], under `head`, against `others`: for each window consecutive
    logits [n, vocabulary]."""
    meter = DifferenceMeter()
    for kept, ids, chunks in zip(states, windows, others, strict=True):
        start = 0
        for logits in chunks:
            stop = start + len(logits)
            meter.add(head.logits(kept[start:stop]), logits, ids[start + 1 : stop + 1])
            start = stop
        on_window()
    return meter.result()


def rows_of(head: Head, states: Sequence[torch.Tensor]) -> Iterator[Iterator[np.ndarray]]:
    """The logits of each window, a few rows at a time, for `measure`."""
    for kept in states:
        yield (head.logits(part) for part in kept.split(_ROWS))


def record(difference: Difference, near_tie: float, text: bool) -> dict[str, Any]:
    """The figures for the manifest. text: False for random tokens, whose perplexity means nothing."""
    figures: dict[str, Any] = {
        "positions": len(difference.shortfall),
        **difference.summary(),
        "top1_agreement": round(difference.agreement(near_tie), 4),
        "near_tie": two_digits(near_tie),
    }
    increase = difference.perplexity_increase
    if text and increase is not None:
        figures |= {
            "perplexity_unquantized": float(f"{difference.reference_perplexity:.4g}"),
            "perplexity": float(f"{difference.perplexity:.4g}"),
            "perplexity_increase_percent": round(increase, 2) + 0.0,  # no "-0.0"
        }
    return figures


def perplexity(windows: Sequence[Sequence[int]], others: Iterable[Iterable[np.ndarray]]) -> float:
    """Of logits alone, as `measure` takes them: exp of the mean negative log likelihood of what follows."""
    losses: list[float] = []
    for ids, chunks in zip(windows, others, strict=True):
        start = 0
        for logits in chunks:
            following = ids[start + 1 : start + len(logits) + 1]
            chosen = np.arange(len(following)), np.asarray(following, int)
            losses += (-log_softmax(logits[: len(following)])[chosen]).tolist()
            start += len(logits)
    return float(f"{np.exp(np.mean(losses)):.4g}")
