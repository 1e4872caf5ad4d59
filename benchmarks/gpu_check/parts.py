"""The parts of the check, each in separate processes.

A fault on a GPU destroys the CUDA context of its process, and a kernel may never end. Neither affects the
other parts. A process writes every result as a line of JSON at once, so that a crash loses no results.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .options import Options, Row, failure

_TAIL = 1500  # characters of a failed process's log that the report shows


@dataclass(frozen=True)
class Part:
    """A part: `module.rows(options, *arguments)` yields its results."""

    name: str
    #: A module of this package.
    module: str
    #: Maximum seconds.
    limit: float
    arguments: tuple[Any, ...] = ()
    #: Number of processes that share the work.
    processes: int = 1


PARTS = (
    Part("correctness", "correctness", 200, processes=max(1, min(6, (os.cpu_count() or 2) // 2))),
    Part("ceilings", "ceilings", 60),
    Part("speed", "speed", 180, (("llmc", "torch sdpa"),)),
    Part("CUDA graph", "graph", 60),
    Part("ahead of time", "aot", 90),
    Part("runtime", "runtime", 90, processes=max(1, min(4, (os.cpu_count() or 2) // 2))),
    Part("TensorRT engine", "tensorrt_try", 120),
    Part("flash-attn", "speed", 60, (("flash-attn",),)),
    Part("FlashInfer", "speed", 90, (("flashinfer",),)),  # last: it may compile for long
)


def work(name: str, options: Options, file: Path) -> None:
    """Run a part in this process, and append its results to `file`."""
    (part,) = (p for p in PARTS if p.name == name)
    with file.open("a") as out:
        for row in _rows(part, options):
            print(json.dumps(row), file=out, flush=True)


def _rows(part: Part, options: Options) -> Iterator[Row]:
    try:
        module = importlib.import_module(f".{part.module}", __package__)
        yield from module.rows(options, *part.arguments)
    except Exception as error:
        yield failure(part.name, error)


def run_part(part: Part, options: Options, seconds_left: float) -> dict[str, Any]:
    """Run a part to its end or its limit. Return its status, seconds and rows."""
    limit = min(part.limit, seconds_left)
    if limit < 1:
        return {"status": "failed", "seconds": 0.0, "error": "not run: no time was left", "rows": []}
    begin = time.perf_counter()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if part.processes > 1:  # the reference's threads would compete for cores
        environment["OMP_NUM_THREADS"] = environment["OPENBLAS_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for index in range(part.processes):
            process_options = dataclasses.replace(options, share=(index, part.processes))
            file, log = Path(folder) / f"{index}.jsonl", Path(folder) / f"{index}.log"
            request = json.dumps([part.name, dataclasses.asdict(process_options), str(file)])
            command = [sys.executable, str(Path(__file__).parent), "--worker", request]
            with log.open("wb") as said:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment
                )
            started.append((process, file, log))
        rows, errors = [], []
        try:
            for process, file, log in started:
                error = _end(process, begin + limit, limit, log)
                rows += read_rows(file)
                errors += [error] if error else []
        finally:
            for process, _, _ in started:  # also after Ctrl-C
                process.kill()
                process.wait()
    result: dict[str, Any] = {"seconds": round(time.perf_counter() - begin, 1), "rows": rows}
    statuses = {row["status"] for row in rows}
    if errors or not rows:
        return {"status": "failed", "error": "; ".join(dict.fromkeys(errors)) or "no results", **result}
    status = "failed" if "failed" in statuses else "absent" if statuses == {"absent"} else "passed"
    return {"status": status, **result}


def _end(process: subprocess.Popen[bytes], deadline: float, limit: float, log: Path) -> str:
    """Wait for a process. Return what went wrong, or ""."""
    try:
        code = process.wait(max(0.0, deadline - time.perf_counter()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"stopped after {limit:.0f} s"
    if code == 0:
        return ""
    tail = log.read_bytes().decode(errors="replace").strip()[-_TAIL:]
    return f"a process ended with {code}: {tail}"


def read_rows(file: Path) -> list[Row]:
    """Return the complete rows of a file. A process that was stopped may have left an incomplete line."""
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
