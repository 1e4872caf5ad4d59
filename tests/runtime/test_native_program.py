"""What is wrong with a native engine's program is named, with a hint."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from llmc.runtime.errors import BundleError
from llmc.runtime.native.program import Buffer, Cache, Instruction, Matrix, Program, View
from support.native_programs import Builder


def copy_after_a_read(tree: dict[str, Any]) -> None:
    copy = {
        **tree["instructions"][1],
        "op": "copy",
        "inputs": [{"buffer": 0, "offset": 0, "width": 64}],
        "weights": [],
    }
    tree["instructions"][1] = copy
    Program.from_json(json.dumps(tree).encode())
    tree["instructions"].insert(3, copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("buffers"), "the program: buffers: the field is missing"),
        (lambda tree: tree.update(logits=-1), "the program: logits: must be 0 to "),
        (
            lambda tree: tree["instructions"][0].update(op="call"),
            "instruction 0 (call) of the program is not",
        ),
        (
            lambda tree: tree.update(vocab_size=70),
            "instruction 0 (embed) of the program has a table of another",
        ),
        (
            lambda tree: tree["matrices"].update(spare={**tree["matrices"]["table"], "element": "int4"}),
            "the matrix 'spare' of the program has blocks that do not fit",
        ),
        (
            lambda tree: tree["matrices"]["table"].update(scales="fp32"),
            "the matrix 'table' of the program is of floats with scales",
        ),
        (
            lambda tree: tree["caches"].append({"num_kv_heads": 1, "head_dim": 578, "v_head_dim": 2}),
            "cache 0 of the program has heads of an odd size",
        ),
        (
            lambda tree: tree["caches"].append({"num_kv_heads": 1, "head_dim": 40, "v_head_dim": 0}),
            "cache 0 of the program has latent keys whose size is no multiple of 16",
        ),
        (
            lambda tree: tree["instructions"].append(tree["instructions"][0]),
            "instruction 4 (embed) of the program writes a buffer that was written or read before",
        ),
        (copy_after_a_read, "instruction 3 (copy) of the program writes a buffer that was written or read"),
    ],
)
def test_a_damaged_program_is_named(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    builder = Builder(64)
    program, _, _ = builder.finish(builder.emit("embed", 64, weights=("table",)))
    tree = json.loads(program.to_json())
    change(tree)
    with pytest.raises(BundleError) as caught:
        Program.from_json(json.dumps(tree).encode())
    assert caught.value.message.startswith(message)
    assert "rebuild it" in caught.value.hint


def test_a_repeated_key_is_refused() -> None:
    with pytest.raises(BundleError, match="the program is not JSON: the key 'version' appears twice"):
        Program.from_json(b'{"version": 1, "version": 1}')


CHOICE = {"groups": 4, "kept": 2, "scored": 2, "k": 3}


@pytest.mark.parametrize(
    ("op", "widths", "integers", "message"),
    [
        ("grouped_top_k", (32, 32, 6), CHOICE | {"groups": 5}, "has groups that do not fit"),
        ("grouped_top_k", (32, 16, 6), CHOICE, "has groups that do not fit"),
        ("grouped_top_k", (32, 32, 6), CHOICE | {"kept": 5}, "keeps or scores what its groups lack"),
        ("grouped_top_k", (32, 32, 6), CHOICE | {"scored": 9}, "keeps or scores what its groups lack"),
        ("grouped_top_k", (32, 32, 34), CHOICE | {"k": 17}, "has an output of another width"),
        ("join", (32, 16, 48), {"groups": 3}, "has groups that do not fit"),
        ("join", (32, 16, 47), {"groups": 4}, "has an output of another width"),
        ("write_keys", (32,), {"layer": 0}, "has keys of another width, or its cache has values"),
        ("write_keys", (16,), {"layer": 1}, "has keys of another width, or its cache has values"),
        ("write_kv", (16, 16), {"layer": 0}, "writes values to a cache that has none"),
        ("attention", (64, 64), {"heads": 4, "layer": 0, "window": 0}, "takes values from elsewhere"),
        (
            "attention",
            (64, 68),
            {"heads": 4, "layer": 0, "window": 0, "value_width": 17},
            "takes values from elsewhere",
        ),
        (
            "attention",
            (64, 64),
            {"heads": 4, "layer": 1, "window": 0, "value_width": 16},
            "takes values from elsewhere",
        ),
        ("linear", (64, 50), {"heads": 2}, "has a matrix of another shape"),
        ("linear", (128, 50), {"heads": 2}, "has heads whose rows are quantized, or are no multiple of 32"),
    ],
)
def test_an_instruction_that_leaves_its_arrays_is_named(
    op: str, widths: tuple[int, ...], integers: dict[str, int], message: str
) -> None:
    """widths: of its inputs, and of its output if it has one"""
    writes = not op.startswith("write")
    builder = Builder(256)
    builder.caches += [Cache(1, 16, 0), Cache(1, 16, 16)]
    inputs = [View(0, 0, width) for width in (widths[:-1] if writes else widths)]
    floats = {"scale": 1.0, "softcap": 0.0} if op == "attention" else {}
    weights = ("table",) if op == "linear" else ()
    out = None
    if writes:
        builder.buffers.append(Buffer(widths[-1], "tokens"))
        out = 1
    instruction = Instruction(op, out, 0, tuple(inputs), weights, "", integers, floats)
    builder.matrices["table"] = Matrix(50, 256, "fp32")
    if op == "linear":
        builder.matrices["table"] = Matrix(50, 64, "fp32")
        builder.instructions[0] = Instruction("receive", 0, 0, (), (), "", {"peer": 1, "sequence": 0}, {})
    builder.instructions.append(instruction)
    with pytest.raises(BundleError, match=message):
        builder.finish(View(0, 0, 256))
