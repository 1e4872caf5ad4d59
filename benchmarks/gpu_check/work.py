"""The timed workloads, with their FLOPs and bytes, computed from lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmc.plugins.paged_attention.launch import FP8, Attention

SHAPES = {
    "32/8x128": Attention(32, 8, 128, 128),
    "64/8x64": Attention(64, 8, 64, 64),
    "64/8x64 window sinks": Attention(64, 8, 64, 64, window=128, sinks=True),
}
# The head sizes that `--tune` covers. In decode, all groups of up to 16 have the same rows per tile.
TUNED = ("32/8x128", "32/8x64", "32/8x256")
PREFILLS = (1024, 4096, 16384)
CONTEXTS = (1024, 8192, 32768)
BATCHES = (1, 8, 64, 256)


def _plain(shape: str) -> Attention:
    """Return the attention for "query heads/key and value heads x head size"."""
    heads, kv_heads, size = map(int, shape.replace("/", "x").split("x"))
    return Attention(heads, kv_heads, size, size)


@dataclass(frozen=True)
class Workload:
    """A step of `batch` sequences with the same lengths."""

    #: A key of SHAPES, or "query heads/key and value heads x head size".
    shape: str
    dtype: str
    #: None: the cache has the model's dtype.
    kv_dtype: str | None
    #: Number of sequences.
    batch: int
    #: Cached tokens of each sequence.
    past: int
    #: New tokens of each sequence.
    new: int

    @property
    def attention(self) -> Attention:
        return SHAPES.get(self.shape) or _plain(self.shape)

    @property
    def kind(self) -> str:
        return "decode" if self.new == 1 else "prefill"

    @property
    def context(self) -> int:
        return self.past + self.new

    def __str__(self) -> str:
        cache = ", fp8 cache" if self.kv_dtype == FP8 else ""
        return f"{self.kind} {self.batch}x{self.context}, {self.shape}, {self.dtype}{cache}"

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of all tokens."""
        a = self.attention
        element = 1 if self.kv_dtype == FP8 else 2
        return self.batch * self.context * a.num_kv_heads * (a.head_dim + a.v_head_dim) * element

    @property
    def flops(self) -> int:
        """FLOPs of both matrix products, for the visible pairs of query and key; 2 per multiplication."""
        a = self.attention
        pairs = visible_pairs(self.past, self.new, a.window)
        return 2 * (a.head_dim + a.v_head_dim) * a.num_heads * pairs * self.batch

    @property
    def bytes_read(self) -> int:
        """Bytes of the keys and values that the tokens of a decode step see, each counted once."""
        visible = min(self.context, self.attention.window or self.context)
        return self.cache_bytes // self.context * visible


def visible_pairs(past: int, new: int, window: int = 0) -> int:
    """Return the number of visible keys, summed over the new tokens.

    A token at position p sees p + 1 keys, or the last `window` of them.
    """
    positions = range(past, past + new)
    if not window:
        return sum(p + 1 for p in positions)
    return sum(min(p + 1, window) for p in positions)


def workloads(*, quick: bool = False) -> Iterator[Workload]:
    for shape in SHAPES:
        for tokens in PREFILLS[1:2] if quick else PREFILLS:
            yield Workload(shape, "bf16", None, 1, 0, tokens)
    if not quick:
        yield Workload("32/8x128", "fp16", None, 1, 0, PREFILLS[1])
        yield Workload("32/8x128", "bf16", FP8, 1, 0, PREFILLS[1])
    for shape, kv_dtype in (*((shape, None) for shape in SHAPES), ("32/8x128", FP8)):
        for context in CONTEXTS[1:2] if quick else CONTEXTS:
            for batch in BATCHES[::2] if quick else BATCHES:
                yield Workload(shape, "bf16", kv_dtype, batch, context - 1, 1)
