"""`compile_model`: build a verified bundle from a checkpoint. Read it from top to bottom."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.compiler import targets
from llmc.compiler.build_key import FIELD, build_key, recorded_key, software, source_name
from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint import hub, recipe
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.sampling import FILE as GENERATION_CONFIG
from llmc.compiler.checkpoint.sampling import not_followed, sampling_defaults
from llmc.compiler.progress import Clock, Progress, Silent
from llmc.compiler.quantize.prequantized_plan import read_prequantized
from llmc.compiler.request import AUTO, BuildRequest, quantized_cache
from llmc.compiler.targets import capability
from llmc.compiler.targets.base import Resolved, Sizes, WeightSources
from llmc.compiler.verify.job import VERIFICATION
from llmc.compiler.verify.prepare import evaluate_early
from llmc.runtime.bundle.manifest import Geometry, Manifest, Sampling, Verification
from llmc.runtime.bundle.manifest import Target as EngineTarget
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BuildError, BundleError, UnsupportedError
from llmc.runtime.memory import memory_needed

if TYPE_CHECKING:
    import onnx_ir as ir

    from llmc.compiler.calibrate.source import Calibration
    from llmc.compiler.checkpoint.model_keys import ModelKeys
    from llmc.compiler.checkpoint.safetensors import TensorRef
    from llmc.compiler.checkpoint.tokenizer import BundleTokenizer
    from llmc.compiler.child_process import Started
    from llmc.compiler.plan import BuildPlan, CheckpointFacts
    from llmc.compiler.quantize.prequantized_plan import PrequantizedWeights
    from llmc.compiler.quantize.produce import Produced
    from llmc.compiler.quantize.step import Maker
    from llmc.compiler.rank_plan import RankPlan
    from llmc.compiler.targets.base import Target
    from llmc.passes.canonicalize.fuse_linears import FusionPlan
    from llmc.passes.contract import PassReport
    from llmc.passes.quantize.matrix import QuantizedMatrix
    from llmc.passes.quantize.plan import QuantPlan


@dataclass(frozen=True)
class BuildInputs:
    """The graph and the data that a build needs beside its plan."""

    checkpoint: Checkpoint
    #: The legalized graph.
    model: ir.Model
    #: The checkpoint's tensors by name. A tied parameter's name maps to the tensor that it shares.
    tensors: Mapping[str, TensorRef]
    #: The matrices whose codes and scales are not computed yet.
    matrices: list[QuantizedMatrix]
    #: The quantized weights of a pre-quantized checkpoint; None if it is not quantized.
    prequantized: PrequantizedWeights | None
    #: The calibration text or ranges. None: no calibration is needed.
    calibration: Calibration
    #: None: the checkpoint has no tokenizer.
    tokenizer: BundleTokenizer | None
    #: Returns the canonical graph in fp32, before quantization. Calibration runs it.
    unquantized: Callable[[], ir.Model]


@dataclass(frozen=True)
class ReadInputs:
    """What a build has read and checked before it traces the model."""

    checkpoint: Checkpoint
    prequantized: bool
    #: None: the checkpoint has no tokenizer.
    tokenizer: BundleTokenizer | None
    vocab_size: int
    max_seq_len: int


@dataclass(frozen=True)
class BuildResult:
    """A finished build."""

    path: Path
    manifest: Manifest
    #: Phase -> its duration in seconds.
    seconds: dict[str, float] = field(default_factory=dict)
    #: Whether the bundle existed already, built from the same inputs with the same options and versions.
    reused: bool = False


def compile_model(request: BuildRequest, progress: Progress | None = None) -> BuildResult:
    """Build the bundle that `request` describes.

    If the output exists and was built from the same inputs, options and versions, it is checked and
    returned, unless `request.force`. A build that fails leaves nothing at the output's path.

    Raises LlmcError (CheckpointError, UnsupportedError, BuildError, RequestError, VerificationError), each
    with a hint.
    """
    from llmc.compiler import manifest
    from llmc.compiler.checkpoint.tokenizer import TOKENIZER_FILE
    from llmc.compiler.quantize import step

    clock = Clock(progress or Silent())
    target = targets.target(request.target)
    if request.output.is_dir() and (existing := _existing(request, clock)) is not None:
        return existing
    starting = VERIFICATION.start() if request.verify else nullcontext(None)
    with BundleWriter(request.output, request.force) as writer, starting as process:
        if process is not None:
            process.prepare({})

        def before_trace(read: ReadInputs) -> None:
            if read.tokenizer is not None:
                read.tokenizer.write(writer)
            if process is not None and request.quant and not read.prequantized:
                file = str(writer.path(TOKENIZER_FILE)) if read.tokenizer else ""
                evaluate_early(process, read.checkpoint, file, read.vocab_size, read.max_seq_len)

        plan, inputs = plan_build(request, progress, clock, before_trace)
        resolved, engine, model = plan.resolved, plan.target.engine, inputs.model
        with clock.phase("hash the checkpoint"):
            files = inputs.checkpoint.file_hashes()
        produced = make_weights(plan, inputs, writer, clock, files)
        with clock.phase("write weights"):
            total = plan.sizes.weight_bytes
            sources = WeightSources(inputs.checkpoint.tensors, produced.tensors)
            target.write_weights(
                resolved,
                engine,
                model,
                sources,
                writer,
                lambda done: clock.progress.bar(min(done, total), total),
            )
            step.discard(writer)
        target.check_machine(resolved, plan.sizes, clock)
        with clock.phase("verify"):
            verification = verify(plan, inputs, writer, clock, process)
        artifact = target.build(resolved, engine, model, plan.sizes, writer, clock)
        with clock.phase("finish"):
            quantization = step.record(
                plan.quantization, inputs.matrices, produced, request.calibration_method
            )
            path = writer.finish(
                manifest.manifest(
                    plan,
                    inputs.checkpoint,
                    model,
                    files,
                    _with_key(verification, plan, files),
                    artifact,
                    quantization,
                )
            )
    return BuildResult(path, Manifest.from_json((path / "manifest.json").read_bytes()), clock.seconds)


def _existing(request: BuildRequest, clock: Clock) -> BuildResult | None:
    """Return the bundle at the output if a new build would give the same one; None if not.

    An unverified bundle is built again if the request asks for verification: this machine may have the
    memory now.
    """
    from llmc.passes.contract import DUMP

    if request.force or os.environ.get(DUMP):
        return None
    with clock.phase("check the existing bundle"):
        try:
            bundle = Bundle.open(request.output)
        except BundleError:
            return None
        recorded = recorded_key(bundle.manifest)
        if recorded is None or (request.verify and bundle.manifest.verification.status != "passed"):
            return None
        if request.calibration is not None and not request.calibration.is_file():
            return None  # the build reports the error
        checkpoint = Checkpoint.open(hub.resolve(request.checkpoint, request.revision))
        name = source_name(request.checkpoint, checkpoint.path)
        if recorded != build_key(request, name, checkpoint.file_hashes()):
            return None
    return BuildResult(bundle.path, bundle.manifest, clock.seconds, reused=True)


def _with_key(record: Verification, plan: BuildPlan, files: Mapping[str, str]) -> Verification:
    """Return `record` with the build key among its details. files: sha256 of the checkpoint's files."""
    name = source_name(plan.request.checkpoint, plan.checkpoint.path)
    return replace(record, details={**record.details, FIELD: build_key(plan.request, name, files)})


