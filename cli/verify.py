"""`llmc verify`: check a bundle's files and judge it by thresholds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli.errors import error_of
from llmc.cli.output import Json, print_json
from llmc.cli.text import table
from llmc.runtime.cpus import limit_library_threads
from llmc.runtime.errors import ThresholdError

if TYPE_CHECKING:
    from llmc.compiler.verify.figures import Threshold
    from llmc.compiler.verify.judge import Verdict


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.llmc", help="The bundle to judge.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT", help="Run the engine beside the checkpoint it was made from (CPU engines)."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure on this text in UTF-8 (default: a built-in text)."),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(metavar="SHARE", min=0, max=1, help="Least top-1 agreement, such as 0.97."),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(metavar="NATS", min=0, help="Largest mean KL divergence.")
    ] = None,
    max_perplexity_increase: Annotated[
        float | None, typer.Option(metavar="PERCENT", min=0, help="Largest increase of perplexity.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a bundle's files and judge how close it is to its checkpoint.

    Without --against the figures are those that the build recorded. A missed threshold is exit code 3. A
    verified bundle without quantization meets every threshold: nothing was lost.

    \b
    Examples:
      llmc verify tales.llmc
      llmc verify tales.llmc --against model_zoo/llama/tales --min-top1 0.97
    """
    if against is not None:
        from llmc.cli.build import require_build_libraries

        require_build_libraries()
        limit_library_threads()
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from llmc.cli.progress import shown

    with shown(f"verifying {bundle}") as progress:
        from llmc.compiler.verify.judge import judge

        verdict = judge(bundle, against, text, progress)
    thresholds = verdict.thresholds(min_top1, max_kl, max_perplexity_increase)
    missed = [threshold for threshold in thresholds if not threshold.met]
    error = ThresholdError(*_complaint(bundle, verdict, missed)) if missed else None
    if as_json:
        print_json(_record(verdict, thresholds), error_of(error) if error else None)
    else:
        print(table(_facts(verdict, thresholds)))
    if error:
        raise error


def _complaint(path: Path, verdict: Verdict, missed: list[Threshold]) -> tuple[str, str]:
    """Return the message and the hint of the ThresholdError for `missed`."""
    message = f"{path} misses {', '.join(threshold.text for threshold in missed)}"
    manifest = verdict.bundle.manifest
    if any(threshold.figure is None for threshold in missed):
        reason = manifest.verification.reason or "its build recorded no such figure"
        if verdict.figures.origin == "measured":
            return f"{message}: it cannot be measured without a tokenizer", "judge by the other figures"
        hint = "build it again, with the verification"
        return f"{message}: {reason}", hint if manifest.gpu else "--against CHECKPOINT measures it"
    if manifest.quantization:
        return (
            message,
            "build with a format of more bits, or leave the most sensitive layers out with --exclude",
        )
    return message, "look at `llmc inspect`, and build again from the checkpoint"


def _facts(verdict: Verdict, thresholds: list[Threshold]) -> list[tuple[str, str]]:
    figures, bundle = verdict.figures, verdict.bundle
    count = len(bundle.manifest.files)
    facts = [("bundle", f"{bundle.name}, every byte of {count} files verified")]
    if verdict.checkpoint:
        facts.append(("checkpoint", f"{verdict.checkpoint}, the one it was made from"))
    where = f"{figures.positions:,} positions of {verdict.text}" if figures.positions else verdict.text
    against = f", against {figures.against}" if figures.against else ""
    facts.append(("figures", f"{figures.origin}, on {where}{against}"))
    if figures.top1_agreement is not None:
        plain = figures.top1_agreement_without_ties
        ties = "" if plain is None else f", {plain:.4f} without near ties"
        facts.append(("top-1 agreement", f"{figures.top1_agreement:.4f}{ties}"))
    if figures.mean_kl is not None:
        facts.append(("mean KL", f"{figures.mean_kl:g} nats"))
    if figures.perplexity is not None and figures.perplexity_unquantized is not None:
        change = f" ({figures.perplexity_increase_percent:+.2f} %)"
        facts.append(("perplexity", f"{figures.perplexity_unquantized:g} -> {figures.perplexity:g}{change}"))
    if figures.kv_cache_mean_kl is not None:
        lost = f"apart from these: mean KL {figures.kv_cache_mean_kl:g}"
        if figures.kv_cache_top1_agreement is not None:
            lost += f", top-1 agreement {figures.kv_cache_top1_agreement:.4f}"
        facts.append((f"KV cache {bundle.manifest.precision.kv_dtype}", lost))
    if figures.max_logit_error is not None:
        facts.append(("max logit error", f"{figures.max_logit_error:g}"))
    if verdict.engine_perplexity is not None:
        on = f"on {verdict.engine_positions:,} positions of the given text"
        facts.append(("engine's perplexity", f"{verdict.engine_perplexity:g}, {on}"))
    facts += [("ok" if threshold.met else "MISSED", threshold.text) for threshold in thresholds]
    return facts


def _record(verdict: Verdict, thresholds: list[Threshold]) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "path": str(verdict.bundle.path),
        "files_verified": len(verdict.bundle.manifest.files),
        "checkpoint": str(verdict.checkpoint) if verdict.checkpoint else None,
        "figures": asdict(verdict.figures),
        "text": verdict.text,
        "text_sha256": verdict.text_sha256 or None,
        "engine_perplexity": verdict.engine_perplexity,
        "engine_positions": verdict.engine_positions,
        "thresholds": [{**asdict(threshold), "met": threshold.met} for threshold in thresholds],
    }
