"""`llmc build`: compile a checkpoint into a bundle."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmc.cli import output
from llmc.cli.output import Json, print_json
from llmc.cli.plan_table import plan_lines, prequantized_plan_lines
from llmc.cli.ranks import describe_ranks, gpu_table, rank_records
from llmc.cli.text import size, table
from llmc.compiler.request import DTYPES, ENGINES, KV_DTYPES, METHODS, ROUNDINGS, TARGETS
from llmc.passes.quantize.formats import FORMATS, get_format
from llmc.runtime.cpus import limit_library_threads
from llmc.runtime.errors import BuildError

if TYPE_CHECKING:
    from llmc.compiler.driver import BuildResult
    from llmc.compiler.plan import BuildPlan
    from llmc.compiler.request import BuildRequest
    from llmc.passes.quantize.plan import QuantPlan
    from llmc.runtime.bundle.manifest import Geometry, Layer, Manifest, Target, Verification

# Import names of the libraries that the extra `build` installs.
LIBRARIES = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnx_graphsurgeon",
    "ml_dtypes",
    "onnxruntime",
    "safetensors",
    "huggingface_hub",
)
_CACHES = [
    f"{cache} ({', '.join(name for name, options in TARGETS.items() if cache in options.caches)})"
    for cache in KV_DTYPES[1:]
]


def build(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint directory, or a Hugging Face hub id.")
    ],
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="NAME.llmc",
            help="The bundle to write (default: the checkpoint's name).",
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="|".join(TARGETS), autocompletion=lambda: list(TARGETS), help="What the engine runs on."
        ),
    ] = "cpu",
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(ENGINES),
            autocompletion=lambda: list(ENGINES),
            help="What runs the model on the CPU (default: llmc chooses).",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="|".join(DTYPES),
            autocompletion=lambda: list(DTYPES),
            help="What the engine computes in: fp32 on the CPU, bf16 or fp16 in TensorRT.",
        ),
    ] = "auto",
    quant: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            autocompletion=lambda: list(FORMATS),
            help=f"Quantize the linear layers: {', '.join(FORMATS)}.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Modules not to quantize; may be given several times."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text to measure activations on, or a table (.json) of an earlier build "
            "(default: a built-in text, where the format needs one).",
        ),
    ] = None,
    calibration_method: Annotated[
        str,
        typer.Option(
            metavar="|".join(METHODS),
            autocompletion=lambda: list(METHODS),
            help="How the range of static activations is chosen.",
        ),
    ] = "max",
    rounding: Annotated[
        str,
        typer.Option(
            metavar="|".join(ROUNDINGS),
            autocompletion=lambda: list(ROUNDINGS),
            help="How weights are rounded. nearest is fast and loses more; auto is gptq where the build "
            "calibrates on a text.",
        ),
    ] = "auto",
    kv_dtype: Annotated[
        str,
        typer.Option(
            metavar="|".join(KV_DTYPES),
            autocompletion=lambda: list(KV_DTYPES),
            help=f"What the KV cache holds: {', '.join(('auto', *_CACHES))}.",
        ),
    ] = "auto",
    sm: Annotated[
        str,
        typer.Option(
            metavar="N,N,...", help="GPUs by compute capability, such as 86,89,120 (default: portable)."
        ),
    ] = "",
    max_seq_len: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens of prompt and answer together (default: the model's context)."
        ),
    ] = None,
    tp: Annotated[
        str,
        typer.Option(
            "--tp",
            metavar="N|auto",
            help="Ranks that each compute a part of every layer (tensor parallelism); auto: the fewest that "
            "--rank-memory can hold.",
        ),
    ] = "1",
    pp: Annotated[
        int,
        typer.Option(
            "--pp",
            metavar="N",
            help="Stages of --tp ranks that each have some of the layers (pipeline parallelism).",
        ),
    ] = 1,
    rank_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory of each rank, such as 24GB or 22.5GiB: of its GPU, or its share of a machine. "
            "A build that needs more for a sequence of the whole context is refused.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="R", help="Branch, tag or commit of a hub id.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the engine with the checkpoint.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Build again and replace an existing bundle.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compile a checkpoint into a verified bundle.

    The engine is compared with the checkpoint at the end. The bundle appears under its name only if the
    whole build succeeds. If it exists, built from the same files with the same options and versions, nothing
    is built.

    \b
    Examples:
      llmc build model_zoo/llama/tales -o tales.llmc
      llmc build model_zoo/llama/tales -o tales-int8.llmc --quant int8
      llmc build model_zoo/llama/tales --dry-run
    """
    from llmc.compiler.request import BuildRequest, parse_memory, parse_sms, parse_tp

    request = BuildRequest(
        checkpoint=checkpoint,
        output=bundle or default_output(checkpoint),
        target=target,
        engine=engine,
        dtype=dtype,  # type: ignore[arg-type]  # the request checks it
        quant=quant,
        exclude=tuple(exclude or ()),
        calibration=calibration,
        calibration_method=calibration_method,  # type: ignore[arg-type]
        rounding=rounding,  # type: ignore[arg-type]
        kv_dtype=kv_dtype,
        sms=parse_sms(sm),
        max_seq_len=max_seq_len,
        tp=parse_tp(tp),
        pp=pp,
        rank_memory=parse_memory(rank_memory) if rank_memory is not None else None,
        revision=revision,
        verify=verify,
        force=force,
    )
    if quant is not None:
        get_format(quant)
    require_build_libraries()
    limit_library_threads()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings do not concern a build
    if not (sys.stderr.isatty() and output.allows("info")):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from llmc.cli.progress import shown

    what = "planning" if dry_run else "building"
    with shown(f"{what} {request.output} from {checkpoint} for {target}") as progress:
        from llmc.compiler.driver import compile_model, plan_build

        if dry_run:
            plan, _ = plan_build(request, progress)
        else:
            result = compile_model(request, progress)
    if dry_run:
        print_json(_plan_record(plan)) if as_json else print(_plan_text(plan))
    else:
        print_json(_result_record(result)) if as_json else print(_result_text(result, request))


