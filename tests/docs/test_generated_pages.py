"""The generated reference pages follow the code, and the written ones name what the code has."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from llmc.compiler.checkpoint import finding
from llmc.runtime.errors import LlmcError

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", REFERENCE / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["cli.md", "capabilities.md"])
def test_a_generated_page_is_current(page: str, generate: ModuleType) -> None:
    assert list(generate.PAGES) == ["cli.md", "capabilities.md"]
    assert (REFERENCE / page).read_text("utf-8") == generate.PAGES[page](), "run `make docs`"


def test_every_command_and_option_is_on_the_page(generate: ModuleType) -> None:
    """Against the help texts, which Typer renders by itself."""
    from typer.testing import CliRunner

    from llmc.cli.app import application

    page = generate.cli_page()
    for path in re.findall(r"^## llmc (.+)$", page, re.MULTILINE):
        shown = CliRunner().invoke(application(), [*path.split(), "--help"], env={"COLUMNS": "200"}).output
        section = page.partition(f"\n## llmc {path}\n")[2].partition("\n## ")[0]
        wanted = set(re.findall(r"--[a-z0-9-]+", shown)) - {"--help"}
        assert wanted <= set(re.findall(r"--[a-z0-9-]+", section))


def test_a_stale_page_fails_the_check(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(generate, "HERE", tmp_path)
    monkeypatch.setattr(generate, "PAGES", {"cli.md": lambda: "new\n"})
    (tmp_path / "cli.md").write_text("old\n")
    assert generate.main(["--check"]) == 1
    assert "run `make docs`" in capsys.readouterr().err
    assert (tmp_path / "cli.md").read_text() == "old\n"
    assert generate.main([]) == 0
    assert (tmp_path / "cli.md").read_text() == "new\n"
    assert generate.main(["--check"]) == 0


def test_every_kind_of_finding_is_explained() -> None:
    page = (REFERENCE / "check-findings.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", page, re.MULTILINE)
    assert {kind: remedy.replace("`", "") for kind, remedy in rows} == finding.REMEDIES


def test_every_variable_that_the_code_reads_is_listed() -> None:
    page = (REFERENCE / "environment.md").read_text("utf-8")
    read: set[str] = set()
    for folder in ("cli", "compiler", "passes", "plugins", "runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text("utf-8")
            read |= set(re.findall(r"environ(?:\.get|\.setdefault)?[(\[]\"([A-Z_]+)\"", text))
            read |= set(re.findall(r"\"(LLMC_[A-Z_]+)\"", text))
    assert {"LLMC_TRACEBACK", "XDG_CACHE_HOME"} <= read
    assert sorted(name for name in read if f"`{name}`" not in page) == []


def test_every_error_of_the_public_tree_is_listed() -> None:
    page = (REFERENCE / "environment.md").read_text("utf-8")
    names = {one.__name__ for one in LlmcError.__subclasses__() if one.__module__ == LlmcError.__module__}
    assert sorted(name for name in names if f"`{name}`" not in page) == []