def plan_build(
    request: BuildRequest,
    progress: Progress | None = None,
    clock: Clock | None = None,
    before_trace: Callable[[ReadInputs], None] = lambda read: None,
) -> tuple[BuildPlan, BuildInputs]:
    """Read the checkpoint, then trace, rewrite, plan the quantization and legalize. Writes no files.

    clock: times the phases; by default a new one that reports to `progress`
    before_trace: called with what was read and checked

    Raises LlmcError as `compile_model` does.
    """
    clock = clock or Clock(progress or Silent())
    with clock.phase("read checkpoint"):
        opened = _read(request)
    if ignored := ", ".join(not_followed(opened.checkpoint)):
        clock.progress.note(f"{GENERATION_CONFIG} sets {ignored}, which `llmc run` does not follow")
    with clock.phase("import torch and transformers"):
        from llmc.compiler.calibrate.source import check_calibration
        from llmc.compiler.checkpoint.config import load_config
        from llmc.compiler.checkpoint.context import choose_context
        from llmc.compiler.checkpoint.model_keys import read_model
        from llmc.compiler.checkpoint.tokenizer import end_of_sequence, read_bundle_tokenizer
        from llmc.compiler.plan import BuildPlan
        from llmc.compiler.rank_plan import gpu_sizes
        from llmc.compiler.trace.export import trace
        from llmc.compiler.weights import write
        from llmc.passes import contract, pipeline
        from llmc.passes.geometry import read_geometry
        from llmc.passes.shard.stages import plan_stages
    context = choose_context(load_config(opened.checkpoint), request.max_seq_len)
    config, max_seq_len = context.config, context.max_seq_len
    keys, renamed = read_model(opened.checkpoint, config)
    opened = _read_weights(opened, renamed.checkpoint, request)
    stored_shapes = {name: shape for name, shape in keys.parameters.items() if name in opened.named}
    renamed.compare(stored_shapes, opened.named)  # sizes first: the trace allocates buffers of these sizes
    checkpoint, resolved = opened.checkpoint, opened.resolved
    with clock.phase("read the tokenizer"):
        vocab_size = int(config.get_text_config().vocab_size)
        tokenizer = read_bundle_tokenizer(checkpoint, vocab_size)
        eos_token_ids, notes = end_of_sequence(checkpoint, tokenizer, vocab_size)
    num_layers, cache = int(config.num_hidden_layers), quantized_cache(request)
    check_calibration(opened.calibration, checkpoint.config, num_layers if cache else 0)
    expected = opened.family.expected(num_layers)
    read = ReadInputs(checkpoint, opened.prequantized is not None, tokenizer, vocab_size, max_seq_len)
    before_trace(read)
    with clock.phase("trace"):
        traced = trace(config, resolved.dtype, max_seq_len)
        model = traced.model
        renamed.compare(_needed(keys, model), opened.named)
    # Notes come after the trace: if the model is refused, they do not matter.
    for note in (*notes, *renamed.notes, *context.notes):
        clock.progress.note(note)
    with clock.phase("rewrite the graph"):
        reports = contract.run(model, pipeline.canonicalize(opened.fusion), expected)
        geometry, parameters = read_geometry(model), write.num_elements(model)
        checkpoint = _as_in_graph(checkpoint, model)
        canonical = model.clone() if opened.calibration is not None and resolved.dtype == "fp32" else None
        quantization = _quantization_plan(request, opened, model)
        matrices = quantization.matrices() if quantization else []
        matches = {"quantize-linears": len(matrices), "quantize-kv-cache": num_layers}
        reports += contract.run(model, pipeline.quantize(quantization, cache), matches)
        divided = _divide(request, opened, model, geometry, max_seq_len)
        resolved, engine, model = divided.resolved, divided.engine, divided.model

    def unquantized() -> ir.Model:
        if canonical is not None:
            return canonical
        fp32_model = trace(config, "fp32", max_seq_len).model
        contract.run(fp32_model, pipeline.canonicalize(), expected)
        return fp32_model

    largest = max(rank.weight_bytes for rank in divided.ranks)
    sizes = Sizes(max_seq_len, write.weight_bytes(model), largest, memory_needed(4 * parameters))
    facts = _facts(opened, expected)
    stages = plan_stages(model, resolved.pp) if resolved.pp > 1 else ()
    ranks = divided.ranks
    gpus = gpu_sizes(ranks, max_seq_len, opened.target.gpus(resolved))
    plan = BuildPlan(
        request,
        facts,
        resolved,
        engine,
        geometry,
        sizes,
        quantization,
        (*reports, *divided.reports),
        eos_token_ids,
        stages,
        ranks,
        gpus,
    )
    tied = {name: checkpoint.tensors[of] for name, of in keys.tied.items() if of in checkpoint.tensors}
    tensors = dict(checkpoint.tensors) | tied
    # In the graph, a matrix of experts is a module with the name of the model's parameter.
    tensors |= {f"{name}.weight": ref for name, ref in checkpoint.tensors.items() if len(ref.shape) == 3}
    inputs = BuildInputs(
        checkpoint, model, tensors, matrices, opened.prequantized, opened.calibration, tokenizer, unquantized
    )
    return plan, inputs


