"""The serving loop: schedule, run, sample, commit."""

from __future__ import annotations

import contextlib
import operator
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, repeat
from typing import NamedTuple, cast

import numpy as np

from llmc.runtime.arguments import Prompt, as_params, as_prompt, as_prompts
from llmc.runtime.backends.base import Backend, PipelineBackend, SamplingBackend, SamplingPipelineBackend
from llmc.runtime.batch import Batch, build_batch
from llmc.runtime.block_pool import BlockPool
from llmc.runtime.detokenizer import TextStream
from llmc.runtime.errors import BackendError, RequestError
from llmc.runtime.sampling import SamplingParams, candidates_needed, sample
from llmc.runtime.scheduler import ScheduledChunk, Scheduler
from llmc.runtime.sequence import FinishReason, SequenceState
from llmc.runtime.sequence import Sequence as TokenSequence
from llmc.runtime.tokenizer import Tokenizer
from llmc.runtime.turns import Turns

_Row = tuple[np.ndarray | None, np.ndarray]  # token ids and logits, as in `Candidates`


@dataclass(frozen=True)
class RequestOutput:
    """A request after one of its steps."""

    #: The id of the request.
    request_id: str
    #: The text that this step added.
    new_text: str
    #: The whole output text, without the prompt.
    text: str
    #: All generated tokens, including an end-of-sequence token.
    token_ids: tuple[int, ...]
    #: The number of tokens in the prompt.
    prompt_tokens: int
    #: None: not finished. "stop": an end-of-sequence token or a stop string. "length": max_tokens or the end
    #: of the context. "abort": aborted.
    finish_reason: FinishReason | None


@dataclass
class EngineStats:
    """Totals since the engine started."""

    #: Number of steps.
    steps: int = 0
    #: Time of all steps, in seconds.
    step_seconds: float = 0.0
    #: The part of `step_seconds` that the backend took.
    backend_seconds: float = 0.0
    #: Tokens of prompts and outputs that the backend computed.
    computed_tokens: int = 0
    #: Tokens that were sampled.
    generated_tokens: int = 0
    #: Tokens that the prefix cache provided.
    cached_tokens: int = 0
    #: How many times a running sequence was preempted.
    preemptions: int = 0


@dataclass
class _Request:
    sequence: TokenSequence
    text_stream: TextStream | None
    text: str = ""
    output_ids: list[int] = field(default_factory=list)
    inbox: deque[RequestOutput] | None = None  # the outputs for `stream`, from steps of any caller
    finished: RequestOutput | None = None


class _Step(NamedTuple):
    """A step in flight: its chunks, their batch, and the sequence of each row of its logits."""

    chunks: list[ScheduledChunk]
    batch: Batch
    sampled: list[TokenSequence]
    #: The candidates that the backend returns of each row; 0: whole rows.
    k: int


