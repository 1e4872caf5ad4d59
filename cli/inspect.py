"""`llmc inspect`: show what is inside a bundle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmc.cli.build import (
    describe_geometry,
    describe_kv_cache_loss,
    describe_layer,
    describe_target,
    describe_verification,
)
from llmc.cli.output import Json, print_json
from llmc.cli.ranks import describe_ranks, rank_records
from llmc.cli.text import size, table

if TYPE_CHECKING:
    from llmc.runtime.bundle.manifest import Manifest, Sampling
    from llmc.runtime.bundle.reader import Bundle
    from llmc.runtime.native.program import Program


def inspect(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.llmc", help="The bundle to look into.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every byte of every file.")] = False,
    program: Annotated[
        bool, typer.Option("--program", help="Print the instructions of a native engine's program.")
    ] = False,
    rank: Annotated[int, typer.Option(metavar="N", help="The rank whose program --program prints.")] = 0,
    as_json: Json = False,
) -> None:
    """Show what is inside a bundle.

    The manifest, the list of files and their sizes are always checked.

    \b
    Examples:
      llmc inspect tales.llmc
      llmc inspect tales.llmc --json
    """
    import json

    from llmc.compiler.bundle_ranks import ranks_of
    from llmc.runtime.backends.kv_cache import block_bytes
    from llmc.runtime.bundle.reader import Bundle
    from llmc.runtime.bundle.strict_json import plain
    from llmc.runtime.errors import RequestError
    from llmc.runtime.native.program import describe

    if rank and not program:
        raise RequestError("--rank chooses the program that --program prints", "add --program", "rank")
    opened = Bundle.open(bundle, verify_hashes=False)
    if verify:
        opened.verify()
    if program:
        instructions = program_of(opened, rank).instructions
        if as_json:
            print_json({"path": str(opened.path), "instructions": plain(instructions)})
        else:
            print("\n".join(f"{number:5}  {describe(one)}" for number, one in enumerate(instructions)))
        return
    manifest = opened.manifest
    geometry, source, tokens = manifest.geometry, manifest.source, manifest.tokens
    total, ranks = total_bytes(opened), ranks_of(opened)
    kv_bytes = block_bytes(geometry, manifest.precision.kv_dtype) // geometry.block_size
    if as_json:
        print_json(
            {
                "path": str(opened.path),
                "bytes": total,
                "kv_bytes_per_token": kv_bytes,
                "ranks": rank_records(ranks, manifest.limits.max_seq_len),
                "hashes_verified": verify,
                "quantization_loss": quantization_loss(manifest),
                "manifest": json.loads(manifest.to_json()),
            }
        )
        return
    requires = ", ".join(f"{name} {version}" for name, version in manifest.target.requires.items())
    libraries = [f"{name} {version}" for name, version in manifest.producer.libraries.items()]
    kinds = Counter(map(describe_layer, geometry.layers))
    facts = [
        ("name", opened.name),
        ("format", str(manifest.format_version)),
        ("source", f"{source.name} ({source.model_type}, {source.architecture}, {source.dtype})"),
        ("engine", f"{describe_target(manifest.target)}: {manifest.target.reason}"),
        ("requires", requires or "nothing"),
        ("precision", f"{manifest.precision.dtype}, KV cache {manifest.precision.kv_dtype}"),
        ("weights", describe_weights(manifest)),
        *describe_loss(manifest),
        *describe_worst(manifest),
        ("model", describe_geometry(geometry)),
        ("attention", ", ".join(f"{count} {kind}" for kind, count in kinds.items())),
        ("context", f"{manifest.limits.max_seq_len} tokens of prompt and answer together"),
        (
            "KV cache",
            ", ".join(filter(None, (f"{size(kv_bytes)} a token", describe_kv_cache_loss(manifest)))),
        ),
        ("operators", ", ".join(f"{o.count} {o.name} (ABI {o.abi})" for o in manifest.operators) or "none"),
        *describe_gpu(manifest),
        *describe_ranks(ranks, manifest.parallel.tp, manifest.limits.max_seq_len),
        ("sampling", describe_sampling(manifest.sampling)),
        ("tokens", f"begin {tokens.bos}, end {', '.join(map(str, tokens.eos)) or 'none'}"),
        ("fidelity", describe_verification(manifest.verification)),
        (
            "passes",
            ", ".join(f"{report.name} {report.matches}" for report in manifest.passes if report.matches)
            or "none",
        ),
        ("built by", ", ".join([f"llmc {manifest.producer.llmc}", *libraries])),
        ("integrity", "every byte verified" if verify else "sizes verified; --verify hashes every byte"),
        ("size", f"{size(total)} in {len(manifest.files) + 1} files"),
    ]
    files = [(name, f"{record.bytes:,}", record.sha256[:12]) for name, record in manifest.files.items()]
    print(table(facts))
    print()
    print(table([("FILE", "BYTES", "SHA256"), *files], right=(1,)))


def total_bytes(bundle: Bundle) -> int:
    """Return the size of a bundle in bytes, with its manifest."""
    from llmc.runtime.bundle.manifest import MANIFEST_NAME

    manifest = (bundle.path / MANIFEST_NAME).stat().st_size
    return manifest + sum(file.bytes for file in bundle.manifest.files.values())


def describe_weights(manifest: Manifest) -> str:
    """Describe how the weights are stored."""
    plan, weights = manifest.quantization, manifest.weights
    if plan is None:
        return f"{weights.dtype}: {weights.note}" if weights.note else weights.dtype
    names = ("format", "modules", "bits_per_parameter")  # the manifest may lack any of them
    return ", ".join(f"{name.replace('_', ' ')} {plan[name]}" for name in names if name in plan)


def describe_sampling(sampling: Sampling | None) -> str:
    """Describe what `llmc run` does without sampling options."""
    if sampling is None:
        return "greedy"
    facts = [f"temperature {sampling.temperature:g}"] if sampling.do_sample else ["greedy"]
    if sampling.do_sample:
        filters = (("top-k", sampling.top_k, 0), ("top-p", sampling.top_p, 1), ("min-p", sampling.min_p, 0))
        facts += [f"{name} {value:g}" for name, value, off in filters if value != off]
    if sampling.repetition_penalty != 1:
        facts.append(f"repetition penalty {sampling.repetition_penalty:g}")
    return f"{', '.join(facts)} (generation_config.json; `llmc run --greedy` ignores it)"


def program_of(bundle: Bundle, rank: int = 0) -> Program:
    """Return the native engine's program of a rank. Raises RequestError for the bundle of another engine."""
    from llmc.runtime.errors import RequestError
    from llmc.runtime.native.program import Program

    if bundle.manifest.target.engine != "native":
        raise RequestError(
            f"{bundle.name} has no program: its engine is {bundle.manifest.target.engine}",
            "build it with --engine native",
            "program",
        )
    ranks = bundle.manifest.parallel.world_size
    if not 0 <= rank < ranks:
        raise RequestError(f"{bundle.name} has no rank {rank}", f"give one of 0 to {ranks - 1}", "rank")
    return Program.from_json(bundle.engine_path(rank).read_bytes())


