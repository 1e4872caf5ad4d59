"""llmc.HeadLinear and llmc.GroupedTopK: their bodies in ONNX against the references in numpy."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from llmc.compiler.trace import ops as ops  # registers torch.ops.llmc
from llmc.plugins.grouped_top_k import body as grouped_body
from llmc.plugins.grouped_top_k import spec as grouped_spec
from llmc.plugins.grouped_top_k.reference import grouped_top_k
from llmc.plugins.head_linear import body as head_body
from llmc.plugins.head_linear import spec as head_spec
from llmc.plugins.head_linear.reference import head_linear

HEADS = {"heads": 5, "rows": 12}


def run(
    spec: ModuleType, body: ModuleType, inputs: dict[str, np.ndarray], **attributes: int
) -> list[np.ndarray]:
    """Run one node with its function body in ONNX Runtime."""
    values = [
        ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, array in inputs.items()
    ]
    kinds = [ir.DataType.FLOAT, ir.DataType.INT64][: 2 if spec is grouped_spec else 1]
    outputs = [
        ir.Value(name=f"y{n}", type=ir.TensorType(kind), shape=ir.Shape(["T", "N"]))
        for n, kind in enumerate(kinds)
    ]
    node = ir.node(spec.NAME, values, attributes, domain=spec.DOMAIN, outputs=outputs)
    opsets = {"": 23, spec.DOMAIN: spec.ABI_VERSION}
    graph = ir.Graph(values, outputs, nodes=[node], opset_imports=opsets, name="one")
    model = ir.to_proto(ir.Model(graph, ir_version=10, functions=[body.function()]))
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, inputs)
    return results


@pytest.mark.parametrize(("begin", "transposed"), [(0, 1), (8, 0), (0, 0)])
def test_linear_layers_of_heads(begin: int, transposed: int) -> None:
    rng = np.random.default_rng(begin)
    x = rng.standard_normal((7, 5 * (12 if transposed else 16)), np.float32)
    w = rng.standard_normal((5 * 20, 16), np.float32)
    wanted = head_linear(x, w, begin=begin, transposed=bool(transposed), **HEADS)
    (got,) = run(head_spec, head_body, {"x": x, "w": w}, begin=begin, transposed=transposed, **HEADS)
    assert got.shape == wanted.shape == (7, 5 * (16 if transposed else 12))
    assert np.abs(got - wanted).max() < 1e-5
    traced = torch.ops.llmc.head_linear(
        torch.from_numpy(x).view(1, 7, 5, -1), torch.from_numpy(w), 5, begin, 12, bool(transposed)
    )
    assert np.abs(traced.numpy().reshape(7, -1) - wanted).max() < 1e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"groups": 4, "kept": 2, "scored": 2, "k": 5},
        {"groups": 8, "kept": 1, "scored": 1, "k": 3},
        {"groups": 1, "kept": 1, "scored": 2, "k": 24},
    ],
)
def test_the_choice_among_groups(sizes: dict[str, Any], tied: bool) -> None:
    rng = np.random.default_rng(1)
    x, choice = rng.standard_normal((2, 50, 24)).astype(np.float32)
    choice = np.rint(choice) if tied else choice
    values, ids = grouped_top_k(x, choice, **sizes)
    got_values, got_ids = run(grouped_spec, grouped_body, {"x": x, "choice": choice}, **sizes)
    assert np.array_equal(got_ids, ids)
    assert np.array_equal(got_values, values)
    if not tied:  # torch may take any of equal numbers
        traced = torch.ops.llmc.grouped_top_k(torch.from_numpy(x), torch.from_numpy(choice), *sizes.values())
        assert np.array_equal(traced[1].numpy(), ids)
