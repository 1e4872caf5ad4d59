"""A script that runs gpu-check's part `runtime` on the stand-in for the driver.

The kernels are right at first, then one at a time is not. test_tensorrt_backend.py starts the script in a
process whose libcuda is the stand-in.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import pytest
from gpu_check import cases, runtime
from gpu_check.card import Card
from gpu_check.cases import Case, Step
from gpu_check.options import Options

from llmc.plugins.cuda.driver import CudaError
from llmc.plugins.cuda.kernel import KernelImage
from llmc.plugins.paged_attention import launch
from llmc.plugins.sampling import launch as sampling
from support.cuda_stand_in import StandIn
from support.gpu_bundle import sampling_kernels
from support.nccl_stand_in import Hub, StandInNccl
from support.triton_interpreter import _patch_interpreter

PAIRS = [("8/4x8", "fp16"), ("4/2x16/32 window", "bf16-fp8kv")]
DECODES = ((140, 3, 199, 31), (141, 40, 0), (199, 32, 33))
ON = {"seed": 3, "sm": 89, "multiprocessors": 8}


def images(variants: Iterable[launch.Variant]) -> list[Any]:
    """Images as the stand-in takes them: the variant's name."""
    return [
        KernelImage(str(v), v.kernel, str(v).encode(), 0, launch.configure(v, 89).num_warps) for v in variants
    ]


def main() -> None:
    pairs = [(cases.SHAPES[shape], *cases.DTYPES[dtypes]) for shape, dtypes in PAIRS]
    variants = [v for a, *pair in pairs for v in launch.variants_for([a], [tuple(pair)])]
    gpu = StandIn(others=variants)
    _patch_interpreter()
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, in the interpreter, about padding

    class Wrong:
        """Changes a bit of what a kernel writes, after each of its launches."""

        def __init__(self, kernel: str, argument: str, offset: int) -> None:
            self.kernel, self.argument, self.offset = kernel, argument, offset

        def __enter__(self) -> None:
            self.real, gpu.run = gpu.run, self.run  # type: ignore[method-assign]

        def __exit__(self, *_: Any) -> None:
            gpu.run = self.real  # type: ignore[method-assign]

        def run(self, variant: Any, grid: Any, raw: Any) -> None:
            self.real(variant, grid, raw)
            if getattr(variant, "kernel", variant) == self.kernel:
                (data,) = (data for (name, _), data in raw.items() if name == self.argument)
                gpu.view(int.from_bytes(data, "little") + self.offset, "uint8", (1,))[0] ^= 64

    vocab = sampling.CHUNK + 300
    files = [
        KernelImage(f.variant, f.entry, f.variant.encode(), f.shared_memory, f.num_warps)
        for f in sampling_kernels((89, "cubin"))
    ]
    sized: Any = {"PAIRS": PAIRS, "DECODES": DECODES, "MAX_LEN": 200, "VOCAB": vocab, "KS": (1, 50)}
    sized |= {"current": lambda: Card("stand-in", 89, 8, 0, 0, ""), "sampling_images": lambda *_: files}
    vars(runtime).update(sized)
    runtime.aot.image = lambda variant, *_: images([variant])[0]
    hubs = [Hub() for _ in range(2)]
    library = StandInNccl(Path(sys.argv[1]), hubs[0].address, gpu.submit)
    found = list(runtime.rows(Options(3)))
    assert [row["status"] for row in found] == ["passed"] * 7, found
    assert len(hubs[0].calls) == 3 * 3 * 2  # element types, runs, operations
    assert library.log[-1] == "abort"
    assert gpu.log.count("instantiate") == len(PAIRS) + 3
    assert gpu.log.count("replay") == len(PAIRS) * len(DECODES) + 3 * 2
    library.address = hubs[1].address
    library.wrong = True
    assert runtime.collectives_in_a_graph(3) == [
        f"{dtype}, {turn}" for dtype in ("bf16", "fp16", "fp32") for turn in ("plain", "graph", "graph again")
    ]
    shares = [list(runtime.rows(Options(3, share=(index, 8)))) for index in (0, 7)]
    assert [[row["name"] for row in share] for share in shares] == [["the GPU's properties"], []]

    assert runtime.device(Card("stand-in", 90, 8, 0, 0, "")) == ["SM 89, torch says 90"]
    mixed = Case("8/4x8", "fp16", "mixed", Step((70, 0, 5), (1, 33, 0)))
    with Wrong("prefill", "output", 3 * 2 * 64 + 1):
        (said,) = runtime.plain_step(mixed, images, **ON)
        assert "1 outputs" in said, said
    with Wrong("write_kv", "value_cache", 1):
        found = runtime.one_graph("8/4x8", "fp16", DECODES, 200, images, **ON)
        assert len(found) >= 3, found
        assert all("value_cache: 1 blocks differ" in said for said in found[1::2]), found
    gpu.fail = "upload graph"  # no memory for a graph: it is gone, and the caller can do without
    with pytest.raises(CudaError, match="cuGraphUpload failed"):
        runtime.one_graph("8/4x8", "fp16", DECODES, 200, images, **ON)
    assert not gpu.graphs
    gpu.fail = ""
    with Wrong("argmax_merge", "result", 0):
        assert runtime.sampled(files, vocab, (1,), 3) == ["k 1, row 0", "k 1, row 0, run again"]
    assert not gpu.memory
    assert not gpu.modules
    assert not gpu.graphs
    print("all as expected")


if __name__ == "__main__":
    main()
