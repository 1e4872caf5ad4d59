"""What is measured: the prompts, and what is read off the times at which tokens came out."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Phase:
    """One request to every tool: all prompts handed over at once, `new_tokens` greedy tokens each."""

    name: str
    prompt_lengths: tuple[int, ...]
    new_tokens: int

    def prompts(self, vocabulary: int, seed: int) -> list[list[int]]:
        """Random token ids, new ones for every seed, so that no prefix cache can help. Special
        tokens sit at the ends of a vocabulary; ids come from its middle."""
        chance = random.Random(f"{self.name}/{seed}")
        low, high = vocabulary // 4, 3 * vocabulary // 4
        return [[chance.randrange(low, high) for _ in range(length)] for length in self.prompt_lengths]


def phases(new_tokens: int) -> list[Phase]:
    return [
        Phase("decode", (64,), new_tokens),
        Phase("concurrent", (32, 64, 96, 128, 160, 192, 224, 256), new_tokens),
        Phase("prefill", (512,), 1),
    ]


# metric -> (heading, unit, larger is better)
METRICS: dict[str, tuple[str, str, bool]] = {
    "decode": ("decode, batch 1", "t/s", True),
    "concurrent_decode": ("8 requests, decode only", "t/s", True),
    "concurrent_whole": ("8 requests, prompts included", "t/s", True),
    "prefill": ("prefill 512", "t/s", True),
    "first_token": ("start to first token", "s", False),
    "whole_process": ("start to exit", "s", False),
    "peak_rss": ("peak RSS", "GB", False),
    "idle_rss": ("RSS before loading", "GB", False),
    "load_rss": ("peak RSS to the first token, above that", "GB", False),
    "model_bytes": ("model files", "GB", False),
}


def metrics(phase: Phase, times: list[list[float]]) -> dict[str, float]:
    """Tokens per second. `times[request][i]`: seconds from handing over to its i-th new token.

    decode             new tokens after the first, over the time since the first
    concurrent_whole   all new tokens over the whole time, prompts' work included
    concurrent_decode  new tokens after every request has its first, over the time since then
    prefill            prompt tokens over the time to the first new token
    """
    for request in times:
        if len(request) != phase.new_tokens:
            raise ValueError(
                f"{phase.name}: {len(request)} new tokens where {phase.new_tokens} were asked for"
            )
    end = max(request[-1] for request in times)
    prompted = max(request[0] for request in times)
    if phase.name == "prefill":
        return {"prefill": sum(phase.prompt_lengths) / end}
    later = sum(at > prompted for request in times for at in request)
    rate = later / (end - prompted)
    if phase.name == "decode":
        return {"decode": rate}
    everything = sum(len(request) for request in times)
    return {"concurrent_decode": rate, "concurrent_whole": everything / end}


def common_prefix(a: list[list[int]], b: list[list[int]]) -> int:
    """How many tokens two sets of continuations share before each pair first differs."""
    total = 0
    for x, y in zip(a, b, strict=True):
        for i, j in zip(x, y, strict=True):
            if i != j:
                break
            total += 1
    return total


def median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def ratios(
    samples: dict[str, dict[str, list[dict[str, Any]]]], references: list[str]
) -> dict[str, dict[str, float]]:
    """tool -> metric -> median over the rounds of (how many times as good as the reference in that round).

    Of several references it is the one that was best in that round: whoever is compared gets no benefit
    from a round in which one of them was slow.
    """
    found: dict[str, dict[str, float]] = {}
    for tool, by_metric in samples.items():
        found[tool] = {}
        for metric, rounds in by_metric.items():
            larger_is_better = METRICS[metric][2]
            best = max if larger_is_better else min
            columns = [samples.get(name, {}).get(metric, []) for name in references]
            columns = [[one["value"] for one in column] for column in columns if column]
            theirs = [best(values) for values in zip(*columns, strict=False)] if columns else []
            pairs = [(mine["value"], base) for mine, base in zip(rounds, theirs, strict=False)]
            pairs = [pair for pair in pairs if all(pair)]  # a memory of 0 has no ratio
            if pairs:
                found[tool][metric] = median([a / b if larger_is_better else b / a for a, b in pairs])
    return found
