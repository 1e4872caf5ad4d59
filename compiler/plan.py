"""The plan of a build, made before a file is written: frozen, printable, comparable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmc.compiler.rank_plan import GpuSize, RankPlan
from llmc.compiler.request import BuildRequest
from llmc.compiler.targets.base import Resolved, Sizes
from llmc.passes.contract import PassReport
from llmc.passes.quantize.plan import QuantPlan
from llmc.passes.shard.stages import Stage
from llmc.runtime.bundle.manifest import Geometry, Sampling, Target


@dataclass(frozen=True)
class CheckpointFacts:
    """Facts about the checkpoint."""

    #: The checkpoint's directory.
    path: Path
    model_type: str
    #: The dtype in its configuration, by torch's name ("bfloat16").
    dtype: str
    #: Whether its weights, or its KV cache, are quantized already.
    prequantized: bool
    #: Whether its family has a recipe.
    known_family: bool
    #: The largest logit error that the verification accepts in fp32 (`recipe.Recipe`).
    logit_tolerance: float
    #: Pass name -> number of matches that the family's recipe requires.
    expected_matches: dict[str, int]
    #: The size of its tensor data in bytes.
    total_bytes: int
    #: Its sampling defaults. None: it has none.
    sampling: Sampling | None


@dataclass(frozen=True)
class BuildPlan:
    """The decisions of one build: the request, the checkpoint, and the engine to build."""

    request: BuildRequest
    checkpoint: CheckpointFacts
    resolved: Resolved
    #: The engine that runs the graph, and why.
    target: Target
    geometry: Geometry
    sizes: Sizes
    #: None: the weights stay unquantized.
    quantization: QuantPlan | None
    #: A report for each pass, in order.
    passes: tuple[PassReport, ...]
    #: The tokens that end a generation.
    eos_token_ids: tuple[int, ...]
    #: The stages of the pipeline; empty without --pp.
    stages: tuple[Stage, ...]
    ranks: tuple[RankPlan, ...]
    #: What each size of GPU could hold; empty for a CPU.
    gpus: tuple[GpuSize, ...]
