"""Check that a decode step captured in a CUDA graph and replayed on other lengths equals plain launches."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch

from . import jit, steps
from .card import Card, current
from .cases import Case, Step
from .correctness import same_bits
from .options import Options, Row

# The lengths of the capture, and those of the replay, with the last two sequences as padding.
CAPTURED = Step((300, 3, 64, 2000, 31, 32, 33, 1), (1,) * 8, num_splits=5)
REPLAYED = Step((301, 90, 65, 1100, 700, 0, 0, 0), (1, 1, 1, 1, 1, 1, 0, 0), num_splits=5)
PAIRS = (("32/8x128", "bf16"), ("64/8x64 window sinks", "bf16-fp8kv"))


def rows(options: Options) -> Iterator[Row]:
    card = current()
    for shape, dtypes in PAIRS:
        cases = [Case(shape, dtypes, "graph", step) for step in (CAPTURED, REPLAYED)]
        name = f"{shape}, {dtypes}"
        try:
            wrong = _differences(cases[0], cases[1], options.seed, card)
        except Exception as error:
            yield {"name": name, "status": "failed", "error": f"{type(error).__name__}: {error}"}
            continue
        status = {"status": "failed", "error": "; ".join(wrong)} if wrong else {"status": "passed"}
        yield {"name": name, **status}


def _differences(captured: Case, replayed: Case, seed: int, card: Card) -> list[str]:
    a = captured.attention
    hosts = [steps.make(captured, seed), steps.make(replayed, seed + 1)]
    buffers = make_buffers(hosts, a.num_heads * a.v_head_dim)
    plan = steps.plan(captured, hosts[0], card.sm, card.multiprocessors)
    bounds = jit.bind(a, plan, buffers, **steps.scales(captured))

    def launch_all() -> None:
        for bound in bounds:
            jit.run(bound, card.sm)

    plain = []
    for host in hosts:
        fill(buffers, host)
        launch_all()
        plain.append(results(buffers))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    gc.collect()
    gc.disable()  # collecting a Triton kernel unloads its module, which is an error during a capture
    try:
        with torch.cuda.graph(graph):
            launch_all()
    finally:
        gc.enable()
    wrong = []
    for which, host, want in zip(("captured", "other"), hosts, plain, strict=True):
        fill(buffers, host)
        graph.replay()
        torch.cuda.synchronize()
        got = results(buffers)
        wrong += [f"{name} on {which} lengths" for name in want if not same_bits(got[name], want[name])]
    finite = plain[1]["output"][: sum(replayed.step.new)].isfinite().all()
    return wrong if bool(finite) else [*wrong, "outputs not finite"]


def make_buffers(hosts: list[steps.Tensors], width: int, device: str = "cuda") -> steps.Tensors:
    """Return buffers that are large enough for every step, as in an engine, and an output buffer."""
    buffers = {}
    for name, tensor in hosts[0].items():
        length = max(len(host[name]) for host in hosts)
        buffers[name] = tensor.new_zeros((length, *tensor.shape[1:])).to(device)
    buffers["output"] = buffers["query"].new_zeros((len(buffers["query"]), width))
    return buffers


def fill(buffers: steps.Tensors, host: steps.Tensors) -> None:
    """Copy a step into the buffers, padded with 0, and fill the output with NaN."""
    for name, tensor in host.items():
        buffers[name].zero_()
        buffers[name][: len(tensor)].copy_(tensor)
    buffers["output"].fill_(float("nan"))


def results(buffers: steps.Tensors) -> steps.Tensors:
    """Return copies of the output and of the caches."""
    return {name: buffers[name].clone() for name in ("output", *steps.CACHES)}
