"""The CPU target: llmc's native engine, and OpenVINO or ONNX Runtime for what it lacks, or on request.

OpenVINO and ONNX Runtime read the same ONNX file. OpenVINO runs `llmc.PagedAttention` with its own paged
attention, ONNX Runtime with the function body in the file. The native engine reads a program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import onnx_ir as ir

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.progress import Clock
from llmc.compiler.rank_plan import RankPlan, with_candidates
from llmc.compiler.request import AUTO, ENGINES, BuildRequest, cache_dtype, compute_dtype
from llmc.compiler.targets import capability
from llmc.compiler.targets.base import (
    GRAPH_FILE,
    Artifact,
    Resolved,
    Sizes,
    VerificationFiles,
    WeightSources,
)
from llmc.compiler.targets.graph_file import write_graph
from llmc.compiler.targets.native.lower import lower
from llmc.compiler.targets.native.pack import write_packed
from llmc.compiler.targets.native.ranks import (
    PROGRAM_FILE,
    WHOLE_FILE,
    discard_whole,
    divide,
    parts_of,
    stages_of,
    weights_files,
    write_ranks,
)
from llmc.compiler.targets.part import rank_plan
from llmc.compiler.weights.narrow import narrow_plan
from llmc.compiler.weights.write import WEIGHTS_FILE, attach_weights, weight_bytes
from llmc.passes import contract, pipeline
from llmc.passes.contract import Pass, PassReport
from llmc.passes.geometry import attention_nodes, chunk_size, value_width
from llmc.passes.legalize.drop_activation_quantization import rounded_to
from llmc.passes.legalize.finalize import serialize
from llmc.passes.spec import module_of
from llmc.plugins.experts.spec import NAME as EXPERTS
from llmc.plugins.paged_attention.spec import SINKS
from llmc.runtime.backends.base import LoadOptions
from llmc.runtime.backends.native import EXACT_DIGITS
from llmc.runtime.bundle.manifest import Geometry
from llmc.runtime.bundle.manifest import Target as EngineTarget
from llmc.runtime.errors import UnsupportedError
from llmc.runtime.native.plan import plan
from llmc.runtime.native.weights import WEIGHTS

# The engine without activation quantization, for the verification. It is removed from the bundle afterwards.
_EXACT_FILE = "rank{}.exact"
_NAMES = {"native": "the native engine", "openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}
# Engine -> the libraries that a bundle requires, with their versions.
REQUIRES: Mapping[str, Mapping[str, str]] = {
    "native": {},
    "openvino": {"openvino": "2026.4"},
    "onnxruntime": {"onnxruntime": "1.32"},
}
_WEIGHTS_NOTE = {
    "openvino": "16-bit matrices as the checkpoint has them (bf16 as fp16 times a power of two, exactly), "
    "widened as they are multiplied; the rest in fp32",
    "onnxruntime": "fp32, which the engine maps as it is",
    "native": "packed in tiles of 32 rows, in the checkpoint's own dtype where they are not quantized",
}


class CpuTarget:
    """Computes in fp32."""

    def resolve(self, request: BuildRequest, checkpoint_dtype: str) -> Resolved:
        dtype = compute_dtype(request, checkpoint_dtype)
        head = None
        if request.quant:
            fmt = capability.check(request.quant, request.target, ())
            # With integer formats, lm_head is quantized to int8: every token reads all of it, and int8 loses
            # little (docs/explanation/quantization.md).
            head = "int8" if fmt.element in ("int8", "int4") else None
        return Resolved(
            request.target,
            dtype,
            cache_dtype(request, dtype),
            head_format=head,
            engine=request.engine,
            tp=1 if request.tp == AUTO else request.tp,
            pp=request.pp,
        )

    def choose_engine(self, resolved: Resolved, model: ir.Model) -> tuple[Resolved, EngineTarget]:
        faults: dict[str, str] = {}
        candidates = ENGINES if resolved.ranks == 1 else ENGINES[:1]  # the others run one rank
        for engine in candidates if resolved.engine is None else (resolved.engine,):
            fault = engine_fault(engine, resolved, model)
            if fault:
                faults[engine] = fault
                continue
            if engine == "openvino" and resolved.kv_dtype != resolved.dtype:
                resolved = replace(resolved, kv_dtype="u8")
            reason = "; ".join(f"{_NAMES[name]} cannot run this model: {faults[name]}" for name in faults)
            if resolved.engine is not None:
                reason = "--engine named it"
            return resolved, EngineTarget(
                "cpu", engine, reason or "it runs every layer of this model", REQUIRES[engine]
            )
        raise UnsupportedError(
            "; ".join(f"{_NAMES[engine]} cannot run this model: {fault}" for engine, fault in faults.items()),
            "leave --engine out" if resolved.engine else "leave --kv-dtype out",
            "engine" if resolved.engine else "kv_dtype",
        )

    def legalize(
        self, resolved: Resolved, engine: str, model: ir.Model, tensors: Mapping[str, TensorRef]
    ) -> list[Pass]:
        """See `Target`. ONNX Runtime gets no 16-bit weights: it would widen them at every start."""
        del resolved
        if engine == "openvino":
            return pipeline.legalize_openvino(narrow_plan(model, tensors))
        if engine == "native":
            return pipeline.legalize_native(narrow_plan(model, tensors, bf16_as_fp16=False))
        return pipeline.legalize_onnxruntime()

    def plan_ranks(
        self, resolved: Resolved, engine: str, model: ir.Model, geometry: Geometry
    ) -> Iterator[tuple[RankPlan, list[PassReport]]]:
        """See `Target`. The sizes are those of the packed weights and of the native engine's buffers."""
        if engine != "native":
            weights = weight_bytes(model)
            yield rank_plan(0, model, None, geometry, resolved.kv_dtype, weights, None), []
            return
        stages = stages_of(model, resolved)
        for rank, (part, reports) in enumerate(divide(model, resolved, stages)):
            program = lower(part).program
            weights = sum(matrix.nbytes for matrix in program.matrices.values())
            weights += 4 * sum(program.constants.values())
            buffers = plan(program, EXACT_DIGITS).row_bytes * LoadOptions.max_tokens
            stage = stages[rank // resolved.tp] if stages else None
            made = rank_plan(rank, part, stage, geometry, resolved.kv_dtype, weights, buffers)
            yield with_candidates(made, geometry.vocab_size, resolved.tp), reports

    def gpus(self, resolved: Resolved) -> tuple[int, ...]:
        del resolved
        return ()

    def write_weights(
        self,
        resolved: Resolved,
        engine: str,
        model: ir.Model,
        sources: WeightSources,
        writer: BundleWriter,
        on_bytes: Callable[[int], None],
    ) -> None:
        """See `Target`. For the native engine, weights are packed as they are read; the program comes too."""
        if engine != "native":
            write_graph(model, sources, writer, on_bytes)
            return
        if resolved.ranks > 1:
            write_ranks(model, resolved, sources, writer, on_bytes)
            return
        attach_weights(model, sources.tensors, sources.made)
        lowered = lower(model)
        writer.path(PROGRAM_FILE.format(0)).write_bytes(lowered.program.to_json())
        write_packed(lowered, writer, on_bytes, sources.made)

    def check_machine(self, resolved: Resolved, sizes: Sizes, clock: Clock) -> None:
        del resolved, sizes, clock

    def verification_files(
        self, resolved: Resolved, engine: str, model: ir.Model, writer: BundleWriter
    ) -> VerificationFiles:
        native, ranks = engine == "native", resolved.ranks
        graph = PROGRAM_FILE.format(0) if native else GRAPH_FILE
        weights = WEIGHTS if native else WEIGHTS_FILE
        quantizing, scratch = "", []
        if rounded_to(model):
            exact = model.clone()
            contract.run(exact, pipeline.exact_activations())
            quantizing, graph = graph, _EXACT_FILE.format(0)
            stages = stages_of(model, resolved)  # those of the weights files
            for rank, part in enumerate(parts_of(exact, resolved, stages)):
                file = _EXACT_FILE.format(rank)
                writer.path(file).write_bytes(lower(part).program.to_json() if native else serialize(part))
                scratch.append(file)
        kv_graph = graph if resolved.kv_dtype != resolved.dtype else ""
        whole = WHOLE_FILE if ranks > 1 else ""
        return VerificationFiles(
            graph, weights, engine, "", kv_graph, quantizing, tuple(scratch), whole, ranks, resolved.pp
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
        """See `Target`. The engine is complete with its weights."""
        del sizes, clock
        if engine != "native":
            return Artifact((GRAPH_FILE,), (WEIGHTS_FILE,), _WEIGHTS_NOTE[engine])
        discard_whole(writer)
        return Artifact(
            tuple(map(PROGRAM_FILE.format, range(resolved.ranks))),
            weights_files(resolved.ranks, writer),
            _WEIGHTS_NOTE[engine],
            part=next(parts_of(model, resolved)),
        )


def engine_fault(engine: str, resolved: Resolved, model: ir.Model) -> str:
    """Return why `engine` cannot run a quantized graph; "" if it can."""
    if engine == "native":
        try:
            lower(model)
        except UnsupportedError as error:
            return error.message
        latent = [module_of(node) for node in attention_nodes(model) if value_width(node)]
        if latent and resolved.kv_dtype == "int8":
            return f"{latent[0]} is multi-head latent attention, whose cache cannot be {resolved.kv_dtype}"
    if engine == "openvino":
        if resolved.kv_dtype == "fp16":
            return "it has no KV cache of fp16"
        if rounded_to(model) - {ir.DataType.INT8}:
            return "it leaves out the rounding of activations to 8 or 4 bits (FP8, FP4)"
        for node in attention_nodes(model):
            if node.attributes["softcap"].as_float():
                return f"{module_of(node)} has an attention softcap"
            if len(node.inputs) > SINKS:
                return f"{module_of(node)} has attention sinks"
            if value_width(node):
                return f"{module_of(node)} is multi-head latent attention"
            if chunk_size(node):
                return f"{module_of(node)} is attention in chunks"
        for node in model.graph:
            if node.op_type == EXPERTS:
                return f"{module_of(node)} is a mixture of experts"
    if engine == "onnxruntime" and resolved.kv_dtype != resolved.dtype:
        return f"it has no KV cache of {resolved.kv_dtype}"
    return ""
