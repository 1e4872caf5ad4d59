"""The scheduler's view of a request: its tokens, how many of them are computed, and its blocks."""

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
    """A WAITING sequence holds no blocks, a RUNNING one does, and a FINISHED one has freed them."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Prompt and output of one request.

    token_ids: all known tokens. The first `prompt_tokens` are the prompt.
    num_computed: the number of tokens whose keys and values are in the cache.
    block_table: the sequence's cache blocks, in order, int32. They also have room for the tokens of
        the current step, which are not computed yet.
    arrival: the place in the order of arrival, set by the scheduler.
    rng: the request's random number generator, independent of other requests.
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
        """Number of tokens that the engine has not computed yet: 1 in decode, more in prefill."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_output(self) -> int:
        """Number of tokens generated so far."""
        return len(self.token_ids) - self.prompt_tokens

    def block_digests(self, count: int, block_size: int) -> list[bytes]:
        """Return the chained hashes of the first `count` blocks. All their tokens must be known."""
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
