"""Measure the difference between two sets of logits, a few rows at a time because vocabularies are large."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

_BLOCK_ELEMENTS = 1 << 21  # rows x vocabulary that are compared together: 16 MB in fp64
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


@dataclass
class DifferenceMeter:
    """Accumulates a Difference. NaN and infinity are passed to the result and raise no error."""

    _largest: list[float] = field(default_factory=list)
    _squares: list[float] = field(default_factory=list)
    _kl: list[float] = field(default_factory=list)
    _top1_gap: list[np.ndarray] = field(default_factory=list)
    _scale: list[float] = field(default_factory=list)
    _losses: list[tuple[float, float]] = field(default_factory=list)

    def add(self, reference: np.ndarray, logits: np.ndarray, following: Sequence[int] = ()) -> None:
        """Add the logits of n positions, both float32 [n, vocabulary].

        following: the token after each position, for the perplexity; may be shorter than n
        """
        step = max(1, _BLOCK_ELEMENTS // reference.shape[1])
        for start in range(0, len(reference), step):
            rows = slice(start, start + step)
            with np.errstate(over="ignore", invalid="ignore"):
                self._add(reference[rows], logits[rows], following[rows])

    def _add(self, reference: np.ndarray, logits: np.ndarray, following: Sequence[int]) -> None:
        error = (logits - reference).astype(np.float64)
        self._largest.append(float(np.abs(error).max()))
        self._scale.append(float(np.abs(reference).max()))
        self._squares += np.square(error).mean(1).tolist()
        best = np.arange(len(logits)), logits.argmax(1)
        self._top1_gap.append(reference.max(1) - reference[best])
        # KL = log E exp(e) - E e, with e the error and E the mean over the reference's distribution.
        logs = log_softmax(reference)
        weights = np.exp(logs)
        peak = error.max(1)
        spread = np.einsum("nv,nv->n", weights, np.exp(error - peak[:, None]))
        self._kl += (np.log(spread) + peak - np.einsum("nv,nv->n", weights, error)).tolist()
        if following:
            chosen = np.arange(len(following)), np.asarray(following)
            ours = -log_softmax(logits[: len(following)])[chosen]
            self._losses += zip((-logs[chosen]).tolist(), ours.tolist(), strict=True)

    def result(self) -> Difference:
        kl = float(np.mean(self._kl))
        reference_loss, loss = np.mean(self._losses, 0) if self._losses else (None, None)
        return Difference(
            largest=float(np.max(self._largest)),
            rms=float(np.sqrt(np.mean(self._squares))),
            kl=0.0 if kl < _KL_OF_ROUNDING else kl,
            top1_gap=np.concatenate(self._top1_gap),
            scale=float(np.max(self._scale)),
            perplexity=None if loss is None else float(np.exp(loss)),
            reference_perplexity=None if reference_loss is None else float(np.exp(reference_loss)),
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