class Engine:
    """A serving engine with one backend.

    Every method may be called from any thread: steps take turns, and one step serves the requests of all
    threads. `step` returns the outputs of all requests to its caller, so a program that calls `add_request`
    and `step` does so in one thread.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None,
        eos_token_ids: Collection[int],
        max_seq_len: int,
        max_batch_tokens: int = 512,
        max_sequences: int = 64,
        *,
        vocab_size: int | None = None,
        prefix_cache: bool = True,
        default_params: SamplingParams | None = None,
    ) -> None:
        """Create an engine. Without a tokenizer, prompts are token ids and there is no output text.

        eos_token_ids: the tokens that end an output.
        max_seq_len: the maximum number of tokens of prompt and output together.
        max_batch_tokens: the maximum number of tokens in a step.
        max_sequences: the maximum number of sequences that run at the same time.
        prefix_cache: whether to reuse the KV blocks of equal prefixes.
        vocab_size: the rows of the model's embedding table. The default is the tokenizer's size.
        default_params: the sampling parameters of requests that have none.
        """
        self.backend = backend
        self.tokenizer = tokenizer
        self.stats = EngineStats()
        pool = BlockPool(backend.num_blocks, backend.block_size, prefix_cache)
        # A backend with pipeline stages computes several steps at the same time.
        depth = getattr(backend, "depth", 1)
        self._pipeline = cast(PipelineBackend, backend) if depth > 1 else None
        self._in_flight: deque[_Step] = deque()
        self.scheduler = Scheduler(pool, max_batch_tokens, max_sequences, max_seq_len, depth)
        self._eos = frozenset(eos_token_ids)
        self._vocab_size = vocab_size or (tokenizer.vocab_size if tokenizer else 2**31)
        self.default_params = default_params or SamplingParams()
        self._requests: dict[str, _Request] = {}
        self._numbers = count(1)
        self._turns = Turns()
        # The ids of streams that the garbage collector closed in the middle of a step.
        self._dropped: deque[str] = deque()
        self._closed = False

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    def add_request(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> str:
        """Queue a request and return its id.

        Raises RequestError if the prompt is empty, too long or outside the vocabulary, if prompt and
        max_tokens can never fit the cache, or if a request with this id is unfinished.
        """
        (checked,) = as_params(params, 1, self.default_params)
        return self._queue(self._accept(as_prompt(prompt), checked, request_id))

    def step(self) -> list[RequestOutput]:
        """Compute one batch. Return an output for every request that got a token.

        With pipeline stages, this is the oldest of the batches that are computed at the same time.
        Errors of the backend propagate. The requests then stay queued, and the next step computes them again
        from the start, unless the caller aborts them.
        """
        with self._turns:
            return self._step()

    def _step(self) -> list[RequestOutput]:
        self._check_open()
        while self._dropped:
            self._abort(self._dropped.popleft())
        started = time.perf_counter()
        try:
            while len(self._in_flight) < self.scheduler.depth and (chunks := self.scheduler.schedule()):
                self._submit(self._plan(chunks))
            if not self._in_flight:
                return []
            step = self._in_flight.popleft()
            # A sequence without a token: its request was aborted meanwhile.
            tokens = [
                None
                if s.state is SequenceState.FINISHED
                else sample(logits, s.params, s.token_ids, s.rng, ids)
                for (ids, logits), s in zip(self._collect(step), step.sampled, strict=True)
            ]
        except BaseException:
            self._discard()
            raise
        self.scheduler.commit(step.chunks)
        outputs = [
            self._append(s, token) for s, token in zip(step.sampled, tokens, strict=True) if token is not None
        ]
        self._count(step.batch, time.perf_counter() - started)
        return outputs

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request and free its blocks. Return None if it is unknown or has finished already."""
        with self._turns:
            return self._abort(request_id)

    def _abort(self, request_id: str) -> RequestOutput | None:
        request = self._requests.get(request_id)
        return self._report(request, "", "abort") if request else None

    def close(self) -> None:
        """Abort all requests and release the backend. Every later request raises RequestError."""
        with self._turns:
            for request in list(self._requests.values()):
                self._report(request, "", "abort")
            try:
                with contextlib.suppress(BackendError):  # nobody waits for the steps in flight
                    self._discard()
            finally:
                self._closed = True
                self._pipeline = None
                # Frees it. After this `_check_open` lets no call reach it.
                self.backend = cast(Backend, None)

    def generate(
        self,
        prompts: str | Iterable[int] | Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Generate until every prompt is finished. Return the finished outputs in the order of the prompts.

        prompts: texts and lists of token ids. A single one needs no list around it.
        params: one SamplingParams for all prompts, or a list with one for each.
        Other requests of the engine advance too.
        """
        listed = as_prompts(prompts)
        params_list = as_params(params, len(listed), self.default_params)
        requests = []
        for number, (prompt, prompt_params) in enumerate(zip(listed, params_list, strict=True)):
            try:
                requests.append(self._accept(prompt, prompt_params, None))
            except RequestError as error:
                where = f"prompts[{number}]: " if len(listed) > 1 else ""
                raise RequestError(where + error.message, error.hint, error.argument) from error
        try:
            for request in requests:
                self._queue(request)
            return [self._finish(request) for request in requests]
        finally:
            for request in requests:  # after an error none of them stays queued
                self.abort(request.sequence.request_id)

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Yield the request's output after each of its tokens. Closing the iterator aborts the request.

        Streams may be read in turns: each advances all of them, and no output is lost.
        Raises RequestError at the call, not at the first token.
        """
        (checked,) = as_params(params, 1, self.default_params)
        return self._stream(self._accept(as_prompt(prompt), checked, None))

    def _stream(self, request: _Request) -> Iterator[RequestOutput]:
        inbox = request.inbox = deque()
        request_id = self._queue(request)
        try:
            while True:
                while inbox:
                    yield (output := inbox.popleft())
                    if output.finish_reason:
                        return
                self._advance(request)
        finally:
            if self._turns.mine:  # closed by the garbage collector during a step, which holds the lock
                self._dropped.append(request_id)
            else:
                self.abort(request_id)

    def _finish(self, request: _Request) -> RequestOutput:
        """Step until a queued request is finished. Return its last output."""
        while request.finished is None:
            self._advance(request)
        return request.finished

    def _advance(self, request: _Request) -> None:
        """Step, unless another thread's step has brought the request new output meanwhile."""
        with self._turns:
            if request.finished is None and not request.inbox:
                self._step()

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the engine is closed", "load the bundle again")

    def _accept(self, prompt: Prompt, params: SamplingParams, request_id: str | None) -> _Request:
        """Return a valid request, without queuing it."""
        self._check_open()
        token_ids = self._token_ids(prompt)
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and the engine has none", "leave `stop` empty")
        sequence = TokenSequence(request_id or self._new_id(), token_ids, params)
        self.scheduler.check_fits(sequence)
        if self.tokenizer is None:
            return _Request(sequence, None)
        return _Request(sequence, TextStream(self.tokenizer.detokenizer(token_ids), params.stop))

    def _new_id(self) -> str:
        return next(name for n in self._numbers if (name := f"request-{n}") not in self._requests)

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            tokens = prompt
        elif self.tokenizer is None:
            raise RequestError("the engine has no tokenizer", "give the prompt as token ids")
        else:
            _check_unicode(prompt)
            tokens = self.tokenizer.encode(prompt) if prompt else []
        if not len(tokens):
            raise RequestError("the prompt is empty", "give at least one token, such as the model's BOS id")
        try:
            token_ids = [operator.index(token) for token in tokens]
        except TypeError as error:
            raise RequestError(
                f"the prompt is not a list of token ids: {error}", "token ids are whole numbers"
            ) from error
        if not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            wrong = next(token for token in token_ids if not 0 <= token < self._vocab_size)
            raise RequestError(
                f"token id {wrong} is outside the vocabulary",
                f"token ids go from 0 to {self._vocab_size - 1}: is this the tokenizer of this model?",
            )
        return token_ids

    def _queue(self, request: _Request) -> str:
        request_id = request.sequence.request_id
        with self._turns:
            self._check_open()
            if request_id in self._requests:
                raise RequestError(f"request id {request_id!r} is in use", "choose another, or leave it out")
            self.scheduler.add(request.sequence)
            self._requests[request_id] = request
        return request_id

    def _plan(self, chunks: list[ScheduledChunk]) -> _Step:
        batch, sampled = build_batch(chunks)
        limit = getattr(self.backend, "max_candidates", 0)
        return _Step(chunks, batch, sampled, candidates_needed((s.params for s in sampled), limit))

    def _submit(self, step: _Step) -> None:
        """Begin a step, if the backend has pipeline stages."""
        self._in_flight.append(step)
        if self._pipeline is not None:
            started = time.perf_counter()
            if step.k:
                cast(SamplingPipelineBackend, self._pipeline).submit_sampled(step.batch, step.k)
            else:
                self._pipeline.submit(step.batch)
            self.stats.backend_seconds += time.perf_counter() - started

    def _collect(self, step: _Step) -> Iterable[_Row]:
        """Run the step, or wait for it. Return (token ids, logits) of each row; ids None: all tokens."""
        rows: Iterable[_Row]
        started = time.perf_counter()
        if self._pipeline is not None and step.k:
            rows = cast(SamplingPipelineBackend, self._pipeline).collect_sampled()
        elif self._pipeline is not None:
            rows = zip(repeat(None), self._pipeline.collect())
        elif step.k:
            rows = cast(SamplingBackend, self.backend).forward_sampled(step.batch, step.k)
        else:
            rows = zip(repeat(None), self.backend.forward(step.batch))
        self.stats.backend_seconds += time.perf_counter() - started
        return rows

    def _discard(self) -> None:
        """Compute everything again that is in the cache or in flight."""
        self._in_flight.clear()
        try:
            if self._pipeline is not None:
                self._pipeline.discard()
        finally:
            self.scheduler.rollback()

    def _append(self, sequence: TokenSequence, token: int) -> RequestOutput:
        """Append a token to a sequence. Finish the request if a stop condition is met."""
        request, params = self._requests[sequence.request_id], sequence.params
        sequence.token_ids.append(token)
        request.output_ids.append(token)
        if token in self._eos and not params.ignore_eos:
            return self._report(request, "", "stop")
        new_text = request.text_stream.push(token) if request.text_stream else ""
        if request.text_stream and request.text_stream.stopped:
            return self._report(request, new_text, "stop")
        full = len(sequence.token_ids) == self.scheduler.max_seq_len
        full = full or sequence.num_output == params.max_tokens
        return self._report(request, new_text, "length" if full else None)

    def _report(self, request: _Request, new_text: str, reason: FinishReason | None) -> RequestOutput:
        """Return the request's output. With a reason, finish the request first and free its blocks."""
        sequence = request.sequence
        if reason:
            if request.text_stream:
                new_text += request.text_stream.finish()
            self.scheduler.finish(sequence, reason)
            del self._requests[sequence.request_id]
        request.text += new_text
        ids, prompt_tokens = tuple(request.output_ids), sequence.prompt_tokens
        output = RequestOutput(sequence.request_id, new_text, request.text, ids, prompt_tokens, reason)
        request.finished = output if reason else None
        if request.inbox is not None:
            request.inbox.append(output)
        return output

    def _count(self, batch: Batch, seconds: float) -> None:
        stats = self.stats
        stats.steps += 1
        stats.step_seconds += seconds
        stats.computed_tokens += len(batch.input_ids)
        stats.generated_tokens += len(batch.logits_index)
        stats.cached_tokens = self.scheduler.num_cached_tokens
        stats.preemptions = self.scheduler.num_preemptions


def _check_unicode(prompt: str) -> None:
    """Raise RequestError for a text with lone surrogates, which Python uses for undecodable bytes."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the prompt is not valid Unicode: character {error.start} is a lone surrogate",
            "decode its bytes as UTF-8, with errors='replace' if need be",
            "prompt",
        ) from error
