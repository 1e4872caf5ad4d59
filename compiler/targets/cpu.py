"""The CPU target: OpenVINO, ONNX Runtime where OpenVINO cannot run a graph, and the native engine on request.

OpenVINO and ONNX Runtime read the same ONNX file. OpenVINO runs `llmc.PagedAttention` with its own paged
attention, ONNX Runtime with the function body in the file.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.progress import Clock
from llmc.compiler.request import BuildRequest, cache_dtype, compute_dtype
from llmc.compiler.targets import capability
from llmc.compiler.targets.base import GRAPH_FILE, Artifact, Resolved, Sizes, VerificationFiles
from llmc.compiler.targets.native.lower import lower
from llmc.compiler.targets.native.pack import PACKED_FILE, write_packed
from llmc.compiler.weights.narrow import narrow_plan
from llmc.compiler.weights.write import WEIGHTS_FILE
from llmc.passes import contract, pipeline
from llmc.passes.contract import Pass
from llmc.passes.geometry import attention_nodes
from llmc.passes.legalize.drop_activation_quantization import rounded_to
from llmc.passes.legalize.finalize import serialize
from llmc.passes.spec import module_of
from llmc.runtime.bundle.manifest import Target as EngineTarget
from llmc.runtime.errors import UnsupportedError

PROGRAM_FILE = "rank0.program.json"
# The graph without activation quantization, for the verification. It is removed from the bundle afterwards.
_EXACT_FILE = "rank0.exact.onnx"
OPENVINO, ONNXRUNTIME = "2026.4", "1.32"  # the versions that a bundle requires
_WEIGHTS_NOTE = {
    "openvino": "16-bit matrices as the checkpoint has them (bf16 as fp16 times a power of two, exactly), "
    "widened as they are multiplied; the rest in fp32",
    "onnxruntime": "fp32, which the engine maps as it is",
    "native": "packed in tiles of 32 rows, in the checkpoint's own dtype where they are not quantized",
}


class CpuTarget:
    """Computes in fp32, on every CPU that OpenVINO and ONNX Runtime know."""

    def resolve(self, request: BuildRequest, checkpoint_dtype: str) -> Resolved:
        dtype = compute_dtype(request, checkpoint_dtype)
        head = None
        if request.quant:
            fmt = capability.check(request.quant, request.target, ())
            # With integer formats, lm_head is quantized to int8: every token reads all of it, and int8 loses
            # little (docs/explanation/quantization.md).
            head = "int8" if fmt.element in ("int8", "int4") else None
        return Resolved(
            request.target, dtype, cache_dtype(request, dtype), head_format=head, engine=request.engine
        )

    def choose_engine(self, resolved: Resolved, model: ir.Model) -> EngineTarget:
        if resolved.engine == "native":
            return native_engine(resolved, model)
        chosen = choose_engine(model)
        if resolved.engine not in (None, chosen.engine):
            if chosen.engine == "onnxruntime":
                raise UnsupportedError(
                    f"OpenVINO cannot run this model: {chosen.reason}", "leave --engine out, or name another"
                )
            chosen = EngineTarget("cpu", "onnxruntime", "--engine named it", {"onnxruntime": ONNXRUNTIME})
        if resolved.kv_dtype != "fp32" and chosen.engine != "openvino":
            raise UnsupportedError(
                f"a KV cache of {resolved.kv_dtype} needs OpenVINO, and ONNX Runtime must run this model: "
                f"{chosen.reason}",
                "leave --kv-dtype out",
                "kv_dtype",
            )
        return chosen

    def legalize(
        self, resolved: Resolved, engine: str, model: ir.Model, tensors: Mapping[str, TensorRef]
    ) -> list[Pass]:
        """See `Target`. ONNX Runtime gets no 16-bit weights: it would widen them at every start."""
        del resolved
        if engine == "openvino":
            return pipeline.legalize_openvino(narrow_plan(model, tensors))
        if engine == "native":
            return pipeline.legalize_openvino(narrow_plan(model, tensors, bf16_as_fp16=False))
        return pipeline.legalize_onnxruntime()

    def check_machine(self, sizes: Sizes, clock: Clock) -> None:
        del sizes, clock

    def verification_files(
        self, resolved: Resolved, engine: str, model: ir.Model, writer: BundleWriter
    ) -> VerificationFiles:
        if engine == "native":
            _write_program(model, writer)
            return VerificationFiles(PROGRAM_FILE, engine)
        graph, quantizing = GRAPH_FILE, ""
        if rounded_to(model):
            exact = model.clone()
            contract.run(exact, pipeline.exact_activations())
            writer.path(_EXACT_FILE).write_bytes(serialize(exact))
            graph, quantizing = _EXACT_FILE, GRAPH_FILE
        kv_graph = graph if resolved.kv_dtype != resolved.dtype else ""
        scratch = (graph,) if quantizing else ()
        return VerificationFiles(graph, engine, "", kv_graph, quantizing, scratch)

    def build(
        self,
        resolved: Resolved,
        engine: str,
        model: ir.Model,
        sizes: Sizes,
        writer: BundleWriter,
        clock: Clock,
    ) -> Artifact:
        """See `Target`. Writes the native program, unless the verification did. Others are complete."""
        del resolved, sizes, clock
        if engine != "native":
            return Artifact(GRAPH_FILE, (WEIGHTS_FILE,), _WEIGHTS_NOTE[engine])
        if not writer.path(PROGRAM_FILE).exists():
            _write_program(model, writer)
        for file in (GRAPH_FILE, WEIGHTS_FILE):
            writer.discard(file)
        return Artifact(PROGRAM_FILE, (PACKED_FILE,), _WEIGHTS_NOTE[engine])


def native_engine(resolved: Resolved, model: ir.Model) -> EngineTarget:
    """Return the native engine. Raises UnsupportedError, with the reason, if it cannot run `model`."""
    if resolved.kv_dtype != "fp32":
        raise UnsupportedError(
            f"the native engine has no KV cache of {resolved.kv_dtype}", "leave --kv-dtype out"
        )
    if rounded_to(model):
        raise UnsupportedError(
            "the native engine does not quantize activations yet",
            "leave --engine out, or choose another --quant",
        )
    lower(model)
    return EngineTarget("cpu", "native", "--engine named it", {})


def _write_program(model: ir.Model, writer: BundleWriter) -> None:
    lowered = lower(model)
    writer.path(PROGRAM_FILE).write_bytes(lowered.program.to_json())
    write_packed(lowered, writer, lambda done: None)


def choose_engine(model: ir.Model) -> EngineTarget:
    """Return the engine that runs `model` by default, OpenVINO if it can, and the reason."""
    if rounded_to(model) - {ir.DataType.INT8}:
        return EngineTarget(
            name="cpu",
            engine="onnxruntime",
            reason="it rounds activations to 8 or 4 bits (FP8, FP4) as a GPU does, which OpenVINO leaves out",
            requires={"onnxruntime": ONNXRUNTIME},
        )
    for node in attention_nodes(model):
        if node.attributes["softcap"].as_float():
            return EngineTarget(
                name="cpu",
                engine="onnxruntime",
                reason=f"{module_of(node)} has an attention softcap, which OpenVINO's attention lacks",
                requires={"onnxruntime": ONNXRUNTIME},
            )
    return EngineTarget(
        name="cpu",
        engine="openvino",
        reason="its paged attention takes every attention layer of this model",
        requires={"openvino": OPENVINO},
    )
