"""What is wrong with a native engine's program is named, with a hint."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from llmc.runtime.errors import BundleError
from llmc.runtime.native.program import Program
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
