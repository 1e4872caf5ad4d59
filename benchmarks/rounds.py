"""The measurement: rounds over all tools, of which one computes at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from driver import Peer, PeerError, Worker, run_to_end, wait_until_idle
from workload import Phase, common_prefix, metrics

CLEAN = 0.1  # the share of the machine that others may use during an undisturbed sample

Say = Callable[[str], None]


@dataclass(frozen=True)
class Rules:
    """How samples are taken."""

    #: Number of timed rounds. An untimed round comes first.
    rounds: int
    #: Maximum seconds to wait for an idle machine before a sample.
    wait_idle: float
    #: How many times a disturbed sample is repeated. The least disturbed one counts.
    retries: int


@dataclass
class Record:
    """The results."""

    #: Tool -> metric -> one entry per round.
    samples: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    #: Tool -> its other figures, such as versions and memory.
    tools: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Tool -> why its measurement ended.
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, tool: str, metric: str, value: float, detail: dict[str, Any]) -> None:
        """Add a sample."""
        entry = {"value": value, **detail}
        self.samples.setdefault(tool, {}).setdefault(metric, []).append(entry)


def measure_start(
    commands: dict[str, tuple[Peer, list[str]]], rules: Rules, record: Record, logs: Path, say: Say
) -> None:
    """Measure fresh processes: the seconds from their start to their first output, and to their end.

    The untimed round puts the files of each tool into the page cache.
    """
    for number in range(-1, rules.rounds):
        for tool in in_turn(commands, number):
            if tool in record.failures:
                continue
            peer, command = commands[tool]
            try:
                run = _cleanest(
                    partial(run_to_end, command, peer.environ(), logs / f"{tool}.log"), rules, number
                )
            except PeerError as error:
                record.failures[tool] = f"start: {error}"
                continue
            if number >= 0:
                record.add(tool, "first_token", run["first_output_seconds"], run)
                record.add(tool, "whole_process", run["seconds"], run)
                say(_line(number, tool, f"first token {run['first_output_seconds']:.2f} s", run))


def measure_phases(
    workers: dict[str, Worker],
    phases: list[Phase],
    vocabulary: int,
    reference: str,
    rules: Rules,
    record: Record,
    say: Say,
) -> None:
    """Measure the phases in rounds. The order of the tools shifts every round.

    In the untimed round every tool computes every shape once.
    """
    alive = dict(workers)
    for number in range(-1, rules.rounds):
        for phase in phases:
            prompts = phase.prompts(vocabulary, seed=number)
            continuations = {}
            for tool in in_turn(alive, number):
                try:
                    answer = _sample(alive[tool], phase, prompts, rules, number)
                except (PeerError, ValueError) as error:
                    record.failures[tool] = f"{phase.name}: {error}"
                    alive.pop(tool).close()
                    continue
                record.tools[tool]["memory"] = answer["memory"]
                if number < 0:
                    continue
                continuations[tool] = answer["tokens"]
                _take(record, tool, answer)
                shown = ", ".join(f"{name} {value:.1f}" for name, value in answer["metrics"].items())
                say(_line(number, tool, f"{shown} t/s", answer))
            _compare(record, continuations, reference)
    for tool in alive:
        known = record.tools[tool]
        record.add(tool, "peak_rss", known["memory"]["peak"] / 1e9, {"memory": known["memory"]})
        idle, loaded = known["idle_memory"], known["load_memory"]
        record.add(tool, "idle_rss", (idle["anonymous"] + idle["file"]) / 1e9, {"memory": idle})
        above = loaded["peak"] - idle["anonymous"] - idle["file"]
        record.add(tool, "load_rss", above / 1e9, {"memory": loaded})
        record.add(tool, "model_bytes", known["model_bytes"] / 1e9, {})


def in_turn(tools: Iterable[str], number: int) -> list[str]:
    """Return all tools. Each round starts with another one."""
    names = list(tools)
    shift = number % len(names) if names else 0
    return names[shift:] + names[:shift]


def _sample(
    worker: Worker, phase: Phase, prompts: list[list[int]], rules: Rules, number: int
) -> dict[str, Any]:
    request = {"op": "generate", "prompts": prompts, "new_tokens": phase.new_tokens}
    answer = _cleanest(partial(worker.ask, **request), rules, number)
    answer["metrics"] = metrics(phase, answer["times"])
    return answer


def _cleanest(measure: Callable[[], dict[str, Any]], rules: Rules, number: int) -> dict[str, Any]:
    """Return the first undisturbed sample, else the least disturbed one. Untimed rounds take any sample."""
    best: dict[str, Any] = {}
    for _ in range(1 + rules.retries if number >= 0 else 1):
        if number >= 0:
            wait_until_idle(rules.wait_idle)
        sample = measure()
        if not best or sample["foreign"] < best["foreign"]:
            best = sample
        if best["foreign"] < CLEAN:
            break
    return best


def _take(record: Record, tool: str, answer: dict[str, Any]) -> None:
    times = [[round(at, 5) for at in request] for request in answer["times"]]
    for metric, value in answer["metrics"].items():
        record.add(tool, metric, value, {"foreign": answer["foreign"], "times": times, **answer["extra"]})
    for key, seconds in answer["extra"].items():
        record.tools[tool][key] = record.tools[tool].get(key, 0.0) + seconds


def _compare(record: Record, continuations: dict[str, list[list[int]]], reference: str) -> None:
    if reference not in continuations:
        return
    for tool, tokens in continuations.items():
        known = record.tools[tool]
        known["same_tokens"] = known.get("same_tokens", 0) + common_prefix(tokens, continuations[reference])
        known["tokens"] = known.get("tokens", 0) + sum(map(len, tokens))


def _line(number: int, tool: str, shown: str, sample: dict[str, Any]) -> str:
    return f"round {number + 1}  {tool:22} {shown}, others used {sample['foreign']:.0%} of the machine"
