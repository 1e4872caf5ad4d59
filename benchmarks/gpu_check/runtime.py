"""Check the runtime's part of a step: memory, copies, the attention launcher, CUDA graphs and sampling.

Everything goes through `runtime/backends/tensorrt` and cuda-python. torch only creates and compares arrays on
the host. As in the runtime, a graph is captured once for the longest decode of a bucket and replayed for
fewer and shorter sequences.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmc.plugins.paged_attention import launch
from llmc.plugins.paged_attention.launch import Variant
from llmc.plugins.sampling import launch as sampling
from llmc.runtime.backends.tensorrt.sizes import longest_decode
from llmc.runtime.backends.tensorrt.step import bucket_of, buckets, room
from llmc.runtime.batch import Batch

from . import aot, steps
from .card import Card, current
from .cases import STEPS, Case, Step
from .correctness import bits, describe, poison, same_bits, still_poisoned
from .options import Options, Row, failure

PAIRS = (
    ("32/8x128", "bf16"),
    ("32/8x128", "fp16-fp8kv"),
    ("8/4x256 window softcap", "bf16-fp8kv"),
)
MAX_LEN = 4096
# Past tokens of the sequences of decode steps, all of one bucket. The first step is captured.
DECODES = (
    (300, 4095, 64, 2000, 31, 32, 33, 1),
    (301, 90, 65, 1100, 700),
    (4095, 0, 255, 256, 5, 1, 3000),
    (31, 32, 33, 0, 12),
)
VOCAB = 128_257
KS = (1, 2, 50, 256)
_SAMPLED_ROWS = 6

Images = Callable[[Iterable[Variant]], list[Any]]  # variants -> KernelImage


class Absent(Exception):
    """A check needs something that this machine lacks."""


def rows(options: Options) -> Iterator[Row]:
    try:
        importlib.import_module("llmc.runtime.backends.tensorrt.cuda")
    except ImportError as error:
        yield {"name": "cuda-python", "status": "absent", "error": f"{type(error).__name__}: {error}"}
        return
    card = current()
    with tempfile.TemporaryDirectory() as folder:
        planned = list(_checks(card, options.seed, Path(folder)))
        for name, check in planned[options.share[0] :: options.share[1]]:
            try:
                wrong = check()
            except Absent as error:
                yield {"name": name, "status": "absent", "error": str(error)}
                continue
            except Exception as error:
                yield failure(name, error)
                continue
            status = {"status": "failed", "error": "; ".join(wrong)} if wrong else {"status": "passed"}
            yield {"name": name, **status}


def _checks(card: Card, seed: int, cache: Path) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """Yield the name of each check, and a call that returns its problems. cache: of compiled kernels."""

    def images(variants: Iterable[Variant]) -> list[Any]:
        return [aot.image(variant, card.sm, cache) for variant in variants]

    given = (images, seed, card.sm, card.multiprocessors)
    yield "the GPU's properties", partial(device, card)
    for shape, dtypes in PAIRS:
        mixed = Case(shape, dtypes, "mixed", STEPS["mixed"])
        yield f"mixed step, {shape}, {dtypes}", partial(plain_step, mixed, *given)
        yield f"one graph, {shape}, {dtypes}", partial(one_graph, shape, dtypes, DECODES, MAX_LEN, *given)
    yield "sampling", lambda: sampled(sampling_images(card.sm, cache), VOCAB, KS, seed)
    yield "NCCL in a graph", partial(collectives_in_a_graph, seed)


def device(card: Card) -> list[str]:
    """Return the properties in which `cuda.probe` differs from torch."""
    from llmc.runtime.backends.tensorrt.cuda import probe

    found = probe()
    pairs = {
        "name": (found.name, card.name), "SM": (found.sm, card.sm),
        "multiprocessors": (found.multiprocessors, card.multiprocessors),
    }  # fmt: skip
    return [f"{what} {mine}, torch says {theirs}" for what, (mine, theirs) in pairs.items() if mine != theirs]


class Layer:
    """One attention layer on the GPU, with its caches and the arrays of a step."""

    def __init__(
        self, case: Case, hosts: list[steps.Tensors], max_len: int, images: Images, sm: int,
        multiprocessors: int,
    ) -> None:  # fmt: skip
        """Load the kernels and allocate the memory.

        case: the layer; its step does not matter. hosts: the steps (`steps.make`) that must fit.
        """
        from llmc.plugins.cuda.kernel import Kernels
        from llmc.plugins.paged_attention.launcher import AttentionLauncher
        from llmc.runtime.backends.tensorrt.cuda import Cuda
        from llmc.runtime.backends.tensorrt.step_arrays import StepArrays

        a = case.attention
        self.case, self.owned = case, ExitStack()
        self.cuda = Cuda()
        self.owned.callback(self.cuda.close)
        variants = launch.variants_for([a], [(case.dtype, case.kv_dtype)])
        kernels = Kernels(images(variants), launch.ARGUMENTS)
        self.owned.callback(kernels.close)
        self.most = max(len(host["past_lengths"]) for host in hosts)
        tokens = max(len(host["query"]) for host in hosts)
        self.arrays = StepArrays(self.cuda, room(tokens, self.most, max_len))
        self.longest = longest_decode(self.most, max_len)
        plan = launch.plan(
            a, case.dtype, case.kv_dtype, *self.longest, sm=sm, multiprocessors=multiprocessors
        )
        scratch = launch.scratch_layout(plan)[1]
        self.launcher = AttentionLauncher(kernels, sm, multiprocessors, self.cuda.allocate(scratch), scratch)
        # Each tensor in its largest size, full of NaN.
        self.empty = {
            name: tensor.new_full(
                (max(len(host[name]) for host in hosts), *tensor.shape[1:]), poison(tensor.dtype)
            )
            for name, tensor in hosts[0].items()
            if name not in self.arrays.addresses
        }
        width = a.num_heads * a.v_head_dim
        self.empty["output"] = self.empty["query"].new_full((tokens, width), float("nan"))
        self.places = {name: self.cuda.allocate(tensor.nbytes) for name, tensor in self.empty.items()}
        self._staging = self.cuda.pinned(max(tensor.nbytes for tensor in self.empty.values()))

    def put(self, host: steps.Tensors, bucket: int | None) -> None:
        """Copy a step to the GPU. All memory outside the step is NaN, and so is the output."""
        for name, empty in self.empty.items():
            whole = empty.clone()
            if name in host:
                whole[: len(host[name])] = host[name]
            part = self._staging[: whole.nbytes]
            part[:] = whole.view(torch.uint8).numpy().reshape(-1)
            self.cuda.upload(part, self.places[name])
            self.cuda.wait()  # the staging memory is used again
        self.arrays.upload(batch_of(host), bucket)

    def launch(self, tokens: int, sequences: int) -> None:
        scales = steps.scales(self.case)
        tensors = self.places | {
            name: at for name, at in self.arrays.addresses.items() if name in launch.ARGUMENTS["write_kv"]
        }
        self.launcher.launch(
            self.case.attention, self.case.dtype, scales["scale"], tensors, tokens, sequences,
            self.cuda.stream, self.case.kv_dtype, (scales.get("k_scale", 1.0), scales.get("v_scale", 1.0)),
        )  # fmt: skip

    def results(self) -> steps.Tensors:
        found = {}
        for name in ("output", *steps.CACHES):
            empty = self.empty[name]
            part = self._staging[: empty.nbytes]
            self.cuda.download(self.places[name], part)
            self.cuda.wait()
            found[name] = torch.from_numpy(part.copy()).view(empty.dtype).reshape(empty.shape)
        return found


def batch_of(host: steps.Tensors) -> Batch:
    """Return the step as the runtime packs it. The token ids do not matter."""
    step = {name: tensor.numpy() for name, tensor in host.items() if tensor.dtype == torch.int32}
    ids = np.zeros(int(step["query_start"][-1]), np.int32)
    return Batch(ids, ids, **step, logits_index=step["query_start"][1:] - 1)


def differences(case: Case, host: steps.Tensors, got: steps.Tensors) -> list[str]:
    """Return the problems of a step's results: wrong values or cache entries, or writes outside the step."""
    want, tokens = steps.expected(case, host), len(host["query"])
    output = got["output"][:tokens].double().numpy()
    problems = describe(
        np.abs(output - want.output) / want.bound, output, want.output, case.attention.v_head_dim
    )
    if not still_poisoned(got["output"][tokens:]):
        problems.append("outputs of padding are written")
    for name in steps.CACHES:
        blocks = len(host[name])
        if not same_bits(got[name][:blocks], want.caches[name]):
            wrong = (bits(got[name][:blocks]) != bits(want.caches[name])).flatten(1).any(1).sum()
            problems.append(f"{name}: {wrong} blocks differ")
        if not still_poisoned(got[name][blocks:]):
            problems.append(f"{name}: written outside the step's blocks")
    return problems


