"""Quantization loss: KL divergence, top-1 agreement and perplexity against the reference.

The reference is the checkpoint in transformers, in fp32. For a pre-quantized checkpoint it is the model with
dequantized weights and without activation quantization. Only a few rows of logits exist at a time: the
reference's last hidden states are kept, and its last matrix is applied to them chunk by chunk.
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
    """Compare the reference with other logits.

    head, states: the reference's last matrix and its last hidden states [tokens, hidden] of each window
    windows: the token ids
    others: for each window consecutive chunks of logits, float32 [n, vocabulary]
    """
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
    """Yield the logits of each window, a few rows at a time, for `measure`."""
    for kept in states:
        yield (head.logits(part) for part in kept.split(_ROWS))


def record(difference: Difference, near_tie: float, text: bool) -> dict[str, Any]:
    """Return the figures for the manifest. text: False for random tokens, which have no perplexity."""
    figures: dict[str, Any] = {
        "positions": len(difference.top1_gap),
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
    """Return the perplexity of logits as `measure` takes them."""
    losses: list[float] = []
    for ids, chunks in zip(windows, others, strict=True):
        start = 0
        for logits in chunks:
            following = ids[start + 1 : start + len(logits) + 1]
            chosen = np.arange(len(following)), np.asarray(following, int)
            losses += (-log_softmax(logits[: len(following)])[chosen]).tolist()
            start += len(logits)
    return float(f"{np.exp(np.mean(losses)):.4g}")
