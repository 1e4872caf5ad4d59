"""Every `llmc` command that the documentation shows is valid, and does what the page says."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from llmc.cli import errors, main
from llmc.cli.app import application

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# What stands for something of the reader's, and what the test has in its place.
STANDS_FOR = {
    "CHECKPOINT": "model_zoo/llama/tales",
    "FILE": "my-text.txt",
    "[--full] [--json]": "--full --json",
}
# Commands that another test runs, or none can: no GPU, no network.
NOT_RUN = (
    "--target tensorrt",  # tests/compiler/test_tensorrt_bundle.py; `tensorrt` needs a GPU
    "run tales-gpu.llmc",
    "run tp2-gpu.llmc",
    "run NAME.llmc --chat",  # tests/cli/test_run_prompts.py; tales has no chat template
    "build CHECKPOINT -o olmo2.llmc",  # tests/compiler/test_families.py
)
SLOW_EXIT_CODES = {
    "llmc verify int4.llmc --against model_zoo/llama/tales --min-top1 0.97 --quiet": errors.MISSED
}


@dataclass(frozen=True)
class Shown:
    """A command on a page. output: the lines that the page shows below it."""

    page: str
    line: str
    output: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """The arguments of `llmc`."""
        words = shlex.split(self.line, comments=True)
        words = words[words.index("llmc") + 1 :]
        return words[: words.index(">")] if ">" in words else words


def shown() -> Iterator[Shown]:
    for page in PAGES:
        text = page.read_text("utf-8")
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            lines = re.sub(r"\n +(?=--)", " ", block).splitlines()  # an option that goes on in the next line
            for number, line in enumerate(lines):
                command = re.match(r"(?:\$ | +run: | +)?((?:[A-Z_]+=\w+ )?llmc .*)", line)
                if command is None:
                    continue
                rest = lines[number + 1 :] if line.startswith("$ ") else []
                end = next((n for n, other in enumerate(rest) if other.startswith("$ ")), len(rest))
                yield Shown(str(page.relative_to(ROOT)), command[1], tuple(rest[:end]))
        for code in re.findall(r"^\|.*`(llmc .* .*)` \|$", text, re.MULTILINE):
            yield Shown(str(page.relative_to(ROOT)), code, ())


SHOWN = list(dict.fromkeys(shown()))
COMMAND = typer.main.get_command(application())


def test_the_pages_show_commands() -> None:
    assert len(SHOWN) > 40
    assert {"README.md", "docs/getting-started.md", "docs/how-to/quantize.md"} <= {one.page for one in SHOWN}
    assert any("--max-kl" in one.line for one in SHOWN)  # of a line that goes on


@pytest.mark.parametrize("one", SHOWN, ids=lambda one: f"{one.page}: {one.line}")
def test_a_shown_command_is_valid(one: Shown) -> None:
    """Its command exists, its options too, and their values are of the right kind."""
    words = [STANDS_FOR.get(word, word) for word in one.words]
    words = [word for word in words if not word.startswith("[--")]
    command: Any = COMMAND
    while words and hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("llmc", words)


@pytest.mark.slow
def test_shown_commands_do_what_the_pages_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fast_builds: None
) -> None:
    """All in one directory, in the order of the pages. A repeated command is run once."""
    (tmp_path / "model_zoo").symlink_to(ROOT / "model_zoo")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model").symlink_to(ROOT / "model_zoo" / "llama" / "tales")
    (tmp_path / "prompts.txt").write_text("Once upon a time\nThe king said\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Once upon a time", "max_tokens": 5}\n')
    (tmp_path / "my-text.txt").write_text((ROOT / "compiler" / "evaluation.txt").read_text("utf-8")[:4000])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done, wrong = set(), []
    # A page may use the bundle of another one: README's and the first guide's are built first.
    order = ["README.md", "docs/getting-started.md", "docs/how-to/ci-pipeline.md", "docs/how-to/quantize.md"]
    for one in sorted(SHOWN, key=lambda one: order.index(one.page) if one.page in order else len(order)):
        line = one.line
        if any(part in line for part in NOT_RUN) or line in done:
            continue
        done.add(line)
        words = _words_here(line)
        if "LLMC_DUMP" in line:
            (tmp_path / "graphs").mkdir()
            monkeypatch.setenv("LLMC_DUMP", "graphs")
        if "-o" in words and "--dry-run" not in words:
            shutil.rmtree(words[words.index("-o") + 1], ignore_errors=True)
        capsys.readouterr()
        code = main.main(words)
        out, err = capsys.readouterr()
        monkeypatch.delenv("LLMC_DUMP", raising=False)
        if code != SLOW_EXIT_CODES.get(line, errors.OK):
            wrong.append(f"{one.page}: {line}: exit code {code}: {err[-300:]}")
        if one.output and not _alike(_text(one.output), _text((out + _errors(err)).splitlines())):
            wrong.append(f"{one.page}: {line} prints\n{out}{_errors(err)}")
    assert len(done) > 30
    assert wrong == []
    assert os.listdir(tmp_path / "graphs")


def _words_here(line: str) -> list[str]:
    for placeholder, value in STANDS_FOR.items():
        line = line.replace(placeholder, value)
    return Shown("", line.replace("/tmp/", ""), ()).words


def _errors(err: str) -> str:
    return "".join(f"{one}\n" for one in err.splitlines() if one.startswith(("error: ", "hint: ")))


def _text(lines: Any) -> str:
    """The words, without durations and however the lines are wrapped."""
    return re.sub(r"\d+\.\d s\b", "N s", " ".join(" ".join(lines).split()))


_DECIMAL = re.compile(r"\d+\.\d+(?:e-?\d+)?")


def _alike(shown: str, printed: str) -> bool:
    """Return whether only decimal numbers differ, and those as they do from one CPU to another.

    torch, whose results the figures compare with, adds in another order on CPUs of other instruction sets.
    """
    if _DECIMAL.sub("#", shown) != _DECIMAL.sub("#", printed):
        return False
    pairs = zip(_DECIMAL.findall(shown), _DECIMAL.findall(printed), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=0.5 if "e" in a else 0.01) for a, b in pairs)


def test_figures_may_differ_by_rounding_and_words_not_at_all() -> None:
    shown = "max logit error 2.1e-05, perplexity 684.5 (-1.16 %), top-1 0.9413, 1,464 positions"
    assert _alike(shown, shown.replace("2.1e-05", "1.4e-05").replace("684.5 (-1.16 %)", "684.4 (-1.17 %)"))
    for old, new in (("2.1e-05", "2.1e-04"), ("684.5", "692.5"), ("1,464", "1,465"), ("error", "errors")):
        assert not _alike(shown, shown.replace(old, new))
