"""The operators in the manifest are those in the engine's graph."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from llmc.compiler import zoo
from llmc.compiler.driver import compile_model
from llmc.compiler.manifest import operators
from llmc.compiler.request import BuildRequest
from llmc.plugins.operator import OPERATORS, bodies_for
from llmc.runtime.bundle.manifest import Operator
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.load import load_engine
from llmc.runtime.sampling import SamplingParams


def graph(*names: str) -> ir.Model:
    nodes = [ir.node(name, [], domain="llmc" if name in OPERATORS else "") for name in names]
    return ir.Model(ir.Graph([], [], nodes=nodes, opset_imports={"": 23, "llmc": 1}), ir_version=10)


def test_every_node_of_our_own_is_counted() -> None:
    model = graph("RoundFP4", "PagedAttention", "MatMul", "RoundFP4")
    both = (Operator("llmc.PagedAttention", 1, 1), Operator("llmc.RoundFP4", 1, 2))
    assert operators(model, inlined=False) == both
    assert operators(model, inlined=True) == both


def test_an_operator_whose_body_is_inlined_is_not_in_the_engine() -> None:
    model = graph("RoundFP4", "PagedAttention")
    for body in bodies_for(["RoundFP4"]):
        model.functions[body.identifier()] = body
    assert [one.name for one in operators(model, inlined=True)] == ["llmc.PagedAttention"]
    assert len(operators(model, inlined=False)) == 2


def test_only_the_bodies_that_a_graph_needs() -> None:
    assert [body.name for body in bodies_for(["MatMul", "PagedAttention"])] == ["PagedAttention"]
    with_bodies = {name for name, operator in OPERATORS.items() if operator.module}
    assert (
        {body.name for body in bodies_for([*OPERATORS, "Add"])}
        == with_bodies
        == {"Experts", "GroupedTopK", "HeadLinear", "PagedAttention", "RoundFP4"}
    )
    assert not bodies_for(["MatMul"])


def test_a_bundle_with_nvfp4_activations_names_its_operators_and_runs(tmp_path: Path) -> None:
    zoo.make("phi3-tiny", tmp_path / "phi3-tiny")
    request = BuildRequest(str(tmp_path / "phi3-tiny"), tmp_path / "x.llmc", quant="nvfp4", verify=False)
    bundle = Bundle.open(compile_model(request).path)
    counts = {one.name: one.count for one in bundle.manifest.operators}
    assert counts == {"llmc.PagedAttention": 2, "llmc.RoundFP4": 2 * 4}  # qkv, o, gate and up, down
    output = load_engine(bundle).generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True))[0]
    assert len(output.token_ids) == 2
