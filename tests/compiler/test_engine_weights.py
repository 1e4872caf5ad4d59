"""Where a rounded weight lies: read back by rows from a file in which several follow one another."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llmc.compiler.checkpoint.safetensors import read_header
from llmc.compiler.quantize.round_to_nearest import dequantize, quantize
from llmc.compiler.verify.engine_weights import ActivationQuantization, EngineWeight
from llmc.compiler.weights.safetensors_writer import write_safetensors
from llmc.passes.quantize import elements
from llmc.passes.quantize.formats import FORMATS
from llmc.runtime.dtypes import numpy_dtype
from support.native_programs import Builder

NAMES = {numpy_dtype(name): name for name in ("I8", "U8", "F8_E4M3", "F8_E8M0", "F16", "BF16", "F32")}


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    entries = [(name, NAMES[array.dtype], array.shape) for name, array in arrays.items()]
    write_safetensors(path, entries, lambda name: [arrays[name].reshape(-1).view(np.uint8).data])


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_rows_of_one_of_three_weights(fmt: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((rows, 256)).astype(np.float32) for rows in (6, 2, 4)]
    amax = max(float(np.abs(part).max()) for part in parts)
    made = [quantize(part, FORMATS[fmt], "w", amax=amax) for part in parts]
    joined = {
        array: made[0][array] if made[0][array].ndim == 0 else np.concatenate([one[array] for one in made])
        for array in made[0]
    }
    write(tmp_path / "w.safetensors", {f"fused_{array}": data for array, data in joined.items()})
    arrays = {array: f"fused_{array}" for array in joined}
    first = 0
    for part in parts:
        stored = EngineWeight(fmt, str(tmp_path / "w.safetensors"), arrays, (first, first + len(part)))
        got = stored.read(read_header(stored.file))
        first += len(part)
        assert got.shape == part.shape
        # Not what was stored but what it stands for: within half a step of the coarsest code.
        steps = {"int8": 1 / 254, "int4": 1 / 14, "e4m3": 1 / 16, "e2m1": 1 / 6 * 1.15}
        step = 1 / 3 if fmt == "mxfp4" else steps[FORMATS[fmt].element]
        bound = np.abs(part).max(1, keepdims=True) * step * 1.01
        assert (np.abs(got - part) <= bound).all()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_scales_are_used_as_they_are_stored(dtype: str, tmp_path: Path) -> None:
    codes = np.array([[1, -2], [127, 0]], np.int8)
    scales = np.array([0.1, 0.3]).astype(numpy_dtype(dtype))
    write(tmp_path / "w.safetensors", {"c": codes, "s": scales})
    stored = EngineWeight(
        "int8", str(tmp_path / "w.safetensors"), {"weight": "c", "weight_scale": "s"}, (0, 2)
    )
    expected = codes.astype(np.float32) * scales.astype(np.float32)[:, None]
    np.testing.assert_array_equal(stored.read(read_header(stored.file)), expected)


def test_a_factor_of_the_input_is_one_of_the_weight_where_the_input_lacks_it(tmp_path: Path) -> None:
    """(x / s) (W s)^T by the definition: the weight is W again, and the input is rounded in between."""
    codes, scales = np.array([[1, -2], [127, 0]], np.int8), np.array([0.5, 0.25], np.float32)
    factor = np.array([2, 0.125], np.float32)
    file = tmp_path / "w.safetensors"
    write(file, {"c": codes, "s": scales, "f": factor})
    rounding = ActivationQuantization("int8", 0.5, (str(file), "f"))
    stored = EngineWeight("int8", str(file), {"weight": "c", "weight_scale": "s"}, (0, 2), rounding)
    np.testing.assert_array_equal(stored.read(read_header(file)), [[1, -0.125], [63.5, 0]])
    x = np.array([[3.1, -16.3], [-100, 0.1]], np.float32)
    # x times 2 and 1/8 is 6.2, -2.0375 and -200, 0.0125; in codes of 0.5: 12, -4 and -128 (saturated), 0.
    np.testing.assert_array_equal(rounding.apply(x), [[3, -16], [-32, 0]])


def test_two_of_four_bits_in_a_byte(tmp_path: Path) -> None:
    """Bytes as the formats describe them: the even column in the low nibble, two's complement or E2M1."""
    packed = np.array([[0x71, 0x8F] * 8], np.uint8)
    block = np.ones((1, 2), ml_dtypes.float8_e4m3fn)
    write(tmp_path / "w.safetensors", {"p": packed, "s": block, "one": np.asarray(np.float32(0.5))})
    arrays = {"weight": "p", "weight_scale": "s", "weight_scale_2": "one"}
    nvfp4 = EngineWeight("nvfp4", str(tmp_path / "w.safetensors"), arrays, (0, 1))
    assert nvfp4.read(read_header(nvfp4.file))[0, :4].tolist() == [0.25, 3, -3, 0]
    write(tmp_path / "i.safetensors", {"p": packed, "s": np.full((1, 1), 0.5, np.float16)})
    int4 = EngineWeight("int4", str(tmp_path / "i.safetensors"), {"weight": "p", "weight_scale": "s"}, (0, 1))
    assert int4.read(read_header(int4.file))[0, :4].tolist() == [0.5, 3.5, -0.5, -4]


