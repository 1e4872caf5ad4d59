"""SmoothQuant: the factors by the paper's formula, the best strength, and folding them into the weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler.calibrate.run_layers import LayerInputs
from llmc.compiler.calibrate.statistics import LayerStatistics, measure
from llmc.compiler.calibrate.table import Source
from llmc.compiler.checkpoint.safetensors import TensorRef, read_header
from llmc.compiler.progress import Silent
from llmc.compiler.quantize import smoothquant
from llmc.compiler.quantize.make_plan import plan_weights
from llmc.compiler.quantize.produce import Produced
from llmc.compiler.quantize.produce_calibrated import produce_calibrated
from llmc.compiler.quantize.round_to_nearest import dequantize
from llmc.compiler.quantize.smoothquant import STRENGTHS, pre_quant_scale, smooth
from llmc.compiler.targets.tensorrt import build
from llmc.compiler.targets.tensorrt.target import RTX
from llmc.compiler.weights.safetensors_writer import write_safetensors
from llmc.passes.quantize import qdq
from llmc.passes.quantize.formats import get_format
from llmc.passes.quantize.matrix import QuantizedMatrix
from llmc.runtime.dtypes import numpy_dtype
from llmc.runtime.errors import UnsupportedError
from support.passes import mark_parameters
from support.passes import quantize as quantize_graph
from support.traces import canonical

FORM = get_format("int8-smoothquant")
MATRIX = QuantizedMatrix(("l.0.a", "l.0.b"), (24, 8), 96, FORM)
SOURCE = Source("0" * 64, 300, "0" * 64)


def inputs(outlier: float = 60) -> np.ndarray:
    """Draw [tokens, in] with a channel of large values, one of zeros, and one with a single large value."""
    x = np.random.default_rng(3).standard_normal((300, 96)).astype(np.float32)
    x[:, 5] *= outlier
    x[:, 9] = 0
    x[17, 30] = -outlier
    return x


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    a, b = (rng.standard_normal((rows, 96)).astype(np.float32) for rows in MATRIX.rows)
    b *= np.float32(0.2)
    a[:, 40] = b[:, 40] = 0
    return {"l.0.a.weight": a, "l.0.b.weight": b}


@pytest.fixture(scope="module")
def tensors(weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> dict[str, TensorRef]:
    file = tmp_path_factory.mktemp("checkpoint") / "w.safetensors"
    entries = [(name, "F32", array.shape) for name, array in weights.items()]
    write_safetensors(file, entries, lambda name: [weights[name].data])
    return read_header(file)


@pytest.mark.parametrize("a", [0.0, 0.5, 0.85, 1.0])
def test_factors_follow_the_paper(a: float, weights: dict[str, np.ndarray]) -> None:
    x, w = inputs(), np.concatenate(list(weights.values()))
    found = pre_quant_scale(np.abs(x).max(0), np.abs(w).max(0), a)
    assert found.dtype == np.float32
    for j in range(96):
        largest, of_weight = float(np.abs(x[:, j]).max()), float(np.abs(w[:, j]).max())
        s = 1.0 if 0 in (largest, of_weight) else largest**a / of_weight ** (1 - a)
        assert float(found[j]) == pytest.approx(1 / s, rel=1e-6)


def test_factors_have_bounds() -> None:
    largest = np.array([1e30, 1e-30, 1], np.float32)
    found = pre_quant_scale(largest, np.ones(3, np.float32), 1.0)
    assert found.tolist() == [2.0**-12, 2.0**12, 1]


def error_of(x: np.ndarray, weights: dict[str, np.ndarray], a: float | None) -> float:
    """Compute the error of the product in int8 by its definition. a: the strength; None: no smoothing."""
    w = np.concatenate(list(weights.values())).astype(np.float64)
    wide = x.astype(np.float64)
    s = np.ones(x.shape[1])
    if a is not None:
        used = np.abs(x).any(0) & w.any(0)
        s[used] = np.abs(wide).max(0)[used] ** a / np.abs(w).max(0)[used] ** (1 - a)
    step, steps = np.abs(wide / s).max() / 127, np.abs(w * s).max(1, keepdims=True) / 127
    product = (np.round(wide / s / step) * step) @ (np.round(w * s / steps) * steps).T
    return float(np.square(product - wide @ w.T).sum())


def test_strength_has_the_least_error(weights: dict[str, np.ndarray], tensors: dict[str, TensorRef]) -> None:
    chosen = set()
    for outlier in (1, 60, 1000):
        x = inputs(outlier)
        errors = {a: error_of(x, weights, a) for a in STRENGTHS}
        found = smooth(MATRIX, tensors, x, "max")
        columns = np.abs(np.concatenate(list(weights.values()))).max(0)
        own = {a: pre_quant_scale(np.abs(x).max(0), columns, a) for a in STRENGTHS}
        (a,) = [a for a in STRENGTHS if np.array_equal(own[a], found.pre_quant_scale)]
        assert errors[a] <= 1.01 * min(errors.values())
        chosen.add(a)
        if outlier > 1:
            assert errors[a] < 0.4 * error_of(x, weights, None)
        largest = np.abs(x * found.pre_quant_scale).max()
        assert float(found.input_scale) == pytest.approx(largest / 127, rel=1e-6)
    assert len(chosen) > 1  # there is something to choose


def test_percentile_range_is_smaller(tensors: dict[str, TensorRef]) -> None:
    x = inputs()
    x[0] *= 50
    found = smooth(MATRIX, tensors, x, "percentile")
    magnitudes = np.abs(x * found.pre_quant_scale)
    quantile = np.quantile(magnitudes, 0.9999, method="inverted_cdf")
    assert float(found.input_scale) * 127 == pytest.approx(quantile, rel=2**-11)
    assert float(found.input_scale) * 127 < 0.5 * magnitudes.max()


def statistics(found: LayerInputs) -> Iterator[LayerStatistics]:
    """The statistics of a layer whose matrices are all smoothed."""
    return measure([found], with_moments=lambda group: False, with_inputs=lambda group: True)


def produce(
    tensors: dict[str, TensorRef],
    x: np.ndarray,
    directory: Path,
    matrix: QuantizedMatrix = MATRIX,
    most_columns: int = 96,
) -> Produced:
    found = LayerInputs(0, {MATRIX.modules: x}, keys=x[:, :8], values=x[:, :8])
    return produce_calibrated([matrix], tensors, statistics(found), SOURCE, directory, "max", most_columns)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("scales", ["F32", "BF16", "F16"])
def test_stored_factors_are_folded_into_the_weights(
    wide: bool,
    scales: str,
    weights: dict[str, np.ndarray],
    tensors: dict[str, TensorRef],
    tmp_path: Path,
) -> None:
    """wide: a matrix with too many columns for GPTQ, which is rounded to nearest."""
    matrix = QuantizedMatrix(MATRIX.modules, MATRIX.rows, 96, FORM.with_scales(scales))
    made = produce(tensors, inputs(), tmp_path, matrix, most_columns=95 if wide else 96)
    arrays = {name: made.tensors[matrix.initializer(name)].read() for name in ("weight", "weight_scale")}
    factor = made.tensors["l.0.a.pre_quant_scale|l.0.b.pre_quant_scale"]
    scale = made.tensors["l.0.a.input_scale|l.0.b.input_scale"]
    assert factor.dtype == scale.dtype == "F32"
    narrow = scale.read().astype(numpy_dtype(scales))  # TensorRT multiplies codes by it in 16 bits
    assert narrow == scale.read()
    smoothed = dequantize(arrays, matrix.format)
    exact = np.concatenate(list(weights.values())) / factor.read()
    step = arrays["weight_scale"].astype(np.float32)[:, None]
    away = np.abs(smoothed - exact) / step
    assert away.max() <= (0.51 if wide else 5)
    assert np.sqrt(np.square(away).mean()) < (0.3 if wide else 0.6)
    assert set(made.errors) == (set() if wide else set(MATRIX.modules))
    # The table stays that of inputs as they are.
    assert made.table
    assert made.table.amax("l.0.a", "max") == pytest.approx(np.abs(inputs()).max(), rel=1e-5)


def test_all_zeros(tensors: dict[str, TensorRef]) -> None:
    found = smooth(MATRIX, tensors, np.zeros((40, 96), np.float32), "max")
    assert found.input_scale == 1
    assert (found.pre_quant_scale == 1).all()


def test_layer_without_measured_inputs_is_refused(tensors: dict[str, TensorRef], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"l\.0\.a is in no decoder layer") as caught:
        produce_calibrated([MATRIX], tensors, [], SOURCE, tmp_path, "max")
    assert "--exclude l.0.a" in caught.value.hint


@pytest.mark.slow
def test_smoothing_halves_the_error_of_a_trained_model(
    tensors: dict[str, TensorRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs of down_proj of model_zoo/llama/tales are the hardest; compared with a strength of 0.5."""
    from llmc.compiler.calibrate.run_layers import layers
    from llmc.compiler.calibrate.source import default_text
    from llmc.compiler.texts import calibration_windows
    from llmc.passes.quantize.fake_quantize import round_int8

    tales = Path(__file__).parents[2] / "model_zoo/llama/tales"
    model, own = canonical(tales)

    def error(x: np.ndarray, matrix: QuantizedMatrix) -> float:
        found = smooth(matrix, own, x, "max")
        rounded = round_int8(x * found.pre_quant_scale, float(found.input_scale)) / found.pre_quant_scale
        w = own[matrix.weights[0]].read().astype(np.float32)
        return float(np.linalg.norm((rounded - x) @ w.T) / np.linalg.norm(x @ w.T))

    ids = calibration_windows(default_text(), tales / "tokenizer.json", 4096, 1024)
    for layer in layers(model, own, ids):
        name = f"model.layers.{layer.layer}.mlp.down_proj"
        matrix = QuantizedMatrix((name,), (256,), 704, FORM)
        searched = error(layer.inputs[(name,)], matrix)
        with monkeypatch.context() as patch:
            patch.setattr(smoothquant, "STRENGTHS", (0.5,))
            assert searched < 0.7 * error(layer.inputs[(name,)], matrix)


