"""Evaluate a finished bundle by the figures that its build recorded, or by a new measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc.compiler import texts
from llmc.compiler.child_process import Child
from llmc.compiler.progress import Progress
from llmc.compiler.verify.figures import Figures, Threshold, is_lossless, known, recorded, reference_of
from llmc.compiler.verify.job import Question
from llmc.runtime.backends.requirements import check_requirements
from llmc.runtime.bundle.manifest import Manifest, Source
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import CheckpointError, RequestError
from llmc.runtime.memory import available_memory, memory_needed

_TOKENIZER = "tokenizer/tokenizer.json"
_OUT_OF_MEMORY = "use a machine with more, or judge the recorded figures, without --against and --text"


@dataclass(frozen=True)
class Verdict:
    """The result of `judge`."""

    bundle: Bundle
    #: The checkpoint that the bundle was compared with, if any.
    checkpoint: Path | None
    figures: Figures
    #: The name or a description of the text that the figures were measured on.
    text: str
    #: The sha256 of that text in UTF-8; "" if it is not known.
    text_sha256: str
    #: The engine's perplexity on the user's text, if it was measured without a checkpoint.
    engine_perplexity: float | None
    #: The number of tokens that it was measured on.
    engine_positions: int | None

    def thresholds(
        self, min_top1: float | None, max_kl: float | None, max_perplexity_increase: float | None
    ) -> list[Threshold]:
        """Return the thresholds that are not None, with their figures.

        min_top1: the least top-1 agreement, 0 to 1
        max_kl: the largest mean KL divergence in nats
        max_perplexity_increase: the largest increase of the perplexity in percent

        The first two also apply to a quantized KV cache whose loss was measured separately. For a verified
        bundle without quantization, a figure that the build did not record counts as met.
        """
        figures = self.figures
        lossless = figures.origin == "recorded" and is_lossless(self.bundle.manifest)
        bounds = [
            ("top-1 agreement", figures.top1_agreement, min_top1, True),
            ("mean KL", figures.mean_kl, max_kl, False),
            ("perplexity increase in %", figures.perplexity_increase_percent, max_perplexity_increase, False),
        ]
        if figures.kv_cache_mean_kl is not None:
            bounds += [
                ("top-1 agreement of the KV cache", figures.kv_cache_top1_agreement, min_top1, True),
                ("mean KL of the KV cache", figures.kv_cache_mean_kl, max_kl, False),
            ]
        return [
            Threshold(name, figure, bound, at_least, lossless and figure is None)
            for name, figure, bound, at_least in bounds
            if bound is not None
        ]


def judge(path: Path, against: str | None, text: Path | None, progress: Progress) -> Verdict:
    """Hash every file of the bundle at `path`, and return its figures.

    against: the checkpoint that the bundle was built from. A CPU engine is compared with it, in transformers
        in fp32, on `text` or the evaluation text. If it is None, the recorded figures are returned.
    text: a text file in UTF-8. Without `against`, the perplexity of a CPU engine is measured on it.

    Raises BundleError for a damaged bundle, CheckpointError for another checkpoint, RequestError for a text
    or an engine that cannot be used and for a lack of memory.
    """
    content = texts.read_text(text) if text else ""
    bundle = Bundle.open(path, verify_hashes=False)
    manifest = bundle.manifest
    runs_here = manifest.gpu is None
    if text and not runs_here:
        raise RequestError(
            f"the engine of {path} is for a GPU ({manifest.target.name}) and cannot be run here on a text",
            "leave --text out: the recorded figures are judged",
            "text",
        )
    if text and _TOKENIZER not in manifest.files:
        raise RequestError(f"{path} has no tokenizer to read a text with", "leave --text out", "text")
    progress.phase("hash the bundle")
    bundle.verify()
    directory = _checked_checkpoint(manifest.source, against, progress) if against else None
    measured_figures: dict[str, Any] = {}
    if runs_here and (directory or text):
        check_requirements(manifest.target.requires, bundle.name)
        progress.phase("compare" if directory else "run the engine")
        measured_figures = _measure(bundle, directory, text, progress)
    elif directory:
        progress.note(
            f"the engine is for a GPU ({manifest.target.name}) and cannot be run here: "
            "the figures are those that its build recorded"
        )
    measured = bool(directory) and runs_here
    now = Figures("measured", reference=reference_of(measured_figures), **known(measured_figures))
    figures = now if measured else recorded(manifest)
    about, digest = _about(manifest, figures, text if measured else None, content)
    return Verdict(
        bundle=bundle,
        checkpoint=directory,
        figures=figures,
        text=about,
        text_sha256=digest,
        engine_perplexity=None if measured else measured_figures.get("perplexity"),
        engine_positions=None if measured else measured_figures.get("positions"),
    )


def _about(manifest: Manifest, figures: Figures, text: Path | None, content: str) -> tuple[str, str]:
    """Return a description of the text that the figures were measured on, and its sha256 or ""."""
    if text:
        return text.name, texts.sha256(content)
    if figures.origin == "measured":
        if _TOKENIZER not in manifest.files:
            return "random tokens", ""
        return "the evaluation text", texts.sha256(texts.read_text(texts.EVALUATION_TEXT))
    loss = manifest.verification.details.get("quantization_loss")
    if isinstance(loss, Mapping) and isinstance(digest := loss.get("text_sha256"), str):
        return "the evaluation text", digest
    return ("nothing" if figures.positions is None else "the texts of the build"), ""


def _checked_checkpoint(source: Source, against: str, progress: Progress) -> Path:
    """Return the checkpoint's directory. Raises CheckpointError if the bundle was built from other files."""
    from llmc.compiler.checkpoint import hub
    from llmc.compiler.checkpoint.checkpoint import Checkpoint

    progress.phase("hash the checkpoint")
    checkpoint = Checkpoint.open(hub.resolve(against))
    hashes = checkpoint.file_hashes()
    for name in sorted(hashes.keys() | source.files.keys()):
        now, then = hashes.get(name), source.files.get(name)
        if now == then:
            continue
        if now is None:
            fact = f"it has no {name}"
        elif then is None:
            fact = f"it has {name}, which was not there"
        else:
            fact = f"{name} has sha256 {now[:12]}..., then {then[:12]}..."
        raise CheckpointError(
            f"{against} is not the checkpoint that the bundle was made from: {fact}",
            f"give the files of {source.name} as they were, or build from these with `llmc build`",
        )
    return checkpoint.path


