"""The ONNX Runtime backend, on the CPU.

The graph has a function body of standard operators for `llmc.PagedAttention`, which ONNX Runtime inlines.
The backend runs graphs that OpenVINO cannot (attention softcap), and is the reference in tests.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from llmc.plugins.paged_attention.spec import BLOCK_SIZE
from llmc.runtime.backends.base import EngineFile, LoadOptions
from llmc.runtime.backends.kv_cache import cpu_blocks
from llmc.runtime.batch import STEP_INPUTS, Batch
from llmc.runtime.cpus import default_threads
from llmc.runtime.errors import BackendError


def load(engine: EngineFile, options: LoadOptions) -> OnnxRuntimeBackend:
    """Load a graph. Raises BackendError for `activation_group` and for caches that are not fp32."""
    if options.activation_group is not None:
        raise BackendError(
            "ONNX Runtime computes with fp32 activations here: `fast` would change nothing",
            "leave --fast out",
        )
    if engine.kv_dtype != "fp32":
        raise BackendError(
            f"ONNX Runtime has no KV cache of {engine.kv_dtype} here",
            "build the bundle with an fp32 KV cache",
        )
    return OnnxRuntimeBackend(engine.path, cpu_blocks(engine, options), default_threads(options.threads))


class OnnxRuntimeBackend:
    """An inference session and its paged KV cache of `num_blocks` blocks of 32 tokens."""

    name = "onnxruntime"
    block_size = BLOCK_SIZE

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
            if port.name in STEP_INPUTS:
                continue
            cache = np.zeros((num_blocks, *port.shape[1:]), np.float32)
            value = ort.OrtValue.ortvalue_from_numpy(cache)
            self._caches.append(value)
            self._binding.bind_ortvalue_input(port.name, value)
            output = port.name.replace("_cache.", "_cache_out.")
            if output not in present:
                raise BackendError(f"{engine.name} has no output {output}", "rebuild the bundle")
            self._binding.bind_ortvalue_output(output, value)  # the cache is updated in place

    def forward(self, batch: Batch) -> np.ndarray:
        """Return logits, float32 [N, vocab], for `batch.logits_index`. They are valid until the next call."""
        for name in STEP_INPUTS:
            self._binding.bind_cpu_input(name, getattr(batch, name))
        self._binding.bind_output("logits")
        self._session.run_with_iobinding(self._binding)
        return self._binding.get_outputs()[-1].numpy()
