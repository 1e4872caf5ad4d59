"""The targets `tensorrt-rtx` and `tensorrt`: a TensorRT engine with our attention plugin and its kernels.

tensorrt-rtx   builds without a GPU, for a list of compute capabilities or a portable engine for Ampere and
               newer. It does not support data-center Hopper and Blackwell (SM90, SM100).
tensorrt       supports these too, but builds only for the GPU of the machine that it runs on.

Everything else is shared. The engine contains the weights, so the bundle keeps neither them nor the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version

import onnx_ir as ir

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.progress import Clock, Progress
from llmc.compiler.rank_plan import Exchange, RankPlan
from llmc.compiler.request import AUTO, BuildRequest, cache_dtype, compute_dtype
from llmc.compiler.targets import capability
from llmc.compiler.targets.base import (
    Artifact,
    Resolved,
    Sizes,
    VerificationFiles,
    WeightSources,
)
from llmc.compiler.targets.graph_file import write_graph
from llmc.compiler.targets.part import rank_plan
from llmc.compiler.targets.tensorrt import build as tensorrt_build
from llmc.compiler.targets.tensorrt import kernels
from llmc.compiler.targets.tensorrt.activations import activation_bytes
from llmc.compiler.targets.tensorrt.build import EngineJob, EngineLimits
from llmc.compiler.targets.tensorrt.ranks import (
    RANK_GRAPH,
    RANK_WEIGHTS,
    discard_whole,
    divide,
    joined,
    read_ranks,
    stages_of,
    write_ranks,
)
from llmc.compiler.weights.write import WEIGHTS_FILE, weight_bytes
from llmc.passes import contract, pipeline
from llmc.passes.contract import Pass, PassReport
from llmc.passes.geometry import attention_nodes, chunk_size, value_width
from llmc.passes.legalize.finalize import serialize
from llmc.passes.legalize.tensorrt_boundary import to_tensorrt
from llmc.passes.spec import module_of
from llmc.plugins.collectives.spec import SEND
from llmc.plugins.collectives.tensorrt_plugin import NAMES as COLLECTIVES
from llmc.plugins.experts.spec import NAME as EXPERTS
from llmc.plugins.paged_attention.spec import NAME as ATTENTION
from llmc.plugins.paged_attention.spec import SINKS
from llmc.runtime.bundle.manifest import Geometry, Gpu
from llmc.runtime.bundle.manifest import Target as EngineTarget
from llmc.runtime.errors import BuildError, UnsupportedError
from llmc.runtime.installation import install_hint
from llmc.runtime.memory import available_memory

PLAN_FILE = "engines/rank{}.plan"
# The graph that the verification runs, and the same with a rounded KV cache. The bundle does not keep them.
ORACLE_FILE, KV_ORACLE_FILE = "rank0.oracle.onnx", "rank0.kv-oracle.onnx"
_BF16_FROM = 80  # the oldest compute capability with bf16
_STAND_IN = "the graph that TensorRT is given, in ONNX Runtime with the same roundings"
_STAND_INS = "the graphs that TensorRT is given, joined, in ONNX Runtime with the same roundings"


@dataclass(frozen=True)
class Flavor:
    """A flavor of TensorRT."""

    #: The name of the target, of the engine and of the package on PyPI.
    name: str
    #: The Python module.
    library: str
    #: The compute capabilities that it builds for.
    compute_capabilities: tuple[int, ...]
    #: Whether it builds for other GPUs than the one of this machine.
    builds_without_gpu: bool


RTX = Flavor("tensorrt-rtx", "tensorrt_rtx", (75, 80, 86, 89, 120, 121), True)
ENTERPRISE = Flavor("tensorrt", "tensorrt", (75, 80, 86, 89, 90, 100, 103, 120, 121), False)
FLAVORS = {flavor.name: flavor for flavor in (RTX, ENTERPRISE)}


def _lacks(node: ir.Node) -> str:
    """Return what the node has or is that no engine of this target can run; empty if nothing."""
    if node.op_type == EXPERTS:
        return "is a mixture of experts"
    if node.op_type != ATTENTION:
        return ""
    if len(node.inputs) > SINKS:
        return "has attention sinks"
    if value_width(node):
        return "is multi-head latent attention"
    return "is attention in chunks" if chunk_size(node) else ""


class TensorRTTarget:
    """Computes in bf16 or fp16 on NVIDIA GPUs."""

    def __init__(self, flavor: Flavor) -> None:
        self.flavor = flavor

    def resolve(self, request: BuildRequest, checkpoint_dtype: str) -> Resolved:
        """See `Target`. Installed libraries are checked last: other errors do not depend on the machine."""
        flavor, dtype = self.flavor, compute_dtype(request, checkpoint_dtype)
        if request.sms or flavor.builds_without_gpu:
            self._check_gpus(request, dtype, request.sms)
        if not tensorrt_build.is_installed(flavor.library):
            raise BuildError(
                f"the target {flavor.name} needs the package {flavor.name}", install_hint(flavor.name)
            )
        sms = request.sms
        if not flavor.builds_without_gpu:
            sms = _this_gpu(request.sms)
            self._check_gpus(request, dtype, sms)
        tp = 1 if request.tp == AUTO else request.tp
        return Resolved(request.target, dtype, cache_dtype(request, dtype), sms, tp=tp, pp=request.pp)

    def _check_gpus(self, request: BuildRequest, dtype: str, sms: tuple[int, ...]) -> None:
        """Raise UnsupportedError if one of `sms` cannot run the request. Empty `sms`: a portable engine."""
        flavor = self.flavor
        if unknown := [sm for sm in sms if sm not in flavor.compute_capabilities]:
            known = ", ".join(map(str, flavor.compute_capabilities))
            other = next((f for f in FLAVORS.values() if unknown[0] in f.compute_capabilities), None)
            hint = f"--target {other.name} does" if other else f"it knows SM {known}"
            raise UnsupportedError(f"{flavor.name} builds no engine for SM{unknown[0]}", hint, "sms")
        if dtype == "bf16" and (old := [sm for sm in sms if sm < _BF16_FROM]):
            raise UnsupportedError(f"SM{old[0]} has no bf16", "leave this GPU out of --sm", "sms")
        kernels.check(sms)
        if request.quant:
            capability.check(request.quant, request.target, sms)

    def choose_engine(self, resolved: Resolved, model: ir.Model) -> tuple[Resolved, EngineTarget]:
        for node in model.graph:
            if lacks := _lacks(node):
                raise UnsupportedError(
                    f"{module_of(node)} {lacks}, which llmc cannot build for GPUs yet",
                    "build it for --target cpu",
                    "target",
                )
        return resolved, EngineTarget(
            name=self.flavor.name,
            engine=self.flavor.name,
            reason=f"for {describe_sms(resolved.sms)}",
            requires={self.flavor.name: version(self.flavor.name)},
        )

    def legalize(
        self, resolved: Resolved, engine: str, model: ir.Model, tensors: Mapping[str, TensorRef]
    ) -> list[Pass]:
        """See `Target`. The graph of several ranks is divided first, and each part is legalized alone."""
        del engine, model, tensors  # the engine stores its weights in the dtype that it computes in
        return pipeline.legalize_tensorrt(resolved.dtype) if resolved.ranks == 1 else []

    def plan_ranks(
        self, resolved: Resolved, engine: str, model: ir.Model, geometry: Geometry
    ) -> Iterator[tuple[RankPlan, list[PassReport]]]:
        """See `Target`. How much memory TensorRT takes for activations is an estimate."""
        del engine
        stages = stages_of(model, resolved)
        parts: Iterator[tuple[ir.Model, list[PassReport]]] = iter([(model, [])])
        if resolved.ranks > 1:
            parts = divide(model, resolved.tp, resolved.dtype, stages)
        for rank, (part, reports) in enumerate(parts):
            stage = stages[rank // resolved.tp] if stages else None
            activations = activation_bytes(part)
            plan = rank_plan(rank, part, stage, geometry, resolved.kv_dtype, weight_bytes(part), activations)
            if stages and rank == resolved.ranks - resolved.tp:
                logits = Exchange(SEND, 1, 0, 4 * geometry.vocab_size)  # through the memory of the CPU
                plan = replace(plan, exchanges=(*plan.exchanges, logits))
            yield plan, reports

    def gpus(self, resolved: Resolved) -> tuple[int, ...]:
        oldest = capability.PORTABLE
        return resolved.sms or tuple(sm for sm in self.flavor.compute_capabilities if sm >= oldest)

    def write_weights(
        self,
        resolved: Resolved,
        engine: str,
        model: ir.Model,
        sources: WeightSources,
        writer: BundleWriter,
        on_bytes: Callable[[int], None],
    ) -> None:
        """See `Target`. The graph and its weights are for the verification and TensorRT's parser."""
        del engine
        if resolved.ranks > 1:
            write_ranks(model, resolved, sources, writer, on_bytes)
        else:
            write_graph(model, sources, writer, on_bytes)

    def check_machine(self, resolved: Resolved, sizes: Sizes, clock: Clock) -> None:
        """See `Target`. The plans of several ranks are built one after the other."""
        del resolved
        needed = tensorrt_build.memory_needed(sizes.rank_bytes)
        available = available_memory()
        clock.progress.note(f"the TensorRT build needs about {needed / 2**30:.1f} GiB of memory")
        if available is not None and needed > available:
            raise BuildError(
                f"the TensorRT build needs about {needed / 2**30:.1f} GiB of memory, "
                f"{available / 2**30:.1f} GiB are available",
                "build on a larger machine: the bundle does not have to run there",
            )

    def verification_files(
        self, resolved: Resolved, engine: str, model: ir.Model, writer: BundleWriter
    ) -> VerificationFiles:
        """See `Target`. The loss of a quantized cache is measured separately, with a graph of its own."""
        del engine
        scratch, stand_in = [ORACLE_FILE], _STAND_IN
        if resolved.ranks > 1:
            model, stand_in = joined(resolved, writer), _STAND_INS
        oracle = oracle_graph(model, resolved.dtype, round_cache=False)
        writer.path(ORACLE_FILE).write_bytes(serialize(oracle))
        if resolved.kv_dtype != resolved.dtype:
            scratch.append(KV_ORACLE_FILE)
            rounded = oracle_graph(model, resolved.dtype, round_cache=True)
            writer.path(KV_ORACLE_FILE).write_bytes(serialize(rounded))
        kv_graph = KV_ORACLE_FILE if len(scratch) > 1 else ""
        return VerificationFiles(
            ORACLE_FILE, WEIGHTS_FILE, "onnxruntime", stand_in, kv_graph, scratch=tuple(scratch)
        )

    def build(
        self,
        resolved: Resolved,
        engine: str,
        model: ir.Model,
        sizes: Sizes,
        writer: BundleWriter,
        clock: Clock,
    ) -> Artifact:
        del engine
        parts, weights = [model], [WEIGHTS_FILE]
        if resolved.ranks > 1:
            discard_whole(writer)
            parts = read_ranks(resolved.ranks, writer)
            weights = [RANK_WEIGHTS.format(rank) for rank in range(resolved.ranks)]
        with clock.phase("compile the GPU kernels"):
            compiled = kernels.compile_into(parts, resolved, writer, clock.progress)
        limits = EngineLimits(sizes.max_seq_len)
        plans = tuple(PLAN_FILE.format(rank) for rank in range(resolved.ranks))
        with clock.phase("build the TensorRT engine" + ("s" if resolved.ranks > 1 else "")):
            for rank, (part, weights_file, plan) in enumerate(zip(parts, weights, plans, strict=True)):
                graph = RANK_GRAPH.format(rank)
                for_parser = to_tensorrt(part).SerializeToString(deterministic=True)
                writer.path(graph).write_bytes(for_parser)
                writer.check_disk_space(writer.path(weights_file).stat().st_size)
                self._build(resolved, part, limits, graph, plan, writer, clock.progress)
                writer.discard(graph)
                writer.discard(weights_file)
        gpu = Gpu(resolved.sms, limits.max_tokens, limits.max_sequences, limits.max_logits, compiled)
        return Artifact(plans, (), "in the engine; tied tensors once", gpu, parts[0])

    def _build(
        self,
        resolved: Resolved,
        model: ir.Model,
        limits: EngineLimits,
        graph: str,
        plan: str,
        writer: BundleWriter,
        progress: Progress,
    ) -> None:
        job = EngineJob(
            library=self.flavor.library,
            onnx=str(writer.path(graph)),
            plan=str(writer.path(plan)),
            profile=tensorrt_build.profile(model, limits),
            compute_capabilities=resolved.sms if self.flavor.builds_without_gpu else (),
        )
        built = tensorrt_build.build(job, progress)
        writer.add_hash(plan, built.plan_sha256, built.plan_bytes)
        collectives = sum(node.op_type in COLLECTIVES for node in model.graph)
        for kind, made, expected in (
            ("attention plugins", built.attention_layers, len(attention_nodes(model))),
            ("collectives and transfers", built.collectives, collectives),
        ):
            if made != expected:
                raise BuildError(
                    f"TensorRT made {made} {kind} of {expected}",
                    "please report this with the model's config.json",
                )


