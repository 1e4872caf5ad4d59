"""`compile_model`: from a checkpoint to a verified bundle, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.compiler import verify
from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint import hub, recipe
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.names import compare_names
from llmc.compiler.progress import Progress, Silent
from llmc.compiler.quantize.prequantized_plan import read_prequantized
from llmc.compiler.request import BuildRequest
from llmc.compiler.targets.base import GRAPH_FILE, TargetCompiler, target_compiler
from llmc.runtime.bundle.manifest import Geometry, Manifest, Target

if TYPE_CHECKING:
    import onnx_ir as ir

    from llmc.compiler.quantize.prequantized_plan import PrequantizedWeights
    from llmc.compiler.quantize.step import Calibration
    from llmc.passes.contract import PassReport
    from llmc.passes.quantize.matrix import QuantizedMatrix
    from llmc.passes.quantize.plan import QuantPlan


@dataclass(frozen=True)
class Plan:
    """A build up to the point where files are written.

    dtype: what the engine computes in; kv_dtype: what its KV cache holds, as the manifest says it; stored: a
    checkpoint that comes quantized; matrices: those whose codes and scales are still to be made; tied: weight
    -> the one in the checkpoint that it is; unquantized: makes the graph before quantization, in fp32, for
    calibration; calibration: what to measure on.
    """

    request: BuildRequest
    checkpoint: Checkpoint
    recipe: recipe.Recipe
    model: ir.Model
    geometry: Geometry
    compiler: TargetCompiler
    target: Target
    dtype: str
    kv_dtype: str
    max_seq_len: int
    reports: list[PassReport]
    stored: PrequantizedWeights | None
    quantization: QuantPlan | None
    matrices: list[QuantizedMatrix]
    tied: dict[str, str]
    unquantized: Callable[[], ir.Model]
    calibration: Calibration
    weight_bytes: int
    verification_bytes: int


@dataclass(frozen=True)
class BuildResult:
    """A finished build. `seconds`: phase -> duration."""

    path: Path
    manifest: Manifest
    seconds: dict[str, float] = field(default_factory=dict)


def compile_model(request: BuildRequest, progress: Progress | None = None) -> BuildResult:
    """Builds the bundle that `request` describes and returns where it is.

    Raises LlmcError (CheckpointError, UnsupportedError, BuildError, VerificationError), each with a hint.
    Nothing carries the output's name unless the build succeeded.
    """
    from llmc.compiler import manifest as record
    from llmc.compiler.checkpoint import tokenizer
    from llmc.compiler.quantize import step
    from llmc.compiler.weights import write
    from llmc.passes.legalize.finalize import serialize

    progress = progress or Silent()
    clock = _Clock(progress)
    with BundleWriter(request.output, request.force) as writer:
        plan = plan_build(request, progress, clock)
        made = step.quantize(plan, writer, progress, clock.phase)
        with clock.phase("write weights"):
            write.write_weights(
                plan.model,
                plan.checkpoint.tensors,
                writer,
                lambda done: progress.bar(done, plan.weight_bytes),
                made.tensors,
            )
            step.discard(writer)
        with clock.phase("write graph"):
            writer.path(GRAPH_FILE).write_bytes(serialize(plan.model))
            tokenizer.save(plan.checkpoint, writer)
        with clock.phase("hash the checkpoint"):
            files = plan.checkpoint.file_hashes()
        finished = plan.compiler.finish(plan, writer, progress, clock.phase)
        with clock.phase("finish"):
            manifest = record.manifest(plan, files, finished, step.record(plan, made))
            path = writer.finish(manifest)
    manifest = Manifest.from_json((path / "manifest.json").read_bytes())
    return BuildResult(path, manifest, clock.seconds)


def plan_build(request: BuildRequest, progress: Progress | None = None, clock: _Clock | None = None) -> Plan:
    """Everything before the first byte is written: reads, traces, rewrites and lowers the graph."""
    clock = clock or _Clock(progress or Silent())
    with clock.phase("read checkpoint"):
        checkpoint = Checkpoint.open(hub.resolve(request.checkpoint, request.revision))
        family = recipe.load(checkpoint.model_type)
        compiler = target_compiler(request.target)
        dtype = request.compute_dtype(checkpoint.dtype)
        sms = compiler.check(request, dtype)
        stored = read_prequantized(checkpoint, replace(request, sms=sms), dtype)
        calibration = None if stored else _read_calibration(request)
    with clock.phase("import torch and transformers"):
        from llmc.compiler.checkpoint.config import context_length, load_config
        from llmc.compiler.quantize import step
        from llmc.compiler.trace.export import trace
        from llmc.compiler.weights import write
        from llmc.passes import contract
        from llmc.passes.geometry import read_geometry
        from llmc.passes.pipeline import pipeline
        from llmc.passes.quantize import qdq, quantize_kv_cache, quantize_linears
    config = load_config(checkpoint)
    max_seq_len = context_length(config, request.max_seq_len)
    num_layers, fp8_cache = int(config.num_hidden_layers), request.kv_dtype == quantize_kv_cache.FP8
    step.check_calibration(calibration, checkpoint.config, num_layers if fp8_cache else 0)
    expected = family.expected(num_layers)
    with clock.phase("trace"):
        traced = trace(config, dtype, max_seq_len)
        compare_names(traced.parameters, stored.checkpoint.named if stored else checkpoint.tensors)
    with clock.phase("rewrite the graph"):
        passes = pipeline(stored.why_apart) if stored else pipeline()
        reports = contract.run(traced.model, passes, expected)
        geometry = read_geometry(traced.model)
        parameters = write.num_elements(traced.model)
        quantization, matrices = None, []
        bits = 32 if checkpoint.dtype == "float32" else 16
        original = traced.model.clone() if calibration is not None and dtype == "fp32" else None

        def unquantized() -> ir.Model:
            if original is not None:
                return original
            again = trace(config, "fp32", max_seq_len).model
            contract.run(again, pipeline(), expected)
            return again

        if request.quant:
            quantization = quantize_linears.plan_weights(
                traced.model,
                request.quant,
                request.exclude,
                family.quantize_exclude,
                bits,
                qdq.SCALES_OF.get(dtype),
                compiler.head_format(request.quant),
            )
        elif stored and stored.modules:  # none: only its KV cache is quantized
            quantization = quantize_linears.plan_prequantized(traced.model, stored, bits)
        if quantization:
            matrices = quantize_linears.apply_plan(traced.model, quantization)
        if fp8_cache:
            quantize_kv_cache.set_kv_scales(traced.model, {})
        target = compiler.lower(traced.model, dtype, checkpoint.tensors)
    return Plan(
        request=request,
        checkpoint=checkpoint,
        recipe=family,
        model=traced.model,
        geometry=geometry,
        compiler=compiler,
        target=target,
        dtype=dtype,
        kv_dtype=request.cache_dtype(dtype),
        max_seq_len=max_seq_len,
        reports=reports,
        stored=stored,
        quantization=quantization,
        matrices=matrices,
        tied=traced.tied,
        unquantized=unquantized,
        calibration=calibration,
        weight_bytes=write.weight_bytes(traced.model),
        verification_bytes=verify.memory_needed(4 * parameters),
    )


def _read_calibration(request: BuildRequest) -> Calibration:
    kv_cache = request.kv_dtype == "fp8"
    if request.quant is None and not kv_cache:
        return None
    from llmc.compiler.quantize import step
    from llmc.passes.quantize import formats

    fmt = formats.get_format(request.quant) if request.quant else None
    return step.read_calibration(request.calibration, fmt, kv_cache, request.calibration_method)


class _Clock:
    """Times the phases of a build and announces them."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._progress.phase(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
