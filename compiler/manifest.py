"""Make the manifest of a finished build."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import onnx_ir as ir

from llmc import __version__
from llmc.compiler.build_key import source_name
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.plan import BuildPlan
from llmc.compiler.rank_plan import RankPlan
from llmc.compiler.targets.base import Artifact
from llmc.compiler.weights import write
from llmc.plugins.operator import DOMAIN, OPERATORS
from llmc.runtime.bundle.manifest import (
    Engine,
    ExchangeRecord,
    Limits,
    Manifest,
    Operator,
    Parallel,
    PassRecord,
    Precision,
    Producer,
    RankRecord,
    Source,
    Tokens,
    Verification,
    Weights,
    oldest_format,
)

_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")  # the graph depends on their versions
_KERNEL_LIBRARIES = ("triton",)


def manifest(
    plan: BuildPlan,
    checkpoint: Checkpoint,
    model: ir.Model,
    files: dict[str, str],
    verification: Verification,
    artifact: Artifact,
    quantization: Mapping[str, Any] | None,
) -> Manifest:
    """Return the manifest of a finished build. `BundleWriter.finish` adds the files and their sizes.

    model: the legalized graph
    files: sha256 of the checkpoint's files, by name
    quantization: the record of `quantize.step.record`; None if the weights are not quantized
    """
    resolved = plan.resolved
    ranks = _ranks(plan.ranks) if artifact.gpu and resolved.ranks > 1 else None
    parallel = Parallel(tp=resolved.tp, pp=resolved.pp, world_size=resolved.ranks)
    architectures = checkpoint.config.get("architectures") or ["unknown"]
    config = json.dumps(checkpoint.config, sort_keys=True).encode()
    libraries = _LIBRARIES + (_KERNEL_LIBRARIES if artifact.gpu else ())
    return Manifest(
        producer=Producer(llmc=__version__, libraries={name: version(name) for name in libraries}),
        source=Source(
            name=source_name(plan.request.checkpoint, checkpoint.path),
            model_type=checkpoint.family,
            architecture=str(architectures[0]),
            config_sha256=hashlib.sha256(config).hexdigest(),
            dtype=checkpoint.dtype,
            files=files,
        ),
        geometry=plan.geometry,
        limits=Limits(max_seq_len=plan.sizes.max_seq_len),
        precision=Precision(dtype=plan.resolved.dtype, kv_dtype=plan.resolved.kv_dtype),  # type: ignore[arg-type]  # checked when written
        target=plan.target,
        operators=operators(artifact.part or model, inlined=artifact.gpu is not None),
        tokens=Tokens(bos=checkpoint.bos_token_id, eos=plan.eos_token_ids),
        passes=tuple(PassRecord(r.name, r.matches, len(r.near_misses)) for r in plan.passes),
        verification=verification,
        engines=tuple(Engine(rank, file) for rank, file in enumerate(artifact.engine_files)),
        weights=Weights(
            files=artifact.weights_files,
            bytes=0,
            dtype=write.main_dtype(model),
            note=artifact.weights_note,
        ),
        quantization=quantization,
        gpu=artifact.gpu,
        sampling=plan.checkpoint.sampling,
        parallel=parallel,
        ranks=ranks,
        format_version=oldest_format(
            parallel,
            plan.geometry.layers,
            gpu=artifact.gpu,
            sampling=plan.checkpoint.sampling,
            ranks=ranks,
        ),
    )


def _ranks(ranks: Sequence[RankPlan]) -> tuple[RankRecord, ...]:
    """Return what the ranks of TensorRT engines have and exchange, which their engines do not tell."""
    return tuple(
        RankRecord(rank.first, rank.stop, tuple(ExchangeRecord(**asdict(each)) for each in rank.exchanges))
        for rank in ranks
    )


def operators(model: ir.Model, inlined: bool) -> tuple[Operator, ...]:
    """Return llmc's custom operators in an engine's graph with their node counts, sorted by name.

    inlined: whether the engine was built from the function bodies that the graph carries, as TensorRT's is.
        Operators with such a body are then not in the engine and are left out.
    """
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    counts = Counter(
        node.op_type for node in nodes if not (inlined and node.op_identifier() in model.functions)
    )
    custom_operators = [OPERATORS[name] for name in sorted(counts)]
    return tuple(
        Operator(operator.full_name, operator.abi, counts[operator.name]) for operator in custom_operators
    )
