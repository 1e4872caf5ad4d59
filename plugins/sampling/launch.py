"""Launch plans of the sampling kernels (`kernels.py`), and the layout of their results.

Nothing here imports torch, triton or CUDA at the top. The kernels do not depend on the model: its vocabulary
and k are run-time arguments.
"""

from __future__ import annotations

import numpy as np

from llmc.plugins.cuda.config import Config

ABI = 1  # of arguments and results; kernels of another ABI are not used
MAX_K = 256
CAPACITY = 512  # maximum candidates of a row: k, and ties with the k-th
CHUNK = 16384  # logits of a program: each thread holds 32 in registers
TILE = 2048  # logits that are compacted at once
MAX_PARTS = 32  # programs per row; the merge holds MAX_PARTS * CAPACITY candidates in registers
MAX_VOCAB = MAX_PARTS * CHUNK
GREEDY = ("argmax_parts", "argmax_merge")
TOP_K = ("top_k_parts", "top_k_merge")

_PARTS = dict.fromkeys(("part_keys", "part_ids", "part_counts", "part_lost"), "*i32")
_LOGITS = {"logits": "*fp32", "vocab": "i32"}
# Kernel -> its run-time arguments, in order.
ARGUMENTS: dict[str, dict[str, str]] = {
    "argmax_parts": {"partial": "*i64", **_LOGITS},
    "argmax_merge": {"result": "*i32", "partial": "*i64", "parts": "i32"},
    "top_k_parts": {**_PARTS, **_LOGITS, "k": "i32"},
    "top_k_merge": {"result": "*i32", **_PARTS, **_LOGITS, "parts": "i32", "k": "i32"},
}
_CONFIGS = {
    "argmax_parts": Config({"CHUNK": CHUNK}, num_warps=16, num_stages=2),
    "argmax_merge": Config({"PARTS": MAX_PARTS}, num_warps=1, num_stages=2),
    "top_k_parts": Config({"CHUNK": CHUNK, "TILE": TILE, "CAPACITY": CAPACITY}, num_warps=16, num_stages=2),
    "top_k_merge": Config({"PARTS": MAX_PARTS, "CAPACITY": CAPACITY}, num_warps=16, num_stages=2),
}

Row = tuple[np.ndarray, np.ndarray]  # token ids, int32 [C] ascending, and their logits, float32 [C]


def variant(kernel: str) -> str:
    """Return the name of the kernel in a bundle."""
    return f"{kernel}-abi{ABI}"


def configure(kernel: str) -> Config:
    """Return the compilation settings of a kernel, for every SM."""
    return _CONFIGS[kernel]


def parts(vocab: int, chunk: int = CHUNK) -> int:
    """Return the number of programs that share a row."""
    return -(-vocab // chunk)


def launches(rows: int, vocab: int, k: int) -> list[tuple[str, tuple[int, int, int]]]:
    """Return kernels and grids, in order, for the stream that computes the logits. k = 1 is greedy."""
    first, second = GREEDY if k == 1 else TOP_K
    return [(first, (parts(vocab), rows, 1)), (second, (rows, 1, 1))]


def scratch(rows: int, vocab: int, chunk: int = CHUNK, capacity: int = CAPACITY) -> dict[str, int]:
    """Return argument -> bytes of device memory, for the results that one kernel passes to the next."""
    count = rows * parts(vocab, chunk)
    lists = 4 * count * capacity
    return {
        "partial": 8 * count, "part_keys": lists, "part_ids": lists,
        "part_counts": 4 * count, "part_lost": 4 * count,
    }  # fmt: skip


def width(k: int, capacity: int = CAPACITY) -> int:
    """Return the number of int32 elements of a row's result."""
    return 1 if k == 1 else 1 + 2 * capacity


def read(result: np.ndarray, k: int) -> list[Row | None]:
    """Return the candidates of each row of a result int32 [N, width]. None: all logits of the row are needed.

    Greedy decoding gives one candidate, with 0 in place of its logit.
    """
    if k == 1:
        nothing = np.zeros(1, np.float32)
        return [(row, nothing) if row[0] >= 0 else None for row in result]
    ids, logits = np.hsplit(result[:, 1:], 2)
    return [
        (ids[row, :count], logits[row, :count].view(np.float32)) if count >= 0 else None
        for row, count in enumerate(result[:, 0])
    ]
