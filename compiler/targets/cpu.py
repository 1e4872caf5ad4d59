"""The CPU target: OpenVINO where it can take the graph, ONNX Runtime where it cannot.

Both read the same ONNX file. `llmc.PagedAttention` is OpenVINO's own paged attention there, and the
function body that the file carries here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.progress import Progress
from llmc.compiler.request import BuildRequest
from llmc.compiler.targets import capability
from llmc.compiler.targets.base import GRAPH_FILE, Finished, PhaseClock
from llmc.compiler.verify.prove import prove
from llmc.passes.geometry import attention_nodes
from llmc.passes.legalize.drop_activation_quantization import rounded_to, with_exact_inputs
from llmc.passes.legalize.finalize import finish, serialize
from llmc.passes.legalize.keep_16bit_weights import keep_stored_dtype
from llmc.passes.legalize.unpack_fp4_weights import unpack_fp4
from llmc.passes.legalize.widen_int8_weights import widen_int8_weights
from llmc.passes.quantize.formats import get_format
from llmc.passes.spec import module_of
from llmc.plugins.paged_attention import body
from llmc.plugins.round_fp4 import body as round_fp4
from llmc.plugins.round_fp4 import spec as round_fp4_spec
from llmc.runtime.bundle.manifest import Target
from llmc.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from llmc.compiler.driver import Plan

_EXACT_FILE = "rank0.exact.onnx"  # beside weights/ while it is needed; no part of a bundle
OPENVINO, ONNXRUNTIME = "2026.4", "1.32"
_WEIGHTS_NOTE = {
    "openvino": "16-bit matrices as the checkpoint has them (bf16 as fp16 times a power of two, exactly), "
    "widened as they are multiplied; the rest in fp32",
    "onnxruntime": "fp32, which the engine maps as it is",
}


class CpuTarget:
    """Computes in fp32, on every CPU that OpenVINO and ONNX Runtime know."""

    def __init__(self) -> None:
        self._kv_dtype = "fp32"

    def check(self, request: BuildRequest, dtype: str) -> tuple[int, ...]:
        self._kv_dtype = request.cache_dtype(dtype)
        if request.quant:
            capability.check(request.quant, request.target, ())
        return ()

    def head_format(self, fmt: str) -> str | None:
        """int8 beside integers: every token reads all of it, and int8 loses little (docs/quantization.md)."""
        return "int8" if get_format(fmt).element in ("int8", "int4") else None

    def lower(self, model: ir.Model, dtype: str, tensors: Mapping[str, TensorRef]) -> Target:
        """Completes the graph to a file that both engines read. In place.

        Only for OpenVINO do 16-bit weights stay so: ONNX Runtime would widen them all at every start.
        """
        del dtype
        target = choose_engine(model)
        if self._kv_dtype != "fp32" and target.engine != "openvino":
            raise UnsupportedError(
                f"a KV cache of {self._kv_dtype} needs OpenVINO, and ONNX Runtime must run this model: "
                f"{target.reason}",
                "leave --kv-dtype out",
            )
        if target.engine == "openvino":
            keep_stored_dtype(model, tensors)
        else:
            unpack_fp4(model)
            widen_int8_weights(model)
            if any(node.op_type == round_fp4_spec.NAME for node in model.graph):
                rounding = round_fp4.function()
                model.functions[rounding.identifier()] = rounding
        function = body.function()
        model.functions[function.identifier()] = function
        finish(model)
        return target

    def finish(self, plan: Plan, writer: BundleWriter, progress: Progress, phase: PhaseClock) -> Finished:
        graph = writer.path(GRAPH_FILE)
        proven, also, rounds = graph, {}, rounded_to(plan.model)
        if rounds:
            proven = writer.path(_EXACT_FILE)
            proven.write_bytes(serialize(with_exact_inputs(plan.model)))
            also["rounding_engine"] = str(graph)
        if plan.kv_dtype != plan.dtype:
            also |= {"kv_engine": str(proven), "kv_dtype": plan.kv_dtype}
        with phase("verify"):
            record = prove(plan, proven, plan.target.engine, progress, **also)
        if rounds:
            writer.discard(_EXACT_FILE)
        return Finished(GRAPH_FILE, record, weights_note=_WEIGHTS_NOTE[plan.target.engine])


def choose_engine(model: ir.Model) -> Target:
    """Which engine runs `model`, and why."""
    if rounded_to(model) - {ir.DataType.INT8}:
        return Target(
            name="cpu",
            engine="onnxruntime",
            reason="it rounds activations to 8 or 4 bits (FP8, FP4) as a GPU does, which OpenVINO leaves out",
            requires={"onnxruntime": ONNXRUNTIME},
        )
    for node in attention_nodes(model):
        if node.attributes["softcap"].as_float():
            return Target(
                name="cpu",
                engine="onnxruntime",
                reason=f"{module_of(node)} has an attention softcap, which OpenVINO's attention lacks",
                requires={"onnxruntime": ONNXRUNTIME},
            )
    return Target(
        name="cpu",
        engine="openvino",
        reason="its paged attention takes every attention layer of this model",
        requires={"openvino": OPENVINO},
    )
