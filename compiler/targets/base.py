"""The interface of a target of `llmc build`, and the records that its methods take and return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.progress import Clock
from llmc.compiler.request import BuildRequest
from llmc.runtime.bundle.manifest import Geometry, Gpu
from llmc.runtime.bundle.manifest import Target as EngineTarget

if TYPE_CHECKING:
    import onnx_ir as ir

    from llmc.compiler.rank_plan import RankPlan
    from llmc.passes.contract import Pass, PassReport

GRAPH_FILE = "rank0.onnx"  # beside weights/: ONNX allows external data below the graph's directory only


@dataclass(frozen=True)
class Resolved:
    """The request, resolved for one target and one checkpoint."""

    #: A name in `request.TARGETS`.
    target: str
    #: The compute dtype of the engine: "fp32", "bf16" or "fp16".
    dtype: str
    #: The dtype of the KV cache, by its name in the manifest.
    kv_dtype: str
    #: Compute capabilities of the GPUs, 89 for 8.9; empty for a CPU and for a portable engine.
    sms: tuple[int, ...] = ()
    #: The engine that the user asked for; None: the target chooses.
    engine: str | None = None
    #: The quantization format of lm_head; None: it stays unquantized.
    head_format: str | None = None
    #: The number of ranks that each compute a part of every layer.
    tp: int = 1
    #: The number of stages of a pipeline, each with some of the layers.
    pp: int = 1

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.tp * self.pp


@dataclass(frozen=True)
class Sizes:
    """Sizes of the engine."""

    #: The context length: tokens of prompt and answer together.
    max_seq_len: int
    #: The size of the weights in bytes, without the file's header.
    weight_bytes: int
    #: The largest size of the weights of a rank.
    rank_bytes: int
    #: The memory that the verification needs, in bytes.
    verification_bytes: int


@dataclass(frozen=True)
class WeightSources:
    """Where the data of a graph's initializers are."""

    #: The checkpoint's tensors, by name.
    tensors: Mapping[str, TensorRef]
    #: The codes and scales that the build made, by the names of their initializers, in files of their own.
    made: Mapping[str, TensorRef]


@dataclass(frozen=True)
class VerificationFiles:
    """The graphs that the verification runs, as files of the unfinished bundle."""

    #: The engine itself, or the graph that stands in for it.
    graph: str
    #: The weights.
    weights: str
    #: The name of the backend that runs the graphs.
    backend: str
    #: A description of the graph that stands in for the engine, for the manifest; "": the engine itself runs.
    stand_in: str = ""
    #: The graph with the quantized KV cache; "": the cache is not quantized.
    kv_graph: str = ""
    #: In fp32, the graph with activation quantization if `graph` is without it; "": there is none.
    quantizing_graph: str = ""
    #: Files to remove from the bundle after the verification.
    scratch: tuple[str, ...] = ()
    #: The program whose weights the reference takes over; "": `graph`.
    program: str = ""
    #: The number of ranks. The files of the others are named like those of rank 0.
    ranks: int = 1
    #: The number of stages that they form.
    stages: int = 1


@dataclass(frozen=True)
class Artifact:
    """A finished engine."""

    #: The file in the bundle that the runtime loads, for each rank.
    engine_files: tuple[str, ...]
    #: The weights files that the bundle keeps; empty if the engine contains the weights.
    weights_files: tuple[str, ...] = ()
    #: How the weights are stored, for the manifest.
    weights_note: str = ""
    gpu: Gpu | None = None
    #: The graph of one of several ranks; None: the build's graph.
    part: ir.Model | None = None


class Target(Protocol):
    """One target. It keeps no state between calls."""

    def resolve(self, request: BuildRequest, checkpoint_dtype: str) -> Resolved:
        """Decide what `request` leaves open.

        checkpoint_dtype: the dtype of the checkpoint, by torch's name ("bfloat16")

        Raises UnsupportedError if the target cannot build it on any machine, BuildError if this machine lacks
        something.
        """
        ...

    def choose_engine(self, resolved: Resolved, model: ir.Model) -> tuple[Resolved, EngineTarget]:
        """Choose the engine that runs a quantized graph, and name the KV cache as the engine does.

        Raises UnsupportedError if no engine can run it.
        """
        ...

    def legalize(
        self, resolved: Resolved, engine: str, model: ir.Model, tensors: Mapping[str, TensorRef]
    ) -> list[Pass]:
        """Return the passes that turn a quantized graph into the one that `engine` takes.

        model: the quantized graph, which is not changed
        tensors: the checkpoint's tensors, by name
        """
        ...

    def plan_ranks(
        self, resolved: Resolved, engine: str, model: ir.Model, geometry: Geometry
    ) -> Iterator[tuple[RankPlan, list[PassReport]]]:
        """Yield the plan of each rank, and the reports of the passes that make its graph of `model`.

        model: the legalized graph
        geometry: the model's

        Raises UnsupportedError if the model cannot be divided among the ranks.
        """
        ...

    def gpus(self, resolved: Resolved) -> tuple[int, ...]:
        """Return the compute capabilities of common GPUs that the engine runs on; () for a CPU."""
        ...

    def write_weights(
        self,
        resolved: Resolved,
        engine: str,
        model: ir.Model,
        sources: WeightSources,
        writer: BundleWriter,
        on_bytes: Callable[[int], None],
    ) -> None:
        """Write the weights of a legalized graph in the form that `engine` reads, and what refers to them.

        on_bytes: called with the number of bytes written so far
        """
        ...

    def check_machine(self, resolved: Resolved, sizes: Sizes, clock: Clock) -> None:
        """Raise BuildError if this machine lacks the memory that `build` needs."""
        ...

    def verification_files(
        self, resolved: Resolved, engine: str, model: ir.Model, writer: BundleWriter
    ) -> VerificationFiles:
        """Write the graphs that the verification runs. `write_weights` has been called."""
        ...

    def build(
        self,
        resolved: Resolved,
        engine: str,
        model: ir.Model,
        sizes: Sizes,
        writer: BundleWriter,
        clock: Clock,
    ) -> Artifact:
        """Build the engine in `writer`. Raises BuildError, and UnsupportedError for an unsupported model."""
        ...
