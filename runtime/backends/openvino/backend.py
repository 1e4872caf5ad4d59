"""The OpenVINO backend, on the CPU. llmc allocates the KV cache, and the graph updates it in place.

Weights of 16, 8 or 4 bits stay compressed in memory. OpenVINO's oneDNN kernels widen them to fp32 during the
multiplication, exactly. For up to 4 rows this happens in registers, and a step takes as long as reading the
weights. For more rows the kernels unpack the weights into a buffer first, which costs more than reading them
again until there are about 16 rows (docs/explanation/performance.md has the figures). So a small decode step
runs as several steps of 4 rows. With int8 activations nothing is widened, and all rows run in one step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from llmc.plugins.paged_attention.spec import BLOCK_SIZE
from llmc.runtime.backends.base import EngineFile, LoadOptions
from llmc.runtime.backends.kv_cache import cpu_blocks
from llmc.runtime.backends.openvino import attention, int8
from llmc.runtime.backends.openvino.file_pages import releasing
from llmc.runtime.backends.openvino.huge_pages import collapse_resident
from llmc.runtime.backends.openvino.signal_stack import kept_signal_stack
from llmc.runtime.batch import STEP_INPUTS, Batch
from llmc.runtime.cpus import default_threads
from llmc.runtime.errors import BackendError

_FEW_ROWS, _MANY_ROWS = 4, 16
# A step of one token, in block 0 of the unused cache.
_FIRST_STEP = Batch.pack([([0], 0, [0], True)])
_NARROW = (ov.Type.bf16, ov.Type.f16)
_INTEGER = (ov.Type.i8, ov.Type.u8, ov.Type.i4, ov.Type.u4)
_KV_PRECISION = {"fp32": "f32", "u8": "u8"}


def load(engine: EngineFile, options: LoadOptions) -> OpenVinoBackend:
    """Load a graph (see `OpenVinoBackend`). Raises RequestError for a KV cache that does not fit."""
    return OpenVinoBackend(
        engine.path,
        cpu_blocks(engine, options),
        default_threads(options.threads),
        kv_dtype=engine.kv_dtype,
        activation_group=options.activation_group,
    )


@kept_signal_stack()
def tested_core(
    threads: int | None = None, *, kv_dtype: str = "fp32", activation_group: int | None = None
) -> tuple[ov.Core, dict[str, Any]]:
    """Return an OpenVINO core that can read engines, and the properties to compile them with.

    With `activation_group` and a u8 cache, the rest of the arithmetic is bf16 if the CPU supports it, which
    is OpenVINO's default. An fp32 cache does not allow that. Otherwise the arithmetic is fp32.

    Raises BackendError if this OpenVINO is not the version that the engines need, if it fails the self-test
    in the precision of that cache, or if it has no cache of `kv_dtype`.
    """
    if kv_dtype not in _KV_PRECISION:
        raise BackendError(
            f"the OpenVINO engine has no KV cache of {kv_dtype}", f"known: {', '.join(_KV_PRECISION)}"
        )
    if not ov.__version__.startswith(attention.SUPPORTED_VERSION):
        wanted = attention.SUPPORTED_VERSION
        raise BackendError(
            f"OpenVINO {ov.__version__} is installed, the engine needs {wanted}",
            f"pip install 'openvino=={wanted}.*'",
        )
    core = ov.Core()
    core.add_extension(attention.extension())
    in_int8 = activation_group is not None and kv_dtype == "u8"
    bf16 = in_int8 and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    config: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "KV_CACHE_PRECISION": _KV_PRECISION[kv_dtype],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": activation_group or 0,
    }
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    attention.self_test(core, config)
    return core, config


class OpenVinoBackend:
    """A compiled graph and its paged KV cache of `num_blocks` blocks of 32 tokens."""

    name = "openvino"
    block_size = BLOCK_SIZE

    def __init__(
        self,
        engine: Path,
        num_blocks: int,
        threads: int | None = None,
        *,
        kv_dtype: str = "fp32",
        activation_group: int | None = None,
    ) -> None:
        """Compile `engine` (ONNX, with its weights in the same directory) and allocate the cache, fp32 or u8.

        activation_group: the number of activations in a row that share an int8 scale. Activations are
            quantized in layers with integer weights only. The number must divide the block of int4 weights,
            or OpenVINO does not quantize. None: activations are exact.
        Raises BackendError if this OpenVINO is not the version that the graph was made for.
        """
        core, config = tested_core(threads, kv_dtype=kv_dtype, activation_group=activation_group)
        try:
            model = core.read_model(engine)
            # Only the logits: the caches are updated in place, and outputs for them would be copies.
            model = ov.Model([model.output("logits")], model.get_parameters(), "llmc")
            narrow, integer = _keep_narrow(model), _has_integer_weights(model)
            in_int8 = int8.quantizes_activations(model)
            if in_int8 and not int8.is_exact(core, config):
                config |= int8.IN_FP32
                in_int8 = False
            self._few_at_once = (narrow or integer) and activation_group is None and not in_int8
            compiled = core.compile_model(model, "CPU", config)
        # OpenVINO raises RuntimeError. Python cannot decode a message that has bytes of a damaged file.
        except (RuntimeError, UnicodeDecodeError) as error:
            text = "" if isinstance(error, UnicodeDecodeError) else str(error)
            reason = ["it is damaged", *(line.strip() for line in text.splitlines() if line.strip())][-1]
            raise BackendError(
                f"OpenVINO {ov.__version__} cannot load {engine.name}: {reason}",
                "set LLMC_TRACEBACK=1 for the full message",
            ) from error
        self.num_blocks = num_blocks
        self._request = compiled.create_infer_request()
        self._caches: list[np.ndarray] = []
        self._ports = {}
        for port in compiled.inputs:
            name = port.get_any_name()
            if name in STEP_INPUTS:
                self._ports[name] = port
                continue
            # The graph declares fp32 [blocks, heads, 32, width]. A compiled u8 cache also holds scales.
            shape = [num_blocks, *(dim.get_length() for dim in list(port.get_partial_shape())[1:])]
            dtype = port.get_element_type().to_dtype()
            memory = np.zeros(shape, dtype)  # zero pages: a block takes memory when it is first written
            self._caches.append(memory)  # ov.Tensor does not keep the array alive
            self._request.set_tensor(port, ov.Tensor(memory, shared_memory=True))
        self._logits = compiled.outputs[0]
        # OpenVINO packs the weights in the first step, so that step is part of loading.
        with releasing(engine.parent):
            self._run(_FIRST_STEP)
        if integer:
            collapse_resident()

    def forward(self, batch: Batch) -> np.ndarray:
        """Return logits, float32 [N, vocab], for `batch.logits_index`. They are valid until the next call."""
        rows = len(batch.input_ids)
        decode = rows == len(batch.past_lengths)
        if self._few_at_once and decode and _FEW_ROWS < rows <= _MANY_ROWS:
            return np.concatenate([self._run(part).copy() for part in batch.split(_FEW_ROWS)])
        return self._run(batch)

    def _run(self, batch: Batch) -> np.ndarray:
        tensors = {}
        for name, port in self._ports.items():
            tensors[name] = ov.Tensor(getattr(batch, name), shared_memory=True)
            self._request.set_tensor(port, tensors[name])
        self._request.infer()
        return self._request.get_tensor(self._logits).data


def _keep_narrow(model: ov.Model) -> bool:
    """Make OpenVINO keep 16-bit weights that the graph widens. Return whether there are any.

    Without the mark OpenVINO would fold them into fp32 constants. The reader of OpenVINO's format sets the
    mark, the reader of ONNX does not.
    """
    has_any = False
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convert":
            continue
        users = {user.get_node().get_type_name() for user in node.output(0).get_target_inputs()}
        source = node.input_value(0)
        constant = source.get_node().get_type_name() == "Constant"
        if users == {"MatMul"} and constant and source.get_element_type() in _NARROW:
            node.get_rt_info()["decompression_0"] = True
            has_any = True
    return has_any


def _has_integer_weights(model: ov.Model) -> bool:
    """Return whether there are matrices of 8 or 4 bits."""
    constants = (node for node in model.get_ops() if node.get_type_name() == "Constant")
    return any(
        node.get_output_element_type(0) in _INTEGER and len(node.get_output_shape(0)) > 1
        for node in constants
    )
