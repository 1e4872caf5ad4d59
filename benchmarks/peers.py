#!/usr/bin/env python3
"""Compare llmc with its peers on one checkpoint, in one run, interleaved. See benchmarks/README.md.

    benchmarks/setup_peers.sh
    python benchmarks/peers.py CHECKPOINT --rounds 3 --json result.json

Run it with the interpreter that has llmc; it uses the standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from driver import HERE, Peer, PeerError, Worker, run_to_end
from report import heading, machine, table
from rounds import Record, Rules, measure_phases, measure_start
from workload import phases, ratios

TOOLS = ("llmc", "openvino-genai", "onnxruntime-genai", "transformers")
READS_CHECKPOINT = ("transformers",)
# The environment variables that a "+switch" sets for a worker.
RUNTIME = {
    "fast": ("FAST", "1"),
    "kv8": ("KV_CACHE", "int8"),
    "kv32": ("KV_CACHE", "f32"),
    "f32": ("ARITHMETIC", "f32"),
    "native": ("ENGINE", "native"),
    "openvino": ("ENGINE", "openvino"),
    "onnxruntime": ("ENGINE", "onnxruntime"),
}
WEIGHTS = {
    "llmc": ("int8", "int8-smoothquant", "int4", "int4-block128", "nvfp4-weight-only"),
    "openvino-genai": ("fp16", "int8", "int4"),
    "onnxruntime-genai": ("int4",),
    "llama-cpp": ("q8_0", "q4_0"),
}
ENGINES = ("native", "openvino", "onnxruntime")
SWITCHES = {"llmc": ("fast", "kv8", *ENGINES), "openvino-genai": ("f32", "kv32")}
BUILD_SWITCHES = {"llmc": ("kv8", *ENGINES)}  # the switches that the converted model depends on
TEXT = "Once upon a time there was a king who had three daughters, and the youngest of them"


def variant(tool: str) -> tuple[str, str, list[str]]:
    """Return the name, weight format and switches of NAME+x+y.

    The weight format is "" for the tool's fp32, or for that of the checkpoint. Raises PeerError.
    """
    name, *parts = tool.split("+")
    weights = [part for part in parts if part not in RUNTIME]
    switches = [part for part in parts if part in RUNTIME]
    known = [*WEIGHTS.get(name, ()), *SWITCHES.get(name, ())]
    variables = [RUNTIME[switch][0] for switch in switches]
    if len(weights) > 1 or len(set(variables)) < len(variables) or set(parts) - set(known):
        raise PeerError(f"no such variant; {name} knows {', '.join(known) or 'none'}")
    return name, "".join(weights), switches


def find_peer(tool: str, options: argparse.Namespace) -> Peer:
    """Return how to start the tool. Convert the checkpoint first if necessary. Raises PeerError."""
    python, worker = require_installed(tool.partition("+")[0])
    name, weights, switches = variant(tool)
    environment = [RUNTIME[switch] for switch in switches]
    if weights:
        environment.append(("WEIGHT_FORMAT", weights))
    if name in READS_CHECKPOINT:
        return Peer(tool, python, worker, options.checkpoint, options.threads, tuple(environment))
    fixed = [switch for switch in BUILD_SWITCHES.get(name, ()) if switch in switches]
    built_as = "+".join(part for part in (name, weights, *fixed) if part)
    model = options.work / f"{options.checkpoint.name}-{fingerprint(options.checkpoint)}" / built_as
    if name == "llmc":
        model = model.with_name(built_as + ".llmc")
        if built_as == name and options.bundle:
            model = options.bundle
    peer = Peer(tool, python, worker, model, options.threads, tuple(environment))
    if not model.exists():
        convert(peer, options)
    return peer


def require_installed(name: str) -> tuple[Path, Path]:
    """Return the interpreter and the worker of a tool. Raises PeerError if it is unknown or not installed."""
    worker = HERE / "peers" / f"{name.replace('-', '_')}_worker.py"
    if not worker.is_file():
        stems = (path.stem.removesuffix("_worker") for path in worker.parent.glob("*_worker.py"))
        known = ", ".join(sorted(stem.replace("_", "-") for stem in stems))
        raise PeerError(f"no such peer; known: {known}")
    python = Path(sys.executable) if name == "llmc" else HERE / ".venvs" / name / "bin" / "python"
    failed = HERE / ".venvs" / f"{name}.failed"
    if failed.is_file():
        raise PeerError("not installed: " + " ".join(failed.read_text().split()))
    if not python.exists():
        raise PeerError(f"not installed: run {HERE.name}/setup_peers.sh {name}")
    return python, worker


def convert(peer: Peer, options: argparse.Namespace) -> None:
    """Convert the checkpoint to `peer.model`, and record the time and memory beside it. Raises PeerError."""
    model = peer.model
    model.parent.mkdir(parents=True, exist_ok=True)
    unfinished = model.with_name("unfinished-" + model.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    say(f"{peer.name}: converting the checkpoint")
    built = run_to_end(
        peer.command("convert", str(options.checkpoint), str(unfinished)),
        peer.environ(),
        log_of(peer.name, options),
    )
    unfinished.rename(model)
    model.with_name(f"{model.name}.convert.json").write_text(json.dumps(built))


def fingerprint(checkpoint: Path) -> str:
    """Return a hash of the configuration, and of the size and modification time of the weight files."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.json")):
        digest.update(path.read_bytes())
    for path in sorted(checkpoint.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


def log_of(tool: str, options: argparse.Namespace) -> Path:
    """Return the file for the tool's stderr."""
    return Path(options.logs / f"{tool}.log")


def first_token_command(peer: Peer) -> list[str]:
    """Return the command of a fresh process that prints one token."""
    name, _, switches = variant(peer.name)
    if name == "llmc":
        limits = ["--max-tokens", "1", "--threads", str(peer.threads)]
        limits += ["--fast"] if "fast" in switches else []
        return [str(peer.python), "-m", "llmc", "run", str(peer.model), TEXT, *limits]
    return peer.command("first", str(peer.model), TEXT)


def heavy_imports(peer: Peer, log: Path) -> list[str]:
    """Return the large packages that the first-token command imports, from `-X importtime`."""
    command = first_token_command(peer)
    run_to_end([command[0], "-X", "importtime", *command[1:]], peer.environ(), log)
    names = {line.rpartition("|")[2].strip() for line in log.read_text(errors="replace").splitlines()}
    return sorted(names & {"torch", "transformers", "onnx", "onnxruntime", "openvino", "tensorrt"})


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all tools. Return everything that `--json` writes."""
    options.logs.mkdir(parents=True, exist_ok=True)
    peers: dict[str, Peer] = {}
    absent: dict[str, str] = {}
    for tool in options.tools:
        try:
            peers[tool] = find_peer(tool, options)
        except PeerError as error:
            absent[tool] = str(error)
            say(f"{tool}: absent: {error}")
    rules = Rules(options.rounds, options.wait_idle, options.retries)
    record = Record()
    try:
        _run(peers, rules, record, options)
    except (KeyboardInterrupt, SystemExit):
        record.failures["this run"] = "interrupted; the table holds what was measured until then"
    for known in record.tools.values():
        if known.get("step_seconds"):
            known["overhead_outside_the_engine_call"] = 1 - known["backend_seconds"] / known["step_seconds"]
    return {
        "machine": machine(),
        "command": sys.argv,
        "checkpoint": options.checkpoint.name,
        "threads": options.threads,
        "rounds": options.rounds,
        "phases": [vars(p) for p in options.phases],
        "reference": options.reference,
        "absent": absent,
        "failures": record.failures,
        "tools": record.tools,
        "samples": record.samples,
        "ratios": ratios(record.samples, options.reference),
    }


def _run(peers: dict[str, Peer], rules: Rules, record: Record, options: argparse.Namespace) -> None:
    if "start" in options.only:
        commands = {tool: (peer, first_token_command(peer)) for tool, peer in peers.items()}
        measure_start(commands, rules, record, options.logs, say)
        for tool in [name for name in commands if name.partition("+")[0] == "llmc"]:
            if tool in record.failures:
                continue
            log = log_of(tool, options)
            record.tools[tool] = {"imported_by_llmc_run": heavy_imports(peers[tool], log)}
    if not options.phases:
        return
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for tool, peer in peers.items():
            say(f"{tool}: loading")
            try:
                workers[tool] = stack.enter_context(Worker(peer, log_of(tool, options)))
            except PeerError as error:
                record.failures[tool] = f"load: {error}"
                continue
            record.tools.setdefault(tool, {}).update(workers[tool].hello | conversion(peer))
        first = options.reference[0]
        measure_phases(workers, options.phases, options.vocabulary, first, rules, record, say)


def conversion(peer: Peer) -> dict[str, Any]:
    """Return the time and memory of the checkpoint's conversion, if this script did it."""
    record_file = peer.model.with_name(f"{peer.model.name}.convert.json")
    return {"conversion": json.loads(record_file.read_text())} if record_file.is_file() else {}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a local Hugging Face checkpoint directory")
    parser.add_argument(
        "--bundle", type=Path, help="an llmc bundle of it; built with `llmc build` when left out"
    )
    parser.add_argument(
        "--tools",
        default=",".join(TOOLS),
        help="comma-separated; NAME+FORMAT, such as openvino-genai+int4: see benchmarks/README.md",
    )
    parser.add_argument(
        "--reference",
        default="openvino-genai",
        help="the tool that ratios are taken against; of several, the best one of each round",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--new-tokens", type=int, default=64, help="per request, in the decode phases")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="where converted models are kept")
    parser.add_argument(
        "--wait-idle",
        type=float,
        default=0.0,
        metavar="S",
        help="before a sample, wait up to S seconds for others to be quiet",
    )
    parser.add_argument("--retries", type=int, default=1, help="repeat a sample that others disturbed")
    known = ["start", *(phase.name for phase in phases(1))]
    parser.add_argument(
        "--only",
        default="start,decode,concurrent,prefill",
        help=f"comma-separated, of {', '.join(known)}; by default %(default)s",
    )
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(known):
        parser.error(f"--only knows {', '.join(known)}, not {', '.join(sorted(unknown))}")
    options.phases = [phase for phase in phases(options.new_tokens) if phase.name in options.only]
    options.checkpoint = options.checkpoint.resolve()
    options.tools = options.tools.split(",")
    options.reference = options.reference.split(",")
    options.vocabulary = json.loads((options.checkpoint / "config.json").read_text())["vocab_size"]
    options.logs = options.work / "logs"
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    result = measure(options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(heading(result))
    print(table(result))
    return 130 if "this run" in result["failures"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended
    sys.exit(main(sys.argv[1:]))