@pytest.mark.parametrize(
    ("rounding", "said"),
    [
        (None, None),
        (ActivationQuantization("e4m3", 0.5), {"kind": "e4m3", "scale": 0.5}),
        (ActivationQuantization("e2m1", 0.25), {"kind": "e2m1", "global_scale": 0.25}),
        (
            ActivationQuantization("int8", 0.5, ("f", "n")),
            {"kind": "int8", "scale": 0.5, "factor": ["f", "n"]},
        ),
    ],
)
def test_it_crosses_a_pipe(rounding: ActivationQuantization | None, said: object) -> None:
    stored = EngineWeight("fp8", "f", {"weight": "a", "weight_scale": "b"}, (3, 5), rounding)
    data = json.loads(json.dumps(stored.to_json()))
    assert data == {
        "format": "fp8",
        "file": "f",
        "arrays": {"weight": "a", "weight_scale": "b"},
        "rows": [3, 5],
        "input": said,
    }
    assert EngineWeight.from_json(data) == stored


@pytest.mark.parametrize(
    ("element", "block", "scales"),
    [
        ("fp32", 0, ""),
        ("fp16", 0, ""),
        ("bf16", 0, ""),
        ("fp8", 96, "fp32"),
        ("int8", 96, "fp32"),
        ("int8", 16, "fp16"),
        ("int4", 32, "fp16"),
        ("int4", 48, "fp32"),
    ],
)
def test_rows_of_a_packed_matrix(element: str, block: int, scales: str, tmp_path: Path) -> None:
    """Compared with the codes and scales that were packed. The last tile is not full."""
    builder = Builder(96)
    builder.matrix("w", 77, 96, element, block, scales)
    tiles = builder.packed["w"].view(np.uint8)
    write_safetensors(tmp_path / "w.safetensors", [("w", "U8", tiles.shape)], lambda name: [tiles.data])
    for rows in ((0, 77), (3, 5), (30, 70), (64, 77), (76, 77)):
        stored = EngineWeight(
            "int8", str(tmp_path / "w.safetensors"), {"weight": "w"}, rows, None, builder.matrices["w"]
        )
        stored = EngineWeight.from_json(json.loads(json.dumps(stored.to_json())))
        read = stored.read(read_header(tmp_path / "w.safetensors"))
        assert read.dtype == np.float32
        np.testing.assert_allclose(read, builder.exact["w"][slice(*rows)], rtol=1e-7)


@pytest.mark.parametrize(
    ("kind", "scale"), [("int4", 1.0), ("int8", -1.0), ("e4m3", 0.0), ("e2m1", float("nan"))]
)
def test_an_input_is_rounded_to_nothing_else(kind: str, scale: float) -> None:
    with pytest.raises(ValueError, match="no quantization of activations"):
        ActivationQuantization(kind, scale)


def test_fp4_weights_that_the_file_holds_as_int8() -> None:
    """Twice each value with half the scale is the same weight."""
    rng = np.random.default_rng(0)
    fmt = FORMATS["nvfp4-weight-only"]
    arrays = quantize(rng.standard_normal((4, 32)).astype(np.float32), fmt, "w")
    values = elements.decode(elements.unpack(arrays["weight"], "e2m1"), "e2m1")
    doubled = arrays | {
        "weight": (2 * values).astype(np.int8),
        "weight_scale": arrays["weight_scale"].astype(np.float32) / 2,
    }
    assert np.array_equal(dequantize(doubled, fmt), dequantize(arrays, fmt))
