"""The native engines of several ranks: a program for each, and the weights in parts.

What all ranks have, such as norms and rotary tables, is in a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.targets.base import WeightSources
from llmc.compiler.targets.native.lower import Lowered, lower
from llmc.compiler.targets.native.pack import write_packed
from llmc.compiler.weights.write import attach_weights
from llmc.passes import contract, pipeline
from llmc.passes.shard.shard import is_part
from llmc.runtime.native.weights import RANK_WEIGHTS, SHARED_WEIGHTS, WEIGHTS

PROGRAM_FILE = "rank{}.program.json"
#: The program of all ranks together, while the verification needs its weights. Its weights file is WEIGHTS.
WHOLE_FILE = "whole.program.json"


def parts_of(model: ir.Model, ranks: int) -> Iterator[ir.Model]:
    """Yield the graph of each rank; `model` itself if it is the only one.

    Raises UnsupportedError if the model cannot be divided among the ranks.
    """
    for rank in range(ranks):
        part = model
        if ranks > 1:
            part = model.clone()
            contract.run(part, pipeline.shard(rank, ranks))
        yield part


def write_ranks(
    model: ir.Model, ranks: int, sources: WeightSources, writer: BundleWriter, on_bytes: Callable[[int], None]
) -> None:
    """Write the programs and weights of the ranks.

    The weights of the ranks are parts of the quantized weights. The whole ones are written too, because the
    verification's reference takes them over. `discard_whole` removes them.
    """
    written = 0

    def report(done: int) -> None:
        on_bytes(written + done)

    for rank, part in enumerate(parts_of(model, ranks)):
        attach_weights(part, sources.tensors, sources.made)
        lowered = lower(part)
        writer.path(PROGRAM_FILE.format(rank)).write_bytes(lowered.program.to_json())
        own = _names(lowered, parts=True)
        written += write_packed(lowered, writer, report, file=RANK_WEIGHTS.format(rank), names=own)
        if rank == 0:
            shared = _names(lowered, parts=False)
            written += write_packed(lowered, writer, report, file=SHARED_WEIGHTS, names=shared)
    if sources.made:
        attach_weights(model, sources.tensors, sources.made)
        lowered = lower(model)
        writer.path(WHOLE_FILE).write_bytes(lowered.program.to_json())
        write_packed(lowered, writer, report, sources.made)


def discard_whole(writer: BundleWriter) -> None:
    """Remove what only the verification needed."""
    if writer.path(WHOLE_FILE).exists():
        writer.discard(WHOLE_FILE)
        writer.discard(WEIGHTS)


def weights_files(ranks: int) -> tuple[str, ...]:
    """Return the names of the weights files of a bundle."""
    return (WEIGHTS,) if ranks == 1 else (*map(RANK_WEIGHTS.format, range(ranks)), SHARED_WEIGHTS)


def _names(lowered: Lowered, *, parts: bool) -> set[str]:
    """Return the matrices and constants of which a rank has only a part; without `parts`, all others."""
    values = {
        name: (source.codes, source.scales, source.dequantized) for name, source in lowered.matrices.items()
    }
    values |= {name: (source.value, None, None) for name, source in lowered.constants.items()}
    return {name for name, of in values.items() if any(value and is_part(value) for value in of) == parts}
