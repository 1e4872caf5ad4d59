"""The programs of several ranks: what is refused, and what they compute together."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from llmc.plugins.cpu import library
from llmc.runtime.batch import Batch
from llmc.runtime.errors import BundleError
from llmc.runtime.native.executor import Executor
from llmc.runtime.native.interpreter import Interpreter
from llmc.runtime.native.program import Instruction, Program, View
from llmc.runtime.parallel.communicator import Communicator
from llmc.runtime.parallel.threads import thread_group
from support.native_programs import VOCABULARY, Builder, Built, steps

ISAS = library.candidates()
WIDTH, HIDDEN = 40, 32
TOKENS = (range(20), range(20, VOCABULARY))  # of each rank; parts need not be equal

_rng = np.random.default_rng(7)
TABLE, UP, DOWN, MIX, SKIP, HEAD = (
    _rng.standard_normal(shape).astype(np.float32)
    for shape in (
        (VOCABULARY, WIDTH),
        (HIDDEN, WIDTH),
        (WIDTH, HIDDEN),
        (WIDTH, 16),
        (WIDTH, HIDDEN),
        (VOCABULARY, WIDTH),
    )
)


def reference(batch: Batch) -> np.ndarray:
    """The model without ranks, in fp64."""
    table, up, down, mix, skip, head = (
        array.astype(np.float64) for array in (TABLE, UP, DOWN, MIX, SKIP, HEAD)
    )
    x = table[batch.input_ids]
    hidden = x @ up.T
    z = x + np.maximum(hidden, 0) @ down.T
    result = z + 2 * z[:, 8:24] @ mix.T + hidden @ skip.T
    return result[batch.logits_index] @ head.T


def rank_program(rank: int) -> Built:
    """The model of `reference` for one of two ranks.

    The first sum overwrites its input. Others read columns of an array that is read again.
    """
    tokens, half = TOKENS[rank], slice(rank * HIDDEN // 2, (rank + 1) * HIDDEN // 2)
    rows = slice(rank * VOCABULARY // 2, (rank + 1) * VOCABULARY // 2)
    build = Builder(WIDTH, 0, TABLE[tokens.start : tokens.stop], tokens.start or None)

    def linear(values: np.ndarray, x: View, on: str = "tokens") -> View:
        name = build.matrix(f"w{len(build.matrices)}", *values.shape, "fp32", values=values)
        return build.emit("linear", len(values), x, weights=(name,), rows=on)

    def add(x: View, y: View) -> View:
        return build.emit("binary", WIDTH, x, y, function="add")

    x = build.emit("all_reduce", WIDTH, View(0, 0, WIDTH), ranks=2)
    hidden = linear(UP[half], x)
    whole = build.emit("all_gather", HIDDEN, hidden, ranks=2)
    down = linear(DOWN[:, half], build.emit("unary", HIDDEN // 2, hidden, function="relu"))
    z = add(x, build.emit("all_reduce", WIDTH, down, ranks=2))
    columns = build.emit("all_reduce", 16, View(z.buffer, 8, 16), ranks=2)
    result = add(add(z, linear(MIX, columns)), linear(SKIP, whole))
    wanted = build.emit("gather_rows", WIDTH, result, rows="logits")
    part = linear(HEAD[rows], wanted, "logits")
    return build.finish(build.emit("all_gather", VOCABULARY, part, rows="logits", ranks=2))


def batches() -> list[Batch]:
    return [*steps(), Batch.pack([([1, 30, 19, 20], 0, [0], False)])]  # the last one has no logits


def in_threads(run: Callable[[int], list[np.ndarray]]) -> list[list[np.ndarray]]:
    """Return the results of `run` for both ranks, which run at the same time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


def interpreted() -> list[list[np.ndarray]]:
    barrier, arrays = threading.Barrier(2, timeout=60), [np.empty(0)] * 2

    def run(rank: int) -> list[np.ndarray]:
        def exchange(array: np.ndarray) -> Sequence[np.ndarray]:
            arrays[rank] = array
            barrier.wait()
            result = list(arrays)
            barrier.wait()
            return result

        program, _, exact = rank_program(rank)
        interpreter = Interpreter(program, exact, 12, exchange=exchange)
        return [interpreter.forward(batch) for batch in batches()]

    return in_threads(run)