@dataclass(frozen=True)
class _Divided:
    """The engine that was chosen, and the ranks that its graph is divided among."""

    resolved: Resolved
    engine: EngineTarget
    #: The legalized graph.
    model: ir.Model
    ranks: tuple[RankPlan, ...]
    #: Of the passes that legalize the graph and make that of rank 0.
    reports: list[PassReport]


def _divide(
    request: BuildRequest, opened: _OpenedInputs, quantized: ir.Model, geometry: Geometry, max_seq_len: int
) -> _Divided:
    """Choose the engine, legalize the graph, and divide it: for `--tp auto`, among the fewest ranks that fit.

    quantized: the quantized graph, which may be legalized in place

    Raises UnsupportedError if the model cannot be divided, BuildError if `request.rank_memory` is too small.
    """
    from llmc.compiler.rank_plan import memory_needed, tp_choices
    from llmc.compiler.weights.write import weight_bytes
    from llmc.passes import contract

    target, memory, auto = opened.target, request.rank_memory, request.tp == AUTO
    choices = tp_choices(request, geometry)
    weights, fault = 0, ""
    for tp in choices:
        if memory is not None and weights // (tp * request.pp) > memory and tp != choices[-1]:
            continue  # its part of the weights alone does not fit
        model = quantized.clone() if auto else quantized
        resolved = replace(opened.resolved, tp=tp)
        ranks: list[RankPlan] = []
        try:
            resolved, engine = target.choose_engine(resolved, model)
            legalize = target.legalize(resolved, engine.engine, model, opened.checkpoint.tensors)
            reports = contract.run(model, legalize)
            weights = weight_bytes(model)
            for rank, of_rank in target.plan_ranks(resolved, engine.engine, model, geometry):
                needed = memory_needed(rank, max_seq_len, on_gpu=bool(target.gpus(resolved)))
                if memory is not None and needed > memory:
                    break
                reports += [] if ranks else of_rank
                ranks.append(rank)
            else:
                return _Divided(resolved, engine, model, tuple(ranks), reports)
        except UnsupportedError as error:
            if tp == 1 or not auto:
                raise
            fault = fault or f"; --tp {tp} is not possible: {error.message}"
            continue
        most = f"with --tp {tp}, rank {rank.rank} needs {needed / 1e9:.4g} GB for {max_seq_len} tokens"
    assert memory is not None
    raise BuildError(
        f"{most}, and --rank-memory is {memory / 1e9:.4g} GB{fault}",
        f"{'' if auto else '--tp auto adds ranks; '}--max-seq-len or --quant lower what a rank needs",
        "rank_memory",
    )


