"""What is wrong with a native engine's program is named, with a hint."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from llmc.runtime.errors import BundleError
from llmc.runtime.native.program import Program
from support.native_programs import Builder


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
            lambda tree: tree.update(vocab_size=7),
            "instruction 0 (embed) of the program has a table of another",
        ),
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