def oracle_graph(model: ir.Model, dtype: str, *, round_cache: bool) -> ir.Model:
    """Return a copy of TensorRT's graph for ONNX Runtime, made with the passes of `pipeline.oracle`.

    round_cache: whether keys and values are rounded to the dtype of the quantized KV cache
    """
    stand_in = model.clone()
    contract.run(stand_in, pipeline.oracle(dtype, round_cache))
    return stand_in


def describe_sms(sms: tuple[int, ...]) -> str:
    """Describe the GPUs that an engine runs on."""
    if not sms:
        return "NVIDIA GPUs from Ampere on (portable)"
    return f"NVIDIA GPUs of compute capability {', '.join(f'{sm // 10}.{sm % 10}' for sm in sms)}"


def _this_gpu(wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Return the compute capability of this machine's GPU.

    wanted: the compute capabilities of the request; empty: any

    Raises BuildError without a GPU or its libraries, UnsupportedError if `wanted` is another one.
    """
    try:
        from llmc.plugins.cuda.driver import CudaError
        from llmc.runtime.backends.tensorrt.cuda import probe
    except ImportError as error:
        raise BuildError(f"the target tensorrt needs {error.name}", install_hint("tensorrt")) from error
    try:
        device = probe()
    except CudaError as error:
        raise BuildError(
            f"the target tensorrt builds on a machine with an NVIDIA GPU only: {error}",
            "--target tensorrt-rtx builds without one, for SM80, 86, 89, 120 and 121",
        ) from error
    if wanted and wanted != (device.sm,):
        raise UnsupportedError(
            f"the target tensorrt builds for the GPU that is here, SM{device.sm}",
            f"leave --sm out, or build on a machine with SM{wanted[0]}",
            "sms",
        )
    return (device.sm,)