def executed(threads: int, isa: str) -> list[list[np.ndarray]]:
    group = thread_group(2, timeout=60)

    def run(rank: int) -> list[np.ndarray]:
        executor = _executor(rank_program(rank), group[rank], threads, isa)
        results = [executor.run(batch).copy() for batch in batches()]
        executor.close()
        return results

    return in_threads(run)


def _executor(built: Built, communicator: Communicator | None, threads: int = 1, isa: str = "") -> Executor:
    program, packed, _ = built
    return Executor(
        program,
        packed,
        max_tokens=64,
        num_blocks=12,
        threads=threads,
        isa=isa or None,
        communicator=communicator,
    )


def test_the_interpreter_of_two_ranks_computes_the_whole_model() -> None:
    for results in interpreted():
        for got, batch in zip(results, batches(), strict=True):
            want = reference(batch)
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-10)


@pytest.mark.skipif(not ISAS, reason="the native engine does not run on this CPU")
def test_the_engine_of_two_ranks_computes_what_the_interpreter_does() -> None:
    first, wanted = executed(1, ISAS[0]), interpreted()[0]
    for got, want in zip(first[0], wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * np.abs(want).max(initial=1))
    for isa in ISAS:
        for threads in (1, 2):
            for results in executed(threads, isa):
                for got, one in zip(results, first[0], strict=True):
                    assert got.tobytes() == one.tobytes(), (isa, threads)


@pytest.mark.skipif(not ISAS, reason="the native engine does not run on this CPU")
def test_a_program_runs_with_as_many_ranks_as_it_was_made_for() -> None:
    with pytest.raises(ValueError, match="the program is one of 2 ranks, and 1 run"):
        _executor(rank_program(0), None)
    with pytest.raises(ValueError, match="the program is one of 2 ranks, and 3 run"):
        _executor(rank_program(0), thread_group(3)[0])
    with pytest.raises(ValueError, match="is that of a pipeline stage, and it runs alone"):
        _executor(stage_program(0), None)


Tree = dict[str, Any]


def of(tree: Tree, op: str, number: int = 0) -> Tree:
    """Return an instruction of a program."""
    found: list[Tree] = [each for each in tree["instructions"] if each["op"] == op]
    return found[number]


def all_ranks(count: int) -> Callable[[Tree], None]:
    def change(tree: Tree) -> None:
        for instruction in tree["instructions"]:
            if "ranks" in instruction["integers"]:
                instruction["integers"]["ranks"] = count

    return change


def set_width(op: str, width: int) -> Callable[[Tree], None]:
    def change(tree: Tree) -> None:
        tree["buffers"][of(tree, op)["out"]]["width"] = width

    return change


def set_integer(op: str, number: int, **values: int) -> Callable[[Tree], None]:
    return lambda tree: of(tree, op, number)["integers"].update(values)


def embed_after_gathering(tree: Tree) -> None:
    """Let the last collective, of rows of logits, write rows of tokens."""
    tree["buffers"][of(tree, "all_gather", 1)["out"]]["rows"] = "tokens"


def no_ranks(tree: Tree) -> None:
    del of(tree, "all_reduce")["integers"]["ranks"]


def whole_table(tree: Tree) -> None:
    tree["matrices"]["table"]["rows"] = VOCABULARY


def part_of_positions(tree: Tree) -> None:
    of(tree, "embed")["op"] = "embed_positions"


def two_inputs(tree: Tree) -> None:
    reduce = of(tree, "all_reduce")
    reduce["inputs"] *= 2


