"""Every relative link, every `path/in/backticks` and every module name in the documentation exists."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "cli", "compiler", "docs", "model_zoo", "passes", "plugins", "runtime", "tests")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(
        page
        for folder in FOLDERS
        for page in sorted((ROOT / folder).rglob("*.md"))
        if ".venvs" not in page.parts  # of benchmarks
    ),
]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(rf"(?:{'|'.join(FOLDERS)}|\.ci)/[\w./-]*|[A-Z]+\.md|pyproject\.toml|Makefile")
_MODULE = re.compile(r"llmc\.(?:cli|compiler|model_zoo|passes|plugins|runtime)(?:\.\w+)*")


def prose(page: Path) -> str:
    """The page without fenced blocks, which show what files of the reader may hold."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def id_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in _LINK.findall(prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_paths_in_backticks_exist(page: Path) -> None:
    named = [word for code in _CODE.findall(prose(page)) for word in code.split()]
    paths = {word.rstrip(".,:") for word in named if _PATH.fullmatch(word.rstrip(".,:"))}
    assert (
        sorted(path for path in paths if not (ROOT / path).exists() and not (page.parent / path).exists())
        == []
    )


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_modules_in_code_exist(page: Path) -> None:
    names = set(_MODULE.findall(page.read_text("utf-8")))
    assert sorted(name for name in names if not _exists(name)) == []


def _exists(name: str) -> bool:
    """Whether `name` is a module, or something in one."""
    try:
        if find_spec(name) is not None:
            return True
    except ModuleNotFoundError:
        pass
    module, _, attribute = name.rpartition(".")
    return (
        module.count(".") > 0
        and find_spec(module) is not None
        and hasattr(__import__(module, fromlist=[attribute]), attribute)
    )


def test_every_page_of_docs_can_be_reached_from_the_index() -> None:
    reached, todo = set(), [ROOT / "docs" / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        links = [link.partition("#")[0] for link in _LINK.findall(prose(page)) if "://" not in link]
        todo += [(page.parent / link).resolve() for link in links if link.endswith(".md")]
    pages = {page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "gpu"}  # results of cards
    assert sorted(id_of(page) for page in pages - reached) == []


def test_references_to_docs_in_the_code_exist() -> None:
    missing = set()
    for folder in (*FOLDERS, ".ci"):
        for file in (ROOT / folder).rglob("*.py"):
            if ".venvs" in file.parts:  # of benchmarks
                continue
            for name in re.findall(r"\bdocs/[\w/-]+\.(?:md|py)", file.read_text("utf-8")):
                if not (ROOT / name).exists():
                    missing.add(f"{file.relative_to(ROOT)}: {name}")
    assert sorted(missing) == []
