"""Every library that llmc imports is one that pyproject.toml declares."""

import ast
import re
import sys
from importlib.metadata import packages_distributions

from support.package_tree import ROOT, files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("build", "openvino", "onnxruntime", "kernels", "tensorrt-rtx", "tensorrt")
# Not installed where the tests run, or imported by a name that no metadata gives.
BY_HAND = {"tomli": "tomli", "tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx", "cuda": "cuda-python"}


def normal(distribution: str) -> str:
    return re.split(r"[^\w.-]", distribution)[0].lower().replace("_", "-")


class WithoutTypeChecking(ast.NodeTransformer):
    """Drops what is imported for type checkers alone."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return None
        return self.generic_visit(node)


def imported() -> dict[str, str]:
    """Top-level module -> a file that imports it; neither llmc nor the standard library."""
    found = {}
    for path in files():
        if path.suffix != ".py":
            continue
        tree = WithoutTypeChecking().visit(ast.parse((ROOT / path).read_text()))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {name.partition(".")[0]: str(path) for name in names}
    return {k: v for k, v in found.items() if k not in {*sys.stdlib_module_names, "llmc", ""}}


def test_every_import_is_declared():
    extras = PROJECT["optional-dependencies"]
    declared = {normal(line) for line in sum((extras[extra] for extra in EXTRAS), PROJECT["dependencies"])}
    known = packages_distributions()
    undeclared = {
        f"{name} ({path})"
        for name, path in imported().items()
        if not declared & {normal(one) for one in [BY_HAND.get(name, name), *known.get(name, [])]}
    }
    assert undeclared == set()
