"""Random and hostile programs, weights files and steps for the native engine.

All arrays of an executor lie between pages that cannot be touched: an access outside them ends the process.
If the process dies, the last seed printed under `-s` is the one at fault.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.plugins.cpu import library
from llmc.runtime.errors import BundleError
from llmc.runtime.native.executor import Executor
from llmc.runtime.native.interpreter import Interpreter
from llmc.runtime.native.plan import plan
from llmc.runtime.native.program import Program
from llmc.runtime.native.weights import WeightsFile
from support.guarded_memory import guarded_batch, guarded_executors, guarded_weights
from support.native_fuzz import (
    MAX_TOKENS,
    mutated_program,
    mutated_step,
    random_program,
    random_steps,
    write_weights,
)

pytestmark = pytest.mark.skipif(not library.candidates(), reason="the native engine does not run on this CPU")

BLOCKS = 10
SEEDS = st.integers(0, 2**32 - 1)


def guarded_executor(program: Program, weights: dict[str, np.ndarray], rng: random.Random) -> Executor:
    """Return an executor whose arrays end, or begin, at pages that cannot be touched."""
    at_end = rng.random() < 0.7
    latent = any(not cache.v_head_dim for cache in program.caches)
    with guarded_executors(MAX_TOKENS, at_end):
        return Executor(
            program,
            guarded_weights(weights, at_end),
            max_tokens=MAX_TOKENS,
            num_blocks=BLOCKS,
            threads=rng.choice((1, 1, 2)),
            digits=rng.choice((1, 3)),
            kv_dtype=rng.choice(("fp32", "fp16") if latent else ("fp32", "fp16", "int8")),
            isa=rng.choice(library.candidates()),
        )


@given(seed=SEEDS)
def test_random_programs_match_the_interpreter(seed: int) -> None:
    print("seed", seed)
    program, packed, exact = random_program(seed)
    steps = random_steps(seed, BLOCKS, 4)
    interpreter = Interpreter(program, exact, BLOCKS)
    want = [interpreter.forward(batch) for batch in steps]
    magnitude = max(np.abs(logits).max(initial=0) for logits in want)
    with guarded_executors(MAX_TOKENS):
        guarded = Executor(
            program, guarded_weights(packed), max_tokens=MAX_TOKENS, num_blocks=BLOCKS, threads=1
        )
    executor = Executor(program, packed, max_tokens=MAX_TOKENS, num_blocks=BLOCKS, threads=2)
    for batch, logits in zip(steps, want, strict=True):
        got = executor.run(batch)
        np.testing.assert_allclose(got, logits, rtol=0, atol=1e-4 * magnitude)
        assert guarded.run(guarded_batch(batch)).tobytes() == got.tobytes()
    executor.close()
    guarded.close()


@given(seed=SEEDS)
def test_an_output_takes_the_place_of_an_input_or_of_none(seed: int) -> None:
    """Instructions write while they read: an output must not share only some columns with an input."""
    program, _, _ = random_program(seed)
    planned = plan(program, 3)

    def columns(buffer: int, offset: int, width: int) -> range:
        root, first = planned.aliases.get(buffer, (buffer, 0))
        place = planned.buffers[root]
        begin = place.offset + 4 * (first + offset)
        return range(begin, begin + 4 * width)

    for item in planned.instructions:
        if item.op in (library.QUANTIZE, library.LINEAR_INT, library.EXPERTS_INT) or item.source.out is None:
            continue
        copied = item.source.inputs[0].width if item.op == library.COPY else None
        width = copied or planned.program.buffers[item.source.out].width
        out = columns(item.source.out, item.source.offset, width)
        for view in item.source.inputs:
            taken = columns(view.buffer, view.offset, view.width)
            assert out == taken or max(out.start, taken.start) >= min(out.stop, taken.stop)


@pytest.mark.hypothesis  # for `make fuzz`: Hypothesis itself marks only tests that have @given themselves
def test_hostile_programs_are_refused_or_stay_inside_their_arrays(tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    path = tmp_path / "weights.safetensors"

    @given(seed=SEEDS)
    def attempt(seed: int) -> None:
        print("seed", seed)
        rng = random.Random(seed)
        base, _, _ = random_program(rng.randrange(50))
        data = mutated_program(base, rng) if rng.random() < 0.8 else base.to_json()
        try:
            program = Program.from_json(data)
            write_weights(path, program, rng, mutate=rng.random() < 0.2)
            weights, memory = WeightsFile(path).arrays(program)
            executor = guarded_executor(program, dict(weights), rng)
        except BundleError:
            outcomes["refused"] += 1
            return
        except (MemoryError, OSError):  # the machine has no room for it
            outcomes["too large"] += 1
            return
        del weights, memory
        for batch in random_steps(seed, BLOCKS, 2):
            try:
                executor.run(guarded_batch(batch))
            except ValueError:  # a smaller vocabulary or context
                outcomes["step refused"] += 1
                break
        else:
            outcomes["ran"] += 1
        executor.close()

    attempt()
    assert outcomes["refused"] > outcomes.total() / 10
    assert outcomes["ran"] > outcomes.total() / 10


@pytest.mark.hypothesis  # as above
def test_hostile_steps_are_refused_or_stay_inside_their_arrays() -> None:
    outcomes: Counter[str] = Counter()

    @given(seed=SEEDS)
    def attempt(seed: int) -> None:
        print("seed", seed)
        rng = random.Random(seed)
        program, packed, _ = random_program(rng.randrange(50))
        executor = guarded_executor(program, dict(packed), rng)
        for batch in random_steps(seed, BLOCKS, 5):
            try:
                executor.run(guarded_batch(mutated_step(batch, rng)))
            except ValueError:
                outcomes["refused"] += 1
            else:
                outcomes["ran"] += 1
        executor.close()

    attempt()
    assert outcomes["refused"] > outcomes.total() / 4
    assert outcomes["ran"] > outcomes.total() / 50