def require_build_libraries() -> None:
    """Raise ModuleNotFoundError for a missing library of the extra `build`, before a download starts."""
    from importlib.util import find_spec

    for name in LIBRARIES:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"no module named {name}", name=name)


def default_output(checkpoint: str) -> Path:
    """Return `<name of the checkpoint>.llmc` in the current directory."""
    from llmc.compiler.checkpoint import hub

    path = Path(checkpoint).expanduser()
    repository = None if path.exists() else hub.parse(checkpoint)
    name = repository.name if repository else path.resolve().name
    if not name:
        raise BuildError(
            f"{checkpoint!r} has no name to call the bundle by", "give one with `--output`", "output"
        )
    return Path(f"{name}.llmc")


def describe_target(target: Target) -> str:
    """Describe the engine, and the target where its name differs."""
    return target.engine if target.engine == target.name else f"{target.engine} on {target.name}"


def describe_geometry(geometry: Geometry) -> str:
    """Describe the shape of a model in one line."""
    latent = any(layer.v_head_dim == 0 for layer in geometry.layers)
    cached = "latent KV heads" if latent else "KV heads"
    heads = f"{geometry.num_heads} heads, {geometry.num_kv_heads} {cached} of {geometry.head_dim}"
    if geometry.v_head_dim != geometry.head_dim and not latent:
        heads += f" (values {geometry.v_head_dim})"
    for kind, what in (("sliding", "with a window of"), ("chunked", "with attention in chunks of")):
        windows = [layer.window for layer in geometry.layers if layer.kind == kind]
        if windows:
            heads += f", {len(windows)} layers {what} {' or '.join(map(str, sorted(set(windows))))}"
    return (
        f"{geometry.num_layers} layers, hidden size {geometry.hidden_size}, {heads}, "
        f"vocabulary {geometry.vocab_size}"
    )


def describe_layer(layer: Layer) -> str:
    """Describe what the attention of a layer sees."""
    if layer.kind == "chunked":
        return f"in chunks of {layer.window}"
    return f"sliding with a window of {layer.window}" if layer.window else "full"


def describe_verification(record: Verification) -> str:
    """Describe the verification in one line."""
    if record.status == "skipped":
        return f"not verified: {record.reason}"
    agreement = "" if record.top1_agreement is None else f", top-1 agreement {record.top1_agreement:.4f}"
    greedy = {True: ", greedy text equal", False: ", greedy text different", None: ""}
    subject = "verified, the graph and not yet the engine," if record.details.get("compared") else "verified"
    return (
        f"{subject} against {record.reference}: max logit error {record.max_logit_error:.1e} "
        f"(tolerance {record.tolerance:.1e}){agreement}{greedy[record.greedy_tokens_equal]}"
    )


def describe_kv_cache_loss(manifest: Manifest) -> str:
    """Describe the loss of a quantized KV cache; "" for a cache in the compute dtype."""
    if (kv_dtype := manifest.precision.kv_dtype) == manifest.precision.dtype:
        return ""
    from llmc.compiler.verify.figures import recorded

    figures = recorded(manifest)
    if figures.kv_cache_mean_kl is None or figures.kv_cache_top1_agreement is None:
        return f"{kv_dtype}: loss not measured"
    agreement = figures.kv_cache_top1_agreement
    return f"{kv_dtype}: mean KL {figures.kv_cache_mean_kl:g}, top-1 agreement {agreement:g}"


def _result_text(result: BuildResult, request: BuildRequest) -> str:
    manifest = result.manifest
    done = (
        "was up to date, nothing was built"
        if result.reused
        else f"built in {sum(result.seconds.values()):.1f} s"
    )
    facts = (
        size(_total_bytes(result)),
        describe_target(manifest.target),
        manifest.precision.dtype,
        *([f"{ranks} ranks"] if (ranks := manifest.parallel.world_size) > 1 else []),
        f"{manifest.limits.max_seq_len} tokens of context",
        done,
    )
    text = f"{request.output}: {', '.join(facts)}\n{describe_verification(manifest.verification)}"
    return f"{text}\nKV cache {loss}" if (loss := describe_kv_cache_loss(manifest)) else text


