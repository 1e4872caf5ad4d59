"""Mixtures of experts in the native engine: routers, and experts of every element type."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from llmc.plugins.cpu import library
from llmc.plugins.experts import body, reference, spec
from llmc.runtime.batch import Batch
from llmc.runtime.errors import BundleError
from llmc.runtime.native.executor import Executor
from llmc.runtime.native.interpreter import Interpreter, gated
from llmc.runtime.native.program import View, check
from support.native_programs import VOCABULARY, Builder, Built, steps

ISAS = library.candidates()
pytestmark = pytest.mark.skipif(not ISAS, reason="the native engine does not run on this CPU")
ELEMENTS = {
    "fp32": ("fp32", 0, ""),
    "bf16": ("bf16", 0, ""),
    "fp8": ("fp8", -1, "fp32"),
    "int8": ("int8", -1, "fp32"),
    "int4": ("int4", 32, "fp16"),
    "fp4": ("fp4", 32, "fp32"),
}


def mixture(
    element: str = "fp32",
    experts: int = 6,
    choices: int = 2,
    width: int = 64,
    inner: int = 96,
    router: np.ndarray | None = None,
    function: str = "silu",
    biases: bool = False,
) -> Built:
    """Softmax, the largest choices, their weights divided by their sum, experts and a gate of one number."""
    build = Builder(width)
    build.matrix("router", experts, width, "fp32", values=router)
    y = build.emit("softmax", experts, build.emit("linear", experts, View(0, 0, width), weights=("router",)))
    y = build.emit("top_k", 2 * choices, y, k=choices)
    best, ids = View(y.buffer, 0, choices), View(y.buffer, choices, choices)
    weights = build.emit("binary", choices, best, build.emit("sum", 1, best), function="div")
    kind, block, scales = ELEMENTS[element]
    shapes = {"gate_up": (2 * experts * inner, width), "down": (experts * width, inner)}
    for name, (rows, columns) in shapes.items():
        build.matrix(name, rows, columns, kind, columns if block < 0 else block, scales)
    inputs, names = (View(0, 0, width), ids, weights), list(shapes)
    if biases:
        names += [build.vector(f"{name}_bias", rows) for name, (rows, _) in shapes.items()]
    floats = {"limit": 2.0, "alpha": 1.702} if function == "clamped_swiglu" else {}
    y = build.emit(
        "experts", width, *inputs, weights=tuple(names), function=function, experts=experts, **floats
    )
    return build.finish(build.emit("binary", width, y, View(0, 3, 1), function="mul"))


def run(
    built: Built, batches: list[Batch], threads: int = 2, digits: int = 3, isa: str | None = None
) -> list:
    executor = Executor(
        built[0], built[1], max_tokens=300, num_blocks=12, threads=threads, digits=digits, isa=isa
    )  # type: ignore[arg-type]
    results = [executor.run(batch).copy() for batch in batches]
    executor.close()
    return results


def long_step(tokens: np.ndarray) -> Batch:
    """Return one step of all tokens, with a row of logits for each."""
    parts = np.array_split(tokens, 3)
    batch = Batch.pack([(ids, 0, range(4 * n, 4 * n + 4), True) for n, ids in enumerate(parts) if len(ids)])
    return dataclasses.replace(batch, logits_index=np.arange(len(tokens), dtype=np.int32))


def check_close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=4e-6 * np.abs(want).max())


@pytest.mark.parametrize("element", ELEMENTS)
def test_experts_are_the_interpreters(element: str) -> None:
    built = mixture(element)
    interpreter = Interpreter(built[0], built[2], 12)  # type: ignore[arg-type]
    for got, batch in zip(run(built, steps()), steps(), strict=True):
        check_close(got, interpreter.forward(batch))


@pytest.mark.parametrize(
    "built",
    [
        lambda: mixture(choices=1),
        lambda: mixture(choices=6),  # all experts
        lambda: mixture(experts=1, choices=1),
        lambda: mixture(experts=40, choices=3, width=32, inner=16),  # more experts than tokens
        lambda: mixture(function="gelu"),
        lambda: mixture(biases=True),
        lambda: mixture(biases=True, function="clamped_swiglu", experts=40, choices=3, width=32, inner=16),
        lambda: mixture("int8", biases=True, function="clamped_swiglu"),
        lambda: mixture(router=np.zeros((6, 64))),  # ties
        lambda: mixture(
            choices=1, router=np.outer(np.arange(6), np.ones(64)), function="relu"
        ),  # one or the other
    ],
)
def test_any_choice_of_experts_is_the_interpreters(built: Callable[[], Built]) -> None:
    made = built()
    interpreter = Interpreter(made[0], made[2], 12)  # type: ignore[arg-type]
    for got, batch in zip(run(made, steps()), steps(), strict=True):
        check_close(got, interpreter.forward(batch))


@pytest.mark.parametrize("element", ["fp32", "bf16", "int8", "int4", "fp4", "clamped"])
def test_a_row_has_the_same_bits_alone_and_among_300(element: str) -> None:
    clamped = element == "clamped"
    built = mixture("int8", biases=True, function="clamped_swiglu") if clamped else mixture(element)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 300)
    (want,) = run(built, [long_step(tokens)], 1)
    for isa in ISAS:
        for threads in (1, 3):
            (got,) = run(built, [long_step(tokens)], threads, isa=isa)
            assert got.tobytes() == want.tobytes(), (isa, threads)
        alone = run(built, [long_step(np.array([token])) for token in range(VOCABULARY)], isa=isa)
        assert np.concatenate(alone)[tokens].tobytes() == want.tobytes(), isa


def test_more_threads_than_cores_give_the_same_bits() -> None:
    """A thread that comes late finds the order of a later layer in the memory of an earlier one."""
    build = Builder(64)
    y = View(0, 0, 64)
    for layer, (experts, inner) in enumerate(((3, 96), (12, 32), (2, 16), (12, 32))):
        router = build.matrix(f"router{layer}", experts, 64, "fp32")
        scores = build.emit("softmax", experts, build.emit("linear", experts, y, weights=(router,)))
        chosen = build.emit("top_k", 4, scores, k=2)
        matrices = (
            build.matrix(f"gate_up{layer}", 2 * experts * inner, 64, "fp32"),
            build.matrix(f"down{layer}", experts * 64, inner, "fp32"),
        )
        inputs = (y, View(chosen.buffer, 2, 2), View(chosen.buffer, 0, 2))
        y = build.emit("experts", 64, *inputs, weights=matrices, function="silu", experts=experts)
        y = build.emit("rms_norm", 64, y, weights=(build.vector(f"n{layer}", 64),), groups=1, epsilon=1e-5)
    built, batches = build.finish(y), [*steps(), *[long_step(np.arange(50))] * 40]
    assert [each.tobytes() for each in run(built, batches, 6)] == [
        each.tobytes() for each in run(built, batches, 1)
    ]


def test_the_lowest_of_equal_experts_comes_first_as_in_onnx() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, (50, 9)).astype(np.float32)  # many ties
    values, columns = reference.top_k(x, 4)
    shape = [ir.Value(name="x", shape=ir.Shape([50, 9]), type=ir.TensorType(ir.DataType.FLOAT))]
    k = ir.tensor(np.array([4], np.int64), name="k")
    kept = ir.Value(name="k", const_value=k, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    node = ir.node("TopK", [*shape, kept], num_outputs=2)
    for output, dtype in zip(node.outputs, (ir.DataType.FLOAT, ir.DataType.INT64), strict=True):
        output.type = ir.TensorType(dtype)
    graph = ir.Graph(shape, node.outputs, nodes=[node], initializers=[kept], opset_imports={"": 23}, name="g")
    session = onnxruntime.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
    got_values, got_columns = session.run(None, {"x": x})
    np.testing.assert_array_equal(values, got_values)
    np.testing.assert_array_equal(columns, got_columns)

    build = Builder(9, table=np.concatenate([x, x[: VOCABULARY - len(x)]]))
    build.emit("top_k", 8, View(0, 0, 9), k=4)
    built = build.finish(View(1, 0, 8))
    interpreter = Interpreter(built[0], built[2], 12)  # type: ignore[arg-type]
    for got, batch in zip(run(built, steps()), steps(), strict=True):
        check_close(got, interpreter.forward(batch))


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", range(len(spec.ACTIVATIONS)))
def test_the_onnx_body_is_the_reference(activation: int, biases: bool) -> None:
    experts, tokens, choices, width, inner = 5, 7, 3, 16, 24
    rng = np.random.default_rng(activation)
    arrays = {
        "x": rng.standard_normal((tokens, width)),
        "ids": rng.integers(0, experts, (tokens, choices)),  # an expert may be chosen twice
        "weights": rng.uniform(0, 1, (tokens, choices)),
        "gate_up": rng.standard_normal((experts * 2 * inner, width)),
        "down": rng.standard_normal((experts * width, inner)),
    }
    if biases:
        arrays |= {
            "gate_up_bias": rng.standard_normal((experts, 2 * inner)),
            "down_bias": rng.standard_normal((experts, width)),
        }
    feeds = {name: a if name == "ids" else a.astype(np.float32) for name, a in arrays.items()}
    types = {name: ir.DataType.INT64 if name == "ids" else ir.DataType.FLOAT for name in feeds}
    inputs = [
        ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(types[name]))
        for name, array in feeds.items()
    ]
    parameters = {"limit": 2.0, "alpha": 1.702}
    attributes = {"experts": experts, "activation": activation} | parameters
    node = ir.node(spec.NAME, inputs, attributes, domain=spec.DOMAIN)
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        inputs, node.outputs, nodes=[node], opset_imports={"": 23, spec.DOMAIN: spec.ABI_VERSION}, name="g"
    )
    model = ir.Model(graph, ir_version=10, functions=[body.function(biases)])
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    function = spec.ACTIVATIONS[activation]
    gate = gated(function, **(parameters if function == "clamped_swiglu" else {}))
    want = reference.experts(*feeds.values(), num_experts=experts, gated=gate)
    np.testing.assert_allclose(session.run(None, feeds)[0], want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"inputs": (View(0, 0, 64), View(3, 2, 2), View(3, 0, 1))}, "another number of weights"),
        ({"integers": {"experts": 3}}, "has matrices of another shape"),
        ({"weights": ("gate_up", "router")}, "has matrices of another shape"),
        ({"integers": {"experts": 0}}, "has no experts"),
        ({"weights": ("gate_up", "down", "gate_up_bias", "gate_up_bias")}, "has biases of another size"),
        ({"weights": ("gate_up", "down", "gate_up_bias")}, "has biases of another size"),
        ({"function": "clamped_swiglu"}, "has other parameters than its function"),
        ({"floats": {"limit": 7.0}}, "has other parameters than its function"),
    ],
)
def test_a_program_with_other_experts_is_refused(change: dict, complaint: str) -> None:
    program, _, _ = mixture(biases=True)
    instructions = [
        dataclasses.replace(each, **change) if each.op == "experts" else each for each in program.instructions
    ]
    with pytest.raises(BundleError, match=complaint):
        check(dataclasses.replace(program, instructions=tuple(instructions)))


def test_numbers_that_are_no_expert_stay_inside_the_arrays() -> None:
    """A hostile program may choose experts by any numbers: they count as expert 0."""
    build = Builder(64)
    inner, experts = 32, 4
    build.matrix("gate_up", 2 * experts * inner, 64, "fp32")
    build.matrix("down", experts * 64, inner, "fp32")
    wide = build.emit("scalar", 64, View(0, 0, 64), function="mul", value=1e30)
    nan = build.emit("binary", 64, wide, wide, function="sub")
    nan = build.emit("binary", 64, nan, nan, function="div")  # 0 / 0
    for ids in (View(wide.buffer, 0, 3), View(nan.buffer, 0, 3)):
        y = build.emit(
            "experts", 64, View(0, 0, 64), ids, View(0, 0, 3), weights=("gate_up", "down"), function="silu",
            experts=experts,
        )  # fmt: skip
    built = build.finish(y)
    interpreter = Interpreter(built[0], built[2], 12)  # type: ignore[arg-type]
    with np.errstate(invalid="ignore"):
        for got, batch in zip(run(built, steps()), steps(), strict=True):
            check_close(got, interpreter.forward(batch))
