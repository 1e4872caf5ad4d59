"""Runs a bundle's graph with OpenVINO on the CPU. The KV cache is ours; the graph writes it in place.

Weights of 16, 8 or 4 bits stay so in memory: OpenVINO's oneDNN kernels widen them to fp32 as they multiply,
exactly. For up to 4 rows that happens in registers, and a step takes as long as reading the weights. For more
rows they are unpacked into a buffer first, which costs more than reading them again until there are about 16
rows (docs/explanation/performance.md has the figures); so a small decode step is run as several of 4 rows.
With activations of int8 there is nothing to widen, and all rows go together.
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
from llmc.runtime.batch import STEP_INPUTS, Batch
from llmc.runtime.errors import BackendError

_FEW_ROWS, _MANY_ROWS = 4, 16
# One token in block 0 of a cache that nobody uses yet.
_FIRST_STEP = Batch.pack([([0], 0, [0], True)])
_NARROW = (ov.Type.bf16, ov.Type.f16)
_INTEGER = (ov.Type.i8, ov.Type.u8, ov.Type.i4, ov.Type.u4)
_KV_PRECISION = {"fp32": "f32", "u8": "u8"}


def load(engine: EngineFile, options: LoadOptions) -> OpenVinoBackend:
    """Loads a graph: see `OpenVinoBackend`. Raises RequestError for a KV cache that does not fit."""
    return OpenVinoBackend(
        engine.path,
        cpu_blocks(engine, options),
        options.threads,
        kv_dtype=engine.kv_dtype,
        activation_group=options.activation_group,
    )


def tested_core(
    threads: int | None = None, *, kv_dtype: str = "fp32", activation_group: int | None = None
) -> tuple[ov.Core, dict[str, Any]]:
    """OpenVINO, ready to read engines, and the settings to compile them with.

    With `activation_group` and a cache of u8 the rest of the arithmetic is bf16 where the CPU has it, which
    is OpenVINO's own default; with an fp32 cache it cannot be. Otherwise it is fp32.

    Raises BackendError if this OpenVINO is not the one the engines are made for, fails the self-test (in
    the precision of that cache), or has no cache of `kv_dtype`.
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
    rounding = activation_group is not None and kv_dtype == "u8"
    bf16 = rounding and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
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
        """Compiles `engine` (ONNX, weights beside it) and allocates the cache, fp32 or u8.

        activation_group: activations are rounded to int8 before they meet integer weights, so many of a row
            with one scale. It must divide the block of int4 weights, or OpenVINO does not round. Other
            weights are not concerned. None: exact.
        Raises BackendError if this OpenVINO is not the one the graph was made for.
        """
        core, config = tested_core(threads, kv_dtype=kv_dtype, activation_group=activation_group)
        try:
            model = core.read_model(engine)
            # Only the logits: the caches are written in place, their outputs would copy them.
            model = ov.Model([model.output("logits")], model.get_parameters(), "llmc")
            narrow, integer = _keep_narrow(model), _has_integer_weights(model)
            in_int8 = int8.rounds_inputs(model)
            if in_int8 and not int8.is_exact(core, config):
                config |= int8.IN_FP32
                in_int8 = False
            self._few_at_once = (narrow or integer) and activation_group is None and not in_int8
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
            if name in STEP_INPUTS:
                self._ports[name] = port
                continue
            # The graph declares fp32 [blocks, heads, 32, width]; compiled for u8 it has room for scales.
            shape = [num_blocks, *(dim.get_length() for dim in list(port.get_partial_shape())[1:])]
            dtype = port.get_element_type().to_dtype()
            memory = np.zeros(shape, dtype)  # zero pages: memory is taken when a block is first written
            self._caches.append(memory)  # ov.Tensor does not keep the array alive
            self._request.set_tensor(port, ov.Tensor(memory, shared_memory=True))
        self._logits = compiled.outputs[0]
        with releasing(
            engine.parent
        ):  # OpenVINO packs the weights in the first step: that is part of loading
            self._run(_FIRST_STEP)
        if integer:
            collapse_resident()

    def forward(self, batch: Batch) -> np.ndarray:
        """Logits float32 [N, vocab] of the rows in `batch.logits_index`; valid until the next call."""
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
    """Asks OpenVINO to keep 16-bit weights that the graph widens as they are; whether there are any.

    Its own readers mark such conversions of its own format; for ONNX it would fold them into fp32 constants.
    """
    found = False
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convert":
            continue
        users = {user.get_node().get_type_name() for user in node.output(0).get_target_inputs()}
        source = node.input_value(0)
        constant = source.get_node().get_type_name() == "Constant"
        if users == {"MatMul"} and constant and source.get_element_type() in _NARROW:
            node.get_rt_info()["decompression_0"] = True
            found = True
    return found


def _has_integer_weights(model: ov.Model) -> bool:
    """Return whether there are matrices of 8 or 4 bits."""
    constants = (node for node in model.get_ops() if node.get_type_name() == "Constant")
    return any(
        node.get_output_element_type(0) in _INTEGER and len(node.get_output_shape(0)) > 1
        for node in constants
    )
