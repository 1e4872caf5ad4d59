"""The reader of headers, compared with the safetensors library and tested with damaged files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc.compiler.checkpoint.safetensors import TensorRef, read_header
from llmc.runtime.dtypes import DTYPES
from llmc.runtime.errors import CheckpointError

GOOD: dict[str, dict[str, Any]] = {
    "a": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]},
    "b.weight": {"dtype": "BF16", "shape": [2], "data_offsets": [48, 52]},
    "__metadata__": {"format": "pt"},
}
DATA = bytes(range(52))


def file_of(header: object, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write(directory: Path, content: bytes) -> Path:
    path = directory / "model.safetensors"
    path.write_bytes(content)
    return path


def changed(name: str, **fields: object) -> dict[str, object]:
    return {**GOOD, name: {**GOOD[name], **fields}}


def test_reads_files_of_the_library(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        "f32": rng.standard_normal((5, 3), dtype=np.float32),
        "f16": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "bf16": rng.standard_normal((7, 2)).astype(ml_dtypes.bfloat16),
        "i64": np.arange(6),
        "u8": np.arange(9, dtype=np.uint8).reshape(3, 3),
        "bool": np.array([True, False]),
        "scalar": np.array(3, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    refs = read_header(path)
    assert refs.keys() == tensors.keys()
    raw = path.read_bytes()
    for name, ref in refs.items():
        assert ref.shape == tensors[name].shape
        assert ref.read().dtype == tensors[name].dtype
        assert ref.read().tobytes() == tensors[name].tobytes() == raw[ref.offset :][: ref.nbytes]
        assert b"".join(chunk.tobytes() for chunk in ref.iter_chunks(8)) == tensors[name].tobytes()


def test_dtype_sizes_equal_those_of_the_library(tmp_path: Path) -> None:
    for dtype, (_, bits, numpy_dtype, _) in DTYPES.items():
        entry = {"dtype": dtype, "shape": [2, 8], "data_offsets": [0, 2 * bits]}
        content = file_of({"x": entry}, bytes(2 * bits))
        assert len(safetensors.deserialize(content)) == 1, dtype
        array = read_header(write(tmp_path, content))["x"].read()
        assert array.nbytes == 2 * bits
        assert array.shape == ((2, 8) if numpy_dtype else (2, bits))


def test_reads_rows(tmp_path: Path) -> None:
    ref = read_header(write(tmp_path, file_of(GOOD)))["a"]
    whole = ref.read()
    for rows in (slice(1, 3), slice(2, None), slice(3, 1), slice(-2, 99)):
        np.testing.assert_array_equal(ref.read(rows), whole[rows])
    assert [len(chunk) for chunk in ref.iter_chunks(25)] == [2, 2]
    assert [len(chunk) for chunk in ref.iter_chunks(1)] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="no rows"):
        ref.read(slice(0, 4, 2))


def test_truncation_after_opening_is_detected(tmp_path: Path) -> None:
    path = write(tmp_path, file_of(GOOD))
    refs = read_header(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="ends after 0 of 4 bytes"):
        refs["b.weight"].read()
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read 'a'"):
        refs["a"].read()


def test_rows_that_end_within_a_byte_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}
    ref = read_header(write(tmp_path, file_of({"x": entry}, bytes(3))))["x"]
    with pytest.raises(CheckpointError, match="do not end on a byte"):
        ref.read()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
ONE = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
TWICE = b"{" + ONE + b"," + ONE + b"}"


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", "cannot hold its header"),
        (b"\x10\0\0", "cannot hold its header"),
        (b"\xff" * 8 + b"{}", "cannot hold its header"),
        (file_of(GOOD)[:40], "cannot hold its header"),
        (LFS, "git-LFS pointer"),
        (file_of(b"\xff\xfe{}"), "not valid JSON"),
        (file_of(b"{"), "not valid JSON"),
        (file_of(b"[" * 100_000), "not valid JSON"),
        (file_of(b'{"\\ud800": 1}'), "not valid JSON"),
        (file_of([]), "not a JSON object"),
        (file_of(TWICE), "key 'a' twice"),
        (file_of({**GOOD, "__metadata__": {"a": 1}}), "map of strings"),
        (file_of({**GOOD, "c": 7}), "'c' lacks dtype"),
        (file_of({**GOOD, "c": {"dtype": "F32", "shape": []}}), "'c' lacks dtype"),
        (file_of(changed("a", dtype="F33")), "'a' has the unknown dtype 'F33'"),
        (file_of(changed("a", dtype=[])), "'a' has the unknown dtype"),
        (file_of(changed("a", shape=[4, -3])), "'a' has a malformed shape"),
        (file_of(changed("a", shape=[4, True])), "'a' has a malformed shape"),
        (file_of(changed("a", shape=[1] * 40)), "'a' has a malformed shape"),
        (file_of(changed("a", data_offsets=[0, 48, 52])), "malformed shape or data_offsets"),
        (file_of(changed("a", data_offsets=[48, 0])), "'a' ends at 0, before"),
        (file_of(changed("a", shape=[4, 4])), r"'a' has 48 bytes, F32 \[4, 4\] needs 64"),
        (file_of(changed("a", shape=[0, 2**62, 2**62], data_offsets=[0, 0])), "'a' has 0 bytes"),
        (file_of(changed("b.weight", data_offsets=[44, 48])), "'b.weight' overlaps"),
        (file_of(changed("b.weight", data_offsets=[52, 56]), DATA + b"1234"), "hole"),
        (file_of(GOOD, DATA[:-1]), "'b.weight' ends 1 bytes after the file"),
        (file_of(GOOD, DATA + b"1"), "1 bytes follow the last tensor"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, fact: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(CheckpointError, match=fact) as caught:
        read_header(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_header_limit(tmp_path: Path) -> None:
    path = write(tmp_path, (100_000_001).to_bytes(8, "little"))
    os.truncate(path, 100_000_100)
    with pytest.raises(CheckpointError, match="over the limit"):
        read_header(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_header(path)


NUMBER = st.one_of(st.integers(-2, 60), st.integers(2**31, 2**70), st.floats(), st.none(), st.booleans())
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "", "f32"]),
        "shape": st.lists(NUMBER, max_size=4),
        "data_offsets": st.lists(NUMBER, max_size=3),
        "more": NUMBER,
    },
)


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    header: dict[str, object] = dict(GOOD)
    for name in draw(st.lists(st.sampled_from([*GOOD, "c"]), max_size=2)):
        entry: Any = draw(ENTRY | NUMBER)
        keep = isinstance(entry, dict) and draw(st.booleans())
        header[name] = {**GOOD.get(name, {}), **entry} if keep else entry
    content = bytearray(file_of(header))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        piece = draw(st.binary(max_size=3) | st.sampled_from([b'"', b"{", b"]", b"0", b'"a":', b"\\ud800"]))
        content[at : at + draw(st.integers(0, 3))] = piece
    return bytes(content[: draw(st.none() | st.integers(0, len(content)))])


@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=damaged_files())
def test_damaged_files_raise_only_checkpoint_errors(tmp_path: Path, content: bytes) -> None:
    """The library too accepts every file that the reader accepts, with the same data."""
    path = write(tmp_path, content)
    try:
        refs = read_header(path)
    except CheckpointError as error:
        error.message.encode()
        return
    theirs = dict(safetensors.deserialize(content))
    assert {name: ref.shape for name, ref in refs.items()} == {
        n: tuple(t["shape"]) for n, t in theirs.items()
    }
    for ref in refs.values():
        try:
            assert ref.read().tobytes() == bytes(theirs[ref.name]["data"])
        except CheckpointError as error:
            assert "do not end on a byte" in error.message  # noqa: PT017


def test_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import llmc.compiler.checkpoint.checkpoint, llmc.compiler.checkpoint.hub, llmc.compiler.zoo, sys; "
    )
    code += "print({'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
    assert TensorRef.__dataclass_params__.frozen  # type: ignore[attr-defined]
