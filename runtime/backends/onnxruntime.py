"""Runs a bundle's graph with ONNX Runtime on the CPU.

The graph carries `llmc.PagedAttention` as a function of standard operators, which ONNX Runtime inlines.
Used for graphs that OpenVINO cannot take (attention softcap), and as the reference in tests.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import onnxruntime as ort

from llmc.runtime.batch import Batch
from llmc.runtime.errors import BackendError

_INPUTS = tuple(field.name for field in fields(Batch))  # other inputs are caches


class OnnxRuntimeBackend:
    """An inference session and its paged KV cache of `num_blocks` blocks of 32 tokens."""

    name = "onnxruntime"
    block_size = 32

    def __init__(self, engine: Path, num_blocks: int, threads: int | None = None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        try:
            self._session = ort.InferenceSession(str(engine), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime {ort.__version__} cannot load {engine.name}: {str(error).splitlines()[0]}",
                "check the bundle with `llmc inspect`",
            ) from error
        self.num_blocks = num_blocks
        self._binding = self._session.io_binding()
        self._caches: list[ort.OrtValue] = []
        present = {output.name for output in self._session.get_outputs()}
        for port in self._session.get_inputs():
            if port.name in _INPUTS:
                continue
            cache = np.zeros((num_blocks, *port.shape[1:]), np.float32)
            value = ort.OrtValue.ortvalue_from_numpy(cache)
            self._caches.append(value)
            self._binding.bind_ortvalue_input(port.name, value)
            output = port.name.replace("_cache.", "_cache_out.")
            if output not in present:
                raise BackendError(f"{engine.name} has no output {output}", "rebuild the bundle")
            self._binding.bind_ortvalue_output(output, value)  # written in place: same memory in and out

    def forward(self, batch: Batch) -> np.ndarray:
        """Logits float32 [N, vocab] of the rows in `batch.logits_index`; valid until the next call."""
        for name in _INPUTS:
            self._binding.bind_cpu_input(name, getattr(batch, name))
        self._binding.bind_output("logits")
        self._session.run_with_iobinding(self._binding)
        return self._binding.get_outputs()[-1].numpy()
