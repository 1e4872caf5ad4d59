"""The workload: the prompts, and the metrics computed from the times of the tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Phase:
    """One request to every tool, with all prompts at once."""

    name: str
    #: The number of tokens of each prompt.
    prompt_lengths: tuple[int, ...]
    #: The number of greedy tokens for each prompt.
    new_tokens: int

    def prompts(self, vocabulary: int, seed: int) -> list[list[int]]:
        """Return random token ids. They differ for every seed, so that no prefix cache can help.

        They come from the middle of the vocabulary, because special tokens are at its ends.
        """
        chance = random.Random(f"{self.name}/{seed}")
        low, high = vocabulary // 4, 3 * vocabulary // 4
        return [[chance.randrange(low, high) for _ in range(length)] for length in self.prompt_lengths]


def phases(new_tokens: int) -> list[Phase]:
    """Return the phases. new_tokens: per request, in the decode phases."""
    return [
        Phase("decode", (64,), new_tokens),
        Phase("concurrent", (32, 64, 96, 128, 160, 192, 224, 256), new_tokens),
        Phase("prefill", (512,), 1),
        Phase("long", (4096,), new_tokens),
    ]


# metric -> (heading, unit, larger is better)
METRICS: dict[str, tuple[str, str, bool]] = {
    "decode": ("decode, batch 1", "t/s", True),
    "concurrent_decode": ("8 requests, decode only", "t/s", True),
    "concurrent_whole": ("8 requests, prompts included", "t/s", True),
    "prefill": ("prefill 512", "t/s", True),
    "long_decode": ("decode, batch 1, context 4,096", "t/s", True),
    "first_token": ("start to first token", "s", False),
    "whole_process": ("start to exit", "s", False),
    "peak_rss": ("peak RSS", "GB", False),
    "idle_rss": ("RSS before loading", "GB", False),
    "load_rss": ("peak RSS to the first token, above that", "GB", False),
    "model_bytes": ("model files", "GB", False),
}


def metrics(phase: Phase, times: list[list[float]]) -> dict[str, float]:
    """Return metric -> tokens per second. times[request][i]: seconds from the request to its i-th new token.

    decode             new tokens after the first, over the time since the first
    concurrent_whole   all new tokens over the whole time, prompts' work included
    concurrent_decode  new tokens after every request has its first, over the time since then
    prefill            prompt tokens over the time to the first new token
    long_decode        as decode
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
    if phase.name in ("decode", "long"):
        return {"decode" if phase.name == "decode" else "long_decode": rate}
    everything = sum(len(request) for request in times)
    return {"concurrent_decode": rate, "concurrent_whole": everything / end}


def common_prefix(a: list[list[int]], b: list[list[int]]) -> int:
    """Return how many tokens two lists of continuations share before each pair first differs."""
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
    """Return tool -> metric -> the median over the rounds of the ratio to the reference in the same round.

    A ratio above 1 is better than the reference. Of several references the best one of the round counts, so
    that a round in which one of them was slow does not help.
    """
    result: dict[str, dict[str, float]] = {}
    for tool, by_metric in samples.items():
        result[tool] = {}
        for metric, rounds in by_metric.items():
            larger_is_better = METRICS[metric][2]
            best = max if larger_is_better else min
            columns = [samples.get(name, {}).get(metric, []) for name in references]
            columns = [[sample["value"] for sample in column] for column in columns if column]
            references_best = [best(values) for values in zip(*columns, strict=False)] if columns else []
            pairs = [(sample["value"], base) for sample, base in zip(rounds, references_best, strict=False)]
            pairs = [pair for pair in pairs if all(pair)]  # a memory of 0 has no ratio
            if pairs:
                result[tool][metric] = median([a / b if larger_is_better else b / a for a, b in pairs])
    return result
