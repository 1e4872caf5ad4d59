"""Measure the difference between two sets of logits, a few rows at a time because vocabularies are large."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from llmc.runtime.cpus import available_cpus

_BLOCK_ELEMENTS = 1 << 17  # rows x vocabulary that are compared together: 1 MB in fp64
_KL_OF_ROUNDING = 1e-12  # a KL divergence below this, or below 0, is a rounding error of fp64


@dataclass(frozen=True)
class Difference:
    """The difference between logits and the reference's, over all positions and the whole vocabulary."""

    #: Largest absolute error.
    largest: float
    #: Root mean square error.
    rms: float
    #: Mean KL divergence from the reference's distribution, in nats.
    kl: float
    #: [positions]: the reference's best logit minus its logit of the other model's best token; 0 if equal.
    top1_gap: np.ndarray
    #: The reference's largest logit by magnitude.
    scale: float
    #: Perplexity of the tokens that follow; None if they were not given.
    perplexity: float | None = None
    reference_perplexity: float | None = None

    @classmethod
    def between(cls, reference: Iterable[np.ndarray], logits: Iterable[np.ndarray]) -> Difference:
        """Compare the logits of several sequences, float32 [positions, vocabulary] each."""
        meter = DifferenceMeter()
        for expected, actual in zip(reference, logits, strict=True):
            meter.add(expected, actual)
        return meter.result()

    @property
    def perplexity_increase(self) -> float | None:
        """The increase of the perplexity over the reference's, in percent; None if it is not known."""
        if self.perplexity is None or self.reference_perplexity is None:
            return None
        return 100 * (self.perplexity / self.reference_perplexity - 1)

    def agreement(self, near_tie: float = 0.0) -> float:
        """Return the share of positions, 0 to 1, with the reference's best token.

        near_tie: a token whose reference logit is at most this below the best one counts as the best
        """
        return float((self.top1_gap <= near_tie).mean())

    def summary(self) -> dict[str, float]:
        """Return the figures for the manifest, to two digits: further digits depend on the machine."""
        figures = {"max_logit_error": self.largest, "rms_logit_error": self.rms, "mean_kl": self.kl}
        shown = {name: two_digits(figure) for name, figure in figures.items()}
        return shown | {"top1_agreement_without_ties": round(self.agreement(), 4)}


class DifferenceMeter:
    """Accumulates a Difference. NaN and infinity are passed to the result and raise no error."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []

    def add(self, reference: np.ndarray, logits: np.ndarray, following: Sequence[int] = ()) -> None:
        """Add the logits of n positions, both float32 [n, vocabulary].

        following: the token after each position, for the perplexity; may be shorter than n
        """
        step = max(1, _BLOCK_ELEMENTS // reference.shape[1])

        def between(start: int) -> _Block:
            rows = slice(start, start + step)
            return _Block.between(reference[rows], logits[rows], following[rows])

        with ThreadPoolExecutor(available_cpus()) as pool:
            self._blocks += pool.map(between, range(0, len(reference), step))

    def result(self) -> Difference:
        kl = float(np.mean(self._all("kl")))
        reference_losses, losses = self._all("reference_losses"), self._all("losses")
        return Difference(
            largest=float(np.max([block.largest for block in self._blocks])),
            rms=float(np.sqrt(np.mean(self._all("squares")))),
            kl=0.0 if kl < _KL_OF_ROUNDING else kl,
            top1_gap=self._all("top1_gap"),
            scale=float(np.max([block.scale for block in self._blocks])),
            perplexity=float(np.exp(losses.mean())) if losses.size else None,
            reference_perplexity=float(np.exp(reference_losses.mean())) if losses.size else None,
        )

    def _all(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(block, name) for block in self._blocks])


@dataclass(frozen=True)
class _Block:
    """The difference of a few positions; arrays have an element a position."""

    largest: float
    scale: float
    #: Mean square errors.
    squares: np.ndarray
    kl: np.ndarray
    top1_gap: np.ndarray
    #: Negative log probabilities of the tokens that follow; may be shorter.
    reference_losses: np.ndarray
    losses: np.ndarray

    @classmethod
    def between(cls, reference: np.ndarray, logits: np.ndarray, following: Sequence[int]) -> _Block:
        with np.errstate(over="ignore", invalid="ignore"):
            error = (logits - reference).astype(np.float64)
            top, peak = reference.max(1).astype(np.float64), error.max(1)
            largest, squares = np.maximum(peak.max(), -error.min()), np.square(error).mean(1)
            best = np.arange(len(logits)), logits.argmax(1)
            # KL = log E exp(e) - E e, with e the error and E the mean over the reference's distribution.
            weights = np.exp(reference - top[:, None])
            total = weights.sum(1)
            mean_error = np.einsum("nv,nv->n", weights, error) / total
            error -= peak[:, None]
            np.exp(error, out=error)
            growth = np.log(np.einsum("nv,nv->n", weights, error) / total) + peak
            # log sum exp of the reference is `log_sum`; that of the other logits is larger by `growth`.
            log_sum = top + np.log(total)
            chosen, count = (np.arange(len(following)), np.asarray(following, int)), len(following)
            return cls(
                largest=float(largest),
                scale=float(np.maximum(top.max(), -reference.min())),
                squares=squares,
                kl=growth - mean_error,
                top1_gap=reference.max(1) - reference[best],
                reference_losses=log_sum[:count] - reference[chosen],
                losses=(log_sum + growth)[:count] - logits[chosen],
            )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log probabilities, float64 [n, vocabulary], of logits [n, vocabulary]."""
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(1, keepdims=True))
    return wide


def two_digits(figure: float) -> float:
    """Round to two significant digits."""
    return float(f"{figure:.1e}")


def scaled(tolerance: float, largest_logit: float) -> float:
    """Return the tolerance for fp32 logits of this magnitude. Errors grow with the logits."""
    return tolerance * max(1.0, largest_logit / 10)
