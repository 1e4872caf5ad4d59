"""What a finished build says about itself: the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.compiler.targets.base import Finished
from llmc.compiler.weights import write
from llmc.passes.geometry import attention_nodes
from llmc.plugins.paged_attention.spec import ABI_VERSION
from llmc.runtime.bundle.manifest import (
    Engine,
    Limits,
    Manifest,
    Operator,
    PassRecord,
    Precision,
    Producer,
    Source,
    Tokens,
    Weights,
)

if TYPE_CHECKING:
    from llmc.compiler.driver import Plan

_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")  # what shapes the graph
_KERNEL_LIBRARIES = ("triton",)


def manifest(
    plan: Plan, files: dict[str, str], finished: Finished, quantization: Mapping[str, Any] | None
) -> Manifest:
    """The manifest of `plan`'s bundle; the writer adds what is on disk. `files`: the checkpoint's hashes."""
    checkpoint = plan.checkpoint
    architectures = checkpoint.config.get("architectures") or ["unknown"]
    config = json.dumps(checkpoint.config, sort_keys=True).encode()
    libraries = _LIBRARIES + (_KERNEL_LIBRARIES if finished.gpu else ())
    return Manifest(
        producer=Producer(llmc=version("llmc"), libraries={name: version(name) for name in libraries}),
        source=Source(
            name=source_name(plan.request.checkpoint, checkpoint.path),
            model_type=checkpoint.model_type,
            architecture=str(architectures[0]),
            config_sha256=hashlib.sha256(config).hexdigest(),
            dtype=checkpoint.dtype,
            files=files,
        ),
        geometry=plan.geometry,
        limits=Limits(max_seq_len=plan.max_seq_len),
        precision=Precision(dtype=plan.dtype, kv_dtype=plan.kv_dtype),  # type: ignore[arg-type]  # checked when written
        target=plan.target,
        operators=(Operator("llmc.PagedAttention", ABI_VERSION, len(attention_nodes(plan.model))),),
        tokens=Tokens(bos=checkpoint.bos_token_id, eos=checkpoint.eos_token_ids),
        passes=tuple(PassRecord(r.name, r.matches, len(r.near_misses)) for r in plan.reports),
        verification=finished.verification,
        engines=(Engine(rank=0, file=finished.engine_file),),
        weights=Weights(
            files=(write.WEIGHTS_FILE,) if finished.weights_file else (),
            bytes=0,
            dtype=write.main_dtype(plan.model),
            note=finished.weights_note,
        ),
        quantization=quantization,
        gpu=finished.gpu,
        format_version=2 if finished.gpu else 1,
    )


def source_name(checkpoint: str, path: Path) -> str:
    """The checkpoint's name without this machine's paths: the hub id, or the directory's own name."""
    return path.resolve().name if Path(checkpoint).exists() else checkpoint
