"""Compare the kernels with the reference, on random inputs, with outputs and scratch filled with NaN.

Every case runs several times. The results must be bit-identical; a difference means a race.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from . import steps
from .cases import Case, cases, share
from .options import Options, Row

Launcher = Callable[..., None]  # jit.run_compiled, or the tests' run_attention
_REPEATS = 3


def rows(options: Options) -> Iterator[Row]:
    from .card import current
    from .jit import run_compiled

    card = current()
    selected = share(cases(quick=options.quick), *options.share)
    for number, case in enumerate(selected):
        try:
            yield check(
                case, run_compiled, options.seed, device="cuda", sm=card.sm,
                multiprocessors=card.multiprocessors, repeats=_REPEATS,
            )  # fmt: skip
            torch.cuda.synchronize()
        except Exception as error:
            row: Row = {"name": str(case), "shape": case.shape, "dtypes": case.dtypes, "status": "failed"}
            yield row | {"error": f"{type(error).__name__}: {error}"}
            try:
                torch.cuda.synchronize()
            except Exception:  # the context is lost, with all that would follow
                left = len(selected) - number - 1
                yield {"name": "the rest", "status": "failed", "error": f"{left} cases not run after a fault"}
                return
        torch.cuda.empty_cache()


def check(
    case: Case, run: Launcher, seed: int, *, device: str, sm: int, multiprocessors: int, repeats: int = 1
) -> Row:
    """Run one case. Return its result, with the problems if there are any. `error / bound` above 1 fails."""
    host = steps.make(case, seed)
    want = steps.expected(case, host)
    a = case.attention
    plan = steps.plan(case, host, sm, multiprocessors)
    tensors = place(case, host, device)
    first: dict[str, torch.Tensor] = {}
    problems: list[str] = []
    for _ in range(repeats):
        tensors["output"].fill_(float("nan"))
        run(a, case.dtype, case.kv_dtype, plan, tensors, sm=sm, **steps.scales(case))
        now = {name: tensors[name][case.first_block :].to("cpu", copy=True) for name in steps.CACHES}
        now["output"] = tensors["output"].to("cpu", copy=True)
        first = first or now
        differing = [name for name in now if not same_bits(now[name], first[name])]
        problems += [f"another {name} when run again" for name in differing]
    for name in steps.CACHES:
        wrong = (bits(first[name]) != bits(want.caches[name])).flatten(1).any(1).nonzero().flatten().tolist()
        if wrong:
            problems.append(f"{name}: {len(wrong)} blocks differ, the first is {wrong[0]}")
        if not still_poisoned(tensors[name][: case.first_block]):
            problems.append(f"{name}: written outside the case's blocks")
    got = first["output"].double().numpy()
    excess = np.abs(got - want.output) / want.bound
    problems += describe(excess, got, want.output, a.v_head_dim)
    row: Row = {"name": str(case), "status": "failed" if problems else "passed", "splits": plan.num_splits}
    row |= {"shape": case.shape, "dtypes": case.dtypes, "error / bound": float(np.nanmax(excess, initial=0))}
    return row | ({"error": "; ".join(dict.fromkeys(problems))} if problems else {})


def place(case: Case, host: steps.Tensors, device: str) -> dict[str, torch.Tensor]:
    """Return the tensors on the device, with an `output` and the blocks before the case's, all poisoned."""
    tensors = {name: tensor.to(device) for name, tensor in host.items()}
    if case.first_block:
        tensors["block_indices"] = tensors["block_indices"] + case.first_block
        for name in steps.CACHES:
            case_blocks = tensors[name]
            pool = case_blocks.new_empty((case.first_block + len(case_blocks), *case_blocks.shape[1:]))
            pool[: case.first_block] = poison(case_blocks.dtype)
            pool[case.first_block :] = case_blocks
            tensors[name] = pool
    a = case.attention
    tokens = int(host["query_start"][-1])
    tensors["output"] = tensors["query"].new_full((tokens, a.num_heads * a.v_head_dim), float("nan"))
    return tensors


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors are bit-identical."""
    return bool(torch.equal(bits(a), bits(b)))


def describe(excess: np.ndarray, got: np.ndarray, want: np.ndarray, width: int) -> list[str]:
    """Return the problems of an output [T, num_heads*Dv], and where its error is largest.

    excess: error / bound of each element. width: the width of a head.
    """
    problems = []
    missing = ~np.isfinite(got)
    if missing.any():
        t, column = np.argwhere(missing)[0]
        problems.append(f"{missing.sum()} outputs not finite, the first: token {t}, head {column // width}")
    if (excess > 1).any():
        t, column = np.unravel_index(np.nanargmax(excess), excess.shape)
        where = f"token {t}, head {column // width}, column {column % width}"
        far = int((excess > 1).sum())
        problems.append(
            f"{far} outputs outside the bound, by up to {excess[t, column]:.3g} times ({where}: "
            f"{got[t, column]:.6g} for {want[t, column]:.6g})"
        )
    return problems


def poison(dtype: torch.dtype) -> Any:
    """Return NaN in a dtype; uint8 stands for E4M3."""
    return steps.NAN_E4M3 if dtype == torch.uint8 else float("nan")


def bits(x: torch.Tensor) -> torch.Tensor:
    """Return `x` viewed as integers of the same size."""
    return x if x.dtype == torch.uint8 else x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def still_poisoned(pool: torch.Tensor) -> bool:
    """Return whether a pool holds only poison. It is compared in parts, because it may be gigabytes."""
    pattern = bits(torch.full((1,), poison(pool.dtype), dtype=pool.dtype, device=pool.device))
    return all(bool((bits(part) == pattern).all()) for part in pool.split(2048))
