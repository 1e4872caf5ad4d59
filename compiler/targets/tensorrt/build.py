"""Build a TensorRT engine from an ONNX file in a child process (`child.py`).

A TensorRT build can abort its process. It also needs two to three times the size of the weights in memory,
which is only freed when the process ends. The targets `tensorrt-rtx` and `tensorrt` share this file.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.compiler.child_process import Child
from llmc.compiler.progress import Progress
from llmc.compiler.targets.tensorrt.errors import REPORT
from llmc.passes import edit
from llmc.passes.shard.stages import unread_inputs
from llmc.plugins.paged_attention.spec import BLOCK_SIZE
from llmc.runtime.batch import STEP_INPUTS
from llmc.runtime.errors import BuildError

if TYPE_CHECKING:
    import onnx_ir as ir

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # smallest, best and largest shape
_INT32_MAX = 2**31 - 1
# Environment variables that the child inherits.
_KEPT = ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "SYSTEMROOT", "TEMP", "TMPDIR")
_WORK_PATH_LENGTH = 120  # characters; longer only if the path of the temporary directory is longer
_CHILD = Child(
    "llmc.compiler.targets.tensorrt.child",
    "TensorRT",
    out_of_memory="a build takes about 2.5 times the size of the weights",
    crashed=f"TensorRT itself crashed; {REPORT}",
)


@dataclass(frozen=True)
class EngineLimits:
    """The largest step of the engine. The memory for activations grows with `max_tokens`.

    One optimization profile from 1 to these limits covers prefill and decode. A second one, with static
    shapes, would double the weights in the engine.
    """

    #: Tokens of a sequence: prompt and answer together.
    max_seq_len: int
    #: Tokens in a step, over all sequences.
    max_tokens: int = 8192
    #: Sequences in a step.
    max_sequences: int = 256
    #: Positions in a step whose logits are computed.
    max_logits: int = 1024


@dataclass(frozen=True)
class EngineJob:
    """The task of the child process.

    library: the Python module, tensorrt or tensorrt_rtx
    onnx: the graph file, with its weights beside it
    plan: the engine file to write
    profile: graph input -> its smallest, best and largest shape
    compute_capabilities: the GPUs to build for, such as 89; empty: the library's default
    """

    library: str
    onnx: str
    plan: str
    profile: dict[str, Range]
    compute_capabilities: tuple[int, ...] = ()


@dataclass(frozen=True)
class BuiltEngine:
    """The result of the child process.

    plan_bytes: the size of the engine file
    plan_sha256: the hash of the engine file
    attention_layers: the number of attention plugins in the network
    collectives: the number of collectives and transfers in the network
    library_version: the version of TensorRT
    seconds: phase -> its duration
    peak_bytes: the peak memory of the child process
    """

    plan_bytes: int
    plan_sha256: str
    attention_layers: int
    collectives: int
    library_version: str
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0


def memory_needed(weight_bytes: int) -> int:
    """Return the peak memory of a build in bytes, for 16-bit weights (measured with Qwen3-0.6B's shape)."""
    return (300 << 20) + int(2.2 * weight_bytes)


def profile(model: ir.Model, limits: EngineLimits) -> dict[str, Range]:
    """Return graph input -> its smallest, best and largest shape. Raises BuildError for an unknown input."""
    tables = limits.max_sequences * -(-limits.max_seq_len // BLOCK_SIZE)
    most = {
        "T": limits.max_tokens,
        "N": min(limits.max_logits, limits.max_tokens),
        "S": limits.max_sequences,
        "n": tables,
        "blocks": min(_blocks(value) for value in model.graph.inputs if "_cache." in str(value.name)),
    }
    least = dict.fromkeys(most, 1) | {"S_plus_1": 2}
    best = {name: min(16, size) for name, size in most.items()} | {
        "S_plus_1": min(17, limits.max_sequences + 1)
    }
    most["S_plus_1"] = limits.max_sequences + 1
    ranges: dict[str, Range] = {}
    unread = unread_inputs(model)
    for value in model.graph.inputs:
        if value.name in unread:
            continue
        axis = "blocks" if "_cache." in str(value.name) else STEP_INPUTS.get(str(value.name))
        first, *rest = edit.dims(value)
        if axis is None or first != -1 or -1 in rest:
            raise BuildError(
                f"graph input {value.name} has an axis that no limit covers", "please report this"
            )
        low, mid, high = ((sizes[axis], *rest) for sizes in (least, best, most))
        ranges[str(value.name)] = (low, mid, high)
    return ranges


def _blocks(cache: ir.Value) -> int:
    """Return the largest number of blocks of a KV cache. TensorRT counts a tensor's elements in 32 bits."""
    size = 1
    for dim in list(cache.shape or [])[1:]:
        size *= int(dim)  # type: ignore[arg-type]
    return _INT32_MAX // size


def is_installed(library: str) -> bool:
    """Return whether the module `library` is installed, without loading its 200 MB."""
    return importlib.util.find_spec(library) is not None


def build(job: EngineJob, progress: Progress) -> BuiltEngine:
    """Build the engine file `job.plan`. A failed build leaves no file.

    Raises UnsupportedError for a model or GPU that this TensorRT does not support, and BuildError if the
    build fails.
    """
    with tempfile.TemporaryDirectory(prefix="llmc-tensorrt-") as scratch:
        try:
            return _run_child(job, progress, Path(scratch))
        except BaseException:
            Path(job.plan).unlink(missing_ok=True)
            raise


def _run_child(job: EngineJob, progress: Progress, scratch: Path) -> BuiltEngine:
    work = _work_directory(scratch, graph=Path(job.onnx).parent, engine=Path(job.plan).parent)
    linked = replace(job, onnx=f"graph/{Path(job.onnx).name}", plan=f"engine/{Path(job.plan).name}")
    return BuiltEngine(**_CHILD.run(asdict(linked), progress, _environment(job.library, scratch), work))


def _work_directory(scratch: Path, **links: Path) -> Path:
    """Make a directory with symbolic links, whose path has the same length wherever the bundle is written.

    links: name of the link -> target

    TensorRT's engine depends on memory addresses (`child._fix_addresses`), and these depend on the lengths of
    the paths that TensorRT handles. Of 200 lengths of a bundle's path, about one in ten changed the engine.
    """
    work = scratch / "_".ljust(_WORK_PATH_LENGTH - len(str(scratch)) - 1, "_")
    work.mkdir()
    for name, target in links.items():
        (work / name).symlink_to(target.absolute(), target_is_directory=True)
    return work


def _environment(library: str, scratch: Path) -> dict[str, str]:
    """Return the environment of the child process.

    It has few variables because its size changes memory addresses, on which the engine depends
    (`child._fix_addresses`).

    For a graph with a plugin, TensorRT-RTX's parser opens `libtensorrt_rtx.so` by that name, and aborts if it
    is not found. The wheel (1.7.1) only has `libtensorrt_rtx.so.1`, so `scratch` gets a link to it.
    """
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    environment["PYTHONHASHSEED"] = "0"
    packaged = importlib.util.find_spec(f"{library}_libs")
    for place in (packaged.submodule_search_locations or []) if packaged else []:
        versioned, plain = Path(place, f"lib{library}.so.1"), scratch / f"lib{library}.so"
        if versioned.exists() and not (versioned.parent / plain.name).exists():
            plain.symlink_to(versioned)
            paths = [str(scratch), environment.get("LD_LIBRARY_PATH", "")]
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    return environment