def quantization_loss(manifest: Manifest) -> dict[str, Any] | None:
    """Return the quantization format and its recorded loss; None if the weights are not quantized."""
    if manifest.quantization is None:
        return None
    loss = manifest.verification.details.get("quantization_loss")
    fmt = {"format": manifest.quantization.get("format")}
    return fmt | (dict(loss) if isinstance(loss, Mapping) else {})


def describe_loss(manifest: Manifest) -> list[tuple[str, str]]:
    """Describe the quantization loss. For a pre-quantized checkpoint: that of activation quantization."""
    if manifest.quantization is None:
        return []
    from llmc.compiler.verify.figures import recorded

    figures, fmt = recorded(manifest), manifest.quantization.get("format", "quantized")
    if figures.mean_kl is None or figures.top1_agreement is None:
        return [("loss", f"{fmt}: not measured")]
    facts = [f"mean KL {figures.mean_kl:g} nats", f"top-1 agreement {figures.top1_agreement:.4f}"]
    before, after, change = (
        figures.perplexity_unquantized,
        figures.perplexity,
        figures.perplexity_increase_percent,
    )
    if before is not None and after is not None and change is not None:
        facts.append(f"perplexity {before:g} -> {after:g} ({change:+.2f} %)")
    if figures.positions is not None:
        facts.append(f"on {figures.positions:,} positions")
    if figures.against:
        facts.append(f"against {figures.against}")
    return [("loss", f"{fmt}: {', '.join(facts)}")]


def describe_worst(manifest: Manifest) -> list[tuple[str, str]]:
    """Describe the layers with the largest errors of outputs on the calibration text, or else of weights."""
    what, errors = module_errors(manifest)
    listed = ", ".join(f"{module} {error}" for module, error in errors)
    return [("worst layers", f"relative error of the {what}: {listed}")] if errors else []


def module_errors(manifest: Manifest) -> tuple[str, list[tuple[str, float]]]:
    """Return the recorded (module, relative error), the largest first, and what they are errors of.

    That is "output" or "weight", and "" if no errors are recorded.
    """
    for what in ("output", "weight"):
        errors = (manifest.quantization or {}).get(f"largest_{what}_errors")
        numbers = [
            (module, error)
            for module, error in (errors.items() if isinstance(errors, Mapping) else ())
            if isinstance(error, (int, float)) and not isinstance(error, bool)
        ]
        if numbers:
            return what, sorted(numbers, key=lambda item: (-item[1], item[0]))
    return "", []


def describe_gpu(manifest: Manifest) -> list[tuple[str, str]]:
    """Describe the GPUs, the largest step and the kernels of a GPU engine."""
    gpu = manifest.gpu
    if gpu is None:
        return []
    codes = Counter((kernel.kind, kernel.sm) for kernel in gpu.kernels)
    variants = sorted({kernel.variant for kernel in gpu.kernels})
    nbytes = sum(manifest.files[kernel.file].bytes for kernel in gpu.kernels)
    step = f"{gpu.max_tokens} tokens, {gpu.max_sequences} sequences, {gpu.max_logits} rows of logits"
    code = ", ".join(f"{count} {kind} for SM{sm}" for (kind, sm), count in codes.items())
    return [
        ("GPUs", ", ".join(f"SM{sm}" for sm in gpu.compute_capabilities) or "portable: SM80 and newer"),
        ("a step", f"at most {step}"),
        ("kernels", f"{', '.join(variants)}: {code}, {size(nbytes)}"),
    ]