def _total_bytes(result: BuildResult) -> int:
    manifest = (result.path / "manifest.json").stat().st_size
    return manifest + sum(file.bytes for file in result.manifest.files.values())


def _result_record(result: BuildResult) -> dict[str, Any]:
    manifest = result.manifest
    return {
        "path": str(result.path),
        "reused": result.reused,
        "bytes": {"total": _total_bytes(result), "weights": manifest.weights.bytes},
        "seconds": result.seconds,
        "target": asdict(manifest.target),
        "precision": asdict(manifest.precision),
        "parallel": asdict(manifest.parallel),
        "max_seq_len": manifest.limits.max_seq_len,
        "geometry": asdict(manifest.geometry),
        "passes": [asdict(report) for report in manifest.passes],
        "verification": asdict(manifest.verification),
    }


def _plan_record(plan: BuildPlan) -> dict[str, Any]:
    expected = plan.checkpoint.expected_matches
    return {
        "checkpoint": str(plan.checkpoint.path),
        "model_type": plan.checkpoint.model_type,
        "known_family": plan.checkpoint.known_family,
        "output": str(plan.request.output),
        "output_exists": os.path.lexists(plan.request.output),
        "target": asdict(plan.target),
        "tensor_parallel": plan.resolved.tp,
        "stages": [asdict(stage) for stage in plan.stages],
        "ranks": rank_records(plan.ranks, plan.sizes.max_seq_len),
        "gpus": [asdict(gpu) for gpu in plan.gpus],
        "precision": {"dtype": plan.resolved.dtype, "kv_dtype": plan.resolved.kv_dtype},
        "quantization": plan.quantization.record() if plan.quantization else None,
        "max_seq_len": plan.sizes.max_seq_len,
        "geometry": asdict(plan.geometry),
        "bytes": {"weights": plan.sizes.weight_bytes, "verification_memory": plan.sizes.verification_bytes},
        "verify": plan.request.verify,
        "passes": [
            {
                "name": report.name,
                "matches": report.matches,
                "expected": expected.get(report.name),
                "near_misses": list(report.near_misses),
                "seconds": report.seconds,
            }
            for report in plan.passes
        ],
    }


def _plan_text(plan: BuildPlan) -> str:
    from llmc.runtime.memory import available_memory

    checkpoint, request = plan.checkpoint, plan.request
    family = (
        "a family with a recipe"
        if plan.checkpoint.known_family
        else "no recipe: accepted on verification alone"
    )
    output = str(request.output)
    if os.path.lexists(request.output):
        output += (
            " (exists, to be replaced)" if request.force else " (exists: another build will need `--force`)"
        )
    verification = "switched off with --no-verify"
    if request.verify:
        available = available_memory()
        verification = f"needs about {size(plan.sizes.verification_bytes)} of memory" + (
            f", {size(available)} are available" if available is not None else ""
        )
    facts = [
        ("checkpoint", f"{checkpoint.path} ({size(checkpoint.total_bytes)}, {checkpoint.dtype})"),
        ("family", f"{checkpoint.model_type}: {family}"),
        ("model", describe_geometry(plan.geometry)),
        ("context", f"{plan.sizes.max_seq_len} tokens"),
        ("engine", f"{describe_target(plan.target)}, {plan.resolved.dtype}: {plan.target.reason}"),
        *describe_ranks(plan.ranks, plan.resolved.tp, plan.sizes.max_seq_len),
        ("KV cache", f"{plan.resolved.kv_dtype}, {size(_kv_bytes(plan))} a token"),
        ("output", output),
        ("weights", f"{size(plan.sizes.weight_bytes)} to write ({plan.sizes.weight_bytes:,} bytes)"),
        ("verification", verification),
    ]
    quantization = "\n\n" + "\n".join(_quantization_lines(plan.quantization)) if plan.quantization else ""
    gpus = f"\n\n{gpu_table(plan.gpus, plan.sizes.max_seq_len)}" if plan.gpus else ""
    return f"{table(facts)}{gpus}{quantization}\n\n{_pass_table(plan)}"


def _quantization_lines(plan: QuantPlan) -> list[str]:
    from llmc.compiler.quantize.prequantized_plan import PrequantizedPlan

    return prequantized_plan_lines(plan) if isinstance(plan, PrequantizedPlan) else plan_lines(plan)


def _kv_bytes(plan: BuildPlan) -> int:
    """Return the size of a token in the KV cache, in bytes."""
    from llmc.runtime.backends.kv_cache import block_bytes

    return block_bytes(plan.geometry, plan.resolved.kv_dtype) // plan.geometry.block_size


def _pass_table(plan: BuildPlan) -> str:
    """Return a table of the matches of each pass, those that the recipe requires, and the near misses."""
    expected = plan.checkpoint.expected_matches
    rows = [("pass", "matches", "expected", "near misses")]
    rows += [
        (report.name, str(report.matches), str(expected.get(report.name, "-")), str(len(report.near_misses)))
        for report in plan.passes
    ]
    misses = [f"near miss of {report.name}: {miss}" for report in plan.passes for miss in report.near_misses]
    return "\n".join([table(rows, right=(1, 2, 3)), *misses])
