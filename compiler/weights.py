"""Writes the engine's weights: the checkpoint's tensors, converted piece by piece, in the graph's order.

fp32 on the CPU: the engine computes in fp32 and can map fp32 from the file as it is, while 16-bit weights
would be expanded in memory at every start. Tied tensors are stored once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from llmc.compiler.package import BundleWriter
from llmc.compiler.safetensors_index import TensorRef
from llmc.compiler.weights_writer import write_safetensors
from llmc.passes import edit
from llmc.passes.fuse_linears import JOIN
from llmc.runtime.errors import BuildError

WEIGHTS_FILE = "weights/model.safetensors"
_CHUNK_BYTES = 16 << 20
_INLINE_BYTES = 1024  # smaller constants (shapes, axes) stay in the graph
_SAFETENSORS_NAMES = {ir.DataType.FLOAT: "F32", ir.DataType.INT64: "I64", ir.DataType.INT32: "I32"}


def write_weights(
    model: ir.Model,
    tensors: Mapping[str, TensorRef],
    writer: BundleWriter,
    on_bytes: Callable[[int], None] = lambda done: None,
) -> int:
    """Streams every large initializer of `model` to the bundle and points the graph at it.

    Parameters (initializers without data) come from `tensors` by name, those of fused layers by the names of
    their parts. Returns the bytes written.
    Raises BuildError if a tensor cannot be converted to the dtype that the graph wants.
    """
    values = [value for value in model.graph.initializers.values() if not _is_inline(value)]
    entries = [(str(value.name), _SAFETENSORS_NAMES[_dtype(value)], _shape(value)) for value in values]
    by_name = {value.name: value for value in values}
    writer.check_disk_space(sum(int(np.prod(shape)) * 4 for _, _, shape in entries))
    done = 0

    def produce(name: str) -> Iterator[memoryview]:
        nonlocal done
        for chunk in _chunks(by_name[name], tensors):
            done += chunk.nbytes
            yield chunk.data
            on_bytes(done)

    path = writer.path(WEIGHTS_FILE)
    sha256, nbytes, spans = write_safetensors(path, entries, produce)
    writer.add_hash(WEIGHTS_FILE, sha256, nbytes)
    for value in values:
        offset, length = spans[str(value.name)]
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE,
            offset,
            length,
            _dtype(value),
            shape=ir.Shape(_shape(value)),
            name=str(value.name),
            base_dir=path.parent.parent,
        )
    return nbytes


def weight_bytes(model: ir.Model) -> int:
    """Bytes that `write_weights` will write, without the header."""
    return sum(
        int(np.prod(_shape(value)) * _dtype(value).itemsize)
        for value in model.graph.initializers.values()
        if not _is_inline(value)
    )


def _is_inline(value: ir.Value) -> bool:
    return value.const_value is not None and int(value.const_value.nbytes) <= _INLINE_BYTES


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _shape(value: ir.Value) -> tuple[int, ...]:
    return tuple(edit.dims(value))


def _chunks(value: ir.Value, tensors: Mapping[str, TensorRef]) -> Iterator[np.ndarray]:
    dtype = _dtype(value).numpy()
    if value.const_value is not None:
        yield np.ascontiguousarray(value.const_value.numpy().astype(dtype, copy=False))
        return
    for name in str(value.name).split(JOIN):  # fused layers: one tensor after the other
        ref = tensors.get(name)
        if ref is None:
            raise BuildError(f"the graph needs {name}, which the checkpoint lacks")
        if ref.dtype not in ("F32", "F16", "BF16", "F64"):
            raise BuildError(
                f"tensor {name} is {ref.dtype}, which llmc cannot convert to {dtype}",
                "quantized checkpoints are not supported yet; build from the original weights",
            )
        for chunk in ref.iter_chunks(_CHUNK_BYTES):
            yield np.ascontiguousarray(chunk.astype(dtype, copy=False))
