"""The product's modules import each other in one direction only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cli", "compiler", "passes", "plugins", "runtime")


def imports() -> dict[str, set[str]]:
    """Module -> the modules of the product that it imports: in functions and for type checkers too."""
    files = {name(file): file for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    return {module: set(imported(file, files)) - {module} for module, file in files.items()}


def name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("llmc", *parts[: -1 if parts[-1] == "__init__" else None]))


def imported(file: Path, known: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module


def test_no_import_circle() -> None:
    graph = imports()
    assert len(graph) > 150
    assert sum(map(len, graph.values())) > 500
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_a_circle_is_found() -> None:
    graph = imports()
    graph["llmc.compiler.request"].add("llmc.compiler.driver")
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph).static_order())
