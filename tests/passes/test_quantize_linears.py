"""Quantized layers in a graph, run by ONNX Runtime, against numpy: dequantize, then multiply.

The same forms in fp32, as the CPU gets them, and in 16 bits, as TensorRT gets them and the oracle runs them.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from llmc.compiler.checkpoint.safetensors import TensorRef, read_header
from llmc.compiler.quantize import produce
from llmc.compiler.quantize.make_plan import plan_weights
from llmc.compiler.quantize.round_to_nearest import dequantize
from llmc.compiler.weights.safetensors_writer import write_safetensors
from llmc.passes.canonicalize.fuse_linears import FuseLinears
from llmc.passes.legalize.unpack_fp4_weights import UnpackFP4Weights
from llmc.passes.parameter import of_tensor, set_parameter
from llmc.passes.quantize import qdq, survey
from llmc.passes.quantize.formats import FORMATS, Format
from llmc.passes.quantize.matrix import QuantizedMatrix
from llmc.plugins.round_fp4 import body as round_fp4
from llmc.runtime.dtypes import numpy_dtype
from support.linears import COLUMNS, NUMPY, ROWS, TOLERANCE, two_linears
from support.passes import oracle_graph, quantize

SCALES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
AMAX = 3.5  # what calibration is supposed to have seen; some inputs are beyond


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TensorRef]:
    file = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    rng = np.random.default_rng(0)
    data = {f"{name}.weight": rng.standard_normal((rows, COLUMNS), np.float32) for name, rows in ROWS.items()}
    data["b.weight"] *= 0.1
    write_safetensors(file, [(n, "F32", a.shape) for n, a in data.items()], lambda name: [data[name].data])
    return read_header(file)


def quantized(
    dtype: str, fmt: str, checkpoint: dict[str, TensorRef], directory: Path
) -> tuple[ir.Model, QuantizedMatrix, produce.Produced]:
    model = two_linears(dtype)
    FuseLinears()(model)
    plan = plan_weights(model, fmt, (), (), 16, qdq.SCALES_OF.get(dtype))
    quantize(model, plan)
    (matrix,) = plan.matrices()
    made = produce.produce([matrix], checkpoint, directory)
    if matrix.format.activations:
        scale = produce.input_scale(matrix, AMAX, SCALES[dtype])
        arrays = {}
        if matrix.format.smoothed:
            arrays["pre_quant_scale"] = np.linspace(0.3, 1.8, COLUMNS, dtype=np.float32)
            scale = scale.astype(np.float32)
        produce.keep(made, matrix, arrays | {"input_scale": scale}, directory / "input.safetensors")
    for name, ref in made.tensors.items():
        value = model.graph.initializers[name]
        assert value.dtype is not None
        value.const_value = ir.ExternalTensor(
            ref.file.name,
            ref.offset,
            ref.nbytes,
            value.dtype,
            shape=value.shape,
            name=name,
            base_dir=directory,
        )
    return model, matrix, made


def reference(
    x: np.ndarray, fmt: Format, made: produce.Produced, dtype: str, matrix: QuantizedMatrix
) -> np.ndarray:
    """Each step as its definition has it, in float64 where the definition does not round."""
    arrays = {array: made.tensors[matrix.initializer(array)].read() for array in fmt.layout(matrix.shape)}
    weight = dequantize(arrays, fmt).astype(NUMPY[dtype]).astype(np.float64)
    wide = x.astype(np.float32)
    if fmt.smoothed:
        factor = made.tensors["a.pre_quant_scale|b.pre_quant_scale"].read()
        wide = wide * factor
    if fmt.activations == "int8":
        scale = made.tensors[matrix.initializer("input_scale")].read().astype(np.float32)
        codes = np.clip(np.rint(wide / scale), -128, 127)
        wide = (codes * scale).astype(NUMPY[dtype]).astype(np.float32)
    elif fmt.activations == "e4m3":
        scale = made.tensors[matrix.initializer("input_scale")].read().astype(np.float32)
        codes = np.clip(wide / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        wide = (codes.astype(np.float32) * scale).astype(NUMPY[dtype]).astype(np.float32)
    elif fmt.activations == "e2m1":
        over = made.tensors[matrix.initializer("input_scale")].read()
        blocks = wide.reshape(len(x), -1, 16)
        short = np.clip(np.abs(blocks).max(-1, keepdims=True) / np.float32(6) / over, 0, 448)
        scale = short.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * over
        codes = np.clip(blocks / np.where(scale == 0, 1, scale), -6, 6).astype(ml_dtypes.float4_e2m1fn)
        wide = (codes.astype(np.float32) * scale).reshape(x.shape).astype(NUMPY[dtype]).astype(np.float32)
    return wide.astype(np.float64) @ weight.T


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_fused_pair_of_layers_multiplies_with_its_codes(
    fmt: str, dtype: str, checkpoint: dict[str, TensorRef], tmp_path: Path
) -> None:
    model, matrix, made = quantized(dtype, fmt, checkpoint, tmp_path)
    if dtype == "fp32":
        UnpackFP4Weights()(model)
        function = round_fp4.function()
        model.functions[function.identifier()] = function
    else:
        model = oracle_graph(model, dtype)
    ir.save(model, tmp_path / "m.onnx")
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    x = (np.random.default_rng(1).standard_normal((7, COLUMNS)) * 1.3).astype(NUMPY[dtype])
    x[0, :32] = 0  # blocks of nothing
    x[1] *= 1e-6  # blocks whose scale rounds to 0
    got = np.concatenate(session.run(None, {"x": x.astype(np.float32)}), axis=1)
    expected = reference(x, matrix.format, made, dtype, matrix)
    assert np.abs(got - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("fmt", FORMATS)
def test_layers_multiplied_as_one_share_a_global_scale(
    fmt: str, checkpoint: dict[str, TensorRef], tmp_path: Path
) -> None:
    _, matrix, made = quantized("fp32", fmt, checkpoint, tmp_path)
    name = matrix.initializer("weight_scale_2" if fmt.startswith("nvfp4") else "weight_scale")
    largest = max(float(np.abs(ref.read()).max()) for ref in checkpoint.values())
    limit = {"e2m1": 6 * 448, "e4m3": 448}.get(matrix.format.element, 0)
    scale = made.tensors[name].read()
    assert (scale.shape == ()) == matrix.format.has_global_scale
    if matrix.format.has_global_scale:
        assert scale == pytest.approx(largest / limit, rel=1e-6)


def test_codes_are_those_of_the_matrix_quantized_whole(
    checkpoint: dict[str, TensorRef], tmp_path: Path
) -> None:
    _, matrix, made = quantized("fp32", "int8", checkpoint, tmp_path)
    whole = np.concatenate([ref.read() for ref in checkpoint.values()])
    codes = made.tensors[matrix.initializer("weight")].read()
    scale = made.tensors[matrix.initializer("weight_scale")].read()
    assert np.array_equal(scale, (np.abs(whole).max(1) / np.float32(127)).astype(numpy_dtype("F32")))
    assert np.array_equal(codes, np.rint(whole / scale[:, None]).astype(np.int8))


def test_a_matrix_that_is_stored_by_columns_is_left_alone() -> None:
    """GPT-2 stores its matrices as [in, out]; scales of rows would be scales of inputs."""
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[T,64] x) => (float[T,192] y)'
        " <float[64,192] w> { y = Gemm <transB = 0> (x, w) }"
    )
    node = next(iter(model.graph))
    assert node.inputs[1] is not None
    set_parameter(node.inputs[1], of_tensor("attn.c_attn.weight", (64, 192)))
    assert survey.linear(node) is None
    node.attributes["transB"] = ir.AttrInt64("transB", 1)
    assert survey.linear(node) is not None