def _measure(
    bundle: Bundle, checkpoint: Path | None, text: Path | None, progress: Progress
) -> dict[str, Any]:
    from llmc.compiler.checkpoint import recipe

    manifest = bundle.manifest
    needed, quantized = manifest.weights.bytes, False
    if checkpoint:
        needed, quantized = _size_of(checkpoint)
    _check_memory(memory_needed(needed), progress)
    question = Question(
        engine=str(bundle.engine_path()),
        backend=manifest.target.engine,
        max_seq_len=manifest.limits.max_seq_len,
        vocab_size=manifest.geometry.vocab_size,
        tokenizer=str(bundle.path / _TOKENIZER) if _TOKENIZER in manifest.files else "",
        text=str(text) if text else "",
        checkpoint=str(checkpoint) if checkpoint else "",
        tolerance=recipe.load(manifest.source.model_type).logit_tolerance,
        reference_weights="dequantized" if quantized else "checkpoint",
        kv_dtype=manifest.precision.kv_dtype,
        ranks=manifest.parallel.world_size,
        stages=manifest.parallel.pp,
    )
    child = Child("llmc.compiler.verify.child", "verification", _OUT_OF_MEMORY)
    return child.run({"measure": asdict(question)}, progress)


def _size_of(checkpoint: Path) -> tuple[int, bool]:
    """Return the bytes of the checkpoint's parameters in fp32, and whether it is quantized."""
    from llmc.compiler.checkpoint.checkpoint import Checkpoint
    from llmc.compiler.checkpoint.prequantized.layout import read_quantized

    quantized = read_quantized(Checkpoint.open(checkpoint))
    return 4 * quantized.parameters, quantized.quantized


def _check_memory(needed: int, progress: Progress) -> None:
    available, need = available_memory(), f"{needed / 2**30:.1f} GiB"
    if available is not None and needed > available:
        raise RequestError(
            f"this needs about {need} of memory, {available / 2**30:.1f} GiB are available", _OUT_OF_MEMORY
        )
    progress.note(f"this needs about {need} of memory")
