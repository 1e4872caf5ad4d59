"""The engine: every request gets the tokens it would get alone, whatever runs beside it."""

from __future__ import annotations

import threading
import weakref
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tokenizers import decoders, models, pre_tokenizers

from llmc.runtime.backends.base import Backend
from llmc.runtime.batch import Batch
from llmc.runtime.engine import Engine, RequestOutput
from llmc.runtime.errors import BackendError, RequestError
from llmc.runtime.sampling import SamplingParams, sample
from llmc.runtime.tokenizer import Tokenizer
from llmc.runtime.turns import Turns
from support.waiting import LONG, wait_until

VOCAB = 13
EOS = 0


def logits_after(context: np.ndarray, vocab: int = VOCAB) -> np.ndarray:
    """Logits that depend on every token so far and on its position. context: int64 [tokens], `entry`s."""
    return np.random.default_rng(zlib.crc32(context.tobytes())).normal(0, 2, vocab).astype(np.float32)


def entry(token: Any, position: Any) -> Any:
    """Return the number that the cache stores for a token in place of keys and values."""
    return token * 4096 + position


class HashBackend:
    """Keeps a paged cache and reads all past tokens back from it through the block tables.

    Any mistake in tables, positions, lengths, caching or preemption changes the next token.
    """

    name = "hash"

    def __init__(self, num_blocks: int = 64, block_size: int = 4, vocab: int = VOCAB) -> None:
        self.num_blocks, self.block_size, self.vocab = num_blocks, block_size, vocab
        self.cache = np.full((num_blocks, block_size), -1, np.int64)
        self.fail = False
        self.calls = 0

    def forward(self, batch: Batch) -> np.ndarray:
        self.calls += 1
        assert all(array.dtype == np.int32 and array.ndim == 1 for array in vars(batch).values())
        assert len(batch.input_ids) == len(batch.position_ids) == batch.query_start[-1]
        assert len(batch.block_indices) == batch.block_begins[-1]
        contexts, written = {}, []
        for s, past in enumerate(batch.past_lengths):
            first, last = batch.query_start[s], batch.query_start[s + 1]
            table = batch.block_indices[batch.block_begins[s] : batch.block_begins[s + 1]]
            places = np.arange(past, past + last - first)
            assert len(table) == -(-(past + last - first) // self.block_size)
            blocks = table[places // self.block_size]
            values = entry(batch.input_ids[first:last].astype(np.int64), batch.position_ids[first:last])
            self.cache[blocks, places % self.block_size] = values
            written += set(blocks)
            contexts.update({row: (table, past + row - first + 1) for row in range(first, last)})
        assert len(set(written)) == len(written), "two sequences write one block"
        if self.fail:
            self.cache[:] = -2  # a failed call may have destroyed anything
            raise BackendError("the device is gone")
        rows = [contexts[row] for row in batch.logits_index]
        logits = [logits_after(self.cache[table].reshape(-1)[:length], self.vocab) for table, length in rows]
        return np.array(logits, np.float32).reshape(len(rows), self.vocab)


class StagesBackend(HashBackend):
    """Has `depth` steps in flight, and computes each of them only when it is collected."""

    def __init__(self, num_blocks: int = 64, block_size: int = 4, vocab: int = VOCAB, depth: int = 2) -> None:
        super().__init__(num_blocks, block_size, vocab)
        self.depth, self.in_flight = depth, deque[Batch]()
        self.most, self.fail_to_submit = 0, False

    def submit(self, batch: Batch) -> None:
        if self.fail_to_submit:
            self.in_flight.clear()
            raise BackendError("the device is gone")
        self.in_flight.append(batch)
        self.most = max(self.most, len(self.in_flight))
        assert self.most <= self.depth

    def collect(self) -> np.ndarray:
        batch = self.in_flight.popleft()
        try:
            return self.forward(batch)
        except BackendError:
            self.in_flight.clear()
            raise

    def discard(self) -> None:
        self.in_flight.clear()


def alone(
    prompt: list[int], params: SamplingParams, max_seq_len: int = 64, vocab: int = VOCAB
) -> tuple[list[int], str]:
    """Output tokens and finish reason of a request by itself, without any cache."""
    tokens, rng = list(prompt), np.random.default_rng(params.seed)
    while True:
        context = entry(np.array(tokens, np.int64), np.arange(len(tokens)))
        tokens.append(sample(logits_after(context, vocab), params, tokens, rng))
        if tokens[-1] == EOS and not params.ignore_eos:
            return tokens[len(prompt) :], "stop"
        if len(tokens) - len(prompt) == params.max_tokens or len(tokens) == max_seq_len:
            return tokens[len(prompt) :], "length"


def engine(backend: Backend | None = None, tokenizer: Tokenizer | None = None, **options: Any) -> Engine:
    options = {"max_seq_len": 64, "vocab_size": VOCAB, **options}
    return Engine(backend or HashBackend(), tokenizer, {EOS}, **options)


def letters() -> Tokenizer:
    """One token a byte, as byte-level BPE without merges; id 0 is never in a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={letter: index for index, letter in enumerate(["<s>", *alphabet])}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    return Tokenizer(tokenizer)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, rng.integers(1, 30)).tolist() for _ in range(count)]


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("max_batch_tokens", [4, 7, 512])
@pytest.mark.parametrize("num_blocks", [16, 64])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tokens_do_not_depend_on_neighbours_chunks_preemption_cache_or_steps_in_flight(
    prefix_cache: bool, max_batch_tokens: int, num_blocks: int, depth: int
) -> None:
    backend = HashBackend(num_blocks) if depth == 1 else StagesBackend(num_blocks, depth=depth)
    it = engine(
        backend,
        max_batch_tokens=max_batch_tokens,
        max_sequences=min(8, max_batch_tokens),
        prefix_cache=prefix_cache,
    )
    wanted = [
        (prompt, SamplingParams(max_tokens=20, ignore_eos=index % 2 == 0, temperature=index % 3, seed=index))
        for index, prompt in enumerate(prompts(12) + prompts(3))
    ]
    outputs = it.generate([prompt for prompt, _ in wanted], [params for _, params in wanted])
    assert [(list(o.token_ids), o.finish_reason) for o in outputs] == [alone(*request) for request in wanted]
    assert it.scheduler.pool.num_used == 0
    assert not it.has_unfinished
    if num_blocks == 16 and max_batch_tokens > 4:
        assert it.stats.preemptions
    if isinstance(backend, StagesBackend):
        assert backend.most == depth
        assert not backend.in_flight
    assert bool(it.stats.cached_tokens) == prefix_cache


def test_an_equal_prompt_is_computed_once() -> None:
    it, prompt = engine(), list(range(1, 12))
    first = it.generate([prompt])[0]
    computed = it.stats.computed_tokens
    second = it.generate([prompt])[0]
    assert second.token_ids == first.token_ids
    assert it.stats.cached_tokens == 8
    assert it.stats.computed_tokens - computed == computed - 8


def test_the_context_ends_a_request() -> None:
    it = engine(max_seq_len=10)
    (output,) = it.generate([[1, 2, 3]], SamplingParams(max_tokens=100, ignore_eos=True))
    assert len(output.token_ids) == 7
    assert output.finish_reason == "length"


def test_end_of_sequence_ends_a_request_unless_ignored() -> None:
    seeds = (SamplingParams(max_tokens=40, temperature=1.0, seed=seed) for seed in range(100))
    params = next(params for params in seeds if alone([1], params)[1] == "stop")
    assert engine().generate([[1]], params)[0].token_ids[-1] == EOS
    going_on = SamplingParams(max_tokens=40, temperature=1.0, seed=params.seed, ignore_eos=True)
    assert len(engine().generate([[1]], going_on)[0].token_ids) == 40


def test_one_seed_gives_one_result_and_no_seed_different_ones() -> None:
    seeded = SamplingParams(temperature=1.0, seed=4, ignore_eos=True, max_tokens=16)
    outputs = engine().generate([[1, 2]] * 3, seeded)
    assert len({output.token_ids for output in outputs}) == 1
    free = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=16)
    assert len({output.token_ids for output in engine().generate([[1, 2]] * 3, free)}) == 3


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ("", {}, "the prompt is empty"),
        ([VOCAB], {}, f"token id {VOCAB} is outside the vocabulary"),
        ([1, -1], {}, "token id -1 is outside"),
        ([1] * 64, {}, "the prompt has 64 tokens, the context 64"),
        ([1] * 20, {"max_tokens": 30}, "need 13 cache blocks of 4 tokens, the engine has 8"),
        ([1.5], {}, "not a list of token ids"),
        ([1], {"stop": ("x",)}, "stop strings need a tokenizer"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_leaves_nothing(
    prompt: Any, params: dict[str, Any], message: str
) -> None:
    tokenizer = letters() if prompt == "" else None
    it = engine(HashBackend(8), tokenizer)
    wanted, small = SamplingParams(**{"max_tokens": 2, **params}), SamplingParams(max_tokens=2)
    for start in (
        lambda: it.add_request(prompt, wanted),
        lambda: it.stream(prompt, wanted),
        lambda: it.generate([[1], prompt], [small, wanted]),
    ):
        with pytest.raises(RequestError, match=message):
            start()
    assert not it.has_unfinished


def test_a_text_prompt_needs_a_tokenizer() -> None:
    with pytest.raises(RequestError, match="no tokenizer") as caught:
        engine().add_request("hello")
    assert caught.value.hint


def test_an_id_in_use_is_refused_and_a_finished_one_is_free_again() -> None:
    it = engine()
    assert it.add_request([1], request_id="mine") == "mine"
    with pytest.raises(RequestError, match="'mine' is in use"):
        it.add_request([1], request_id="mine")
    it.abort("mine")
    assert it.add_request([1], request_id="mine") == "mine"


def test_chosen_ids_do_not_collide_with_given_ones() -> None:
    it = engine()
    names = {it.add_request([1], request_id="request-2")} | {it.add_request([1]) for _ in range(3)}
    assert len(names) == 4


def test_abort_reports_what_there_is_and_frees_the_blocks() -> None:
    it = engine()
    name = it.add_request([1, 2, 3], SamplingParams(ignore_eos=True))
    it.step()
    output = it.abort(name)
    assert output is not None
    assert (len(output.token_ids), output.finish_reason) == (1, "abort")
    assert it.abort(name) is None
    assert it.scheduler.pool.num_used == 0
    assert it.step() == []


def test_a_failing_backend_leaves_all_requests_whole() -> None:
    backend = HashBackend()
    it, params = engine(backend), SamplingParams(max_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
    for prompt in prompts(4):
        it.add_request(prompt, params)
    finished: list[RequestOutput] = []
    for step in range(100):
        backend.fail = step % 3 == 2
        if backend.fail and it.has_unfinished:
            with pytest.raises(BackendError, match="the device is gone"):
                it.step()
            assert it.scheduler.pool.num_used == 0
        else:
            finished += [output for output in it.step() if output.finish_reason]
        it.scheduler.check()
    finished.sort(key=lambda output: output.request_id)
    assert [list(output.token_ids) for output in finished] == [alone(p, params)[0] for p in prompts(4)]


def test_an_aborted_request_in_flight_leaves_no_token_and_no_block() -> None:
    backend = StagesBackend()
    it, params = engine(backend), SamplingParams(max_tokens=6, ignore_eos=True)
    asked = prompts(3)
    names = [it.add_request(prompt, params) for prompt in asked]
    it.step()
    assert len(backend.in_flight) == 1
    in_flight = [name for name in names if not it._requests[name].output_ids]
    for name in in_flight:
        assert it.abort(name) is not None
        it.add_request([5], params, name)  # the id is free again
    outputs = []
    while it.has_unfinished:
        outputs += it.step()
        it.scheduler.check()
    finished = {output.request_id: list(output.token_ids) for output in outputs if output.finish_reason}
    wanted = {name: [5] if name in in_flight else prompt for name, prompt in zip(names, asked, strict=True)}
    assert finished == {name: alone(prompt, params)[0] for name, prompt in wanted.items()}
    assert it.scheduler.pool.num_used == 0


def test_an_error_outside_of_the_backend_discards_the_steps_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = StagesBackend()
    it, params = engine(backend), SamplingParams(max_tokens=6, ignore_eos=True)
    asked = prompts(4)
    for prompt in asked:
        it.add_request(prompt, params)
    it.step()
    with monkeypatch.context() as patch:
        patch.setattr("llmc.runtime.engine.sample", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            it.step()
    assert not backend.in_flight
    assert it.scheduler.pool.num_used == 0
    it.scheduler.check()
    finished = []
    while it.has_unfinished:
        finished += [output for output in it.step() if output.finish_reason]
    finished.sort(key=lambda output: output.request_id)
    assert [list(output.token_ids) for output in finished] == [alone(prompt, params)[0] for prompt in asked]


def test_closing_an_engine_leaves_no_step_in_flight() -> None:
    backend = StagesBackend()
    it = engine(backend)
    for prompt in prompts(4):
        it.add_request(prompt)
    it.step()
    assert backend.in_flight
    it.close()
    assert not backend.in_flight


def test_logits_that_are_not_a_number_fail_the_step_and_leave_all_requests_whole() -> None:
    class Broken(HashBackend):
        def forward(self, batch: Batch) -> np.ndarray:
            return super().forward(batch) * np.nan

    it = engine(Broken())
    it.add_request([1, 2])
    with pytest.raises(BackendError, match="maximum is nan"):
        it.step()
    it.scheduler.check()
    assert it.scheduler.pool.num_used == 0


def test_a_failing_backend_ends_generate_without_leftovers() -> None:
    backend = HashBackend()
    backend.fail = True
    it = engine(backend)
    with pytest.raises(BackendError):
        it.generate([[1], [2]])
    with pytest.raises(BackendError):
        list(it.stream([1]))
    assert not it.has_unfinished


def test_streams_read_in_turns_lose_no_output() -> None:
    it, params = engine(), SamplingParams(max_tokens=9, ignore_eos=True)
    streams = [it.stream(prompt, params) for prompt in prompts(3)]
    outputs: list[list[RequestOutput]] = [[], [], []]
    for _ in range(9):
        for stream, collected in zip(streams, outputs, strict=True):
            collected.append(next(stream))
    for stream, collected, prompt in zip(streams, outputs, prompts(3), strict=True):
        assert next(stream, None) is None
        assert [len(output.token_ids) for output in collected] == list(range(1, 10))
        assert list(collected[-1].token_ids) == alone(prompt, params)[0]
        assert collected[-1].finish_reason == "length"


def test_closing_a_stream_aborts_its_request_and_no_other() -> None:
    it = engine()
    other = it.add_request([3], SamplingParams(max_tokens=5, ignore_eos=True))
    stream = it.stream([1, 2])
    next(stream)
    stream.close()
    assert list(it._requests) == [other]
    it.scheduler.check()


def test_a_stream_ends_when_its_request_is_aborted() -> None:
    it = engine()
    stream = it.stream([1, 2], SamplingParams(ignore_eos=True))
    name = next(stream).request_id
    it.abort(name)
    assert [output.finish_reason for output in stream] == ["abort"]


def test_generate_lets_other_streams_go_on() -> None:
    it, params = engine(), SamplingParams(max_tokens=6, ignore_eos=True)
    stream = it.stream([4], params)
    first = next(stream)
    it.generate([[1]], params)
    assert list([first, *stream][-1].token_ids) == alone([4], params)[0]


def test_new_texts_add_up_to_the_text_and_hold_no_stop_string() -> None:
    tokenizer = letters()
    it = engine(HashBackend(vocab=tokenizer.vocab_size), tokenizer, vocab_size=None)
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=1, ignore_eos=True)
    outputs = list(it.stream("a🙂", params))
    ids, reason = alone(tokenizer.encode("a🙂"), params, vocab=tokenizer.vocab_size)
    text = tokenizer.decode(ids)
    assert (list(outputs[-1].token_ids), outputs[-1].finish_reason) == (ids, reason)
    assert "".join(output.new_text for output in outputs) == outputs[-1].text == text
    assert outputs[-1].prompt_tokens == 5

    held = SamplingParams(max_tokens=30, temperature=1.0, seed=1, ignore_eos=True, stop=(text[-3:] + "x",))
    outputs = list(it.stream("a🙂", held))
    assert outputs[-2].text == text[:-3][: len(outputs[-2].text)]
    assert outputs[-1].text == text == "".join(output.new_text for output in outputs)

    stop = text[5:8]
    stopped = SamplingParams(max_tokens=30, temperature=1.0, seed=1, ignore_eos=True, stop=(stop,))
    outputs = list(it.stream("a🙂", stopped))
    assert outputs[-1].text == text[: text.index(stop)] == "".join(output.new_text for output in outputs)
    assert outputs[-1].finish_reason == "stop"
    assert len(outputs[-1].token_ids) < 30


def test_the_statistics_add_up() -> None:
    it = engine(max_batch_tokens=8, max_sequences=8)
    outputs = it.generate(prompts(4), SamplingParams(max_tokens=6, ignore_eos=True))
    stats = it.stats
    assert stats.generated_tokens == sum(len(output.token_ids) for output in outputs) == 24
    assert stats.computed_tokens + stats.cached_tokens == sum(map(len, prompts(4))) + 4 * 5
    assert 0 < stats.backend_seconds < stats.step_seconds


class EngineMachine(RuleBasedStateMachine):
    """Random requests, steps, failures and aborts on a tiny pool; every result equals that of `alone`.

    Up to three steps are in flight.
    """

    @initialize(
        blocks=st.integers(3, 9), size=st.integers(1, 4), tokens=st.integers(1, 9), cache=st.booleans(),
        sequences=st.integers(1, 4), depth=st.integers(1, 3),
    )  # fmt: skip
    def start(self, blocks: int, size: int, tokens: int, cache: bool, sequences: int, depth: int) -> None:
        self.backend = StagesBackend(blocks, size, depth=depth)
        self.it = engine(
            self.backend,
            max_batch_tokens=tokens,
            max_sequences=min(sequences, tokens),
            max_seq_len=20,
            prefix_cache=cache,
        )
        self.requests: dict[str, tuple[list[int], SamplingParams]] = {}

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=14),
        max_tokens=st.integers(1, 12),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 3),
        ignore_eos=st.booleans(),
    )
    def add(self, prompt: list[int], **options: Any) -> None:
        params = SamplingParams(**options, repetition_penalty=1.1)
        try:
            self.requests[self.it.add_request(prompt, params)] = prompt, params
        except RequestError:
            needed = min(len(prompt) + params.max_tokens, 20) - 1
            assert needed > self.backend.num_blocks * self.backend.block_size

    @rule(fails=st.integers(0, 9))
    def step(self, fails: int) -> None:
        self.backend.fail = fails == 0
        self.backend.fail_to_submit = fails == 1
        try:
            outputs = self.it.step()
        except BackendError:
            return
        assert len({output.request_id for output in outputs}) == len(outputs)
        for output in outputs:
            prompt, params = self.requests[output.request_id]
            expected, reason = alone(prompt, params, 20)
            assert list(output.token_ids) == expected[: len(output.token_ids)]
            if output.finish_reason:
                assert (list(output.token_ids), output.finish_reason) == (expected, reason)
                del self.requests[output.request_id]

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        del self.requests[name]
        assert self.it.abort(name) is not None

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "it"):
            self.it.scheduler.check()
            assert self.it.has_unfinished == bool(self.requests)

    def teardown(self) -> None:
        if not hasattr(self, "it"):
            return
        for _ in range(3000):
            if not self.it.has_unfinished:
                break
            self.step(fails=2)
            self.holds()
        assert not self.requests, "not finished after 3000 steps"
        self.it.step()  # what is left of aborted requests
        self.it.step()
        assert self.it.scheduler.pool.num_used == 0


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=150, stateful_step_count=40)


def test_a_stream_that_is_closed_inside_a_step_ends_with_the_next_one() -> None:
    """The garbage collector may close a forgotten stream at any moment."""

    class Collecting(HashBackend):
        forgotten: Any = None

        def forward(self, batch: Batch) -> np.ndarray:
            if self.forgotten:
                self.forgotten.close()
            return super().forward(batch)

    backend = Collecting()
    it = engine(backend)
    stream = it.stream([1, 2], SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    backend.forgotten = stream
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    assert list(it.generate([3, 4], params)[0].token_ids) == alone([3, 4], params)[0]
    assert not it.has_unfinished
    it.scheduler.check()


def test_threads_share_the_steps_and_get_what_they_would_get_alone() -> None:
    backend = HashBackend()
    it = engine(backend, max_batch_tokens=32, max_sequences=8)
    asked = prompts(8, seed=3)
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
    start, forward = threading.Barrier(8), backend.forward

    def forward_when_all_have_come(batch: Batch) -> np.ndarray:
        """On a busy machine, one thread may be finished before the others begin."""
        wait_until(lambda: it._turns._next - it._turns._serving == 8)  # this one and seven that wait
        backend.forward = forward  # type: ignore[method-assign]
        return forward(batch)

    backend.forward = forward_when_all_have_come  # type: ignore[method-assign]

    def serve(number: int) -> list[int]:
        start.wait(timeout=LONG)
        if number % 2:
            return list(list(it.stream(asked[number], params))[-1].token_ids)
        return list(it.generate(asked[number], params)[0].token_ids)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(serve, range(8)))
    assert answers == [alone(prompt, params)[0] for prompt in asked]
    assert backend.calls < 8 * 12, "every thread stepped for itself"
    it.scheduler.check()
    assert it.scheduler.pool.num_used == 0


def test_an_error_in_one_thread_leaves_the_turns_in_order() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="x"), turns:
        raise ValueError("x")
    with turns:
        assert turns.mine
        with ThreadPoolExecutor(1) as threads:
            assert not threads.submit(lambda: turns.mine).result(timeout=LONG)
    assert not turns.mine


def test_an_interrupted_wait_does_not_hold_up_those_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()

    def interrupt() -> None:
        raise KeyboardInterrupt

    turns.__enter__()
    with monkeypatch.context() as patched:
        patched.setattr(turns._changed, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            turns.__enter__()
    turns.__exit__()
    with turns:
        assert turns.mine


def test_a_closed_engine_ends_its_requests_frees_the_backend_and_refuses_new_ones() -> None:
    backend = HashBackend()
    it, gone = engine(backend), weakref.ref(backend)
    stream = it.stream([1, 2], SamplingParams(ignore_eos=True))
    first = next(stream)
    it.close()
    it.close()
    assert [output.finish_reason for output in [first, *stream]] == [None, "abort"]
    del backend
    assert gone() is None
    for start in (lambda: it.generate([[1]]), lambda: it.stream([1]), lambda: it.add_request([1]), it.step):
        with pytest.raises(RequestError, match="the engine is closed"):
            start()


@pytest.mark.parametrize(
    ("prompts", "lists"),
    [
        ([3, 4], [[3, 4]]),
        (np.array([3, 4]), [[3, 4]]),
        ([[3], (4, 5)], [[3], [4, 5]]),
        (np.array([[3], [4]]), [[3], [4]]),
        (([n] for n in (3, 4)), [[3], [4]]),
        ([], []),
    ],
    ids=["ids", "array of ids", "lists", "array of lists", "generator", "none"],
)
def test_one_prompt_needs_no_list_around_it(prompts: Any, lists: list[list[int]]) -> None:
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    outputs = engine().generate(prompts, params)
    assert [list(output.token_ids) for output in outputs] == [alone(one, params)[0] for one in lists]


def test_a_text_is_one_prompt() -> None:
    tokenizer = letters()
    it = engine(HashBackend(vocab=tokenizer.vocab_size), tokenizer, vocab_size=None)
    assert [output.prompt_tokens for output in it.generate("Once", SamplingParams(max_tokens=1))] == [4]


@pytest.mark.parametrize(
    ("call", "message", "argument"),
    [
        (lambda it: it.generate({"prompt": "x"}), "prompts is of type dict", "prompts"),
        (lambda it: it.generate(None), "prompts is None", "prompts"),
        (lambda it: it.generate(b"x"), "prompts is of type bytes", "prompts"),
        (lambda it: it.generate({1, 2}), "prompts is of type set", "prompts"),
        (lambda it: it.generate([[1], 5]), r"prompts\[1\] is of type int", "prompts"),
        (lambda it: it.generate([[1], [VOCAB]]), r"prompts\[1\]: token id 13 is outside", ""),
        (lambda it: it.generate(["\ud800"]), "character 0 is a lone surrogate", "prompt"),
        (lambda it: it.generate([[1]], {"max_tokens": 3}), "params is of type dict", "params"),
        (lambda it: it.generate([[1]], [3]), r"params\[0\] is of type int", "params"),
        (lambda it: it.generate([[1]], []), "1 prompts but 0 sampling parameters", "params"),
        (lambda it: it.stream(7), "prompt is of type int", "prompt"),
        (lambda it: it.add_request(None), "prompt is None", "prompt"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named(call: Any, message: str, argument: str) -> None:
    it = engine(tokenizer=letters())
    with pytest.raises(RequestError, match=message) as caught:
        call(it)
    assert caught.value.argument == argument
    assert caught.value.hint
    assert not it.has_unfinished


def test_requests_without_parameters_take_the_engine_s() -> None:
    params = SamplingParams(max_tokens=4, temperature=1.0, seed=3, repetition_penalty=1.5, ignore_eos=True)
    it = engine(default_params=params)
    expected = alone([1, 2], params)[0]
    assert list(it.generate([[1, 2]])[0].token_ids) == expected
    assert list(list(it.stream([1, 2]))[-1].token_ids) == expected
    it.add_request([1, 2])
    assert [it.step()[0].token_ids[-1] for _ in expected] == expected
