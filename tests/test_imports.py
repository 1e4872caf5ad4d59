"""The product's modules import each other in one direction only."""

from __future__ import annotations

from graphlib import TopologicalSorter

import grimp
import pytest

PACKAGES = ("llmc.cli", "llmc.compiler", "llmc.passes", "llmc.plugins", "llmc.runtime")


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """Every import of the product: of functions and of type checkers too."""
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def test_no_import_circle(graph: grimp.ImportGraph) -> None:
    assert len(graph.modules) > 150
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    list(TopologicalSorter(imports).static_order())  # raises CycleError, which names the circle
