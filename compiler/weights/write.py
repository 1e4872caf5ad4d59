"""Write the engine's weights: the checkpoint's tensors, in the dtype and the order of the graph.

They are streamed in chunks, so that memory holds only one chunk. Tied tensors are stored once. For an engine
with a layout of its own, `attach_weights` reads them instead.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.weights.safetensors_writer import TensorEntry, write_safetensors
from llmc.passes import edit
from llmc.passes.dtypes import SAFETENSORS
from llmc.passes.parameter import parameter
from llmc.passes.quantize.elements import decode, unpack
from llmc.runtime.dtypes import FLOATS
from llmc.runtime.errors import BuildError, CheckpointError

WEIGHTS_FILE = "weights/model.safetensors"
_INLINE_BYTES = 1024  # constants of at most this size (shapes, axes) stay in the graph
_NAMES = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT8: "int8",
    ir.DataType.INT4: "int4",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.FLOAT4E2M1: "fp4",
    ir.DataType.UINT8: "fp4",  # packed, for ONNX Runtime
}


def write_weights(
    model: ir.Model,
    tensors: Mapping[str, TensorRef],
    writer: BundleWriter,
    on_bytes: Callable[[int], None] = lambda done: None,
    made: Mapping[str, TensorRef] = MappingProxyType({}),
    file: str = WEIGHTS_FILE,
) -> int:
    """Stream every large initializer of `model` to the bundle, and make the graph refer to the file.

    tensors: the checkpoint's tensors, by name
    on_bytes: called with the number of bytes written so far
    made: the codes and scales that the build made, by the names of their initializers
    file: the name of the file, in a directory of the bundle

    Each parameter is read from its source tensors, or from `made`, and converted to the dtype of the graph.
    Of the parameters that one of several ranks has a part of, the whole one is in memory for a moment.
    Returns the bytes written.
    Raises BuildError if a tensor is missing or cannot be converted, CheckpointError for NaN and infinity.
    """
    values = [value for value in model.graph.initializers.values() if not _is_inline(value)]
    entries = [_entry(value, made) for value in values]
    by_name = {value.name: value for value in values}
    writer.check_disk_space(sum(_nbytes(value) for value in values))
    done = 0

    def produce(name: str) -> Iterator[memoryview]:
        nonlocal done
        for chunk in _contents(by_name[name], tensors, made):
            done += chunk.nbytes
            yield np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
            on_bytes(done)

    path = writer.path(file)
    sha256, nbytes, spans = write_safetensors(path, entries, produce)
    writer.add_hash(file, sha256, nbytes)
    for value in values:
        offset, length = spans[str(value.name)]
        value.const_value = ir.ExternalTensor(
            file,
            offset,
            length,
            _dtype(value),
            shape=ir.Shape(_shape(value)),
            name=str(value.name),
            base_dir=path.parent.parent,
        )
    return nbytes


def attach_weights(
    model: ir.Model, tensors: Mapping[str, TensorRef], made: Mapping[str, TensorRef] = MappingProxyType({})
) -> None:
    """Let every large initializer of `model` read its data from its sources whenever they are used.

    The arguments and the errors, which occur at the first use, are those of `write_weights`.
    """
    for value in model.graph.initializers.values():
        if (record := parameter(value)) is not None:
            read = functools.partial(_read, value, tensors, made.get(record.file_name))
            shape = ir.Shape(_shape(value))
            value.const_value = ir.LazyTensor(read, _dtype(value), shape, name=str(value.name))


def _read(value: ir.Value, tensors: Mapping[str, TensorRef], made: TensorRef | None) -> ir.TensorProtocol:
    record, dtype = parameter(value), _dtype(value)
    assert record is not None
    shape = record.whole or _shape(value)
    data, position = np.empty(-(-math.prod(shape) * dtype.bitwidth // 8), np.uint8), 0
    for chunk in _made_chunks(value, made) if made else _chunks(value, tensors):
        part = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
        data[position : position + len(part)] = part
        position += len(part)
    if position != len(data):
        raise BuildError(f"{value.name} has {position} bytes, the graph needs {len(data)}")
    if dtype.bitwidth < 8:
        whole: ir.TensorProtocol = ir.PackedTensor(data, dtype, shape=ir.Shape(shape))
    else:
        whole = ir.Tensor(data.view(dtype.numpy()).reshape(shape), dtype)
    if not record.kept:
        return whole
    array = whole.numpy()
    for axis, ranges in record.kept:
        cuts = [array[(slice(None),) * axis + (slice(*span),)] for span in ranges]
        array = np.concatenate(cuts, axis) if len(cuts) > 1 else cuts[0]
    return ir.Tensor(np.ascontiguousarray(array), dtype)


def weight_bytes(model: ir.Model) -> int:
    """Return the number of bytes that `write_weights` will write, without the header."""
    return sum(_nbytes(value) for value in model.graph.initializers.values() if not _is_inline(value))


def num_elements(model: ir.Model) -> int:
    """Return the number of elements that `write_weights` will write."""
    values = model.graph.initializers.values()
    return sum(math.prod(_shape(value)) for value in values if not _is_inline(value))


def main_dtype(model: ir.Model) -> str:
    """Return the dtype that most elements of the weights have, such as "bf16" or "int4"."""
    sizes: Counter[ir.DataType] = Counter()
    for value in model.graph.initializers.values():
        sizes[_dtype(value)] += math.prod(_shape(value))
    return _NAMES[sizes.most_common(1)[0][0]]


def _contents(
    value: ir.Value, tensors: Mapping[str, TensorRef], made: Mapping[str, TensorRef]
) -> Iterator[np.ndarray]:
    """Return the data of an initializer, in chunks."""
    record = parameter(value)
    if record is not None and record.kept:
        part = _read(value, tensors, made.get(record.file_name))
        return iter([np.frombuffer(part.tobytes(), np.uint8)])
    ref = made.get(str(value.name))
    return _made_chunks(value, ref) if ref else _chunks(value, tensors)


def _entry(value: ir.Value, made: Mapping[str, TensorRef]) -> TensorEntry:
    name, record = str(value.name), parameter(value)
    if record is not None and record.kept:
        if _dtype(value) in SAFETENSORS:
            return name, SAFETENSORS[_dtype(value)], _shape(value)
        return name, "U8", (_nbytes(value),)  # two codes in a byte
    if (ref := made.get(name)) and not _is_converted(value, ref):
        return name, ref.dtype, ref.shape
    return name, SAFETENSORS[_dtype(value)], _shape(value)


def _is_inline(value: ir.Value) -> bool:
    if parameter(value) is not None:
        return False
    return value.const_value is not None and int(value.const_value.nbytes) <= _INLINE_BYTES


def _nbytes(value: ir.Value) -> int:
    return math.ceil(math.prod(_shape(value)) * _dtype(value).itemsize)


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _shape(value: ir.Value) -> tuple[int, ...]:
    return tuple(edit.dims(value))


def _chunks(value: ir.Value, tensors: Mapping[str, TensorRef]) -> Iterator[np.ndarray]:
    dtype = _dtype(value).numpy()
    record = parameter(value)
    if record is None:
        assert value.const_value is not None, f"{value.name} has neither data nor a Parameter"
        yield _flat(value.const_value.numpy(), dtype, str(value.name))
        return
    if not record.sources:
        raise BuildError(f"the graph needs {value.name}, which the build has not made")
    for source in record.sources:  # the tensors of fused layers are concatenated
        name, ref = source.tensor, tensors.get(source.tensor)
        if ref is None:
            raise BuildError(f"the graph needs {name}, which the checkpoint lacks")
        if ref.dtype not in FLOATS:
            raise BuildError(
                f"tensor {name} is {ref.dtype}, which llmc cannot convert to {dtype}",
                "run `llmc check CHECKPOINT` to see what is wrong with it",
            )
        power = record.exponent
        for chunk in ref.iter_chunks():
            _require_finite(chunk, name)
            yield _flat(chunk.astype(np.float32) * np.float32(2.0**power) if power else chunk, dtype, name)


def _require_finite(array: np.ndarray, name: str) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        total = array.sum(dtype=np.float32)  # one pass; not finite if any element is not
    if np.isfinite(total) or np.isfinite(array.astype(np.float32)).all():
        return
    raise CheckpointError(
        f"tensor {name} of the checkpoint has values that are NaN or infinite",
        "the file is damaged, or training diverged; `llmc check CHECKPOINT --full` lists such tensors",
    )


def _is_converted(value: ir.Value, ref: TensorRef) -> bool:
    """Return whether the array that was made is stored with other values or in another dtype."""
    record = parameter(value)
    assert record is not None, f"{value.name} was made and has no Parameter"
    if record.exponent or record.packed:
        return True
    return SAFETENSORS.get(_dtype(value), ref.dtype) != ref.dtype


def _made_chunks(value: ir.Value, ref: TensorRef) -> Iterator[np.ndarray]:
    record = parameter(value)
    assert record is not None
    for chunk in ref.iter_chunks():
        if not _is_converted(value, ref):
            yield chunk
            continue
        codes = unpack(chunk, record.packed) if record.packed else chunk
        values = decode(codes, record.packed) * np.float32(2.0**record.exponent)
        yield _flat(values, _dtype(value).numpy(), str(value.name))


def _flat(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # reported below with the tensor's name
        converted = array.astype(dtype, copy=False)
    if dtype == np.float16 and array.dtype != dtype and np.isinf(converted).any():
        raise BuildError(f"tensor {name} has values that fp16 cannot hold", "build with --dtype bf16")
    return np.ascontiguousarray(converted).reshape(-1)
