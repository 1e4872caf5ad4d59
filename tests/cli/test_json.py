"""`--json`: one schema for every command, for errors too. docs/reference/json.md lists the fields."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmc.cli import errors, main, output

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "json.md"
GOLDEN = Path(__file__).parents[1] / "golden" / "format-1.llmc"
OPTIONAL = {"id"}  # of a line of --prompts
HEAD = {"schema_version", "command", "ok"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def llmc(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run a command with --json -> exit code, the one object on stdout."""

    def call(*arguments: object) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main.main([*map(str, arguments), "--json"])
        [line] = capsys.readouterr().out.splitlines()
        return code, json.loads(line)

    return call


def documented(command: str) -> set[str]:
    """The fields of a command that the page lists."""
    section = PAGE.read_text("utf-8").partition(f"\n## {command}\n")[2].partition("\n## ")[0]
    first_cells = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)
    return {name for cell in first_cells for name in re.findall(r"`([\w-]+)`", cell)}


def test_every_command_prints_the_documented_fields(
    llmc: Any, bundle: Callable[[str], Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    tiny, source = bundle("llama-tiny"), checkpoint("llama-tiny")
    built = tmp_path / "new.llmc"
    commands = {
        "build": (source, "-o", built, "--no-verify", "--engine", "native"),
        "build --dry-run": (source, "-o", built, "--dry-run"),
        "run": (tiny, "Once", "--max-tokens", 2),
        "inspect": (tiny,),
        "inspect --program": (built, "--program"),
        "report": (tiny, "-o", tmp_path / "page.html"),
        "verify": (tiny,),
        "check": (source,),
        "bench": (tiny, "--prompt-tokens", 8, "--new-tokens", 2),
        "bench --layers": (built, "--prompt-tokens", 236, "--layers"),  # and 20 steps: the context of 256
        "doctor": (),
        "zoo list": (),
        "zoo make": ("llama-tiny", tmp_path / "made"),
    }
    for command, arguments in commands.items():
        name = command.partition(" --")[0]
        code, record = llmc(*name.split(), *arguments)
        assert (code, record["ok"], record["command"]) == (0, True, name)
        assert record["schema_version"] == output.SCHEMA_VERSION
        assert list(record)[:3] == ["schema_version", "command", "ok"]
        assert record.keys() - HEAD == documented(command) - OPTIONAL, command
        if "machine" in record:
            assert record["machine"].keys() == documented("machine")
        for rank in record.get("ranks", ()):
            assert rank.keys() == documented("rank")


@pytest.mark.parametrize(
    ("arguments", "code", "kind", "argument"),
    [
        (("zoo", "make", "gpt-9", "x"), errors.USAGE, "UnsupportedError", "name"),
        (("run", "nowhere.llmc", "Once"), errors.ERROR, "BundleError", None),
        (("run", "x", "Once", "--top-p", "2"), errors.USAGE, "RequestError", "top_p"),
        (("run", "x", "Once", "--top-k", "few"), errors.USAGE, "UsageError", "top_k"),
        (("run", "x", "Once", "--kv-memory", "lots"), errors.USAGE, "UsageError", "kv_memory"),
        (("build", "x", "--target", "abacus"), errors.USAGE, "BuildError", "target"),
        (("check", "nowhere"), errors.ERROR, "CheckpointError", None),
        (("inspect", str(GOLDEN), "--program"), errors.USAGE, "RequestError", "program"),
        (("nonsense",), errors.USAGE, "UsageError", None),
    ],
)
def test_an_error_is_an_object_too(
    llmc: Any, arguments: tuple[str, ...], code: int, kind: str, argument: str | None
) -> None:
    got, record = llmc(*arguments)
    assert got == code
    assert record.keys() == HEAD | {"error"}
    assert record["ok"] is False
    error = record["error"]
    assert error.keys() == {"kind", "message", "hint", "argument", "exit_code"} == documented("Errors")
    assert (error["kind"], error["argument"], error["exit_code"]) == (kind, argument, code)


def test_text_stays_as_it_is_and_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    output.start("run", True)
    output.print_json({"text": "Käse 猫\u2028\x85\n"})
    out = capsys.readouterr().out
    assert 'Käse 猫\\u2028\\u0085\\n"' in out
    assert len(out.splitlines()) == 1


def test_a_stream_that_is_not_utf8_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "latin-1", "backslashreplace"))
    output.start("run", True)
    output.print_json({"text": "😀"})
    assert json.loads(raw.getvalue())["text"] == "😀"
