"""Compare the kernels compiled ahead of time, launched through the driver as in an engine, with the JIT's.

The results must be bit-identical. Needs cuda-python.
"""

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
    """Return which results of the JIT and of the driver are not bit-identical."""
    host = steps.make(case, seed)
    plan = steps.plan(case, host, card.sm, card.multiprocessors)
    torch.zeros(1, device="cuda")  # creates torch's context and makes it current
    images = [image(planned.variant, card.sm, cache) for planned in plan.launches]
    kernels = loader(images, launch.ARGUMENTS)
    results = []
    for ahead_of_time in (False, True):
        tensors = place(case, host, "cuda")
        for bound in jit.bind(case.attention, plan, tensors, **steps.scales(case)):
            if ahead_of_time:
                stream = torch.cuda.current_stream().cuda_stream
                kernels.launch(str(bound.variant), bound.grid, addresses(bound), stream)
            else:
                jit.run(bound, card.sm)
        torch.cuda.synchronize()
        results.append({name: tensors[name] for name in ("output", *steps.CACHES)})
    kernels.close()
    wrong = [
        f"{name} is not the JIT's" for name in results[0] if not same_bits(results[0][name], results[1][name])
    ]
    return wrong if bool(results[1]["output"].isfinite().all()) else [*wrong, "outputs not finite"]


def image(variant: launch.Variant, sm: int, cache: Path) -> Any:
    """Return the variant's cubin as a `KernelImage`."""
    from llmc.plugins.paged_attention.compile_kernels import compile_variant

    return kernel_image(str(variant), compile_variant(variant, sm, cache))


def kernel_image(name: str, compiled: Kernel) -> Any:
    """Return a compiled kernel as a `KernelImage` of that name."""
    from llmc.plugins.cuda.kernel import KernelImage

    return KernelImage(
        variant=name, entry=compiled.name, image=compiled.cubin,
        shared_memory=compiled.shared_memory, num_warps=compiled.num_warps,
    )  # fmt: skip


def addresses(bound: jit.Bound) -> dict[str, float]:
    """Return a launch's arguments, with the device addresses of tensors."""
    return {
        name: argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
        for name, argument in bound.arguments.items()
    }
