"""The graphs and weights of the ranks of a TensorRT bundle.

The ranks are divided before TensorRT's passes, and each graph is legalized alone. A rank has a graph file and
a weights file, which its plan is built from. The verification runs all ranks as one graph
(`passes/shard/join.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.targets.base import Resolved, WeightSources
from llmc.compiler.weights.write import WEIGHTS_FILE, write_weights
from llmc.passes import contract, pipeline
from llmc.passes.contract import PassReport
from llmc.passes.legalize.finalize import serialize
from llmc.passes.shard.join import join
from llmc.passes.shard.stages import Stage, plan_stages

RANK_GRAPH, RANK_WEIGHTS = "rank{}.onnx", "weights/model.rank{}.safetensors"


def stages_of(model: ir.Model, resolved: Resolved) -> tuple[Stage, ...]:
    """Return the stages of a quantized graph; () if every rank has all layers.

    Raises UnsupportedError if the model has fewer layers.
    """
    return plan_stages(model, resolved.pp) if resolved.pp > 1 else ()


def divide(
    model: ir.Model, tp: int, dtype: str, stages: Sequence[Stage] = ()
) -> Iterator[tuple[ir.Model, list[PassReport]]]:
    """Yield TensorRT's graph of each of several ranks, with the reports of its passes.

    The ranks send the logits outside of their graphs.

    model: the quantized graph
    tp: the ranks of a stage
    dtype: a key of `pipeline.DTYPES`
    stages: see `stages_of`

    Raises UnsupportedError if the model cannot be divided among the ranks.
    """
    for rank in range(tp * max(1, len(stages))):
        part = model.clone()
        passes = pipeline.shard(rank, tp, stages, logits=False)
        yield part, contract.run(part, [*passes, *pipeline.legalize_tensorrt(dtype)])


def parts_of(model: ir.Model, tp: int, dtype: str, stages: Sequence[Stage] = ()) -> Iterator[ir.Model]:
    """Yield the graphs of `divide`."""
    return (part for part, _ in divide(model, tp, dtype, stages))


def write_ranks(
    model: ir.Model,
    resolved: Resolved,
    sources: WeightSources,
    writer: BundleWriter,
    on_bytes: Callable[[int], None],
) -> None:
    """Write the graphs and weights of the ranks.

    The weights of the ranks are parts of the quantized weights. The whole ones are written too, because the
    verification's reference takes them over.
    """
    written = 0

    def report(done: int) -> None:
        on_bytes(written + done)

    parts = parts_of(model, resolved.tp, resolved.dtype, stages_of(model, resolved))
    for rank, part in enumerate(parts):
        file = RANK_WEIGHTS.format(rank)
        written += write_weights(part, sources.tensors, writer, report, sources.made, file)
        writer.path(RANK_GRAPH.format(rank)).write_bytes(serialize(part))
    if sources.made:
        whole = model.clone()
        contract.run(whole, pipeline.legalize_tensorrt(resolved.dtype))
        write_weights(whole, sources.tensors, writer, report, sources.made)


def read_ranks(ranks: int, writer: BundleWriter) -> list[ir.Model]:
    """Return the graphs that `write_ranks` wrote."""
    return [ir.load(writer.path(RANK_GRAPH.format(rank))) for rank in range(ranks)]


def joined(resolved: Resolved, writer: BundleWriter) -> ir.Model:
    """Return the graphs of all ranks as one, for the verification."""
    return join(read_ranks(resolved.ranks, writer), resolved.tp)


def discard_whole(writer: BundleWriter) -> None:
    """Remove what only the verification needed."""
    if writer.path(WEIGHTS_FILE).exists():
        writer.discard(WEIGHTS_FILE)
