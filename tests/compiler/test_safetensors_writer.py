"""The writer of safetensors files, compared with the safetensors library; its files are repeatable."""

import hashlib
import json
import math
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint.safetensors import read_header
from llmc.compiler.weights.safetensors_writer import ALIGNMENT, write_safetensors
from llmc.compiler.weights.write import WEIGHTS_FILE, write_weights
from llmc.passes.parameter import Parameter, of_tensor, set_parameter
from llmc.runtime.dtypes import DTYPES
from llmc.runtime.errors import BuildError, CheckpointError

NUMPY = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8, "BOOL": np.bool_}


def tensors_of(shapes, seed=0):
    random = np.random.default_rng(seed)
    return {
        name: (dtype, (random.integers(0, 2, shape) if dtype == "BOOL" else random.random(shape) * 99))
        for name, (dtype, shape) in shapes.items()
    }


def write(path, tensors):
    """Write {name: (dtype, array)} and return the result of the writer."""
    arrays = {name: np.asarray(value, NUMPY[dtype]) for name, (dtype, value) in tensors.items()}
    entries = [(name, tensors[name][0], array.shape) for name, array in arrays.items()]
    return arrays, write_safetensors(path, entries, lambda name: [np.atleast_1d(arrays[name])])


MIXED = {
    "matrix": ("F32", (16, 8)),
    "scalar": ("F32", ()),
    "half": ("F16", (3, 5)),
    "empty": ("F32", (0, 4)),
    "mask": ("BOOL", (7,)),
    "ids": ("I64", (5,)),
}


