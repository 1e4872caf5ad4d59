"""Runs a bundle's graph with OpenVINO on the CPU. The KV cache is ours; the graph writes it in place."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from llmc.runtime.backends import openvino_attention
from llmc.runtime.batch import Batch
from llmc.runtime.errors import BackendError

_INPUTS = tuple(field.name for field in fields(Batch))  # other inputs are caches


def tested_core(threads: int | None = None) -> tuple[ov.Core, dict[str, Any]]:
    """OpenVINO, ready to read engines, and the settings to compile them with.

    Raises BackendError if this OpenVINO is not the one the engines are made for, or fails the self-test.
    """
    if not ov.__version__.startswith(openvino_attention.SUPPORTED_VERSION):
        wanted = openvino_attention.SUPPORTED_VERSION
        raise BackendError(
            f"OpenVINO {ov.__version__} is installed, the engine needs {wanted}",
            f"pip install 'openvino=={wanted}.*'",
        )
    core = ov.Core()
    core.add_extension(openvino_attention.extension())
    config: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    openvino_attention.self_test(core, config)
    return core, config


class OpenVinoBackend:
    """A compiled graph and its paged KV cache of `num_blocks` blocks of 32 tokens."""

    name = "openvino"
    block_size = openvino_attention.BLOCK_SIZE

    def __init__(self, engine: Path, num_blocks: int, threads: int | None = None) -> None:
        """Compiles `engine` (ONNX, weights beside it) and allocates the cache.

        Raises BackendError if this OpenVINO is not the one the graph was made for.
        """
        core, config = tested_core(threads)
        try:
            model = core.read_model(engine)
            # Only the logits: the caches are written in place, their outputs would copy them.
            model = ov.Model([model.output("logits")], model.get_parameters(), "llmc")
            compiled = core.compile_model(model, "CPU", config)
        except RuntimeError as error:  # OpenVINO's only kind
            reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
            raise BackendError(
                f"OpenVINO {ov.__version__} cannot load {engine.name}: {reason}",
                "set LLMC_TRACEBACK=1 for all that it says",
            ) from error
        self.num_blocks = num_blocks
        self._request = compiled.create_infer_request()
        self._caches: list[np.ndarray] = []
        self._ports = {}
        for port in compiled.inputs:
            name = port.get_any_name()
            if name in _INPUTS:
                self._ports[name] = port
                continue
            shape = [num_blocks, *(dim.get_length() for dim in list(port.get_partial_shape())[1:])]
            memory = np.zeros(shape, np.float32)  # zero pages: memory is taken when a block is first written
            self._caches.append(memory)  # ov.Tensor does not keep the array alive
            self._request.set_tensor(port, ov.Tensor(memory, shared_memory=True))
        self._logits = compiled.outputs[0]

    def forward(self, batch: Batch) -> np.ndarray:
        """Logits float32 [N, vocab] of the rows in `batch.logits_index`; valid until the next call."""
        tensors = {}
        for name, port in self._ports.items():
            tensors[name] = ov.Tensor(getattr(batch, name), shared_memory=True)
            self._request.set_tensor(port, tensors[name])
        self._request.infer()
        return self._request.get_tensor(self._logits).data