def plain_step(case: Case, images: Images, seed: int, sm: int, multiprocessors: int) -> list[str]:
    """Return the problems of a step of decodes, chunks and prefills that is launched kernel by kernel."""
    host = steps.make(case, seed)
    layer = Layer(case, [host], MAX_LEN, images, sm, multiprocessors)
    with layer.owned:
        layer.put(host, None)
        layer.launcher.begin(host["query_start"].numpy(), host["past_lengths"].numpy())
        layer.launch(len(host["query"]), len(host["past_lengths"]))
        layer.cuda.wait()
        return differences(case, host, layer.results())


def one_graph(
    shape: str, dtypes: str, decodes: tuple[tuple[int, ...], ...], max_len: int, images: Images, seed: int,
    sm: int, multiprocessors: int,
) -> list[str]:  # fmt: skip
    """Return the problems of replays of one graph, compared with the reference and with plain launches."""
    cases = [Case(shape, dtypes, "graph", Step(past, (1,) * len(past))) for past in decodes]
    hosts = [steps.make(case, seed + i) for i, case in enumerate(cases)]
    layer = Layer(cases[0], hosts, max_len, images, sm, multiprocessors)
    bucket = len(decodes[0])
    problems, graph = [], None
    with layer.owned:
        layer.launcher.begin(*layer.longest)
        run = partial(layer.launch, bucket, bucket)
        for case, host in zip(cases, hosts, strict=True):
            if bucket_of(batch_of(host), buckets(bucket)) != bucket:
                raise ValueError(f"a step of {len(case.step.past)} sequences is not of the bucket {bucket}")
            layer.put(host, bucket)
            run()
            layer.cuda.wait()
            plain = layer.results()
            if graph is None:  # the run before has loaded what a capture could not
                graph = layer.cuda.capture(run)
                layer.owned.callback(graph.close)
            layer.put(host, bucket)
            graph.launch()
            layer.cuda.wait()
            got = layer.results()
            found = differences(case, host, got)
            found += [
                f"{name} is not that of plain launches"
                for name in got
                if not same_bits(got[name], plain[name])
            ]
            problems += [f"past {case.step.past}: {what}" for what in found]
    return problems


