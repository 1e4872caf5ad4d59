"""A target of `llmc build`: resolve the request, legalize the graph, stand in for the engine, build it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.progress import Clock
from llmc.compiler.request import BuildRequest
from llmc.runtime.bundle.manifest import Gpu
from llmc.runtime.bundle.manifest import Target as EngineTarget

if TYPE_CHECKING:
    import onnx_ir as ir

    from llmc.passes.contract import Pass

GRAPH_FILE = "rank0.onnx"  # beside weights/: ONNX allows external data below the graph's directory only


@dataclass(frozen=True)
class Resolved:
    """The request, resolved for one target and one checkpoint."""

    #: A name in `request.TARGETS`.
    target: str
    #: What the engine computes in: "fp32", "bf16" or "fp16".
    dtype: str
    #: What the KV cache holds, as the manifest names it.
    kv_dtype: str
    #: Compute capabilities of the GPUs, 89 for 8.9; none for a CPU and for a portable engine.
    sms: tuple[int, ...] = ()
    #: The engine that the user asked for; None: the target chooses.
    engine: str | None = None
    #: The format of lm_head where the other linear layers are quantized; None: it stays unquantized.
    head_format: str | None = None


@dataclass(frozen=True)
class Sizes:
    """Sizes of the engine."""

    #: Tokens of prompt and answer together.
    max_seq_len: int
    #: Bytes of the weights, without the file's header.
    weight_bytes: int
    #: Bytes of memory that the verification needs.
    verification_bytes: int


@dataclass(frozen=True)
class ProofFiles:
    """The graphs that the verification runs, as files of the bundle in work."""

    #: The engine itself, or the graph that stands in for it.
    graph: str
    #: The backend that runs them.
    backend: str
    #: What stands in for the engine, for the record; "": nothing does.
    stand_in: str = ""
    #: The same graph with its quantized KV cache; "": the cache is not quantized.
    kv_graph: str = ""
    #: In fp32, the same graph with its activation quantization, which `graph` lacks then; "": there is none.
    quantizing_graph: str = ""
    #: Files that the bundle does not keep.
    scratch: tuple[str, ...] = ()


@dataclass(frozen=True)
class Artifact:
    """A finished engine."""

    #: What the runtime loads.
    engine_file: str
    #: The weights files that the bundle keeps; none if the engine holds the weights itself.
    weights_files: tuple[str, ...] = ()
    #: How the weights are stored, for the manifest.
    weights_note: str = ""
    gpu: Gpu | None = None


class Target(Protocol):
    """One target. It has no state: every method gets what it needs."""

    def resolve(self, request: BuildRequest, checkpoint_dtype: str) -> Resolved:
        """Decide what `request` leaves open, for a checkpoint of `checkpoint_dtype` (torch's name).

        Raises UnsupportedError where the target never could build it, BuildError where this machine lacks
        something.
        """
        ...

    def choose_engine(self, resolved: Resolved, model: ir.Model) -> EngineTarget:
        """Choose what runs a quantized graph. Raises UnsupportedError where nothing does."""
        ...

    def legalize(
        self, resolved: Resolved, engine: str, model: ir.Model, tensors: Mapping[str, TensorRef]
    ) -> list[Pass]:
        """Return the passes that turn a quantized graph into the one that `engine` takes.

        model: the quantized graph, which stays unchanged. tensors: the checkpoint's.
        """
        ...

    def check_machine(self, sizes: Sizes, clock: Clock) -> None:
        """Raise BuildError if this machine lacks the memory that `build` needs."""
        ...

    def proof(self, resolved: Resolved, engine: str, model: ir.Model, work: BundleWriter) -> ProofFiles:
        """Write what the verification runs. The bundle has the graph (GRAPH_FILE) and the weights."""
        ...

    def build(
        self, resolved: Resolved, engine: str, model: ir.Model, sizes: Sizes, work: BundleWriter, clock: Clock
    ) -> Artifact:
        """Complete the engine. Raises BuildError, UnsupportedError."""
        ...
