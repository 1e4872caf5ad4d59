"""The plan of each rank: what it has and exchanges, the memory that it needs, and the GPUs that have as much.

The numbers of a graph's part are read by `targets/part.py`, those of a bundle by `bundle_ranks.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from llmc.compiler.request import AUTO, MAX_RANKS, MAX_TP, BuildRequest
from llmc.plugins.paged_attention.spec import BLOCK_SIZE
from llmc.runtime.backends.tensorrt.sizes import reserve
from llmc.runtime.bundle.manifest import Geometry
from llmc.runtime.parallel.candidates import most_of, width

_PROCESS_BYTES = 128 << 20  # of a rank on a CPU beside its model: 59 MiB were measured
_CUDA_BYTES = 1 << 30  # of a rank on a GPU: CUDA, NCCL, and what the driver keeps. An estimate


@dataclass(frozen=True)
class Exchange:
    """What a rank gives to one kind of collective, or sends to other ranks, in a step."""

    #: AllReduce, AllGather or Send.
    operation: str
    #: How many of them a step has.
    count: int
    #: The bytes for each token of the step, all together. None: unknown.
    token_bytes: int | None
    #: The bytes for each row of logits, all together. None: unknown.
    logits_bytes: int | None


@dataclass(frozen=True)
class RankPlan:
    """One rank."""

    rank: int
    #: Its layers: first .. stop - 1.
    first: int
    stop: int
    #: The largest number of query heads of a layer, and of KV heads.
    num_heads: int
    num_kv_heads: int
    #: The bytes of its weights. A rank of a finished TensorRT bundle: those of its plan, which has them.
    weight_bytes: int
    #: The bytes of a KV block of `BLOCK_SIZE` tokens, all its layers.
    kv_block_bytes: int
    #: The bytes of activations in the largest step. None: unknown.
    activation_bytes: int | None
    exchanges: tuple[Exchange, ...] = ()
    #: The bytes for each row of logits in a step that needs only the largest one of every row. None: those of
    #: whole rows, or none.
    greedy_bytes: int | None = None

    def kv_bytes(self, tokens: int) -> int:
        """Return the bytes of KV cache for a sequence of `tokens` tokens."""
        return -(-tokens // BLOCK_SIZE) * self.kv_block_bytes

    def needed(self, tokens: int) -> int:
        """Return the bytes that the rank needs for a sequence of `tokens` tokens."""
        return self.weight_bytes + self.kv_bytes(tokens) + (self.activation_bytes or 0)


def with_candidates(rank: RankPlan, vocabulary: int, tp: int) -> RankPlan:
    """Return a rank of the native engine with its `greedy_bytes`. tp: the number of ranks in a stage"""
    exchanges = sum(1 for each in rank.exchanges if each.logits_bytes)
    if not exchanges or not most_of(vocabulary // tp):
        return rank
    return replace(rank, greedy_bytes=4 * width(1) * exchanges)


@dataclass(frozen=True)
class Card:
    """A common GPU."""

    name: str
    #: Its memory as its maker gives it. nvidia-smi reports this many times 10^9 bytes, or up to 8 % more.
    gigabytes: int
    #: Its compute capability: 89 for 8.9.
    sm: int


# nvidia-smi reports 23,028 MiB (A10), 23,034 (L4), 32,607 (RTX 5090), 40,960 or 81,920 (A100),
# 46,068 (L40S), 81,559 (H100) and 183,359 (B200). With ECC, a part of the memory is not for programs.
CARDS = (
    Card("RTX A4000", 16, 86),
    Card("RTX 4080", 16, 89),
    Card("RTX 5080", 16, 120),
    Card("A10", 24, 86),
    Card("RTX 3090", 24, 86),
    Card("RTX 4090", 24, 89),
    Card("L4", 24, 89),
    Card("RTX 5090", 32, 120),
    Card("A100 40GB", 40, 80),
    Card("A40", 48, 86),
    Card("RTX A6000", 48, 86),
    Card("L40S", 48, 89),
    Card("RTX 6000 Ada", 48, 89),
    Card("A100 80GB", 80, 80),
    Card("H100", 80, 90),
    Card("RTX PRO 6000", 96, 120),
    Card("H200", 141, 90),
    Card("B200", 192, 100),
)


@dataclass(frozen=True)
class GpuSize:
    """A size of GPU, one for each rank."""

    #: The GPUs of this size that the engine runs on.
    cards: tuple[str, ...]
    #: As their maker gives it: 10^9 bytes each.
    gigabytes: int
    #: The tokens of KV cache that fit beside the weights and activations of any rank; 0: these do not fit.
    kv_tokens: int
    #: Whether that is enough for a sequence of the whole context.
    fits: bool


def gpu_sizes(ranks: Sequence[RankPlan], max_seq_len: int, sms: Collection[int]) -> tuple[GpuSize, ...]:
    """Return what each size of GPU could hold, the smallest first.

    sms: the compute capabilities that the engine runs on
    """
    cards = [card for card in CARDS if card.sm in sms]
    found = []
    for gigabytes in sorted({card.gigabytes for card in cards}):
        room = _room(gigabytes * 10**9)
        tokens = min(max(0, room - rank.needed(0)) // rank.kv_block_bytes * BLOCK_SIZE for rank in ranks)
        names = tuple(card.name for card in cards if card.gigabytes == gigabytes)
        found.append(GpuSize(names, gigabytes, tokens, tokens >= max_seq_len))
    return tuple(found)


def memory_needed(rank: RankPlan, max_seq_len: int, *, on_gpu: bool) -> int:
    """Return the smallest memory, in bytes, that holds a rank with a sequence of the whole context.

    on_gpu: whether the memory is that of a GPU
    """
    needed = rank.needed(max_seq_len)
    if not on_gpu:
        return needed + _PROCESS_BYTES
    total = needed
    while (room := _room(total)) < needed:  # what is left free grows with the GPU
        total += needed - room
    return total


def _room(total: int) -> int:
    """Return how many of a GPU's bytes a rank can use. The runtime leaves some free."""
    return total - _CUDA_BYTES - reserve(total)


def tp_choices(request: BuildRequest, geometry: Geometry) -> list[int]:
    """Return the numbers of ranks in a stage that a build may have, ascending.

    For `--tp auto`: those that give every rank as many heads, up to the limits of a request.
    """
    if request.tp != AUTO:
        return [request.tp]
    kv_heads = {layer.num_kv_heads for layer in geometry.layers}
    return [
        tp
        for tp in range(1, min(geometry.num_heads, MAX_TP, MAX_RANKS // request.pp) + 1)
        if geometry.num_heads % tp == 0 and all(heads % tp == 0 or tp % heads == 0 for heads in kv_heads)
    ]