@dataclass(frozen=True)
class _OpenedInputs:
    """The inputs that are read before torch is imported, and later the checkpoint's weights."""

    checkpoint: Checkpoint
    family: recipe.Recipe
    target: Target
    resolved: Resolved
    calibration: Calibration
    sampling: Sampling | None
    prequantized: PrequantizedWeights | None = None

    @property
    def named(self) -> Mapping[str, Any]:
        """The parameters of the model by name, without scales; a quantized weight is one entry."""
        return self.prequantized.checkpoint.named if self.prequantized else self.checkpoint.tensors

    @property
    def fusion(self) -> FusionPlan:
        from llmc.passes.canonicalize.fuse_linears import FusionPlan

        return self.prequantized.fusion if self.prequantized else FusionPlan()


def _read(request: BuildRequest) -> _OpenedInputs:
    """Read the inputs. Raises LlmcError if the checkpoint, the target or the machine cannot do the build."""
    checkpoint = Checkpoint.open(hub.resolve(request.checkpoint, request.revision))
    checkpoint.check_layers()
    family = recipe.load(checkpoint.family)
    target = targets.target(request.target)
    resolved = target.resolve(request, checkpoint.dtype)
    calibration = _read_calibration(request)
    return _OpenedInputs(checkpoint, family, target, resolved, calibration, sampling_defaults(checkpoint))


