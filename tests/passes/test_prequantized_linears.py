"""Layers of a quantized checkpoint in a graph, run by ONNX Runtime, against numpy, step by step.

In fp32, as the CPU gets them, and in 16 bits, as TensorRT gets them and the oracle runs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.progress import Silent
from llmc.compiler.quantize.make_plan import plan_prequantized
from llmc.compiler.quantize.prequantized_arrays import produce_prequantized
from llmc.compiler.quantize.prequantized_plan import PrequantizedWeights, read_prequantized
from llmc.compiler.request import BuildRequest
from llmc.compiler.targets.tensorrt import build
from llmc.compiler.targets.tensorrt.target import RTX
from llmc.passes.canonicalize.fuse_linears import FuseLinears
from llmc.passes.legalize.tensorrt_boundary import to_tensorrt
from llmc.passes.legalize.unpack_fp4_weights import UnpackFP4Weights
from llmc.plugins.round_fp4 import body as round_fp4
from support.linears import COLUMNS, NUMPY, ROWS, TOLERANCE, two_linears
from support.passes import mark_parameters, oracle_graph, quantize
from support.quantized_layouts import LAYOUTS, Written

REFUSED = ("ct-int4-reordered", "ct-int8-asymmetric")  # test_stored_plan.py


def written(root: Path, layout: str, same: bool) -> Written:
    """A checkpoint of the layers a and b, whose scales are the same or not."""
    quantizer, settings, _ = LAYOUTS[layout]
    draw = np.random.default_rng(0)
    tensors, exact = {}, {}
    factors = draw.uniform(0.5, 2, COLUMNS)
    for name, rows in ROWS.items():
        weight = np.clip(draw.standard_normal((rows, COLUMNS)), -2, 2).astype(np.float32)
        weight[0, 0] = 2 if same or name == "a" else 2.5
        parts, exact[name] = quantizer(weight)
        if "pre_quant_scale" in parts:
            parts["pre_quant_scale"] = factors.astype(parts["pre_quant_scale"].dtype)
        tensors |= {f"{name}.{last}": value for last, value in parts.items()}
    return Written(root, tensors, exact, settings)


def read(made: Written, dtype: str) -> PrequantizedWeights:
    options: dict[str, Any] = {} if dtype == "fp32" else {"target": "tensorrt-rtx", "sms": (120,)}
    request = BuildRequest(str(made.root), Path("x.llmc"), **options)
    stored = read_prequantized(Checkpoint.open(made.write()), request, dtype)
    assert stored is not None
    return stored


def run(made: Written, dtype: str, directory: Path, x: np.ndarray) -> tuple[np.ndarray, bool]:
    """The outputs of a and b, side by side, and whether they were multiplied as one."""
    stored = read(made, dtype)
    model = two_linears(dtype)
    fused = FuseLinears(stored.fusion)(model).count == 1
    plan = plan_prequantized(model, stored, 16)
    quantize(model, plan)
    matrices = plan.matrices()
    refs: dict[str, TensorRef] = {
        **produce_prequantized(matrices, stored.modules, directory).tensors,
        **{name: ref for name, ref in Checkpoint.open(made.root).tensors.items() if "pre_quant" in name},
    }
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            ref = refs[name]
            assert value.dtype is not None
            if "pre_quant" in name:  # which `weights.write_weights` converts to what the graph says
                value.const_value = ir.tensor(ref.read().astype(value.dtype.numpy()), name=name)
                continue
            place = (ref.file.name, ref.offset, ref.nbytes, value.dtype)
            value.const_value = ir.ExternalTensor(*place, shape=value.shape, name=name, base_dir=directory)
    if dtype == "fp32":
        UnpackFP4Weights()(model)
        function = round_fp4.function()
        model.functions[function.identifier()] = function
    else:
        model = oracle_graph(model, dtype)
    ir.save(model, directory / "m.onnx")
    session = ort.InferenceSession(str(directory / "m.onnx"), providers=["CPUExecutionProvider"])
    return np.concatenate(session.run(None, {"x": x.astype(np.float32)}), axis=1), fused


def expected(made: Written, name: str, x: np.ndarray, dtype: str) -> np.ndarray:
    """One layer: each value that the graph holds in 16 bits is rounded to them, and none other."""
    narrow = NUMPY[dtype]
    tensors = {
        key.removeprefix(f"{name}."): v for key, v in made.tensors.items() if key.startswith(f"{name}.")
    }
    wide = x.astype(np.float32)
    if "pre_quant_scale" in tensors:
        wide = (wide * tensors["pre_quant_scale"].astype(np.float32)).astype(narrow).astype(np.float32)
    scale = tensors.get("input_scale")
    if "input_global_scale" in tensors:
        scale = np.float32(1 / float(tensors["input_global_scale"][0]))
    if scale is not None and tensors["weight" if "weight" in tensors else "weight_packed"].dtype != np.uint8:
        codes = np.clip(wide / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        wide = (codes.astype(np.float32) * scale).astype(narrow).astype(np.float32)
    elif scale is not None:
        blocks = wide.reshape(len(x), -1, 16)
        short = np.clip(np.abs(blocks).max(-1, keepdims=True) / np.float32(6) / scale, 0, 448)
        step = short.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
        codes = np.clip(blocks / np.where(step == 0, 1, step), -6, 6).astype(ml_dtypes.float4_e2m1fn)
        wide = (codes.astype(np.float32) * step).reshape(x.shape).astype(narrow).astype(np.float32)
    return wide.astype(np.float64) @ made.exact[name].astype(narrow).astype(np.float64).T


@pytest.mark.parametrize("same", [True, False], ids=["same scales", "different scales"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "layout", [name for name in LAYOUTS if name not in ("ct-int4-reordered", "ct-int8-asymmetric")]
)
def test_layers_multiply_with_what_the_checkpoint_stands_for(
    layout: str, dtype: str, same: bool, tmp_path: Path
) -> None:
    made = written(tmp_path / "checkpoint", layout, same)
    x = (np.random.default_rng(1).standard_normal((7, COLUMNS)) * 1.3).astype(NUMPY[dtype])
    got, fused = run(made, dtype, tmp_path, x)
    want = np.concatenate([expected(made, name, x, dtype) for name in ROWS], axis=1)
    assert fused == (same or "nvfp4" not in layout)
    assert np.abs(got - want).max() <= TOLERANCE[dtype] * np.abs(want).max()


@pytest.mark.skipif(not build.is_installed(RTX.library), reason="tensorrt-rtx is not installed")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "scales", "sm", "bytes_a_weight"),
    [
        ("modelopt-fp8", "F32", 89, 1.15),
        ("modelopt-fp8-channel", "F32", 89, 1.1),
        ("ct-fp8-dynamic", "BF16", 89, 1.1),
        ("modelopt-int8", "F32", 86, 1.1),
        ("modelopt-awq", "F32", 86, 0.75),
        ("modelopt-nvfp4", "F8_E4M3", 120, 0.8),
    ],
)
def test_tensorrt_keeps_the_codes(
    layout: str, scales: str, sm: int, bytes_a_weight: float, tmp_path: Path
) -> None:
    """The plan of one layer: were the weight widened, it would take 2 bytes a weight."""
    rows, columns = 2048, 1024
    weight = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    quantizer, settings, _ = LAYOUTS[layout]
    parts, exact = quantizer(weight)
    made = Written(tmp_path / "c", {f"a.{last}": v for last, v in parts.items()}, {"a": exact}, settings)
    stored = read(made, "bf16")
    assert stored.modules["a"].format.scales == scales
    bf16 = ir.TensorType(ir.DataType.BFLOAT16)
    x = ir.Value(name="x", shape=ir.Shape(["T", columns]), type=bf16)
    w = ir.Value(name="a.weight", shape=ir.Shape([rows, columns]), type=bf16)
    y = ir.Value(name="y", shape=ir.Shape(["T", rows]), type=bf16)
    gemm = ir.node("Gemm", [x, w], {"transB": 1}, outputs=[y], name="a")
    graph = ir.Graph([x], [y], nodes=[gemm], name="g", opset_imports={"": 23})
    graph.initializers.add(w)
    model = mark_parameters(ir.Model(graph, ir_version=10))
    plan = plan_prequantized(model, stored, 16)
    quantize(model, plan)
    matrices = plan.matrices()
    for name, ref in produce_prequantized(matrices, stored.modules, tmp_path).tensors.items():
        value = graph.initializers.get(name)
        if value is None:
            continue  # padding of the file
        assert value.dtype is not None
        place = (ref.file.name, ref.offset, ref.nbytes, value.dtype)
        value.const_value = ir.ExternalTensor(*place, shape=value.shape, name=name, base_dir=tmp_path)
    onnx.save(to_tensorrt(model), tmp_path / "m.onnx")
    profile = {"x": ((1, columns), (16, columns), (64, columns))}
    job = build.EngineJob(RTX.library, str(tmp_path / "m.onnx"), str(tmp_path / "p"), profile, (sm,))
    built = build.build(job, Silent())
    print(layout, round(built.plan_bytes / weight.size, 3), "bytes a weight")
    assert built.plan_bytes < bytes_a_weight * weight.size
