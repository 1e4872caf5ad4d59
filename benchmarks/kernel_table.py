"""Print registers, spills and shared memory of the attention kernels at common head shapes, as Markdown.

    python benchmarks/kernel_table.py [--sm 90] [--cache DIR]

This is the table of docs/explanation/kernels.md. It needs Triton and no GPU.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

from llmc.plugins.cuda.gpus import SMS
from llmc.plugins.paged_attention.compile_kernels import compile_variant
from llmc.plugins.paged_attention.launch import ARGUMENTS, FP8, Attention, variants_for

# Head shapes of the table, and of a test of tests/plugins/test_kernels.py.
COMMON = {
    "heads of 64, groups of 4": Attention(32, 8, 64, 64),
    "heads of 64, window, sinks (gpt-oss)": Attention(64, 8, 64, 64, window=128, sinks=True),
    "heads of 128, groups of 4": Attention(32, 8, 128, 128),
    "heads of 192 and 128, no groups": Attention(16, 16, 192, 128),
    "heads of 256, window, softcap (Gemma 2)": Attention(8, 4, 256, 256, window=4096, softcap=50.0),
}
# (dtype of activations, dtype of the KV cache or None for the same)
BF16: tuple[tuple[str, str | None], ...] = (("bf16", None), ("bf16", FP8))
FP16: tuple[tuple[str, str | None], ...] = (("fp16", None), ("fp16", FP8))


def table(sms: Iterable[int], cache: Path, pairs: Iterable[tuple[str, str | None]] = BF16) -> str:
    """Return a Markdown table with a row for each variant and a column for each SM.

    A cell is `registers per thread, KiB of shared memory`, and `!spilled bytes per thread` if there are any.

    cache: the directory of compiled kernels
    pairs: (dtype of activations, dtype of the KV cache or None for the same)
    """
    sms = list(sms)
    rows = ["| kernel | " + " | ".join(f"SM{sm}" for sm in sms) + " |", "|---" * (len(sms) + 1) + "|"]
    for variant in sorted(
        variants_for(COMMON.values(), pairs), key=lambda v: list(ARGUMENTS).index(v.kernel)
    ):
        cells = []
        for sm in sms:
            kernel = compile_variant(variant, sm, cache)
            spill = f" !{kernel.spills}" if kernel.spills else ""
            cells.append(f"{kernel.registers}, {kernel.shared_memory / 1024:.0f}{spill}")
        rows.append(f"| `{variant}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the table of kernels of docs/explanation/kernels.md.")
    parser.add_argument("--sm", type=int, action="append", choices=SMS, help="an SM (default: all)")
    parser.add_argument("--cache", type=Path, help="where compiled kernels are kept (default: nowhere)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(table(options.sm or SMS, options.cache or Path(folder)))


if __name__ == "__main__":
    main()
