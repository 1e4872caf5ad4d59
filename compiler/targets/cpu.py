"""The CPU target: OpenVINO where it can take the graph, ONNX Runtime where it cannot.

Both read the same ONNX file. `llmc.PagedAttention` is OpenVINO's own paged attention there, and the
function body that the file carries here.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.geometry import attention_nodes
from llmc.compiler.targets.finish import finish
from llmc.passes.spec import module_of
from llmc.plugins.paged_attention import body
from llmc.runtime.bundle.manifest import Target

ENGINE_FILE = "rank0.onnx"  # beside weights/: ONNX allows external data below the graph's directory only
OPENVINO, ONNXRUNTIME = "2026.4", "1.32"


def choose_engine(model: ir.Model) -> Target:
    """Which engine runs `model`, and why."""
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


def lower(model: ir.Model) -> None:
    """Completes the canonical graph to a file that both engines read. In place."""
    function = body.function()
    model.functions[function.identifier()] = function
    finish(model)


def serialize(model: ir.Model) -> bytes:
    """The bytes of the engine file; the same model gives the same bytes."""
    return ir.to_proto(model).SerializeToString(deterministic=True)
