"""The protocol of all workers: JSON lines on stdin and stdout, with one operation, `generate`.

A worker file passes `load(model, threads) -> Tool` to `main`. It is started as

    python WORKER.py serve MODEL --threads N            a persistent worker, driven by peers.py
    python WORKER.py first MODEL --threads N TEXT       a fresh process that prints one token and ends
    python WORKER.py convert CHECKPOINT MODEL           writes the tool's model format (not every tool)

This file uses the standard library only, because every peer's interpreter imports it.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

HEAVY_MODULES = ("torch", "transformers", "onnx", "onnxruntime", "openvino")


class Tool(Protocol):
    """A loaded model."""

    #: Its precision and options, for the report.
    describe: dict[str, Any]

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generation:
        """Continue all prompts at once, greedily, by exactly `new_tokens` each. EOS does not end them."""


class Generation:
    """The tokens of each request and their times, in seconds since the requests started."""

    def __init__(self, requests: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(requests)]
        self.times: list[list[float]] = [[] for _ in range(requests)]
        self.extra: dict[str, float] = {}
        self._start = time.perf_counter()

    def now(self) -> float:
        """Return the seconds since the requests started."""
        return time.perf_counter() - self._start

    def emit(self, request: int, token: int, at: float) -> None:
        """Record a token of a request."""
        self.tokens[request].append(token)
        self.times[request].append(at)

    def as_json(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "times": self.times, "extra": self.extra}


def memory() -> dict[str, int]:
    """Return this process's peak RSS and its resident anonymous and file pages, in bytes (Linux)."""
    names = {"VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "file"}
    sizes = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in names:
            sizes[names[key]] = int(value.split()[0]) * 1024
    return sizes


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    installed = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def size_of(model: Path) -> int:
    """Return the bytes of all files of a model."""
    return sum(path.stat().st_size for path in model.rglob("*") if path.is_file())


def _serve(load: Callable[[Path, int], Tool], model: Path, threads: int, packages: tuple[str, ...]) -> None:
    # Otherwise a stopped worker would stay when its driver is killed (Linux: PR_SET_PDEATHSIG is 1).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # Libraries print to stdout, so replies go to a private copy of it.
    replies: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    idle = memory()  # the libraries are loaded, the model is not
    started = time.perf_counter()
    tool = load(model, threads)
    seconds = time.perf_counter() - started
    tool.generate([list(range(300, 308))], 1)  # some unpack or pack the weights only now
    reply(
        {
            "load_seconds": seconds,
            "versions": versions(*packages),
            "describe": tool.describe,
            "imported": [name for name in HEAVY_MODULES if name in sys.modules],
            "idle_memory": idle,
            "load_memory": memory(),
            "model_bytes": size_of(model),
        }
    )
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "generate":
            generation = tool.generate(request["prompts"], request["new_tokens"])
            reply(generation.as_json() | {"memory": memory()})
        else:
            reply({"error": f"unknown op {request['op']!r}"})


def main(
    load: Callable[[Path, int], Tool],
    first: Callable[[Path, int, str], str] | None = None,
    convert: Callable[[Path, Path], None] | None = None,
    packages: tuple[str, ...] = (),
) -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("serve", "first"):
        command = commands.add_parser(name)
        command.add_argument("model", type=Path)
        command.add_argument("--threads", type=int, required=True)
        if name == "first":
            command.add_argument("text")
    command = commands.add_parser("convert")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("model", type=Path)
    arguments = parser.parse_args()

    if arguments.command == "serve":
        _serve(load, arguments.model, arguments.threads, packages)
    elif arguments.command == "first" and first is not None:
        print(json.dumps({"text": first(arguments.model, arguments.threads, arguments.text)}), flush=True)
    elif arguments.command == "convert" and convert is not None:
        convert(arguments.checkpoint, arguments.model)
        print("converted", flush=True)
    else:
        parser.error(f"this tool has no {arguments.command!r}")