def _read_weights(opened: _OpenedInputs, checkpoint: Checkpoint, request: BuildRequest) -> _OpenedInputs:
    """Return `opened` with the checkpoint's weights. checkpoint: its checkpoint, with the model's names."""
    prequantized = _read_prequantized(checkpoint, request, opened.resolved)
    calibration = None if prequantized else opened.calibration
    return replace(opened, checkpoint=checkpoint, prequantized=prequantized, calibration=calibration)


def _needed(keys: ModelKeys, model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Return the parameters of the model and the buffers that its graph uses, with their shapes."""
    from llmc.passes.parameter import parameters

    used = {source.tensor for _, record in parameters(model) for source in record.sources}
    return {**keys.parameters, **{name: keys.buffers[name] for name in sorted(used & keys.buffers.keys())}}


def _as_in_graph(checkpoint: Checkpoint, model: ir.Model) -> Checkpoint:
    """Return the checkpoint with the matrices of experts as the graph has them (`Source.transposed`)."""
    from llmc.compiler.checkpoint.safetensors import TransposedTensor
    from llmc.passes.parameter import parameters

    sources = {source for _, record in parameters(model) for source in record.sources if source.transposed}
    stored = {source.tensor: checkpoint.tensors.get(source.tensor) for source in sources}
    transposed = {name: TransposedTensor.of(ref) for name, ref in stored.items() if ref is not None}
    return replace(checkpoint, tensors={**checkpoint.tensors, **transposed})


def _facts(opened: _OpenedInputs, expected: dict[str, int]) -> CheckpointFacts:
    from llmc.compiler.plan import CheckpointFacts

    return CheckpointFacts(
        path=opened.checkpoint.path,
        model_type=opened.checkpoint.family,
        dtype=opened.checkpoint.dtype,
        prequantized=opened.prequantized is not None,
        known_family=opened.family.known,
        logit_tolerance=opened.family.logit_tolerance,
        expected_matches=expected,
        total_bytes=opened.checkpoint.total_bytes,
        sampling=opened.sampling,
    )


def _quantization_plan(request: BuildRequest, opened: _OpenedInputs, model: ir.Model) -> QuantPlan | None:
    from llmc.compiler.quantize import make_plan
    from llmc.passes.quantize import qdq

    bits = 32 if opened.checkpoint.dtype == "float32" else 16
    if request.quant:
        return make_plan.plan_weights(
            model,
            request.quant,
            request.exclude,
            opened.family.quantize_exclude,
            bits,
            qdq.SCALES_OF.get(opened.resolved.dtype),
            opened.resolved.head_format,
        )
    if opened.prequantized and opened.prequantized.modules:  # else only its KV cache is quantized
        return make_plan.plan_prequantized(model, opened.prequantized, bits)
    return None


def make_weights(
    plan: BuildPlan, inputs: BuildInputs, writer: BundleWriter, clock: Clock, files: Mapping[str, str]
) -> Produced:
    """Write the codes and scales of the quantized matrices to scratch files. Set the KV cache's scales.

    files: sha256 of the checkpoint's files, by name
    """
    from llmc.compiler.quantize import step
    from llmc.compiler.quantize.produce import Produced
    from llmc.passes.quantize import quantize_kv_cache

    if not inputs.matrices and inputs.calibration is None and inputs.prequantized is None:
        return Produced()
    maker = _maker(plan, inputs, writer, clock, files)
    with clock.phase("copy the quantized weights" if inputs.prequantized else "quantize the weights"):
        produced = step.make_weights(
            maker,
            inputs.matrices,
            plan.resolved.dtype,
            plan.request.calibration_method,
            writer,
            lambda done: clock.progress.bar(done, len(inputs.matrices)),
        )
    if quantized_cache(plan.request):
        if inputs.prequantized:
            quantize_kv_cache.fill_kv_scales(inputs.model, inputs.prequantized.largest_kv)
        elif produced.table is not None:
            quantize_kv_cache.fill_kv_scales(inputs.model, produced.table.kv)
    return produced


def verify(
    plan: BuildPlan, inputs: BuildInputs, writer: BundleWriter, clock: Clock, process: Started | None
) -> Verification:
    """Compare the engine, or the graph that stands in for it, with the checkpoint.

    process: the verification process; None: none was started

    Returns the record for the manifest. Raises VerificationError if they differ.
    """
    if process is None:
        return Verification(status="skipped", reason="switched off with --no-verify")
    from llmc.compiler.checkpoint.tokenizer import TOKENIZER_FILE
    from llmc.compiler.verify.verify_build import verify_build

    target = targets.target(plan.request.target)
    files = target.verification_files(plan.resolved, plan.target.engine, inputs.model, writer)
    tokenizer = writer.path(TOKENIZER_FILE) if inputs.tokenizer else None
    record = verify_build(plan, files, inputs.matrices, writer, tokenizer, clock.progress, process)
    for file in files.scratch:
        writer.discard(file)
    return record


def _maker(
    plan: BuildPlan, inputs: BuildInputs, writer: BundleWriter, clock: Clock, files: Mapping[str, str]
) -> Maker:
    from llmc.compiler.quantize import step

    if inputs.prequantized:
        return step.Prequantized(inputs.prequantized.modules)
    text = inputs.calibration
    if not isinstance(text, str):
        return step.RoundToNearest(inputs.tensors, text)
    from llmc.compiler.calibrate.cache import CalibrationCache, calibration_key
    from llmc.compiler.calibrate.run_layers import layers
    from llmc.compiler.calibrate.table import Source
    from llmc.compiler.checkpoint.tokenizer import TOKENIZER_FILE
    from llmc.compiler.texts import calibration_windows
    from llmc.passes.legalize.finalize import serialize

    with clock.phase("trace for calibration"):
        graph = inputs.unquantized()
    checkpoint = inputs.checkpoint
    vocabulary = plan.geometry.vocab_size
    tokenizer = writer.path(TOKENIZER_FILE) if inputs.tokenizer else None
    length = plan.sizes.max_seq_len
    ids = calibration_windows(text, tokenizer, vocabulary, length)
    source = Source.of(text if tokenizer else "", ids, checkpoint.config)
    method, gptq = plan.request.calibration_method, plan.request.rounding != "nearest"
    cache = CalibrationCache(calibration_key(serialize(graph), files, ids, software("cpu")))
    layer_inputs = layers(graph, inputs.tensors, ids)
    return step.Calibrated(inputs.tensors, layer_inputs, source, method, gptq, cache, clock.progress.note)


def _read_prequantized(
    checkpoint: Checkpoint, request: BuildRequest, resolved: Resolved
) -> PrequantizedWeights | None:
    """Read the quantized weights of a pre-quantized checkpoint; None if it is not quantized.

    Raises UnsupportedError for a format that the target does not support.
    """
    prequantized = read_prequantized(checkpoint, request, resolved.dtype)
    for name, module in prequantized.modules.items() if prequantized else ():
        capability.check_prequantized(module.format, name, resolved.target, resolved.sms)
    return prequantized


def _read_calibration(request: BuildRequest) -> Calibration:
    cache = quantized_cache(request)
    if request.quant is None and cache is None:
        return None
    from llmc.compiler.calibrate.source import read_calibration
    from llmc.passes.quantize.formats import get_format

    fmt = get_format(request.quant) if request.quant else None
    method, rounding = request.calibration_method, request.rounding
    return read_calibration(request.calibration, fmt, cache is not None, method, rounding)
