"""Builds a TensorRT engine from an ONNX file in a process of its own; `tensorrt_child.py` is that process.

A TensorRT build can abort the process it runs in, and needs about three times the weights in memory, which
only the end of a process gives back. What `tensorrt-rtx` and `tensorrt` share is here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.compiler.progress import Progress
from llmc.passes import edit
from llmc.plugins.paged_attention.spec import BLOCK_SIZE
from llmc.runtime.batch import STEP_INPUTS
from llmc.runtime.errors import BuildError, UnsupportedError

if TYPE_CHECKING:
    import onnx_ir as ir

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # shapes at least, at best, at most
_INT32_MAX = 2**31 - 1
_KEPT = ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "SYSTEMROOT", "TEMP", "TMPDIR")
_WORK_PATH_LENGTH = 120  # of characters, where the temporary directory's path is shorter than that
_ERRORS = {"unsupported": UnsupportedError, "build": BuildError}


@dataclass(frozen=True)
class EngineLimits:
    """What a step of the engine may hold at most; the memory for activations grows with max_tokens.

    One profile from 1 to these covers prefill and decode: a second one, with static shapes, doubles the
    weights in the engine.
    """

    max_seq_len: int
    max_tokens: int = 8192
    max_sequences: int = 256
    max_logits: int = 1024


@dataclass(frozen=True)
class EngineJob:
    """What the child is asked to build. No compute capability: the library's portable engine."""

    library: str
    onnx: str
    plan: str
    profile: dict[str, Range]
    compute_capabilities: tuple[int, ...] = ()


@dataclass(frozen=True)
class BuiltEngine:
    """What the child built. `attention_layers`: plugin nodes; `peak_bytes`: the child's memory."""

    plan_bytes: int
    plan_sha256: str
    attention_layers: int
    library_version: str
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0


def memory_needed(weight_bytes: int) -> int:
    """Bytes that a build takes at its peak, for 16-bit weights (measured with Qwen3-0.6B's shape)."""
    return (300 << 20) + int(2.2 * weight_bytes)


def profile(model: ir.Model, limits: EngineLimits) -> dict[str, Range]:
    """Graph input -> its shapes at least, at best, at most. Raises BuildError for an unknown input."""
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
    for value in model.graph.inputs:
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
    """The most blocks that a cache can have: TensorRT counts a tensor's elements in 32 bits."""
    size = 1
    for dim in list(cache.shape or [])[1:]:
        size *= int(dim)  # type: ignore[arg-type]
    return _INT32_MAX // size


def is_installed(library: str) -> bool:
    """Whether `import library` would find TensorRT, without loading its 200 MB."""
    return importlib.util.find_spec(library) is not None


def build(job: EngineJob, progress: Progress) -> BuiltEngine:
    """Builds the engine file `job.plan`.

    Raises UnsupportedError for what this TensorRT cannot build, and BuildError when the build breaks; a
    failed build leaves no file.
    """
    with tempfile.TemporaryDirectory(prefix="llmc-tensorrt-") as scratch:
        try:
            return _run_child(job, progress, Path(scratch))
        except BaseException:
            Path(job.plan).unlink(missing_ok=True)
            raise


def _run_child(job: EngineJob, progress: Progress, scratch: Path) -> BuiltEngine:
    result: dict[str, Any] | None = None
    failure: dict[str, str] | None = None
    work = _work_directory(scratch, graph=Path(job.onnx).parent, engine=Path(job.plan).parent)
    near = replace(job, onnx=f"graph/{Path(job.onnx).name}", plan=f"engine/{Path(job.plan).name}")
    with open(scratch / "stderr", "w+b") as complaints:
        child = subprocess.Popen(
            [sys.executable, "-m", "llmc.compiler.targets.tensorrt.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env=_environment(job.library, scratch),
            cwd=work,
        )
        assert child.stdin and child.stdout
        try:
            with child.stdin as stdin:
                stdin.write(json.dumps(asdict(near)))
            for line in child.stdout:
                message = json.loads(line)
                if "done" in message:
                    progress.bar(message["done"], message["total"])
                elif "note" in message:
                    progress.note(message["note"])
                elif "error" in message:
                    failure = message
                else:
                    result = message
            code = child.wait()
        except BrokenPipeError:
            code = child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        complaints.seek(0)
        last = complaints.read().decode(errors="replace").strip().splitlines()[-1:]
    if failure is not None:
        raise _ERRORS[failure["kind"]](failure["error"], failure["hint"])
    if code != 0 or result is None:
        raise _death(code, last[0] if last else "no message")
    return BuiltEngine(**result)


def _work_directory(scratch: Path, **links: Path) -> Path:
    """A directory with these links, whose own path has the same length wherever the bundle is written.

    The lengths of paths that TensorRT handles move addresses, and addresses show in the engine
    (`tensorrt_child._fix_addresses`): of 200 lengths of a bundle's path, about one in ten gave other bytes.
    """
    work = scratch / "_".ljust(_WORK_PATH_LENGTH - len(str(scratch)) - 1, "_")
    work.mkdir()
    for name, target in links.items():
        (work / name).symlink_to(target.absolute(), target_is_directory=True)
    return work


def _death(code: int, last: str) -> BuildError:
    if code < 0:
        memory = -code == signal.SIGKILL
        return BuildError(
            f"the TensorRT process was killed by signal {-code} ({signal.strsignal(-code)}): {last}",
            "it may have run out of memory: a build takes about 2.5 times the size of the weights"
            if memory
            else "TensorRT itself crashed; please report this with the model's config.json",
        )
    return BuildError(f"the TensorRT process failed with exit code {code}: {last}", "please report this")


def _environment(library: str, scratch: Path) -> dict[str, str]:
    """The child's environment: little of ours, because its size moves addresses, and they show in the engine
    (`tensorrt_child._fix_addresses`).

    RTX's parser opens `libtensorrt_rtx.so` by that name as soon as a graph has a plugin, and aborts when it
    is not found; its wheel (1.7.1) brings `libtensorrt_rtx.so.1` only.
    """
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    environment |= {"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"}
    if path := os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path.split(os.pathsep)))
    packaged = importlib.util.find_spec(f"{library}_libs")
    for place in (packaged.submodule_search_locations or []) if packaged else []:
        versioned, plain = Path(place, f"lib{library}.so.1"), scratch / f"lib{library}.so"
        if versioned.exists() and not (versioned.parent / plain.name).exists():
            plain.symlink_to(versioned)
            paths = [str(scratch), environment.get("LD_LIBRARY_PATH", "")]
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    return environment
