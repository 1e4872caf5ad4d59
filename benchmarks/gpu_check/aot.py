"""The kernels as `compile_kernels` makes them ahead of time, launched as an engine does, through the driver:
bit for bit what the JIT's give. Needs cuda-python."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmc.plugins.cuda.compile import Kernel
from llmc.plugins.paged_attention import launch

from . import jit, steps
from .card import Card, current
from .cases import STEPS, Case
from .correctness import place, same_bits
from .options import Options, Row

PAIRS = (
    ("32/8x128", "bf16"),
    ("64/8x64 window sinks", "bf16-fp8kv"),
    ("6/2x48/80 everything", "fp16"),
)


def rows(options: Options) -> Iterator[Row]:
    try:
        kernel = importlib.import_module("llmc.plugins.cuda.kernel")
    except ImportError as error:
        yield {"name": "cuda-python", "status": "absent", "error": f"{type(error).__name__}: {error}"}
        return
    card = current()
    with tempfile.TemporaryDirectory() as folder:
        for shape, dtypes in PAIRS[:1] if options.quick else PAIRS:
            case = Case(shape, dtypes, "mixed", STEPS["mixed"])
            try:
                wrong = _differences(kernel.Kernels, case, options.seed, card, Path(folder))
            except Exception as error:
                wrong = [f"{type(error).__name__}: {error}"]
            status = {"status": "failed", "error": "; ".join(wrong)} if wrong else {"status": "passed"}
            yield {"name": f"{shape}, {dtypes}", **status}


def _differences(loader: Any, case: Case, seed: int, card: Card, cache: Path) -> list[str]:
    """What differs in a bit between the JIT's results and the driver's."""
    host = steps.make(case, seed)
    plan = steps.plan(case, host, card.sm, card.multiprocessors)
    torch.zeros(1, device="cuda")  # torch's context exists from here on, and is the thread's
    images = [image(one.variant, card.sm, cache) for one in plan.launches]
    kernels = loader(images, launch.ARGUMENTS)
    found = []
    for ahead_of_time in (False, True):
        tensors = place(case, host, "cuda")
        for bound in jit.bind(case.attention, plan, tensors, **steps.scales(case)):
            if ahead_of_time:
                stream = torch.cuda.current_stream().cuda_stream
                kernels.launch(str(bound.variant), bound.grid, addresses(bound), stream)
            else:
                jit.run(bound, card.sm)
        torch.cuda.synchronize()
        found.append({name: tensors[name] for name in ("output", *steps.CACHES)})
    kernels.close()
    wrong = [f"{name} is not the JIT's" for name in found[0] if not same_bits(found[0][name], found[1][name])]
    return wrong if bool(found[1]["output"].isfinite().all()) else [*wrong, "outputs not finite"]


def image(variant: launch.Variant, sm: int, cache: Path) -> Any:
    """The variant's cubin as a `KernelImage`."""
    from llmc.plugins.paged_attention.compile_kernels import compile_variant

    return kernel_image(str(variant), compile_variant(variant, sm, cache))


def kernel_image(name: str, made: Kernel) -> Any:
    """A compiled kernel as a `KernelImage` of that name."""
    from llmc.plugins.cuda.kernel import KernelImage

    return KernelImage(
        variant=name, entry=made.name, image=made.cubin,
        shared_memory=made.shared_memory, num_warps=made.num_warps,
    )  # fmt: skip


def addresses(bound: jit.Bound) -> dict[str, float]:
    """A launch's arguments with tensors as addresses on the device."""
    return {
        name: given.data_ptr() if isinstance(given, torch.Tensor) else given
        for name, given in bound.arguments.items()
    }
