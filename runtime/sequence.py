"""One request as the scheduler sees it: its tokens, how far they are computed, and in which blocks."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from enum import Enum
from typing import Literal

import numpy as np

from llmc.runtime.block_pool import hash_block
from llmc.runtime.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


class SequenceState(Enum):
    """WAITING holds no block; RUNNING holds blocks; FINISHED has given them back."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Prompt and output of one request.

    token_ids: all tokens known so far, the prompt's `prompt_tokens` first.
    num_computed: how many of them have their keys and values in the cache.
    block_table: the cache blocks holding them, in order; int32, as the engine wants it.
    arrival: place in the order of arrival, given by the scheduler.
    rng: this request's own random numbers, so that its draws do not depend on its neighbours.
    """

    __slots__ = (
        "_digests",
        "arrival",
        "block_table",
        "finish_reason",
        "num_computed",
        "params",
        "prompt_tokens",
        "request_id",
        "rng",
        "state",
        "token_ids",
    )

    def __init__(self, request_id: str, prompt_ids: Iterable[int], params: SamplingParams) -> None:
        self.request_id = request_id
        self.token_ids = list(prompt_ids)
        self.prompt_tokens = len(self.token_ids)
        self.params = params
        self.num_computed = 0
        self.block_table: array[int] = array("i")
        self.state = SequenceState.WAITING
        self.finish_reason: FinishReason | None = None
        self.arrival = -1
        self.rng = np.random.default_rng(params.seed)
        self._digests: list[bytes] = []

    @property
    def num_pending(self) -> int:
        """Known tokens that are not computed yet: 1 while decoding, more while prefilling."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_tokens

    def block_digests(self, count: int, block_size: int) -> list[bytes]:
        """The chained hashes of the first `count` blocks, all of whose tokens must be known."""
        digests = self._digests
        for index in range(len(digests), count):
            tokens = self.token_ids[index * block_size : (index + 1) * block_size]
            digests.append(hash_block(digests[-1] if digests else b"", tokens))
        return digests[:count]

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}, {self.state.value}, {self.num_computed} of "
            f"{len(self.token_ids)} tokens computed, {len(self.block_table)} blocks)"
        )
