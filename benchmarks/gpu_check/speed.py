"""Time the kernels and those of peers on the same tensors: seconds, TFLOP/s of prefill, GB/s of decode.

Writing the new keys and values is timed separately, because the peers get caches that are already written.
Every peer's output is compared with llmc's before its time counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from llmc.plugins.paged_attention import launch
from llmc.plugins.paged_attention.launch import FP8
from llmc.plugins.paged_attention.spec import BLOCK_SIZE

from . import jit, peers
from .card import Card, current
from .ceilings import measured
from .options import Options, Row, failure
from .steps import MODEL
from .timing import L2, seconds
from .work import Workload, workloads

OURS = "llmc"
_DIFFERENCE = 0.02  # relative root mean square; rounding in bf16 gives a tenth of it, a wrong softmax 1
_SLACK = 1 << 30  # bytes left free


class Disagreement(Exception):
    """A peer's output differs from llmc's."""


def rows(options: Options, contenders: tuple[str, ...]) -> Iterator[Row]:
    """Yield the results. contenders: OURS, or names in `peers.PEERS`."""
    card = current()
    absent = {name: reason for name in contenders if name != OURS and (reason := peers.missing(name))}
    for name, reason in absent.items():
        yield {"name": name, "status": "absent", "error": reason}
    if not (left := [name for name in contenders if name not in absent]):
        return
    l2 = L2(card.l2)
    planned = list(workloads(quick=options.quick))
    for number, workload in enumerate(planned):
        if all(name != OURS and peers.cannot(name, workload) for name in left):
            continue
        torch.cuda.empty_cache()
        if workload.cache_bytes + _SLACK > torch.cuda.mem_get_info()[0]:
            yield {"name": str(workload), "status": "absent", "error": "the cache does not fit this card"}
            continue
        try:
            yield from _contest(workload, left, options, card, l2)
        except Exception as error:  # before any contender ran; other workloads still run
            yield failure(str(workload), error)
        try:
            torch.cuda.synchronize()
        except Exception:  # the context is lost, with all that would follow
            rest = len(planned) - number - 1
            yield {"name": "the rest", "status": "failed", "error": f"{rest} workloads not run after a fault"}
            return


def _contest(w: Workload, contenders: list[str], options: Options, card: Card, l2: L2) -> Iterator[Row]:
    """Time all contenders on one workload. A failure of one does not affect the others."""
    repeats = 10 if options.quick else 30
    cold = l2 if w.kind == "decode" else None
    tensors = make_tensors(w, options.seed)
    a = w.attention
    plan = launch.plan(
        a, w.dtype, w.kv_dtype, tensors["query_start"].cpu().numpy(), tensors["past_lengths"].cpu().numpy(),
        sm=card.sm, multiprocessors=card.multiprocessors,
    )  # fmt: skip
    bounds = jit.bind(a, plan, tensors, scale=a.head_dim**-0.5)
    write, attend = bounds[:1], bounds[1:]

    def launch_all(which: list[jit.Bound]) -> None:
        for bound in which:
            jit.run(bound, card.sm)

    launch_all(bounds)
    for who in contenders:
        row: Row = {"name": f"{w}: {who}", "who": who, "workload": str(w), "kind": w.kind, "dtype": w.dtype}
        try:
            if who == OURS:
                took = seconds(partial(launch_all, attend), repeats=repeats, l2=cold)
                row["write_seconds"] = seconds(partial(launch_all, write), repeats=repeats, l2=cold)
                row["splits"] = plan.num_splits
                if not bool(tensors["output"].isfinite().all()):
                    raise RuntimeError("some outputs are not finite")
            elif reason := peers.cannot(who, w):
                yield row | {"status": "absent", "error": reason}
                continue
            else:
                call = peers.PEERS[who](w, tensors)
                row["difference"] = difference(call().reshape(tensors["output"].shape), tensors["output"])
                if not row["difference"] < _DIFFERENCE:
                    raise Disagreement(f"differs from ours by {row['difference']:.3g}, relative")
                took = seconds(call, repeats=repeats, l2=cold)
                del call
        except Exception as error:
            ours = who == OURS or isinstance(error, Disagreement)
            status = "failed" if ours else "absent"  # a peer that does not run is no failure of llmc
            yield row | {"status": status, "error": f"{type(error).__name__}: {error}"}
            continue
        yield row | measured(row["name"], seconds=took, **rates(w, took))


def rates(w: Workload, took: float) -> dict[str, float]:
    if w.kind == "decode":
        return {"gbps": w.bytes_read / took / 1e9}
    return {"tflops": w.flops / took / 1e12}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the root mean square of a - b, relative to that of b."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def make_tensors(w: Workload, seed: int, device: str = "cuda") -> dict[str, torch.Tensor]:
    """Return a step: argument name -> tensor. All blocks of the pool are used, in random order."""
    a = w.attention
    generator = torch.Generator(device).manual_seed(seed)
    dtype = MODEL[w.dtype]
    tokens, per_sequence = w.batch * w.new, -(-w.context // BLOCK_SIZE)
    blocks = w.batch * per_sequence

    def normal(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(generator=generator)

    def cache(width: int) -> torch.Tensor:
        size = (blocks, a.num_kv_heads, BLOCK_SIZE, width)
        if w.kv_dtype != FP8:
            return normal(*size)
        codes = torch.empty(size, dtype=torch.uint8, device=device)
        return codes.random_(0, 0x40, generator=generator)  # E4M3 from 0 to 1.875

    def ints(values: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, np.int32), device=device)

    tensors = {
        "query": normal(tokens, a.num_heads * a.head_dim),
        "key": normal(tokens, a.num_kv_heads * a.head_dim),
        "value": normal(tokens, a.num_kv_heads * a.v_head_dim),
        "key_cache": cache(a.head_dim),
        "value_cache": cache(a.v_head_dim),
        "query_start": ints(np.arange(w.batch + 1) * w.new),
        "past_lengths": ints([w.past] * w.batch),
        "block_indices": ints(np.random.default_rng(seed).permutation(blocks)),
        "block_begins": ints(np.arange(w.batch + 1) * per_sequence),
    }
    if a.sinks:
        tensors["sinks"] = normal(a.num_heads).float()
    tensors["output"] = torch.full(
        (tokens, a.num_heads * a.v_head_dim), float("nan"), dtype=dtype, device=device
    )
    return tensors
