"""Pipeline stages: how layers are divided, and what a stage's graph keeps, receives and sends."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from llmc.passes import contract, edit, pipeline
from llmc.passes.geometry import attention_nodes
from llmc.passes.parameter import parameters
from llmc.passes.shard.stages import Stage, balanced, plan_stages
from llmc.plugins.collectives.spec import RECV, SEND
from llmc.runtime.errors import UnsupportedError
from support.traces import canonical


def stage_of(model: ir.Model, rank: int, tp: int, stages: tuple[Stage, ...]) -> ir.Model:
    part = model.clone()
    contract.run(part, pipeline.shard(rank, tp, stages))
    return part


def transfers(part: ir.Model) -> list[tuple[str, int, int, list[int]]]:
    """Return (operator, peer, sequence, shape) of the transfers, in their order."""
    return [
        (
            node.op_type,
            int(edit.attribute(node, "peer")),
            int(edit.attribute(node, "sequence")),
            edit.dims(node.outputs[0]),
        )
        for node in part.graph
        if node.op_type in (SEND, RECV)
    ]


def test_the_largest_stage_is_as_small_as_possible() -> None:
    """Compared with all divisions."""
    numbers = random.Random(3)
    for _ in range(300):
        sizes = [numbers.randint(1, 9) for _ in range(numbers.randint(1, 8))]
        count = numbers.randint(1, len(sizes))
        costs = []
        for cuts in itertools.combinations(range(1, len(sizes)), count - 1):
            sums = [sum(sizes[a:b]) for a, b in itertools.pairwise((0, *cuts, len(sizes)))]
            costs.append((max(sums), sum(size * size for size in sums)))
        ranges = balanced(sizes, count)
        assert len(ranges) == count
        assert [number for first, stop in ranges for number in range(first, stop)] == list(range(len(sizes)))
        sums = [sum(sizes[first:stop]) for first, stop in ranges]
        assert (max(sums), sum(size * size for size in sums)) == min(costs)


def test_equal_layers_with_a_large_head_are_divided_unequally() -> None:
    assert balanced([14, *[10] * 6, 34], 2) == [(0, 5), (5, 8)]
    assert balanced([10] * 28, 2) == [(0, 14), (14, 28)]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "name",
    ["llama-tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2-tiny", "olmo2-tiny"))],
)
def test_only_the_residual_stream_is_transferred(
    name: str, tp: int, checkpoint: Callable[[str], Path]
) -> None:
    """Each layer is in one stage, and its weights are those of the whole graph."""
    model, _ = canonical(checkpoint(name))
    layers = len(attention_nodes(model))
    stages = plan_stages(model, layers)
    vocabulary = edit.dims(model.graph.outputs[0])[-1]
    embedded = next(node for node in model.graph if node.op_type == "Gather").outputs[0]
    width = edit.dims(embedded)[-1]
    last = layers - 1
    names: list[set[str]] = []
    for rank in range(layers * tp):
        part = stage_of(model, rank, tp, stages)
        number, place = divmod(rank, tp)
        expected = []
        if number:
            expected.append((RECV, rank - tp, 0, [-1, width]))
        if number < last:
            expected.append((SEND, rank + tp, 0, [-1, width]))
        if place == 0 and number == last:
            expected.append((SEND, 0, 0, [-1, vocabulary]))
        if rank == 0:
            expected.append((RECV, last * tp, 0, [-1, vocabulary]))
        assert transfers(part) == expected
        assert len(attention_nodes(part)) == stages[number].stop - stages[number].first
        caches = [value.name for value in part.graph.inputs if value.name and value.name.startswith("key")]
        assert [name.rpartition(".")[2] for name in caches if name] == [str(number)]
        assert contract.run(part, pipeline.shard(rank, tp, stages))[-1].matches == 0  # of its own result
        if place == 0:
            names.append({record.file_name for _, record in parameters(part)})
    whole = {record.file_name for _, record in parameters(model)}
    assert set.union(*names) == whole
    for first, second in itertools.combinations(range(layers), 2):
        assert not any(".layers." in name for name in names[first] & names[second])


def test_what_a_later_layer_reads_is_transferred_through_all_stages(
    checkpoint: Callable[[str], Path],
) -> None:
    """The last layer also adds the embedding: two arrays go to every later stage."""
    model, _ = canonical(checkpoint("gemma3-tiny"))
    layers = len(attention_nodes(model))
    assert layers > 2
    model = model.clone()
    embedded = next(node for node in model.graph if node.op_type == "Gather").outputs[0]
    rows = next(node for node in model.graph if node.name == "hidden_rows")
    x = edit.operand(rows, 0)
    total = edit.insert(rows, "Add", [x, embedded], {}, "with_embedding", list(x.shape or []))
    rows.replace_input_with(0, total)
    stages = plan_stages(model, layers)
    for number in range(layers):
        found = transfers(stage_of(model, number, 1, stages))
        kinds = [(op, peer, sequence) for op, peer, sequence, _ in found]
        for sequence in (0, 1):
            assert ((RECV, number - 1, sequence) in kinds) == (number > 0)
            assert ((SEND, number + 1, sequence) in kinds) == (number < layers - 1)


def test_the_bytes_of_stages_count_embedding_and_head(checkpoint: Callable[[str], Path]) -> None:
    model, _ = canonical(checkpoint("llama-tiny-plain"))
    one = plan_stages(model, 1)[0]
    sizes = {record.file_name: 4 * math.prod(edit.dims(value)) for value, record in parameters(model)}
    first, second = plan_stages(model, 2)
    assert (first.first, first.stop, second.first, second.stop) == (0, 1, 1, 2)
    assert one.weight_bytes >= sum(sizes.values())
    head = next(size for name, size in sizes.items() if "lm_head" in name)
    assert second.weight_bytes > head
    assert first.weight_bytes > sizes["model.embed_tokens.weight"]


def test_a_large_table_of_embeddings_does_not_take_layers_from_its_stage(
    checkpoint: Callable[[str], Path],
) -> None:
    """A step reads a row for each token. `lm_head` is read as a whole."""
    model, _ = canonical(checkpoint("qwen2-tiny"))
    model = model.clone()
    before = plan_stages(model, 2)
    assert [(stage.first, stage.stop) for stage in before] == [(0, 2), (2, 4)]
    table = edit.operand(next(node for node in model.graph if node.op_type == "Gather"), 0)
    rows, width = edit.dims(table)
    table.shape = ir.Shape([100 * rows, width])
    after = plan_stages(model, 2)
    assert [(stage.first, stage.stop) for stage in after] == [(0, 2), (2, 4)]
    assert after[0].weight_bytes - before[0].weight_bytes == 99 * rows * width * 4
    head = next(value for value, record in parameters(model) if "lm_head" in record.file_name)
    rows, width = edit.dims(head)
    head.shape = ir.Shape([100 * rows, width])
    assert [(stage.first, stage.stop) for stage in plan_stages(model, 2)] == [(0, 3), (3, 4)]


def test_more_stages_than_layers_are_refused(checkpoint: Callable[[str], Path]) -> None:
    model, _ = canonical(checkpoint("llama-tiny"))
    with pytest.raises(UnsupportedError, match="3 stages cannot divide the 2 layers") as error:
        plan_stages(model, 3)
    assert error.value.hint == "choose a --pp up to 2"
    assert error.value.argument == "pp"