@pytest.mark.slow
@pytest.mark.skipif(
    not build.is_installed("tensorrt_rtx"), reason="the package tensorrt-rtx is not installed"
)
@pytest.mark.parametrize(("dtype", "sms"), [("bf16", (80,)), ("fp16", (120,)), ("bf16", ())])
def test_tensorrt_keeps_the_codes(dtype: str, sms: tuple[int, ...], tmp_path: Path) -> None:
    """The plan of a layer has about one byte per weight; it would have two if TensorRT widened the weight."""
    rows, columns = 2048, 1024
    narrow = ir.TensorType({"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16}[dtype])
    x = ir.Value(name="x", shape=ir.Shape(["T", columns]), type=narrow)
    w = ir.Value(name="l.0.a.weight", shape=ir.Shape([rows, columns]), type=narrow)
    y = ir.Value(name="y", shape=ir.Shape(["T", rows]), type=narrow)
    gemm = ir.node("Gemm", [x, w], {"transB": 1}, outputs=[y], name="a")
    gemm.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'l.0.a', 'op']"
    graph = ir.Graph([x], [y], nodes=[gemm], name="g", opset_imports={"": 23})
    graph.initializers.add(w)
    model = mark_parameters(ir.Model(graph, ir_version=10))
    plan = plan_weights(model, FORM.name, (), (), 16, qdq.SCALES_OF[dtype])
    quantize_graph(model, plan)
    (matrix,) = plan.matrices()
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((rows, columns), np.float32)
    write_safetensors(tmp_path / "w", [("l.0.a.weight", "F32", weight.shape)], lambda name: [weight.data])
    found = LayerInputs(0, {("l.0.a",): rng.standard_normal((64, columns), np.float32)}, weight, weight)
    tensors = read_header(tmp_path / "w")
    made = produce_calibrated([matrix], tensors, statistics(found), SOURCE, tmp_path, "max")
    for name, value in graph.initializers.items():
        ref = made.tensors[name]
        assert value.dtype is not None
        place = (ref.file.name, ref.offset, ref.nbytes, value.dtype)
        value.const_value = ir.ExternalTensor(*place, shape=value.shape, name=name, base_dir=tmp_path)
    ir.save(model, tmp_path / "m.onnx")
    profile = {"x": ((1, columns), (16, columns), (64, columns))}
    job = build.EngineJob(RTX.library, str(tmp_path / "m.onnx"), str(tmp_path / "p"), profile, sms)
    built = build.build(job, Silent())
    print(dtype, sms, round(built.plan_bytes / weight.size, 3), "bytes per weight")
    assert built.plan_bytes < 1.2 * weight.size