def test_library_reads_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    arrays, (sha256, nbytes, spans) = write(path, tensors_of(MIXED))
    data = path.read_bytes()
    assert (sha256, nbytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert list(spans) == list(MIXED)
    loaded = load_file(path)
    assert {name for name in loaded if not name.startswith("__pad_")} == set(MIXED)
    for name, array in arrays.items():
        offset, size = spans[name]
        assert offset % ALIGNMENT == 0
        assert data[offset : offset + size] == array.tobytes()
        np.testing.assert_array_equal(loaded[name], array)


def test_aligned_sizes_need_no_padding(tmp_path):
    path = tmp_path / "model.safetensors"
    write(path, tensors_of({"b": ("F32", (16, 2)), "a": ("F16", (64,)), "last": ("U8", (3,))}))
    with safe_open(path, "np") as file:
        assert set(file.keys()) == {"a", "b", "last"}


def test_two_writes_are_identical(tmp_path):
    hashes = {write(tmp_path / f"{i}.safetensors", tensors_of(MIXED))[1][0] for i in range(2)}
    assert len(hashes) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_library_knows_every_dtype(tmp_path, dtype):
    path, shape = tmp_path / "model.safetensors", (4, 8)
    nbytes = math.prod(shape) * DTYPES[dtype].bits // 8
    write_safetensors(path, [("x", dtype, shape)], lambda name: [bytes(nbytes)])
    with safe_open(path, "np") as file:
        assert file.get_slice("x").get_dtype() == dtype
        assert file.get_slice("x").get_shape() == list(shape)


def test_bf16_is_written_through_a_view(tmp_path):
    path, value = tmp_path / "model.safetensors", np.arange(32, dtype=ml_dtypes.bfloat16)
    _, _, spans = write_safetensors(path, [("x", "BF16", value.shape)], lambda name: [value.view(np.uint8)])
    offset, size = spans["x"]
    assert path.read_bytes()[offset : offset + size] == value.tobytes()


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(NUMPY)), st.lists(st.integers(0, 9), max_size=3)), max_size=8)
)
def test_any_shapes_are_aligned_and_read_back(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("w") / "model.safetensors"
    named = {f"layer.{i}": (dtype, tuple(shape)) for i, (dtype, shape) in enumerate(shapes)}
    arrays, (_, nbytes, spans) = write(path, tensors_of(named))
    assert nbytes == path.stat().st_size
    assert all(offset % ALIGNMENT == 0 for offset, _ in spans.values())
    loaded = load_file(path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)


def test_memory_is_bounded(tmp_path):
    piece, count = bytes(2**20), 96
    tracemalloc.start()
    try:
        write_safetensors(
            tmp_path / "w", [("x", "U8", (count, 2**20))], lambda name: (piece for _ in range(count))
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize(
    ("entries", "buffers", "expected"),
    [
        ([("x", "F32", (2,))], [b"1234"], "tensor 'x': its producer yielded 4 of 8 bytes"),
        ([("x", "F32", (2,))], [b"1234567", b"89"], "tensor 'x': its producer yielded more than 8 bytes"),
        ([("x", "U8", (1,))] * 2, [b"1"], "tensor 'x': the name is used twice"),
        ([("__pad_0", "U8", (1,))], [b"1"], "tensor '__pad_0': the name is reserved"),
        ([("__metadata__", "U8", (1,))], [b"1"], "tensor '__metadata__': the name is reserved"),
        ([("x", "FP32", (1,))], [b"1"], "tensor 'x': dtype 'FP32' is none of"),
        ([("x", "U8", (-1,))], [b"1"], "tensor 'x': negative size in shape [-1]"),
        ([("x", "F4", (3,))], [b"1"], "tensor 'x': F4 [3] does not fill whole bytes"),
    ],
)
def test_invalid_entries_are_refused(tmp_path, entries, buffers, expected):
    with pytest.raises(BuildError) as caught:
        write_safetensors(tmp_path / "model.safetensors", entries, lambda name: buffers)
    assert expected in caught.value.message


def test_header_over_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("llmc.compiler.weights.safetensors_writer.MAX_HEADER_BYTES", 100)
    with pytest.raises(BuildError) as caught:
        write_safetensors(tmp_path / "w", [(f"{i}", "U8", (64,)) for i in range(9)], lambda name: [bytes(64)])
    assert "spread the tensors" in caught.value.hint


def test_failed_write_raises_oserror(tmp_path):
    """A limit on the file size of a child process stops the write in the middle of a buffer."""
    code = (
        "import sys; from pathlib import Path\n"
        "from llmc.compiler.weights.safetensors_writer import write_safetensors\n"
        "write_safetensors(Path(sys.argv[1]), [('x', 'U8', (100_000,))], lambda name: [bytes(100_000)])"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "w"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        capture_output=True,
        text=True,
    )
    assert "OSError: [Errno 27] File too large" in child.stderr
    assert (tmp_path / "w").stat().st_size == 50_000


def test_no_padding_and_metadata(tmp_path):
    """transformers expects the weights alone, and their format in the header."""
    data = {"a": b"abc", "b": b"defgh"}
    entries = [(name, "U8", [len(value)]) for name, value in data.items()]
    file = tmp_path / "model.safetensors"
    _, size, spans = write_safetensors(
        file, entries, lambda name: [data[name]], alignment=1, metadata={"format": "pt"}
    )
    written = file.read_bytes()
    length = int.from_bytes(written[:8], "little")
    assert length % 8 == 0
    assert json.loads(written[8 : 8 + length]) == {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "U8", "shape": [5], "data_offsets": [3, 8]},
    }
    assert written[8 + length :] == b"abcdefgh"
    assert (size, spans) == (len(written), {"a": (8 + length, 3), "b": (11 + length, 5)})


def test_made_arrays_are_converted_as_their_parameter_says(tmp_path: Path) -> None:
    """E2M1 codes become int8 of twice their value, and E8M0 scales fp32 of half theirs."""
    codes = np.arange(16, dtype=np.uint8).reshape(1, 16)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    scales = np.array([[0.25, 8.0]], ml_dtypes.float8_e8m0fnu)
    file = tmp_path / "made.safetensors"
    entries = [("w", "U8", packed.shape), ("s", "F8_E8M0", scales.shape)]
    arrays = {"w": packed, "s": scales.view(np.uint8)}
    write_safetensors(file, entries, lambda name: [arrays[name].reshape(-1).data])
    weight, scale = (
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        for name, shape, dtype in (("w", (1, 16), ir.DataType.INT8), ("s", (1, 2), ir.DataType.FLOAT))
    )
    set_parameter(weight, Parameter(("w",), (1,), (), exponent=1, packed="e2m1"))
    set_parameter(scale, Parameter(("w",), (1,), (), "weight_scale", exponent=-1))
    graph = ir.Graph([], [], nodes=[], initializers=[], name="g")
    for value in (weight, scale):
        graph.initializers.add(value)
    with BundleWriter(tmp_path / "x.llmc") as work:
        write_weights(ir.Model(graph, ir_version=10), {}, work, made=read_header(file))
        written = {name: ref.read() for name, ref in read_header(work.path(WEIGHTS_FILE)).items()}
    assert written["w"].dtype == np.int8
    assert np.array_equal(written["w"] * 0.5, codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    assert np.array_equal(written["s"], np.array([[0.125, 4.0]], np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    weight = ir.Value(name="a.weight", shape=ir.Shape((2, 300)), type=ir.TensorType(ir.DataType.FLOAT))
    set_parameter(weight, of_tensor("a.weight", (2, 300)))
    graph = ir.Graph([], [], nodes=[], initializers=[], name="g")
    graph.initializers.add(weight)
    array = np.full((2, 300), 1e37, np.float32)  # their sum overflows, which is no fault
    save_file({"a.weight": array}, tmp_path / "finite.safetensors")
    array[1, 299] = value
    save_file({"a.weight": array}, tmp_path / "other.safetensors")
    with BundleWriter(tmp_path / "x.llmc") as work:
        write_weights(ir.Model(graph, ir_version=10), read_header(tmp_path / "finite.safetensors"), work)
    fact = r"a\.weight of the checkpoint has values that are NaN or infinite"
    with BundleWriter(tmp_path / "y.llmc") as work, pytest.raises(CheckpointError, match=fact) as caught:
        write_weights(ir.Model(graph, ir_version=10), read_header(tmp_path / "other.safetensors"), work)
    assert "llmc check" in caught.value.hint
