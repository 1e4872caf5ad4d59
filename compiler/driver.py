"""`compile_model`: from a checkpoint to a verified bundle, top to bottom."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.compiler import hub, recipe, verify
from llmc.compiler.checkpoint import Checkpoint
from llmc.compiler.package import BundleWriter
from llmc.compiler.progress import Progress, Silent
from llmc.compiler.request import BuildRequest
from llmc.compiler.weight_names import compare_names
from llmc.runtime.bundle.manifest import (
    Engine,
    Geometry,
    Limits,
    Manifest,
    Operator,
    PassRecord,
    Precision,
    Producer,
    Source,
    Target,
    Tokens,
    Verification,
    Weights,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from llmc.passes.contract import PassReport

_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")  # what shapes the engine file
_WEIGHTS_NOTE = "fp32, which the CPU engines map as it is; tied tensors once, in the graph's order"


@dataclass(frozen=True)
class Plan:
    """A build up to the point where files are written."""

    request: BuildRequest
    checkpoint: Checkpoint
    recipe: recipe.Recipe
    model: ir.Model
    geometry: Geometry
    target: Target
    max_seq_len: int
    reports: list[PassReport]
    weight_bytes: int
    verification_bytes: int


@dataclass(frozen=True)
class BuildResult:
    """A finished build. `seconds`: phase -> duration."""

    path: Path
    manifest: Manifest
    seconds: dict[str, float] = field(default_factory=dict)


def compile_model(request: BuildRequest, progress: Progress | None = None) -> BuildResult:
    """Builds the bundle that `request` describes and returns where it is.

    Raises LlmcError (CheckpointError, UnsupportedError, BuildError, VerificationError), each with a hint.
    Nothing carries the output's name unless the build succeeded.
    """
    from llmc.compiler import tokenizer, weights
    from llmc.compiler.targets import cpu

    progress = progress or Silent()
    clock = _Clock(progress)
    with BundleWriter(request.output, request.force) as writer:
        plan = plan_build(request, progress, clock)
        with clock.phase("write weights"):
            weights.write_weights(
                plan.model,
                plan.checkpoint.tensors,
                writer,
                lambda done: progress.bar(done, plan.weight_bytes),
            )
        with clock.phase("write graph"):
            writer.path(cpu.ENGINE_FILE).write_bytes(cpu.serialize(plan.model))
            tokenizer.save(plan.checkpoint, writer)
        with clock.phase("hash the checkpoint"):
            files = plan.checkpoint.file_hashes()
        with clock.phase("verify"):
            record = _verify(plan, writer.path(cpu.ENGINE_FILE), progress)
        with clock.phase("finish"):
            path = writer.finish(_manifest(plan, files, record))
    manifest = Manifest.from_json((path / "manifest.json").read_bytes())
    return BuildResult(path, manifest, clock.seconds)


def plan_build(request: BuildRequest, progress: Progress | None = None, clock: _Clock | None = None) -> Plan:
    """Everything before the first byte is written: reads, traces, rewrites and lowers the graph."""
    clock = clock or _Clock(progress or Silent())
    with clock.phase("read checkpoint"):
        checkpoint = Checkpoint.open(hub.resolve(request.checkpoint, request.revision))
        family = recipe.load(checkpoint.model_type)
    with clock.phase("import torch and transformers"):
        from llmc.compiler import weights
        from llmc.compiler.config import context_length, load_config
        from llmc.compiler.geometry import read_geometry
        from llmc.compiler.targets import cpu
        from llmc.compiler.trace.export import trace_fp32
        from llmc.passes import contract
        from llmc.passes.pipeline import pipeline
    config = load_config(checkpoint)
    max_seq_len = context_length(config, request.max_seq_len)
    with clock.phase("trace"):
        traced = trace_fp32(config, max_seq_len)
        compare_names(traced.parameters, checkpoint.tensors)
    with clock.phase("rewrite the graph"):
        expected = family.expected(int(config.num_hidden_layers))
        reports = contract.run(traced.model, pipeline(), expected)
        geometry = read_geometry(traced.model)
        target = cpu.choose_engine(traced.model)
        cpu.lower(traced.model)
    nbytes = weights.weight_bytes(traced.model)
    return Plan(
        request=request,
        checkpoint=checkpoint,
        recipe=family,
        model=traced.model,
        geometry=geometry,
        target=target,
        max_seq_len=max_seq_len,
        reports=reports,
        weight_bytes=nbytes,
        verification_bytes=verify.memory_needed(nbytes),
    )


def _verify(plan: Plan, engine: Path, progress: Progress) -> Verification:
    if not plan.request.verify:
        return Verification(status="skipped", reason="switched off with --no-verify")
    job = verify.Job(
        checkpoint=str(plan.checkpoint.path),
        engine=str(engine),
        backend=plan.target.engine,
        max_seq_len=plan.max_seq_len,
        vocab_size=plan.geometry.vocab_size,
        windows=sorted({layer.window for layer in plan.geometry.layers if layer.window}),
        tolerance=plan.recipe.logit_tolerance,
        needed_bytes=plan.verification_bytes,
    )
    return verify.run(job, progress)


def _manifest(plan: Plan, files: dict[str, str], record: Verification) -> Manifest:
    from llmc.compiler.geometry import attention_nodes
    from llmc.compiler.targets.cpu import ENGINE_FILE
    from llmc.compiler.weights import WEIGHTS_FILE
    from llmc.plugins.paged_attention.spec import ABI_VERSION

    checkpoint = plan.checkpoint
    architectures = checkpoint.config.get("architectures") or ["unknown"]
    config = json.dumps(checkpoint.config, sort_keys=True).encode()
    libraries = {name: version(name) for name in _LIBRARIES}
    attention = Operator("llmc.PagedAttention", ABI_VERSION, len(attention_nodes(plan.model)))
    return Manifest(
        producer=Producer(llmc=version("llmc"), libraries=libraries),
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
        precision=Precision(dtype="fp32", kv_dtype="fp32"),
        target=plan.target,
        operators=(attention,),
        tokens=Tokens(bos=checkpoint.bos_token_id, eos=checkpoint.eos_token_ids),
        passes=tuple(PassRecord(r.name, r.matches, len(r.near_misses)) for r in plan.reports),
        verification=record,
        engines=(Engine(rank=0, file=ENGINE_FILE),),
        weights=Weights(files=(WEIGHTS_FILE,), bytes=0, dtype="fp32", note=_WEIGHTS_NOTE),
    )


def source_name(checkpoint: str, path: Path) -> str:
    """The checkpoint's name without this machine's paths: the hub id, or the directory's own name."""
    return path.resolve().name if Path(checkpoint).exists() else checkpoint


class _Clock:
    """Times the phases of a build and announces them."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._progress.phase(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
