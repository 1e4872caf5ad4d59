"""The ranks of a finished bundle, as `rank_plan.py` describes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from llmc.compiler.rank_plan import Exchange, RankPlan, with_candidates
from llmc.plugins.collectives.spec import ALL_GATHER, ALL_REDUCE, DOMAIN, SEND
from llmc.runtime.backends.base import LoadOptions
from llmc.runtime.backends.kv_cache import block_bytes
from llmc.runtime.backends.native import EXACT_DIGITS
from llmc.runtime.backends.tensorrt.sizes import geometry_of_rank
from llmc.runtime.bundle.manifest import Manifest, RankRecord
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.bundle.strict_json import DAMAGED
from llmc.runtime.errors import BundleError
from llmc.runtime.native.plan import plan
from llmc.runtime.native.program import Program

_OPERATIONS: Mapping[str, str] = {"all_reduce": ALL_REDUCE, "all_gather": ALL_GATHER, "send": SEND}


def ranks_of(bundle: Bundle) -> tuple[RankPlan, ...]:
    """Return the ranks of a bundle. Raises BundleError for a damaged program."""
    manifest = bundle.manifest
    ranks = range(manifest.parallel.world_size)
    if manifest.target.engine != "native":
        return tuple(_of_manifest(manifest, rank) for rank in ranks)
    programs = [Program.from_json(bundle.engine_path(rank).read_bytes()) for rank in ranks]
    found: list[RankPlan] = []
    for rank, program in enumerate(programs):
        first = found[-1].first if rank % manifest.parallel.tp else found[-1].stop if found else 0
        found.append(_of_program(manifest, rank, program, first))
    return tuple(found)


def _of_program(manifest: Manifest, rank: int, program: Program, first: int) -> RankPlan:
    """Return the rank of a program whose first layer is the model's layer `first`."""
    stop = first + len(program.caches)
    heads = [each.integers["heads"] for each in program.instructions if each.op == "attention"]
    if not heads or not first < stop <= len(manifest.geometry.layers):
        raise BundleError(f"the program of rank {rank} has other layers than the manifest says", DAMAGED)
    layers = tuple(
        replace(layer, num_kv_heads=cache.num_kv_heads)
        for layer, cache in zip(manifest.geometry.layers[first:stop], program.caches, strict=True)
    )
    made = RankPlan(
        rank,
        first,
        stop,
        max(heads),
        max(layer.num_kv_heads for layer in layers),
        sum(matrix.nbytes for matrix in program.matrices.values()) + 4 * sum(program.constants.values()),
        block_bytes(replace(manifest.geometry, layers=layers), manifest.precision.kv_dtype),
        plan(program, EXACT_DIGITS).row_bytes * LoadOptions.max_tokens,
        _exchanges(program),
    )
    return with_candidates(made, program.vocab_size, manifest.parallel.tp)


def _exchanges(program: Program) -> tuple[Exchange, ...]:
    found = []
    for op, operation in _OPERATIONS.items():
        views = [each.inputs[0] for each in program.instructions if each.op == op]
        if views:
            total = 4 * sum(view.width for view in views)
            of_logits = 4 * sum(view.width for view in views if program.buffers[view.buffer].rows == "logits")
            found.append(Exchange(operation, len(views), total - of_logits, of_logits))
    return tuple(found)


def _of_manifest(manifest: Manifest, rank: int) -> RankPlan:
    """Return a rank of another engine. Its heads are those that `passes/shard/parts.py` gives it."""
    geometry, tp = manifest.geometry, manifest.parallel.tp
    record = manifest.ranks[rank] if manifest.ranks else RankRecord(0, geometry.num_layers, ())
    geometry = replace(geometry, layers=geometry.layers[record.first : record.stop])
    place = rank % tp
    kv_heads = [
        layer.num_kv_heads // tp + (place < layer.num_kv_heads % tp) if layer.num_kv_heads >= tp else 1
        for layer in geometry.layers
    ]
    part = geometry_of_rank(geometry, kv_heads, tp)
    gpu = manifest.gpu is not None
    return RankPlan(
        rank,
        record.first,
        record.stop,
        part.num_heads,
        part.num_kv_heads,
        manifest.files[manifest.engines[rank].file].bytes if gpu else manifest.weights.bytes,
        block_bytes(part, manifest.precision.kv_dtype),
        None,
        tuple(Exchange(**asdict(each)) for each in record.exchanges)
        if manifest.ranks
        else _counted(manifest),
    )


def _counted(manifest: Manifest) -> tuple[Exchange, ...]:
    """Return the collectives of a bundle of format 4, whose bytes are unknown."""
    counts = {operator.name: operator.count for operator in manifest.operators}
    return tuple(
        Exchange(operation, counts[f"{DOMAIN}.{operation}"], None, None)
        for operation in (ALL_REDUCE, ALL_GATHER)
        if f"{DOMAIN}.{operation}" in counts
    )