def sampling_images(sm: int, cache: Path) -> list[Any]:
    from llmc.plugins.sampling.compile_kernels import compile_kernel

    return [
        aot.kernel_image(sampling.variant(name), compile_kernel(name, sm, cache))
        for name in sampling.ARGUMENTS
    ]


def make_logits(vocab: int, seed: int) -> np.ndarray:
    """Return logits with edge cases: infinities, one value everywhere, a NaN, ties."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (_SAMPLED_ROWS, vocab)).astype(np.float16).astype(np.float32)
    logits[1, rng.random(vocab) < 0.9] = -np.inf
    logits[2], logits[3, vocab // 2] = 0, np.nan
    logits[4, : vocab // 20] = np.round(logits[4, : vocab // 20]) + 40
    return logits


def sampled(images: list[Any], vocab: int, ks: tuple[int, ...], seed: int) -> list[str]:
    """Return the rows in which the candidates of the sampling kernels differ from numpy's."""
    from llmc.runtime.backends.tensorrt.cuda import Cuda
    from llmc.runtime.backends.tensorrt.sampling import TokenSampler

    given, problems = make_logits(vocab, seed), []
    with ExitStack() as owned:
        cuda = Cuda()
        owned.callback(cuda.close)
        host = cuda.pinned(given.nbytes).view(np.float32).reshape(given.shape)
        host[:] = given
        logits = cuda.allocate(given.nbytes)
        cuda.upload(host, logits)
        cuda.wait()
        host[:] = 0
        sampler = TokenSampler(cuda, images, logits, host)
        owned.callback(sampler.close)
        for k in ks:
            for again in (False, True):
                found = sampler.candidates(len(given), k)
                wrong = [row for row, one in enumerate(found) if not right_candidates(given[row], k, *one)]
                problems += [f"k {k}, row {row}" + (", run again" if again else "") for row in wrong]
    return problems


