"""Quantization loss: KL divergence, top-1 agreement and perplexity against the reference.

The reference is the checkpoint in transformers, in fp32. For a pre-quantized checkpoint it is the model with
dequantized weights and without activation quantization. To save memory, the reference's last hidden states
are kept instead of its logits, and lm_head is applied to them chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.compiler.verify.difference import Difference, DifferenceMeter, log_softmax, two_digits

if TYPE_CHECKING:
    import torch

    from llmc.compiler.verify.reference import Head

_ROWS = 64  # rows of logits that are computed at a time


def measure(
    head: Head,
    states: Sequence[torch.Tensor],
    windows: Sequence[Sequence[int]],
    others: Iterable[Iterable[np.ndarray]],
    on_window: Callable[[], None] = lambda: None,
) -> Difference:
    """Compare the reference with other logits.

    head: the reference's lm_head
    states: the reference's last hidden states of each window, [tokens, hidden]
    windows: the token ids of each window
    others: the other logits: for each window consecutive chunks, float32 [n, vocabulary]
    on_window: called after each window
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
    """Yield the logits of each window as chunks of a few rows, float32 [n, vocabulary], for `measure`."""
    for kept in states:
        yield (head.logits(part) for part in kept.split(_ROWS))


def record(difference: Difference, near_tie: float, text: bool) -> dict[str, Any]:
    """Return the figures for the manifest.

    near_tie: the logit difference up to which two tokens count as tied
    text: whether the tokens are a text; random tokens get no perplexity
    """
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
    """Return the perplexity of logits. The arguments are those of `measure`."""
    losses: list[float] = []
    for ids, chunks in zip(windows, others, strict=True):
        start = 0
        for logits in chunks:
            following = ids[start + 1 : start + len(logits) + 1]
            chosen = np.arange(len(following)), np.asarray(following, int)
            losses += (-log_softmax(logits[: len(following)])[chosen]).tolist()
            start += len(logits)
    return float(f"{np.exp(np.mean(losses)):.4g}")