@pytest.mark.parametrize(
    ("rank", "change", "complaint"),
    [
        (1, all_ranks(1), "(embed) of the program has a part of a table, and there is one rank"),
        (0, all_ranks(1), "(embed) of the program has a table of another shape"),
        (0, all_ranks(1025), "(all_reduce) of the program has another number of ranks"),
        (0, set_integer("all_reduce", 1, ranks=3), "(all_reduce) of the program has another number of"),
        (0, set_integer("all_reduce", 1, ranks=0), "(all_reduce) of the program has another number of"),
        (0, set_integer("all_gather", 1, ranks=4), "(all_gather) of the program has another number of"),
        (0, set_integer("all_reduce", 0, groups=2), "(all_reduce) of the program has other parameters"),
        (1, no_ranks, "(embed) of the program has a table of another shape"),
        (0, part_of_positions, "(embed_positions) of the program has a table of another shape"),
        (1, whole_table, "(embed) of the program has a table of another shape"),
        (0, two_inputs, "(all_reduce) of the program has 2 inputs"),
        (0, set_width("all_gather", 16), "(all_gather) of the program has an output that is not as wide as"),
        (0, set_width("all_gather", 48), "(all_gather) of the program has an output that is not as wide as"),
        (0, set_width("all_reduce", 80), "(all_reduce) of the program has inputs of another width"),
        (0, embed_after_gathering, "(all_gather) of the program mixes rows of tokens and of logits"),
        (1, set_integer("embed", 0, begin=21), "(embed) of the program has a table of another shape"),
        (1, set_integer("embed", 0, begin=-1), "must be 0 to"),
        (0, set_integer("embed", 0, begin=1 << 27), "(embed) of the program has a table of another shape"),
    ],
)
def test_a_damaged_program_of_a_rank_is_named(
    rank: int, change: Callable[[Tree], Any], complaint: str
) -> None:
    tree = json.loads(rank_program(rank)[0].to_json())
    change(tree)
    with pytest.raises(BundleError) as caught:
        Program.from_json(json.dumps(tree).encode())
    assert complaint in caught.value.message
    assert "rebuild it" in caught.value.hint


def test_one_rank_needs_no_part_of_a_table() -> None:
    built = Builder(8, begin=0).finish(View(0, 0, 8))
    assert Program.from_json(built[0].to_json()).ranks == 1
    with pytest.raises(BundleError, match="has a part of a table, and there is one rank"):
        Builder(8, begin=1).finish(View(0, 0, 8))


def stage_program(number: int) -> Built:
    """The model of `reference` in two stages: what comes before the second sum, and the rest.

    Two arrays go to the second stage, one of them columns of a buffer.
    """
    build = Builder(WIDTH, 0, TABLE)

    def linear(values: np.ndarray, x: View, on: str = "tokens") -> View:
        name = build.matrix(f"w{len(build.matrices)}", *values.shape, "fp32", values=values)
        return build.emit("linear", len(values), x, weights=(name,), rows=on)

    def add(x: View, y: View) -> View:
        return build.emit("binary", WIDTH, x, y, function="add")

    def send(x: View, peer: int, sequence: int) -> None:
        integers = {"peer": peer, "sequence": sequence}
        build.instructions.append(Instruction("send", None, 0, (x,), (), "", integers, {}))

    if number == 0:
        x = View(0, 0, WIDTH)
        hidden = linear(UP, x)
        z = add(x, linear(DOWN, build.emit("unary", HIDDEN, hidden, function="relu")))
        send(z, 1, 0)
        send(View(hidden.buffer, 0, HIDDEN), 1, 1)
        return build.finish(build.emit("receive", VOCABULARY, rows="logits", peer=1, sequence=0))
    build.instructions.clear()
    build.buffers.clear()
    z = build.emit("receive", WIDTH, peer=0, sequence=0)
    hidden = build.emit("receive", HIDDEN, peer=0, sequence=1)
    twice = build.emit("scalar", WIDTH, linear(MIX, View(z.buffer, 8, 16)), function="mul", value=2.0)
    result = add(add(z, twice), linear(SKIP, hidden))
    logits = linear(HEAD, build.emit("gather_rows", WIDTH, result, rows="logits"), "logits")
    send(logits, 0, 0)
    program, packed, exact = build.finish(logits)
    return replace(program, logits=None), packed, exact


def test_the_interpreter_of_two_stages_computes_the_whole_model() -> None:
    inboxes: list[SimpleQueue[np.ndarray]] = [SimpleQueue(), SimpleQueue()]

    def run(rank: int) -> list[np.ndarray]:
        def transfer(peer: int, array: np.ndarray | None) -> np.ndarray:
            if array is None:
                return inboxes[rank].get(timeout=60)
            inboxes[peer].put(array)
            return array

        program, _, exact = stage_program(rank)
        interpreter = Interpreter(program, exact, 12, transfer=transfer)
        return [interpreter.forward(batch) for batch in batches()]

    first, second = in_threads(run)
    for got, none, batch in zip(first, second, batches(), strict=True):
        want = reference(batch)
        assert none.shape == (0, VOCABULARY)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-10)


