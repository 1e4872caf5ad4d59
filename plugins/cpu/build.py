"""Compile the CPU engine, one library for each instruction set.

`python plugins/cpu/build.py` writes `plugins/cpu/lib/`. setup.py calls it when the package is built. The
compiler is zig's clang, from the PyPI package `ziglang`, which is a build requirement, or the clang in the
environment variable CC. The same sources and the same compiler give the same bytes.
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
        "x86_64_v4+avx512vnni+amx_tile+amx_int8",
        "-march=x86-64-v4 -mavx512vnni -mamx-tile -mamx-int8",
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


def compile_libraries(output: Path = LIBRARIES) -> list[Path]:
    """Compile the libraries that are older than the sources. CC compiles those of this architecture only.

    output: the directory of the libraries.
    Returns the paths that were written.
    Raises FileNotFoundError if there is no compiler, and subprocess.CalledProcessError if it fails.
    """
    output.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in SOURCES)
    written = []
    for name, (target, cpu, march) in TARGETS.items():
        if compiler := os.environ.get("CC"):
            if not name.startswith(platform.machine()):
                continue
            command = [*shlex.split(compiler), *FLAGS, *march.split()]
        elif importlib.util.find_spec("ziglang"):
            command = [sys.executable, "-m", "ziglang", "cc", *FLAGS, "-target", target, f"-mcpu={cpu}"]
        else:
            raise FileNotFoundError("there is no compiler: install ziglang, or set CC to a clang")
        path = output / f"{name}.so"
        if path.exists() and path.stat().st_mtime > newest:
            continue
        subprocess.run([*command, str(HERE / "engine.c"), "-o", str(path)], check=True)
        written.append(path)
    return written


if __name__ == "__main__":
    for library in compile_libraries():
        print(library)
