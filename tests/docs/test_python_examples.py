"""Every Python example of the documentation runs, and prints what the page says it prints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/getting-started.md", "docs/reference/python-api.md")
_EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\nprints\n\n```\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
EXAMPLES = [
    pytest.param(code, printed, id=f"{page}-{number}")
    for page in PAGES
    for number, (code, printed) in enumerate(_EXAMPLE.findall((ROOT / page).read_text("utf-8")))
]


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_an_example_runs(
    code: str,
    printed: str,
    bundle: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tales.llmc").symlink_to(bundle("llama-tiny"))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})
    out = capsys.readouterr().out
    assert out == printed if printed else "print" not in code or out


def test_the_pages_have_examples() -> None:
    assert len(EXAMPLES) == 8


def test_the_table_of_options_is_that_of_the_parameters() -> None:
    from dataclasses import fields

    from llmc.runtime.sampling import SamplingParams

    page = (ROOT / "docs/reference/python-api.md").read_text("utf-8")
    table = page.partition("| option | default |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", table, re.MULTILINE)
    assert [name for name, _ in rows] == [field.name for field in fields(SamplingParams)]
    for name, default in rows:
        value = getattr(SamplingParams(), name)
        assert default.strip("`").removeprefix("the bundle's, else ") in (
            str(value),
            f"{value}"[:-2],
            "none",
        ), name


def test_the_fields_of_a_line_are_on_the_page() -> None:
    from dataclasses import fields

    from llmc.runtime.sampling import SamplingParams

    page = (ROOT / "docs/how-to/prompts.md").read_text("utf-8")
    assert [field.name for field in fields(SamplingParams) if f"`{field.name}`" not in page] == []