@pytest.mark.skipif(not ISAS, reason="the native engine does not run on this CPU")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_engine_of_two_stages_computes_the_whole_model(threads: int) -> None:
    group = thread_group(2, timeout=60, stages=2)

    def run(rank: int) -> list[np.ndarray]:
        executor = _executor(stage_program(rank), group[rank], threads, ISAS[0])
        results = [executor.run(batch).copy() for batch in batches()]
        executor.close()
        return results

    first, second = in_threads(run)
    for got, none, batch in zip(first, second, batches(), strict=True):
        want = reference(batch)
        assert none.shape == (0, VOCABULARY)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * np.abs(want).max(initial=1))


Ranks = Callable[[int], Built]
both = pytest.mark.parametrize(("program", "stages"), [(rank_program, 1), (stage_program, 2)])


def stepped(program: Ranks, stages: int, step: Callable[[Executor, int], list[Any]]) -> list[list[Any]]:
    """Return the results of `step` for both ranks."""
    group = thread_group(2, timeout=60, stages=stages)

    def run(rank: int) -> list[Any]:
        executor = _executor(program(rank), group[rank], threads=2)
        results = step(executor, rank)
        executor.close()
        return results

    return in_threads(run)


@pytest.mark.skipif(not ISAS, reason="the native engine does not run on this CPU")
@both
def test_the_engine_gives_the_candidates_of_its_logits(program: Ranks, stages: int) -> None:
    """Whole rows before and after, so that a step leaves nothing behind."""

    def step(executor: Executor, rank: int) -> list[Any]:
        results = []
        for batch in batches():
            rows = len(batch.logits_index)
            whole = executor.run(batch).copy()
            for k in (1, 2, 3) if rows else ():
                executor.begin(batch, k=k)
                if rank == 0:
                    results.append((k, whole, executor.finish_sampled(rows, k)))
            np.testing.assert_array_equal(executor.run(batch), whole)
        assert rank or executor.max_exchanged == (3 if stages == 1 else 16)
        return results

    first, second = stepped(program, stages, step)
    assert not second
    assert len(first) >= 6
    for k, whole, found in first:
        for row, (ids, kept) in zip(whole, found, strict=True):
            np.testing.assert_array_equal(ids, np.sort(np.argsort(-row)[:k]))
            np.testing.assert_array_equal(kept, row[ids])


@pytest.mark.skipif(not ISAS, reason="the native engine does not run on this CPU")
@both
def test_rows_whose_candidates_tie_too_often_arrive_whole(
    program: Ranks, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "HEAD", np.zeros_like(HEAD))
    batch = batches()[0]

    def step(executor: Executor, rank: int) -> list[Any]:
        executor.begin(batch, k=3)
        return [] if rank else executor.finish_sampled(len(batch.logits_index), 3)

    found, _ = stepped(program, stages, step)
    assert len(found) == len(batch.logits_index)
    for ids, row in found:
        assert ids is None
        assert row.tolist() == [0.0] * VOCABULARY


def no_send(tree: Tree) -> None:
    tree["instructions"].remove(of(tree, "send"))


def late_send(tree: Tree) -> None:
    of(tree, "send")["inputs"][0]["buffer"] = of(tree, "receive")["out"] + 1


def send_writes(tree: Tree) -> None:
    of(tree, "send")["out"] = 0


@pytest.mark.parametrize(
    ("rank", "change", "complaint"),
    [
        (1, no_send, "the program writes no logits"),
        (0, set_integer("send", 0, peer=1024), "(send) of the program has a rank that cannot be"),
        (1, set_integer("receive", 0, peer=1 << 20), "(receive) of the program has a rank that cannot be"),
        (0, set_integer("send", 0, sequence=-1), "must be 0 to"),
        (0, set_integer("receive", 0, ranks=2), "(receive) of the program has other parameters"),
        (0, late_send, "(send) of the program reads a buffer that nothing has written"),
        (0, send_writes, "(send) of the program writes no buffer"),
        (0, set_width("receive", 48), "the program's logits are not as wide as its vocabulary"),
        (1, set_width("receive", 36), "reads past the columns of its buffer"),
    ],
)
def test_a_damaged_program_of_a_stage_is_named(
    rank: int, change: Callable[[Tree], Any], complaint: str
) -> None:
    tree = json.loads(stage_program(rank)[0].to_json())
    change(tree)
    with pytest.raises(BundleError) as caught:
        Program.from_json(json.dumps(tree).encode())
    assert complaint in caught.value.message
