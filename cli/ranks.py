"""Describe the ranks of a plan or of a bundle, and what each size of GPU could hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmc.cli.text import count, size, table

if TYPE_CHECKING:
    from llmc.compiler.rank_plan import Exchange, GpuSize, RankPlan


def layers(first: int, stop: int) -> str:
    """Describe the layers first .. stop - 1."""
    return f"layer {first}" if stop == first + 1 else f"layers {first}-{stop - 1}"


def describe_ranks(ranks: Sequence[RankPlan], tp: int, max_seq_len: int) -> list[tuple[str, str]]:
    """Return rows for a table: what each rank has, the memory that it needs, and what the ranks exchange.

    tp: the number of ranks in a stage
    """
    if len(ranks) == 1:
        return [("memory", _memory(ranks[0], max_seq_len))]
    pp = len(ranks) // tp
    part = (
        "each with a part of every layer" if pp == 1 else f"{pp} stages of {tp}, each with some of the layers"
    )
    rows = [("ranks", f"{len(ranks)}, {part}")]
    texts = [
        f"{layers(rank.first, rank.stop)}, {count(rank.num_heads, 'head')}, "
        f"{count(rank.num_kv_heads, 'KV head')}; {_memory(rank, max_seq_len)}"
        for rank in ranks
    ]
    rows += [(f"rank{numbers}", text) for numbers, text in _runs(texts)]
    collectives = [_collectives(rank.exchanges) for rank in ranks[::tp]] if tp > 1 else []
    if len(set(collectives)) == 1:
        rows.append(("collectives", collectives[0]))
    else:
        rows += [("collectives", f"in stage{numbers}: {text}") for numbers, text in _runs(collectives)]
    sent = {each.operation: each for each in ranks[0].exchanges}.get("Send")
    logits = {each.operation: each for each in ranks[-tp].exchanges}.get("Send")
    if sent and logits and sent.token_bytes is not None and logits.logits_bytes is not None:
        rows.append(
            (
                "transfers",
                f"{size(sent.token_bytes)} for a token to the next stage, "
                f"{size(logits.logits_bytes)} for a row of logits to rank 0",
            )
        )
    if (greedy := ranks[-tp].greedy_bytes) is not None:
        rows.append(("logits", f"{size(greedy)} in place of a row if all requests of a step are greedy"))
    return rows


def rank_records(ranks: Sequence[RankPlan], max_seq_len: int) -> list[dict[str, Any]]:
    """Return the fields of ranks for JSON."""
    return [
        {**asdict(rank), "kv_bytes": rank.kv_bytes(max_seq_len), "memory_bytes": rank.needed(max_seq_len)}
        for rank in ranks
    ]


def gpu_table(gpus: Sequence[GpuSize], max_seq_len: int) -> str:
    """Return a table of GPU sizes, one GPU for each rank."""
    rows = [("GPU", "such as", "KV cache of a rank")]
    for gpu in gpus:
        held = f"{gpu.kv_tokens:,} tokens" if gpu.kv_tokens else "too small"
        if gpu.kv_tokens and not gpu.fits:
            held += f", less than the context of {max_seq_len:,}"
        rows.append((f"{gpu.gigabytes} GB", ", ".join(gpu.cards), held))
    return table(rows, right=(0,))


def _memory(rank: RankPlan, max_seq_len: int) -> str:
    kv = f"{size(rank.kv_bytes(max_seq_len))} of KV cache for {max_seq_len} tokens"
    parts = [f"{size(rank.weight_bytes)} of weights", kv]
    if rank.activation_bytes is not None:
        parts.append(f"{size(rank.activation_bytes)} of activations")
    return f"{size(rank.needed(max_seq_len))}: {', '.join(parts)}"


def _collectives(exchanges: Sequence[Exchange]) -> str:
    used = [each for each in exchanges if each.operation != "Send"]
    what = " and ".join(f"{each.count} {each.operation}" for each in used)
    tokens = [each.token_bytes for each in used if each.token_bytes is not None]
    rows = [each.logits_bytes for each in used if each.logits_bytes]
    given = [f"{size(sum(tokens))} for a token"] if tokens else []
    given += [f"{size(sum(rows))} for a row of logits"] if rows else []
    return f"{what} a step" + (f"; a rank gives {' and '.join(given)}" if given else "")


def _runs(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return equal texts one after the other once: [a, a, b] -> [("s 0-1", a), (" 2", b)]."""
    runs: list[tuple[int, int, str]] = []
    for number, text in enumerate(texts):
        if runs and runs[-1][2] == text:
            runs[-1] = (runs[-1][0], number, text)
        else:
            runs.append((number, number, text))
    return [(f" {a}" if a == b else f"s {a}-{b}", text) for a, b, text in runs]
