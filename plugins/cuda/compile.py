"""Compile Triton kernels to cubin and PTX, without a GPU, and cache them in a directory.

ptxas reports registers and spills (`-v`) when it makes the cubin. Triton reports the dynamic shared memory of
a launch, which is checked against the SM's limit.
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
    """A kernel cannot be compiled, or does not fit the GPU."""


@dataclass(frozen=True)
class Kernel:
    """A compiled variant.

    Launch it with num_warps * 32 threads and `shared_memory` bytes of dynamic shared memory. More than 48 KiB
    need cuFuncSetAttribute. The parameters are `signature`, in order, and two null pointers for scratch
    memory, which these kernels do not use.
    """

    #: The name of the kernel in the cubin and in the PTX.
    name: str
    #: The compute capability that the kernel was compiled for.
    sm: int
    cubin: bytes
    ptx: bytes
    #: Dynamic shared memory in bytes.
    shared_memory: int
    num_warps: int
    #: Registers per thread.
    registers: int
    #: Bytes that a thread stores to and loads from local memory.
    spills: int
    #: Run-time argument -> Triton type.
    signature: dict[str, str]


def compile_source(
    function: Any, name: str, types: Mapping[str, str], config: Config, sm: int, cache: Path | None
) -> Kernel:
    """Return the kernel from the directory `cache`, or compile it and store it there.

    function: a `triton.jit` function.
    name: the variant's name, for messages.
    types: the run-time arguments -> their Triton types.
    cache: None, or a directory that cannot be written: the kernel is compiled and not stored.
    The cache key is the hash of the file that defines the function, Triton's version and the other arguments.
    The result does not depend on the directory in which the package is installed.
    Raises CompileError.
    """
    if cache is None:
        return _compile(function, name, types, config, sm)
    stem = cache / cache_key(function, name, types, config, sm)
    kernel = _read(stem)
    if kernel is None:
        kernel = _compile(function, name, types, config, sm)
        with contextlib.suppress(OSError):
            _write(stem, kernel)
    return kernel


def cache_key(function: Any, name: str, types: Mapping[str, str], config: Config, sm: int) -> str:
    """Return the name of the kernel's files in a cache. See `compile_source`."""
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
    metadata = built.metadata
    if metadata.shared > SHARED_LIMIT[sm]:
        raise CompileError(
            f"{name} wants {metadata.shared} bytes of shared memory; SM{sm} has {SHARED_LIMIT[sm]}"
        )
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise CompileError(f"{name} for SM{sm} wants scratch memory, which the launcher does not give")
    registers, spills = _ptxas_figures(log.getvalue())
    return Kernel(
        name=metadata.name, sm=sm, cubin=built.asm["cubin"], ptx=built.asm["ptx"].encode(),
        shared_memory=metadata.shared, num_warps=metadata.num_warps, registers=registers, spills=spills,
        signature=dict(types),
    )  # fmt: skip


@contextlib.contextmanager
def _quiet_triton() -> Iterator[io.StringIO]:
    """Give Triton a temporary cache, omit line information, which holds paths, and yield the log of ptxas."""
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
    """Return a cached kernel, or None if there is none or if its files do not match its record."""
    try:
        record = json.loads(stem.with_suffix(".json").read_text())
        code = {kind: stem.with_suffix(f".{kind}").read_bytes() for kind in ("cubin", "ptx")}
        if any(hashlib.sha256(code[kind]).hexdigest() != record.pop(f"{kind}_sha256") for kind in code):
            return None
        return Kernel(cubin=code["cubin"], ptx=code["ptx"], **record)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(stem: Path, kernel: Kernel) -> None:
    """Write the files of a kernel atomically, the record last, so that a reader sees all of them or none."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    record = asdict(kernel)
    code = {kind: record.pop(kind) for kind in ("cubin", "ptx")}
    record |= {f"{kind}_sha256": hashlib.sha256(data).hexdigest() for kind, data in code.items()}
    files = {**code, "json": (json.dumps(record, indent=1) + "\n").encode()}
    for kind, data in files.items():
        target = stem.with_suffix(f".{kind}")
        part = target.with_suffix(f".{kind}.{os.getpid()}")
        try:
            part.write_bytes(data)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