def collectives_in_a_graph(seed: int) -> list[str]:
    """Return the problems of a single rank's collectives, launched plainly and replayed in a graph.

    They leave the numbers of a single rank as they are. Raises Absent without NCCL.
    """
    from llmc.plugins.collectives.spec import ALL_GATHER, ALL_REDUCE
    from llmc.plugins.collectives.tensorrt_plugin import Attributes
    from llmc.runtime.backends.tensorrt.cuda import Cuda
    from llmc.runtime.backends.tensorrt.nccl import Nccl, NcclCollectives, unique_id
    from llmc.runtime.errors import BackendError
    from llmc.runtime.parallel.threads import thread_group

    try:
        nccl = Nccl()
    except BackendError as error:
        raise Absent(error.message) from error
    rng, count, problems = np.random.default_rng(seed), 4096, []
    names = (ALL_REDUCE, ALL_GATHER)
    dtypes = {"bf16": 2, "fp16": 2, "fp32": 4}  # bytes
    with ExitStack() as owned:
        cuda = Cuda()
        owned.callback(cuda.close)
        identity = unique_id(nccl, thread_group(1)[0])
        collectives = NcclCollectives(nccl, 1, 0, identity, len(names), cuda.make_current)
        owned.callback(collectives.close)
        host = cuda.pinned(4 * count)
        source, between, target = (cuda.allocate(4 * count) for _ in range(3))

        def run(dtype: str) -> None:
            collectives.begin()
            places = (source, between, target)
            for number, name in enumerate(names):
                collectives.run(name, Attributes(1, number), dtype, *places[number:][:2], count, cuda.stream)
            collectives.end()

        for dtype, size in dtypes.items():
            graph = None
            for turn in ("plain", "graph", "graph again"):
                numbers = rng.integers(1, 100, count * size, np.uint8)  # finite in every type
                host[: numbers.size] = numbers
                cuda.upload(host, source)
                if turn == "plain":
                    run(dtype)
                else:
                    graph = graph or cuda.capture(partial(run, dtype))
                    graph.launch()
                collectives.wait(cuda.is_done)
                host[:] = 0
                cuda.download(target, host)
                cuda.wait()
                if not np.array_equal(host[: numbers.size], numbers):
                    problems.append(f"{dtype}, {turn}")
            assert graph is not None
            graph.close()
    return problems


def right_candidates(row: np.ndarray, k: int, ids: np.ndarray | None, values: np.ndarray) -> bool:
    """Return whether `ids` are all tokens that tie with the k-th largest logit of a row or exceed it.

    None is right for greedy decoding of a row with a NaN, and for a top-k with too many ties.
    """
    order = np.where(np.isnan(row), np.inf, row)
    reached = np.flatnonzero(order >= np.partition(order, -k)[-k]) if k > 1 else order.argmax(keepdims=True)
    whole = bool(np.isnan(row).any()) if k == 1 else len(reached) > sampling.CAPACITY
    if ids is None:
        return whole and np.array_equal(values, row, equal_nan=True)
    same = k == 1 or np.array_equal(values, row[ids], equal_nan=True)
    return not whole and np.array_equal(ids, reached) and same
