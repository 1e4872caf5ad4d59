"""Random programs, mutated programs and weights files, and random steps for the native engine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import operator
import random
from pathlib import Path
from typing import Any

import numpy as np

from llmc.runtime.batch import Batch
from llmc.runtime.errors import BundleError
from llmc.runtime.native.program import (
    BINARY,
    INTEGERS,
    OPERATIONS,
    ROUND,
    UNARY,
    Cache,
    Instruction,
    Program,
    View,
)
from support.native_programs import POSITIONS, VOCABULARY, Builder, Built

BLOCK = 32
MAX_TOKENS = 64
_WORDS = (*OPERATIONS, *UNARY, *BINARY, *ROUND, "fp32", "fp16", "bf16", "tokens", "logits", "", "table", "x")
_ODD = (0, 1, -1, 2, 15, 16, 17, 31, 32, 33, 64, 577, 1 << 16, 1 << 26, 1 << 27, 1 << 31, 1 << 40, 1 << 63)
_LARGEST_FILE = 1 << 24  # bytes; weights files that would be larger lack their data


def random_program(seed: int) -> Built:
    """Return a decoder of one or two layers with random sizes, operations and dtypes."""
    rng = random.Random(seed)
    build = Builder(16 * rng.randint(1, 6), seed)
    names = (f"w{number}" for number in range(100))
    x = View(0, 0, build.buffers[0].width)

    def matrix(rows: int, columns: int) -> str:
        element, scales = rng.choice(("fp32", "fp16", "bf16", "fp8", *INTEGERS)), ""
        block = 0
        if columns % 16 and element in INTEGERS:
            element = "fp32"
        if element == "fp8":
            block, scales = columns, "fp32"
        if element in INTEGERS:
            block = rng.choice([size for size in range(16, columns + 1, 16) if columns % size == 0])
            scales = rng.choice(("fp16", "fp32"))
        return build.matrix(next(names), rows, columns, element, block, scales)

    def linear(x: View, rows: int) -> View:
        return build.emit("linear", rows, x, weights=(matrix(rows, x.width),))

    def experts(x: View) -> View:
        """Experts that the token chooses: an error in the last place would choose others. Some are equal."""
        count, inner = rng.randint(1, 9), 16 * rng.randint(1, 5)
        k = rng.randint(1, count)
        table = build.rng.integers(0, 4, (VOCABULARY, count))
        table_name = build.matrix(next(names), VOCABULARY, count, "fp32", values=table)
        scores = build.emit("embed", count, weights=(table_name,))
        if count % 2 == 0 and rng.random() < 0.5:
            groups = {"groups": count // 2, "kept": -(-k // 2), "scored": rng.randint(1, 2)}
            chosen = build.emit("grouped_top_k", 2 * k, scores, scores, k=k, **groups)
        else:
            chosen = build.emit("top_k", 2 * k, scores, k=k)
        values, ids = View(chosen.buffer, 0, k), View(chosen.buffer, k, k)
        weights = build.emit("softmax", k, values)
        if rng.random() < 0.5:
            weights = build.emit("binary", k, weights, build.emit("sum", 1, weights), function="div")
        names_of = (matrix(2 * count * inner, x.width), matrix(count * x.width, inner))
        if rng.random() < 0.5:
            sizes = (2 * count * inner, count * x.width)
            names_of += tuple(build.vector(next(names), size) for size in sizes)
        function = rng.choice(("silu", "gelu", "clamped_swiglu"))
        floats = {"limit": rng.choice((0.5, 7.0)), "alpha": 1.702} if function == "clamped_swiglu" else {}
        settings = {"weights": names_of, "function": function, "experts": count, **floats}
        return build.emit("experts", x.width, x, ids, weights, **settings)  # type: ignore[arg-type]

    def norm(x: View, groups: int = 1) -> View:
        if rng.random() < 0.3:
            size = rng.choice((x.width, x.width // groups))  # each group has its own weights, or the same
            vectors = tuple(build.vector(next(names), size) for _ in range(rng.randint(1, 2)))
            return build.emit("layer_norm", x.width, x, weights=vectors, groups=groups, epsilon=1e-5)
        weight = build.vector(next(names), x.width // groups)
        return build.emit("rms_norm", x.width, x, weights=(weight,), groups=groups, epsilon=1e-5)

    def rope(x: View, heads: int, rotated: int, interleaved: int, tables: tuple[str, str]) -> View:
        settings = {"heads": heads, "rotated": rotated, "interleaved": interleaved}
        return build.emit("rope", x.width, x, weights=tables, **settings)

    if rng.random() < 0.3:  # only here: elsewhere an error in the last place may reach another number
        scale = build.vector(next(names), 1, np.array([rng.choice((0.01, 0.05))]))
        x = build.emit("round", x.width, x, weights=(scale,), function=rng.choice(ROUND))
    if rng.random() < 0.3:
        table = build.matrix(next(names), POSITIONS, x.width, rng.choice(("fp32", "fp16", "bf16")))
        x = build.emit(
            "binary", x.width, x, build.emit("embed_positions", x.width, weights=(table,)), function="add"
        )
    for layer in range(rng.randint(1, 2)):
        kv_heads, shared = rng.randint(1, 3), rng.choice((1, 1, 2, 3, 5, 17))
        width, value_width = 2 * rng.randint(1, 20), rng.randint(1, 40)
        latent = rng.random() < 0.3
        if latent:
            width = 16 * rng.randint(1, 3)
            value_width = rng.randint(1, width)
        build.caches.append(Cache(kv_heads, width, 0 if latent else value_width))
        heads = kv_heads * shared
        sizes = (heads * width, kv_heads * width, kv_heads * value_width)
        both = linear(norm(x), sum(sizes))
        query, key = View(both.buffer, 0, sizes[0]), View(both.buffer, sizes[0], sizes[1])
        value = View(both.buffer, sizes[0] + sizes[1], sizes[2])
        query, key = norm(query, heads), norm(key, kv_heads)
        if rng.random() < 0.7:
            rotated, interleaved = 2 * rng.randint(1, width // 2), rng.randint(0, 1)
            angles = build.rng.uniform(0, 6, POSITIONS * rotated // 2)
            tables = (
                build.vector(next(names), len(angles), np.cos(angles)),
                build.vector(next(names), len(angles), np.sin(angles)),
            )
            query, key = (
                rope(query, heads, rotated, interleaved, tables),
                rope(key, kv_heads, rotated, interleaved, tables),
            )
        write, new = ("write_keys", (key,)) if latent else ("write_kv", (key, value))
        build.instructions.append(Instruction(write, None, 0, new, (), "", {"layer": layer}, {}))
        attended = build.emit(
            "attention",
            heads * value_width,
            query,
            heads=heads,
            layer=layer,
            weights=(build.vector(next(names), heads),) if rng.random() < 0.3 else (),
            window=rng.choice((0, 0, 1, 20, 40)),
            chunk=rng.choice((0, 0, 7, 32, 50)),
            **({"value_width": value_width} if latent else {}),
            scale=0.5 / width,
            softcap=rng.choice((0.0, 3.0)),
        )
        if latent:
            element = rng.choice(("fp32", "fp16", "bf16"))
            matrices = build.matrix(next(names), 32 * heads, value_width, element)
            attended = build.emit("linear", 32 * heads, attended, weights=(matrices,), heads=heads)
            of_head = query.width // heads
            attended = build.emit("join", heads * (32 + of_head), attended, query, groups=heads)
        x = build.emit("binary", x.width, x, linear(attended, x.width), function="add")
        inner = rng.randint(1, 100)
        hidden = norm(x)
        if rng.random() < 0.3:
            groups = rng.choice((1, 2, 4))
            begin = rng.randrange(x.width // groups)
            taken = groups * rng.randint(1, x.width // groups - begin)
            hidden = build.emit("slice", taken, hidden, groups=groups, begin=begin)
        both = linear(hidden, 2 * inner)
        gate, up = View(both.buffer, 0, inner), View(both.buffer, inner, inner)
        function = rng.choice(("silu", "gelu", "gelu_tanh", "relu"))
        if rng.random() < 0.5:
            hidden = build.emit("glu", inner, gate, up, function=function)
        else:
            hidden = build.emit(
                "binary", inner, build.emit("unary", inner, gate, function=function), up, function="mul"
            )
        down = linear(hidden, x.width)
        x = build.emit("binary", x.width, x, down, function=rng.choice(("add", "sub", "max")))
        x = build.emit("scalar", x.width, x, function="mul", value=rng.choice((0.5, 1.5)))
        if x.width % 32 == 0 and rng.random() < 0.5:
            x = build.emit("binary", x.width, x, experts(norm(x)), function="add")
        if x.width > 16 and rng.random() < 0.3:  # views of one buffer that overlap
            shift = rng.choice((0, 16, rng.randrange(x.width)))
            part = x.width - shift
            views = [View(x.buffer, shift, part), View(x.buffer, 0, part)]
            rng.shuffle(views)
            both = build.emit("binary", part, *views, function="sub")
            x = linear(both, x.width)
        if rng.random() < 0.5:  # the halves change places
            cut = rng.randint(1, x.width - 1)
            swapped = build.emit("copy", x.width, View(x.buffer, cut, x.width - cut))
            build.emit("copy", x.width, View(x.buffer, 0, cut), out=swapped.buffer, offset=x.width - cut)
            x = swapped
    return build.finish(norm(x))


def mutated_program(program: Program, rng: random.Random) -> bytes:
    """Return the JSON of a program with changes that `check` accepts, and some that nobody checked."""
    data = program.to_json()
    for _ in range(rng.choice((0, 30))):
        changed = _change(json.loads(data), rng)
        with contextlib.suppress(BundleError):
            Program.from_json(changed)
            data = changed
    for _ in range(rng.choice((0, 0, 1, 3))):
        data = _change(json.loads(data), rng)
    return data


def _change(tree: Any, rng: random.Random) -> bytes:
    if places := _places(tree):
        where, key = rng.choice(places)
        value, action = where[key], rng.random()
        if action < 0.4:  # another one of the same kind
            where[key] = _copy(rng.choice([node[name] for node, name in places if name == key]))
        elif action < 0.6:  # everywhere, so that sizes still fit each other
            numbers = [(node, name) for node, name in places if type(node[name]) is int]
            old = operator.getitem(*rng.choice(numbers))
            new = rng.choice((old + 1, 2 * old, old // 2, rng.randrange(200)))
            for node, name in numbers:
                if node[name] == old:
                    node[name] = new
        elif action < 0.65:
            del where[key]
        elif action < 0.7 and isinstance(where, list):
            where.insert(rng.randrange(len(where) + 1), _copy(value))
        elif action < 0.75:
            where[key] = _copy(operator.getitem(*rng.choice(places)))
        elif isinstance(value, str):
            where[key] = rng.choice(_WORDS)
        elif isinstance(value, float):
            where[key] = rng.choice((0.0, -1.0, 1e-30, 1e30, 1e300, 5e-324, 3, float("inf")))
        elif isinstance(value, list):
            rng.shuffle(value)
        elif type(value) is int:
            where[key] = rng.choice((*_ODD, value + 1, value - 1, 2 * value, -value))
        else:
            where[key] = rng.choice((None, 0, "", [], {}, 1.5, True))
    return json.dumps(tree).encode()


def _copy(tree: Any) -> Any:
    return json.loads(json.dumps(tree))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found, pending = [], [tree]
    while pending:
        node = pending.pop()
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        found += [(node, key) for key in keys]
        pending += [node[key] for key in keys if isinstance(node[key], dict | list)]
    return found


def write_weights(path: Path, program: Program, rng: random.Random, mutate: bool) -> None:
    """Write a weights file of random bytes for a program; mutate: it may not fit the program."""
    header: dict[str, Any] = {}
    position = 0
    sizes = {name: ("U8", matrix.nbytes) for name, matrix in program.matrices.items()}
    sizes |= {name: ("F32", 4 * size) for name, size in program.constants.items()}
    for name, (dtype, nbytes) in sizes.items():
        header[name] = {"dtype": dtype, "shape": [nbytes], "data_offsets": [position, position + nbytes]}
        position = -(-(position + nbytes) // 64) * 64
    size = min(position, _LARGEST_FILE)
    if mutate and header:
        for _ in range(rng.randint(1, 2)):
            entry = header[rng.choice(list(header))]
            action = rng.randrange(5)
            if action == 0:
                header.pop(rng.choice(list(header)))
            elif action == 1:
                entry["dtype"] = rng.choice(("F32", "U8", "F16", 3, None))
            elif action == 2:
                size = rng.randrange(size + 1)
            else:
                change = rng.choice((1, 4, 64, -64, 1 << 20, 1 << 62, -(1 << 62)))
                span = entry["data_offsets"]
                entry["data_offsets"] = [span[0] + change * (action == 3), span[1] + change]
            if not header:
                break
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + rng.randbytes(size))


@dataclasses.dataclass
class _Sequence:
    past: int
    table: list[int]


def random_steps(seed: int, num_blocks: int, count: int) -> list[Batch]:
    """Return ragged steps: prefill and decoding, without new tokens, with shared blocks and spare blocks.

    The wanted rows of logits are in any order, repeated, or none.
    """
    rng = random.Random(seed)
    users = dict.fromkeys(range(num_blocks), 0)
    sequences: list[_Sequence] = []
    steps: list[Batch] = []

    def drop(sequence: _Sequence) -> None:
        for block in sequence.table:
            users[block] -= 1
        sequences.remove(sequence)

    while len(steps) < count:
        if sequences and (len(sequences) > 5 or rng.random() < 0.15):
            drop(rng.choice(sequences))
        if not sequences or rng.random() < 0.5:
            sequences.append(_Sequence(0, []))
        elif rng.random() < 0.3:  # another prompt with the same beginning
            model = rng.choice(sequences)
            whole = rng.randint(0, model.past // BLOCK)
            sequences.append(_Sequence(whole * BLOCK, model.table[:whole]))
            for block in model.table[:whole]:
                users[block] += 1
        rows, left = [], MAX_TOKENS
        for sequence in rng.sample(sequences, len(sequences)):
            new = min(rng.choice((0, 1, 1, 1, 2, rng.randint(1, 64))), left, POSITIONS - sequence.past)
            free = [block for block, number in users.items() if not number]
            needed = -(-(sequence.past + new) // BLOCK) - len(sequence.table)
            if rng.random() < 0.2 and len(free) > needed >= 0:
                needed += 1  # a block for later tokens
            if needed > len(free):
                new = 0
            for block in rng.sample(free, max(needed, 0)) if new else ():
                users[block] += 1
                sequence.table.append(block)
            table = sequence.table if new or rng.random() < 0.5 else []
            rows.append((rng.choices(range(VOCABULARY), k=new), sequence.past, tuple(table), False))
            sequence.past += new
            left -= new
        if left == MAX_TOKENS:  # nobody has a new token
            drop(rng.choice(sequences))
            continue
        batch = Batch.pack(rows)
        wanted = rng.choices(range(MAX_TOKENS - left), k=rng.choice((0, 1, 3, rng.randint(1, MAX_TOKENS))))
        steps.append(dataclasses.replace(batch, logits_index=np.array(wanted, np.int32)))
    return steps


def mutated_step(batch: Batch, rng: random.Random) -> Batch:
    """Return a step with one to three changes, which may contradict each other."""
    fields = [field.name for field in dataclasses.fields(Batch)]
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(fields)
        array: np.ndarray = getattr(batch, name).copy()
        action = rng.randrange(9)
        if action == 0:
            array = array[:-1]
        elif action == 1:
            array = array[:0]
        elif action == 2:
            array = np.append(array, np.int32(rng.choice((0, 1, -1, 5)))).astype(np.int32)
        elif action == 3:
            array = array[::-1]
        elif action == 4:
            array = array.astype(rng.choice((np.int64, np.int8, np.float32, np.uint32)))
        elif action == 5:
            array = array[None]
        elif action == 6:
            array = getattr(batch, rng.choice(fields))
        elif array.size:
            new = rng.choice((-1, 0, 1, 7, 31, 32, 50, 127, 128, 1 << 20, 2**31 - 1, -(2**31)))
            array.reshape(-1)[rng.randrange(array.size)] = np.array(new).astype(array.dtype)
        batch = dataclasses.replace(batch, **{name: array})
    return batch
