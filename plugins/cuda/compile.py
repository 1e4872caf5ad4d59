"""Compiles Triton kernels to cubin and PTX, without a GPU, and keeps them in a directory.

Registers and spills are what ptxas says (`-v`) while it makes the cubin; shared memory is Triton's figure
for the launch (dynamic shared memory), checked against what the SM has.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc.plugins.cuda.config import Config
from llmc.plugins.cuda.gpus import SHARED_LIMIT


class CompileError(RuntimeError):
    """A kernel that cannot be compiled, or that would not fit the GPU."""


@dataclass(frozen=True)
class Kernel:
    """A compiled variant. Launch it with num_warps * 32 threads and `shared_memory` bytes of dynamic shared
    memory (above 48 KiB only after cuFuncSetAttribute); its parameters are `signature`, in order, and two
    null pointers for scratch memory that these kernels do not use."""

    name: str
    sm: int
    cubin: bytes
    ptx: bytes
    shared_memory: int
    num_warps: int
    registers: int
    spills: int  # bytes a thread stores to and loads from local memory
    signature: dict[str, str]


def compile_source(
    function: Any, name: str, types: Mapping[str, str], config: Config, sm: int, cache: Path
) -> Kernel:
    """The kernel from `cache` (a directory), or compiled and put there.

    function: a `triton.jit` function; name: what messages call it; types: its run-time arguments. The key is
    the hash of the file that the function is in, Triton's version, all arguments of this call and the SM.
    The result is the same for every place on disk that the package is installed at. Raises CompileError.
    """
    stem = cache / cache_key(function, name, types, config, sm)
    found = _read(stem)
    if found is None:
        found = _compile(function, name, types, config, sm)
        _write(stem, found)
    return found


def cache_key(function: Any, name: str, types: Mapping[str, str], config: Config, sm: int) -> str:
    """The name of the kernel's files in a cache: see `compile_source`."""
    import triton

    file = Path(function.fn.__code__.co_filename)
    parts = [
        hashlib.sha256(file.read_bytes()).hexdigest(), triton.__version__, function.fn.__name__, name,
        list(types.items()), asdict(config), sm,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _compile(function: Any, name: str, types: Mapping[str, str], config: Config, sm: int) -> Kernel:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise CompileError("TRITON_INTERPRET is set: kernels of this process cannot be compiled")
    aligned: dict[tuple[int, ...], Any] = {
        (i,): [["tt.divisibility", 16]] for i, type_ in enumerate(types.values()) if type_.startswith("*")
    }
    constants = {n: bool(c) if isinstance(c, bool) else int(c) for n, c in config.constants.items()}
    source = ASTSource(function, dict(types) | dict.fromkeys(constants, "constexpr"), constants, aligned)
    options = {
        "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
    with _quiet_triton() as log:
        try:
            built: Any = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
        except Exception as error:
            raise CompileError(f"{name} for SM{sm}: {error}") from error
    made = built.metadata
    if made.shared > SHARED_LIMIT[sm]:
        raise CompileError(
            f"{name} wants {made.shared} bytes of shared memory; SM{sm} has {SHARED_LIMIT[sm]}"
        )
    if made.global_scratch_size or made.profile_scratch_size:
        raise CompileError(f"{name} for SM{sm} wants scratch memory, which the launcher does not give")
    registers, spills = _ptxas_figures(log.getvalue())
    return Kernel(
        name=made.name, sm=sm, cubin=built.asm["cubin"], ptx=built.asm["ptx"].encode(),
        shared_memory=made.shared, num_warps=made.num_warps, registers=registers, spills=spills,
        signature=dict(types),
    )  # fmt: skip


@contextlib.contextmanager
def _quiet_triton() -> Iterator[io.StringIO]:
    """Triton with a cache of its own, no line information (it holds paths), and ptxas's log caught."""
    from triton import knobs

    log = io.StringIO()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for group in (knobs.cache, knobs.compilation, knobs.nvidia):
            stack.enter_context(group.scope())
        stack.enter_context(contextlib.redirect_stdout(log))
        knobs.cache.dir = folder
        knobs.compilation.disable_line_info = True
        knobs.nvidia.dump_ptxas_log = True
        yield log


def _ptxas_figures(log: str) -> tuple[int, int]:
    used = re.search(r"Used (\d+) registers", log)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if used is None or spilled is None:
        raise CompileError(f"ptxas did not say how many registers it used: {log.strip()!r}")
    return int(used[1]), int(spilled[1]) + int(spilled[2])


def _read(stem: Path) -> Kernel | None:
    """A cached kernel; None where there is none, or where its files do not match its record."""
    try:
        record = json.loads(stem.with_suffix(".json").read_text())
        code = {kind: stem.with_suffix(f".{kind}").read_bytes() for kind in ("cubin", "ptx")}
        if any(hashlib.sha256(code[kind]).hexdigest() != record.pop(f"{kind}_sha256") for kind in code):
            return None
        return Kernel(cubin=code["cubin"], ptx=code["ptx"], **record)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(stem: Path, kernel: Kernel) -> None:
    """The record last, each file renamed when whole: a reader sees all of a kernel or none."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    record = asdict(kernel)
    code = {kind: record.pop(kind) for kind in ("cubin", "ptx")}
    record |= {f"{kind}_sha256": hashlib.sha256(data).hexdigest() for kind, data in code.items()}
    files = {**code, "json": (json.dumps(record, indent=1) + "\n").encode()}
    for kind, data in files.items():
        target = stem.with_suffix(f".{kind}")
        part = target.with_suffix(f".{kind}.{os.getpid()}")
        part.write_bytes(data)
        part.replace(target)
