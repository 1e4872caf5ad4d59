"""The graphs and weights of the ranks of a TensorRT bundle.

The ranks are divided before TensorRT's passes, and each graph is legalized alone. A rank has a graph file and
a weights file, which its plan is built from. The verification runs all ranks as one graph
(`passes/shard/join.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.targets.base import WeightSources
from llmc.compiler.weights.write import WEIGHTS_FILE, write_weights
from llmc.passes import contract, pipeline
from llmc.passes.contract import PassReport
from llmc.passes.legalize.finalize import serialize
from llmc.passes.shard.join import join

RANK_GRAPH, RANK_WEIGHTS = "rank{}.onnx", "weights/model.rank{}.safetensors"


def divide(model: ir.Model, ranks: int, dtype: str) -> Iterator[tuple[ir.Model, list[PassReport]]]:
    """Yield TensorRT's graph of each of several ranks, with the reports of its passes.

    model: the quantized graph
    dtype: a key of `pipeline.DTYPES`

    Raises UnsupportedError if the model cannot be divided among the ranks.
    """
    for rank in range(ranks):
        part = model.clone()
        yield part, contract.run(part, [*pipeline.shard(rank, ranks), *pipeline.legalize_tensorrt(dtype)])


def parts_of(model: ir.Model, ranks: int, dtype: str) -> Iterator[ir.Model]:
    """Yield the graphs of `divide`."""
    return (part for part, _ in divide(model, ranks, dtype))


def write_ranks(
    model: ir.Model,
    ranks: int,
    dtype: str,
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

    for rank, part in enumerate(parts_of(model, ranks, dtype)):
        file = RANK_WEIGHTS.format(rank)
        written += write_weights(part, sources.tensors, writer, report, sources.made, file)
        writer.path(RANK_GRAPH.format(rank)).write_bytes(serialize(part))
    if sources.made:
        whole = model.clone()
        contract.run(whole, pipeline.legalize_tensorrt(dtype))
        write_weights(whole, sources.tensors, writer, report, sources.made)


def read_ranks(ranks: int, writer: BundleWriter) -> list[ir.Model]:
    """Return the graphs that `write_ranks` wrote."""
    return [ir.load(writer.path(RANK_GRAPH.format(rank))) for rank in range(ranks)]


def joined(ranks: int, writer: BundleWriter) -> ir.Model:
    """Return the graphs of all ranks as one, for the verification."""
    return join(read_ranks(ranks, writer))


def discard_whole(writer: BundleWriter) -> None:
    """Remove what only the verification needed."""
    if writer.path(WEIGHTS_FILE).exists():
        writer.discard(WEIGHTS_FILE)
