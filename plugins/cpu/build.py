"""Compile the CPU engine, one library for each instruction set.

`python plugins/cpu/build.py` writes `plugins/cpu/lib/`. setup.py calls it when the package is built. The
compiler is zig's clang, from the PyPI package `ziglang`, which is a build requirement, or the clang in the
environment variable CC. The same sources and the same compiler give the same bytes.

`python plugins/cpu/build.py --sanitize DIR` writes libraries for this machine with AddressSanitizer and
UndefinedBehaviorSanitizer. `make sanitize` tests them.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
LIBRARIES = HERE / "lib"
SOURCES = sorted([Path(__file__), *HERE.glob("*.[ch]"), *HERE.parent.glob("*/cpu/*.c")])
# Name of the library -> zig's target and CPU, and clang's flag for that CPU.
TARGETS = {
    "x86_64-amx": (
        "x86_64-linux-none",
        "x86_64_v4+avx512vnni+gfni+amx_tile+amx_int8",
        "-march=x86-64-v4 -mavx512vnni -mgfni -mamx-tile -mamx-int8",
    ),
    "x86_64-avx512vnni": ("x86_64-linux-none", "x86_64_v4+avx512vnni", "-march=x86-64-v4 -mavx512vnni"),
    "x86_64-avxvnni": ("x86_64-linux-none", "x86_64_v3+avxvnni", "-march=x86-64-v3 -mavxvnni"),
    "x86_64-avx2": ("x86_64-linux-none", "x86_64_v3", "-march=x86-64-v3"),
    "aarch64-i8mm": (
        "aarch64-linux-none",
        "generic+dotprod+i8mm+fullfp16",
        "-march=armv8.2-a+dotprod+i8mm+fp16",
    ),
    "aarch64-dotprod": ("aarch64-linux-none", "generic+dotprod+fullfp16", "-march=armv8.2-a+dotprod+fp16"),
}
# No C library is linked, so one file serves every Linux. The flags keep the output reproducible.
FLAGS = [
    "-O3",
    "-std=gnu11",
    "-shared",
    "-nostdlib",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-g0",
    "-s",
    "-Wl,--build-id=none",
    "-D__MM_MALLOC_H",
    "-DLLMC_FREESTANDING",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unused-function",
]

# With sanitizers. Their runtimes, libasan.so and libubsan.so, come with the process that loads the library.
# The linker drops zig's own runtime, so compiling and linking are two commands.
SANITIZED = [
    *("-O1", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-g"),
    *("-fsanitize=address", "-fsanitize=undefined", "-fno-sanitize-recover=all"),
    *("-fno-stack-protector", "-fno-omit-frame-pointer", "-D__MM_MALLOC_H", "-DLLMC_FREESTANDING"),
]


def compiler(name: str, libc: str = "none") -> list[str] | None:
    """Return the command that compiles C for the library `name`. None: CC is for another architecture.

    libc: of zig's target: "none" or "gnu".
    Raises FileNotFoundError if there is no compiler.
    """
    target, cpu, march = TARGETS[name]
    if command := os.environ.get("CC"):
        return [*shlex.split(command), *march.split()] if name.startswith(platform.machine()) else None
    if not importlib.util.find_spec("ziglang"):
        raise FileNotFoundError("there is no compiler: install ziglang, or set CC to a clang")
    target = target.replace("-none", f"-{libc}")
    return [sys.executable, "-m", "ziglang", "cc", "-target", target, f"-mcpu={cpu}"]


def compile_libraries(output: Path = LIBRARIES) -> list[Path]:
    """Compile the libraries that are older than the sources. CC compiles those of this architecture only.

    output: the directory of the libraries.
    Returns the paths that were written.
    Raises FileNotFoundError if there is no compiler, and subprocess.CalledProcessError if it fails.
    """
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name in TARGETS:
        command, path = compiler(name), output / f"{name}.so"
        if command is None or _is_new(path):
            continue
        subprocess.run([*command, *FLAGS, str(HERE / "engine.c"), "-o", str(path)], check=True)
        written.append(path)
    return written


def compile_sanitized(output: Path) -> list[Path]:
    """Compile the libraries of this architecture with sanitizers. See `compile_libraries`."""
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name in TARGETS:
        command, path = compiler(name, "gnu"), output / f"{name}.so"
        if command is None or not name.startswith(platform.machine()) or _is_new(path):
            continue
        compiled = str(path.with_suffix(".o"))
        subprocess.run([*command, *SANITIZED, "-c", str(HERE / "engine.c"), "-o", compiled], check=True)
        subprocess.run([*command, "-shared", "-nostdlib", compiled, "-o", str(path)], check=True)
        written.append(path)
    return written


def _is_new(library: Path) -> bool:
    newest = max(path.stat().st_mtime for path in SOURCES)
    return library.exists() and library.stat().st_mtime > newest


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--sanitize"] and len(arguments) == 2:
        libraries = compile_sanitized(Path(arguments[1]))
    elif not arguments:
        libraries = compile_libraries()
    else:
        sys.exit("usage: build.py [--sanitize DIRECTORY]")
    for library in libraries:
        print(library)
