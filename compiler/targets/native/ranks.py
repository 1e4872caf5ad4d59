"""The native engines of several ranks: a program for each, and the weights in parts.

What one rank has is in a file of its own. What several ranks have, such as norms and rotary tables, is in a
file for just these ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.targets.base import Resolved, WeightSources
from llmc.compiler.targets.native.lower import Lowered, lower
from llmc.compiler.targets.native.pack import write_packed
from llmc.compiler.weights.write import attach_weights
from llmc.passes import contract, pipeline
from llmc.passes.contract import PassReport
from llmc.passes.shard.shard import is_part
from llmc.passes.shard.stages import Stage, plan_stages
from llmc.runtime.native.weights import SHARED_WEIGHTS, WEIGHTS, weights_file

PROGRAM_FILE = "rank{}.program.json"
#: The program of all ranks together, while the verification needs its weights. Its weights file is WEIGHTS.
WHOLE_FILE = "whole.program.json"


def stages_of(model: ir.Model, resolved: Resolved) -> tuple[Stage, ...]:
    """Return the stages of a graph; () if every rank has all layers.

    Raises UnsupportedError if the model has fewer layers.
    """
    return plan_stages(model, resolved.pp) if resolved.pp > 1 else ()


def divide(
    model: ir.Model, resolved: Resolved, stages: Sequence[Stage] | None = None
) -> Iterator[tuple[ir.Model, list[PassReport]]]:
    """Yield the graph of each rank, with the reports of its passes; `model` itself if it is the only one.

    stages: see `stages_of`; None: those of `model`

    Raises UnsupportedError if the model cannot be divided among the ranks.
    """
    if resolved.ranks == 1:
        yield model, []
        return
    stages = stages_of(model, resolved) if stages is None else stages
    for rank in range(resolved.ranks):
        part = model.clone()
        yield part, contract.run(part, pipeline.shard(rank, resolved.tp, stages))


def parts_of(
    model: ir.Model, resolved: Resolved, stages: Sequence[Stage] | None = None
) -> Iterator[ir.Model]:
    """Yield the graphs of `divide`."""
    return (part for part, _ in divide(model, resolved, stages))


def write_ranks(
    model: ir.Model,
    resolved: Resolved,
    sources: WeightSources,
    writer: BundleWriter,
    on_bytes: Callable[[int], None],
) -> None:
    """Write the programs and weights of the ranks.

    The weights of the ranks are parts of the quantized weights. The whole ones are written too, because the
    verification's reference takes them over. `discard_whole` removes them.
    """
    written = 0

    def report(done: int) -> None:
        on_bytes(written + done)

    files = [_files(lower(part), rank, resolved) for rank, part in enumerate(parts_of(model, resolved))]
    owners: dict[object, list[int]] = {}  # what a tensor is -> the ranks that have it
    for rank, contents in enumerate(files):
        for content in contents.values():
            owners.setdefault(content, []).append(rank)
    for rank, part in enumerate(parts_of(model, resolved)):
        attach_weights(part, sources.tensors, sources.made)
        lowered = lower(part)
        writer.path(PROGRAM_FILE.format(rank)).write_bytes(lowered.program.to_json())
        names: dict[str, set[str]] = {weights_file([rank], resolved.ranks): set()}
        if rank == 0:
            names[SHARED_WEIGHTS] = set()
        for name, content in files[rank].items():
            ranks = owners[content]
            if ranks[0] == rank:
                names.setdefault(weights_file(ranks, resolved.ranks), set()).add(name)
        for file, chosen in names.items():
            written += write_packed(lowered, writer, report, file=file, names=chosen)
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


def weights_files(ranks: int, writer: BundleWriter) -> tuple[str, ...]:
    """Return the names of the weights files of a bundle, that of all ranks last."""
    if ranks == 1:
        return (WEIGHTS,)
    own = [weights_file([rank], ranks) for rank in range(ranks)]
    directory = writer.path(SHARED_WEIGHTS).parent
    found = sorted(f"{directory.name}/{path.name}" for path in directory.iterdir())
    some = [name for name in found if name not in (*own, SHARED_WEIGHTS)]
    return (*own, *some, SHARED_WEIGHTS)


def _files(lowered: Lowered, rank: int, resolved: Resolved) -> dict[str, object]:
    """Return name of a matrix or constant -> what it is, which is equal in ranks that have the same.

    A part of a tensor is the same in the ranks with the same place in their stages.
    """
    values = {
        name: (source.codes, source.scales, source.dequantized) for name, source in lowered.matrices.items()
    }
    values |= {name: (source.value, None, None) for name, source in lowered.constants.items()}
    return {
        name: (name, lowered.program.matrices.get(name), lowered.program.constants.get(name), place)
        for name, of in values.items()
        for place in [rank % resolved.tp if any(value and is_part(value) for value in of) else None]
    }
