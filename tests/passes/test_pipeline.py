"""The lists of passes on a whole layer: the runner's checks, second runs, and dumps."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from llmc.compiler.quantize.make_plan import plan_weights
from llmc.compiler.targets.native.lower import lower
from llmc.passes import contract, pipeline, spec
from llmc.passes.contract import Pass
from llmc.passes.legalize.drop_activation_quantization import rounded_to
from llmc.passes.legalize.keep_16bit_weights import Narrow, NarrowPlan
from llmc.passes.legalize.tensorrt_boundary import to_tensorrt
from llmc.passes.parameter import META, parameter, parameters
from llmc.passes.spec import Stage
from llmc.plugins.paged_attention.spec import QUANTIZED_CACHES, QuantizedCache
from llmc.runtime.errors import BuildError, UnsupportedError
from support.traced_text import TRACED, traced

NARROW = NarrowPlan({"wo.weight": Narrow("fp16", 3)})
FORMATS = ("int8-smoothquant", "fp8", "int8")


def quantized(fmt: str | None, cache: QuantizedCache | None = None) -> ir.Model:
    model = traced()
    contract.run(model, pipeline.canonicalize())
    plan = plan_weights(model, fmt, (), (), 16) if fmt else None
    contract.run(model, pipeline.quantize(plan, cache))
    assert spec.check(model, Stage.QUANTIZED) == []
    return model


def check(model: ir.Model, passes: list[Pass], stage: Stage, matches: dict[str, int]) -> None:
    """Runs `passes`, then each once more."""
    found = {report.name: report.matches for report in contract.run(model, passes)}
    assert spec.check(model, stage) == []
    assert matches.items() <= found.items()
    once = contract.as_text(model)
    assert [one(model).count for one in passes] == [0] * len(passes)
    assert contract.as_text(model) == once


@pytest.mark.parametrize("fmt", [None, *FORMATS])
def test_graphs_for_the_native_engine_can_be_lowered(fmt: str | None) -> None:
    model = quantized(fmt)
    check(model, pipeline.legalize_native(NarrowPlan()), Stage.FOR_NATIVE, {})
    program = lower(model).program
    rounds = {instruction.function for instruction in program.instructions if instruction.op == "round"}
    assert len(rounds) == len(rounded_to(model))


def test_graphs_for_openvino_and_their_exact_halves() -> None:
    plain, model = quantized(None), quantized("int8-smoothquant")
    check(plain, pipeline.legalize_openvino(NARROW), Stage.FOR_OPENVINO, {"keep-16bit-weights": 1})
    check(model, pipeline.legalize_openvino(NarrowPlan()), Stage.FOR_OPENVINO, {"attach-bodies": 1})
    check(
        model.clone(), pipeline.exact_activations(), Stage.FOR_OPENVINO, {"drop-activation-quantization": 3}
    )


@pytest.mark.parametrize("fmt", FORMATS)
def test_graphs_for_onnxruntime(fmt: str) -> None:
    widened = 3 if fmt == "int8-smoothquant" else 0
    check(
        quantized(fmt),
        pipeline.legalize_onnxruntime(),
        Stage.FOR_ONNXRUNTIME,
        {"widen-int8-weights": widened, "attach-bodies": 1},
    )


@pytest.mark.parametrize("cache", [None, *QUANTIZED_CACHES.values()])
@pytest.mark.parametrize("fmt", [None, *FORMATS])
def test_graphs_for_tensorrt_and_their_stand_ins(fmt: str | None, cache: QuantizedCache | None) -> None:
    model = quantized(fmt, cache)
    check(model, pipeline.legalize_tensorrt("fp32"), Stage.FOR_TENSORRT, {})
    assert not to_tensorrt(model).functions
    stand_in = model.clone()
    check(
        stand_in,
        pipeline.oracle("fp32", True),
        Stage.ORACLE,
        {"widen-quantized-caches": int(cache is not None)},
    )


def test_fp8_activations_are_not_for_openvino() -> None:
    with pytest.raises(BuildError, match=r"not for-openvino: .* quantizes its activations to FLOAT8E4M3FN"):
        contract.run(quantized("fp8"), pipeline.legalize_openvino(NarrowPlan()))


def test_a_quantized_cache_is_not_for_onnxruntime() -> None:
    with pytest.raises(BuildError, match="has a quantized cache"):
        contract.run(quantized(None, QUANTIZED_CACHES["fp8"]), pipeline.legalize_onnxruntime())


def test_lists_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(BuildError, match="requires a quantized graph"):
        contract.run(traced(), pipeline.legalize_onnxruntime())


def test_an_initializer_without_data_or_parameter_is_refused() -> None:
    model = traced()
    del model.graph.initializers["wq"].meta[META]
    with pytest.raises(UnsupportedError, match="initializer wq has neither data nor a Parameter"):
        contract.run(model, pipeline.canonicalize())


def test_a_clone_keeps_its_parameters() -> None:
    model = quantized("int8")
    assert [record for _, record in parameters(model.clone())] == [r for _, r in parameters(model)]
    codes = parameter(model.graph.initializers["wq.weight|wk.weight|wv.weight"])
    assert codes is not None
    assert (codes.modules, codes.rows, codes.sources) == (("wq", "wk", "wv"), (8, 4, 4), ())


@pytest.mark.parametrize("from_environment", [False, True])
def test_dumps_are_numbered_texts(
    from_environment: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if from_environment:
        monkeypatch.setenv("LLMC_DUMP", str(tmp_path))
    model = traced(TRACED)
    passes = pipeline.canonicalize()
    contract.run(model, passes, dump=None if from_environment else tmp_path)
    contract.run(model, pipeline.legalize_onnxruntime(), dump=None if from_environment else tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names[:4] == [
        "01-number-tokens.txt",
        "02-gather-rows.txt",
        "03-fuse-partial-rope.txt",
        "04-fold-expands.txt",
    ]
    assert names[-1] == "20-finalize.txt"
    assert "PagedAttention" not in (tmp_path / names[5]).read_text()
    assert "PagedAttention" in (tmp_path / names[6]).read_text()
