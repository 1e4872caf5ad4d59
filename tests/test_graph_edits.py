"""Graphs change in passes/ only: every other module reads them.

The tracer makes the graph, and the bodies of operators are graphs of their own, so those may edit as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE_FOLDERS = ("cli", "compiler", "passes", "plugins", "runtime")
# Methods of graphs, nodes and values that change them, whatever they are called on.
EDITS = {
    "insert_before",
    "insert_after",
    "replace_input_with",
    "register_initializer",
    "replace_all_uses_with",
    "resize_inputs",
    "resize_outputs",
}
# Methods that lists and dicts have too: only on these attributes of a graph, model or node.
PARTS = {"graph", "inputs", "outputs", "initializers", "functions", "attributes", "opset_imports", "meta"}
PART_EDITS = {"add", "append", "clear", "extend", "insert", "pop", "remove", "setdefault", "update"}
ASSIGNED = {"type", "dtype", "shape", "const_value"}


def may_edit(file: Path) -> bool:
    name = file.relative_to(ROOT).as_posix()
    body = file.name == "body.py" and name.startswith("plugins/")
    return name.startswith(("passes/", "compiler/trace/")) or body


def edits(source: str) -> Iterator[str]:
    """`line: what` of every place that changes a graph.

    Names that other things have too count in modules that know graphs, which are those that import onnx_ir.
    """
    tree = ast.parse(source)
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    froms = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    modules |= {str(node.module) for node in froms}
    knows_graphs = any(name.split(".")[0] == "onnx_ir" for name in modules)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            part = _part(node.func.value)
            if node.func.attr in EDITS or (knows_graphs and node.func.attr in PART_EDITS and part in PARTS):
                yield f"{node.lineno}: {ast.unparse(node.func)}"
        elif knows_graphs and isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
            every = [part for target in targets for part in _flat(target)]
            for target in every:
                if _is_edit(target, node):
                    yield f"{node.lineno}: {ast.unparse(target)}"


def _flat(target: ast.expr) -> list[ast.expr]:
    if isinstance(target, ast.Tuple | ast.List):
        return [part for element in target.elts for part in _flat(element)]
    return [target]


def _part(value: ast.expr) -> str:
    if isinstance(value, ast.Attribute):
        return value.attr
    return value.id if isinstance(value, ast.Name) and value.id == "graph" else ""


def _is_edit(target: ast.expr, statement: ast.stmt) -> bool:
    if isinstance(target, ast.Subscript):
        return isinstance(target.value, ast.Attribute) and target.value.attr in PARTS
    if not isinstance(target, ast.Attribute) or target.attr not in ASSIGNED:
        return False
    if isinstance(target.value, ast.Name) and target.value.id == "self":
        return False
    points_at_file = (
        target.attr == "const_value"
        and isinstance(statement, ast.Assign)
        and ast.unparse(statement.value).startswith(("ir.ExternalTensor(", "ir.LazyTensor("))
    )
    return not points_at_file


def test_only_passes_edit_graphs() -> None:
    files = [
        file for folder in PACKAGE_FOLDERS for file in (ROOT / folder).rglob("*.py") if not may_edit(file)
    ]
    assert len(files) > 100
    found = {
        file.relative_to(ROOT).as_posix(): places
        for file in files
        if (places := list(edits(file.read_text("utf-8"))))
    }
    assert found == {}


def test_weights_point_at_their_file_in_one_place() -> None:
    holders = [
        file.relative_to(ROOT).as_posix()
        for folder in PACKAGE_FOLDERS
        for file in (ROOT / folder).rglob("*.py")
        if not may_edit(file) and ".const_value = " in file.read_text("utf-8")
    ]
    assert holders == ["compiler/weights/write.py"]


@pytest.mark.parametrize(
    "line",
    [
        "graph.insert_before(node, other)",
        "model.graph.insert_after(node, [other])",
        "model.graph.remove(node)",
        "graph.append(node)",
        "graph.extend([node])",
        "node.replace_input_with(0, value)",
        "graph.register_initializer(value)",
        "model.graph.initializers.add(value)",
        "graph.initializers.pop('w')",
        "del graph.initializers['w']",
        "model.graph.inputs.append(value)",
        "model.functions[key] = function",
        "node.attributes.pop('scale')",
        "ir.convenience.replace_all_uses_with(a, b)",
        "value.type = ir.TensorType(dtype)",
        "value.dtype = dtype",
        "value.shape = ir.Shape([1])",
        "value.const_value = ir.tensor(array)",
        "value.dtype, value.shape = dtype, shape",
    ],
)
def test_a_planted_edit_is_found(line: str) -> None:
    assert list(edits(f"import onnx_ir as ir\n{line}")) != []


def test_an_edit_through_a_plan_is_found() -> None:
    assert list(edits("plan.model.graph[0].replace_input_with(0, None)")) != []


@pytest.mark.parametrize(
    "line",
    [
        "value.const_value = ir.ExternalTensor('weights', 0, 4)",
        "names.append(value.name)",
        "self.shape = value.shape",
        "dtype = value.dtype",
        "inputs = list(graph.inputs)",
    ],
)
def test_reading_is_not_editing(line: str) -> None:
    assert list(edits(f"import onnx_ir as ir\n{line}")) == []
