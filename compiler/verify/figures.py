"""The fidelity figures of a bundle, and thresholds for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from llmc.runtime.bundle.manifest import Manifest


@dataclass(frozen=True)
class Figures:
    """The measured difference between an engine and its checkpoint. A figure that is not known is None."""

    #: Whether this was measured now or when the bundle was built.
    origin: Literal["measured", "recorded"]
    positions: int | None = None
    #: Near ties count as agreement.
    top1_agreement: float | None = None
    top1_agreement_without_ties: float | None = None
    #: In nats.
    mean_kl: float | None = None
    max_logit_error: float | None = None
    #: Perplexity of the reference.
    perplexity_unquantized: float | None = None
    #: Perplexity of the engine.
    perplexity: float | None = None
    perplexity_increase_percent: float | None = None
    #: The loss of a quantized KV cache, if the build measured it separately.
    kv_cache_top1_agreement: float | None = None
    kv_cache_mean_kl: float | None = None
    #: "checkpoint", or "dequantized" for a pre-quantized checkpoint; "": not recorded.
    reference: str = ""

    @property
    def against(self) -> str:
        """A description of the reference if it is not the checkpoint itself; else ""."""
        return "the dequantized checkpoint" if self.reference == "dequantized" else ""


@dataclass(frozen=True)
class Threshold:
    """A bound of one figure."""

    #: The figure's name in messages.
    name: str
    #: The figure; None if it is not known.
    figure: float | None
    bound: float
    #: Whether the bound is a minimum; else it is a maximum.
    at_least: bool
    #: Whether the engine is verified and not quantized, so that an unknown figure meets every bound.
    lossless: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure is within its bound. An unknown figure is not, unless `lossless`."""
        if self.figure is None:
            return self.lossless
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound

    @property
    def text(self) -> str:
        """The threshold as text, such as "mean KL 0.02 (at most 0.01)"."""
        unknown = "not lost: unquantized and verified" if self.lossless else "unknown"
        figure = unknown if self.figure is None else f"{self.figure:g}"
        return f"{self.name} {figure} ({'at least' if self.at_least else 'at most'} {self.bound:g})"


def recorded(manifest: Manifest) -> Figures:
    """Return the figures that the build recorded.

    The reference is the checkpoint, dequantized if it is pre-quantized. For a 16-bit engine the figures are
    the loss of the whole engine. For an fp32 engine they are the loss of quantization, because the error of
    its arithmetic is negligible. The loss of a quantized KV cache is recorded separately.
    """
    cache = manifest.verification.details.get("kv_cache_loss")
    cache_figures = known(cache) if isinstance(cache, Mapping) else {}
    return replace(
        _without_cache(manifest),
        kv_cache_top1_agreement=cache_figures.get("top1_agreement_without_ties"),
        kv_cache_mean_kl=cache_figures.get("mean_kl"),
    )


def _without_cache(manifest: Manifest) -> Figures:
    record, details = manifest.verification, manifest.verification.details
    loss = details.get("quantization_loss")
    if isinstance(loss, Mapping):
        engine = loss.get("engine")
        figures = known(engine if isinstance(engine, Mapping) else loss)
        before, after = figures.get("perplexity_unquantized"), figures.get("perplexity")
        if before and after:  # older bundles record only these two
            figures.setdefault("perplexity_increase_percent", round(100 * (after / before - 1), 2))
        if "top1_agreement_without_ties" in figures:
            figures.setdefault("top1_agreement", figures["top1_agreement_without_ties"])
        return Figures("recorded", reference=reference_of(loss), **figures)
    engine = details.get("engine")
    return Figures(
        "recorded",
        positions=record.tokens_compared,
        top1_agreement=record.top1_agreement,
        max_logit_error=record.max_logit_error,
        mean_kl=known(engine).get("mean_kl") if isinstance(engine, Mapping) else None,
    )


def is_lossless(manifest: Manifest) -> bool:
    """Return whether the build verified an engine with neither quantized weights nor a quantized cache."""
    precision = manifest.precision
    return (
        manifest.quantization is None
        and precision.kv_dtype == precision.dtype
        and manifest.verification.status == "passed"
    )


def known(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a record that are fields of `Figures` and numbers.

    The record may come from `details` of a manifest, which may hold anything.
    """
    names = asdict(Figures("recorded")).keys() - {"origin", "reference"}
    return {
        name: value
        for name, value in figures.items()
        if name in names and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def reference_of(figures: Mapping[str, Any]) -> str:
    """Return `Figures.reference` from a record."""
    reference = figures.get("reference")
    return reference if isinstance(reference, str) else ""
