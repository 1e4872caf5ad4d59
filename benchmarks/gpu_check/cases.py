"""The cases of the check: head shapes, dtypes and lengths. Plain data that needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from llmc.plugins.paged_attention.launch import FP8, Attention

# The first shapes are those of models, the others are edge cases.
SHAPES = {
    "32/8x128": Attention(32, 8, 128, 128),  # Llama 3 8B, Qwen3 8B
    "64/8x64 window sinks": Attention(64, 8, 64, 64, window=128, sinks=True),  # gpt-oss
    "16/16x192/128": Attention(16, 16, 192, 128),  # keys wider than values
    "8/4x256 window softcap": Attention(8, 4, 256, 256, window=100, softcap=50.0),  # Gemma 2, shorter window
    "4/4x64": Attention(4, 4, 64, 64),
    "6/2x40": Attention(6, 2, 40, 40),  # neither a group nor a head size that is a power of two
    "6/2x48/80 everything": Attention(6, 2, 48, 80, window=33, softcap=5.0, sinks=True),
    "64/1x64": Attention(64, 1, 64, 64),  # the largest group
    "8/4x8": Attention(8, 4, 8, 8),  # smaller than a tile
    "4/2x32 window of one": Attention(4, 2, 32, 32, window=1),
    "4/2x32/16": Attention(4, 2, 32, 16),  # less than a swizzle of shared memory
    "4/2x16/32 window": Attention(4, 2, 16, 32, window=40),
}
DTYPES: dict[str, tuple[str, str | None]] = {
    "bf16": ("bf16", None),
    "fp16": ("fp16", None),
    "bf16-fp8kv": ("bf16", FP8),
    "fp16-fp8kv": ("fp16", FP8),
}
# Each (shape, dtypes) needs four compilations.
PAIRS = [
    *(("32/8x128", dtypes) for dtypes in DTYPES),
    *(("64/8x64 window sinks", dtypes) for dtypes in DTYPES),
    *(("6/2x48/80 everything", dtypes) for dtypes in DTYPES),
    ("16/16x192/128", "bf16"),
    ("16/16x192/128", "fp16-fp8kv"),
    ("8/4x256 window softcap", "bf16"),
    ("8/4x256 window softcap", "bf16-fp8kv"),
    ("4/4x64", "fp16"),
    ("4/4x64", "bf16-fp8kv"),
    ("6/2x40", "fp16"),
    ("64/1x64", "bf16"),
    ("8/4x8", "fp16"),
    ("8/4x8", "bf16-fp8kv"),
    ("4/2x32 window of one", "bf16"),
    ("4/2x32/16", "fp16"),
    ("4/2x32/16", "bf16-fp8kv"),
    ("4/2x16/32 window", "bf16"),
]
QUICK_PAIRS = [
    ("32/8x128", "bf16"),
    ("32/8x128", "fp16-fp8kv"),
    ("64/8x64 window sinks", "bf16-fp8kv"),
    ("6/2x48/80 everything", "fp16"),
]


@dataclass(frozen=True)
class Step:
    """The lengths of a step."""

    #: The cached tokens of each sequence.
    past: tuple[int, ...]
    #: The new tokens of each sequence. 0: padding, as in a captured step.
    new: tuple[int, ...]
    #: None: the number that the planner chooses.
    num_splits: int | None = None
    #: Number of leading blocks that all sequences share with the first.
    shared: int = 0
    #: Whether the blocks before the window are replaced by one that was never written.
    forget: bool = False


STEPS = {
    # decode, chunk across pages, decode, fresh prefill, chunk, padding
    "mixed": Step((70, 31, 64, 0, 32, 5), (1, 40, 1, 33, 2, 0), num_splits=2),
    "fresh prefills": Step((0, 0, 0, 0), (31, 32, 33, 1)),
    "page ends": Step((31, 32, 33, 63), (33, 32, 31, 2)),
    "decode": Step((0, 30, 31, 32, 95, 7), (1, 1, 1, 1, 1, 0)),
    "splits": Step((300, 3, 64, 2000), (1, 1, 1, 1), num_splits=5),
    "most splits": Step((1500, 31), (1, 1), num_splits=64),
    "shared prefix": Step((64, 70, 64), (3, 1, 2), shared=2),
    "long": Step((4100, 700), (1, 90)),
    # more sequences than a program compares at once; the longest are decoded with the planner's splits
    "many": Step(tuple(i * 7 % 50 for i in range(300)), tuple((1, 2, 0, 1, 3)[i % 5] for i in range(300))),
    "left behind": Step((300, 330), (1, 9), num_splits=2, forget=True),
}
QUICK_STEPS = ("mixed", "fresh prefills", "splits", "shared prefix")
FAR_BLOCKS = 1 << 16  # of 32/8x128: 2**31 elements, so that the case's blocks are beyond 32-bit offsets


@dataclass(frozen=True)
class Case:
    """A step of one layer."""

    #: A key of SHAPES.
    shape: str
    #: A key of DTYPES.
    dtypes: str
    #: The name of `step`, for reports.
    step_name: str
    step: Step
    #: Number of the pool's blocks before those of the case.
    first_block: int = 0

    @property
    def attention(self) -> Attention:
        return SHAPES[self.shape]

    @property
    def dtype(self) -> str:
        return DTYPES[self.dtypes][0]

    @property
    def kv_dtype(self) -> str | None:
        return DTYPES[self.dtypes][1]

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtypes}, {self.step_name}" + (", far" if self.first_block else "")


def cases(*, quick: bool = False) -> list[Case]:
    """Return all cases. Those of one (shape, dtypes) are consecutive, because they share compiled kernels."""
    steps: Iterable[str] = QUICK_STEPS if quick else STEPS
    return [case for pair in (QUICK_PAIRS if quick else PAIRS) for case in _of(*pair, steps)]


def share(all_cases: list[Case], index: int, count: int) -> list[Case]:
    """Return the cases of process `index` of `count`, so that no two processes compile the same case."""
    pairs = list(dict.fromkeys((case.shape, case.dtypes) for case in all_cases))
    selected = set(pairs[index::count])
    return [case for case in all_cases if (case.shape, case.dtypes) in selected]


def _of(shape: str, dtypes: str, steps: Iterable[str]) -> Iterator[Case]:
    for name in steps:
        case = Case(shape, dtypes, name, STEPS[name])
        if case.step.forget and not case.attention.window:
            continue
        yield case
        if (shape, dtypes, name) == ("32/8x128", "bf16", "mixed"):
            yield replace(case, first_block=FAR_BLOCKS)
