"""pyproject.toml lists every package and every data file of the tree, and nothing else."""

import sys
from pathlib import Path

from support.package_tree import COMPILED, ROOT, files, package

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_the_list_is_the_tree():
    folders = {path.parent for path in files() if path.suffix == ".py"}
    assert sorted(SETUPTOOLS["packages"]) == sorted(map(package, folders))
    assert [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []


def test_every_data_file_is_listed():
    unlisted = {path for path in files() if path.suffix != ".py"}
    for name, patterns in SETUPTOOLS["package-data"].items():
        folder = Path(SETUPTOOLS["package-dir"].get(name, name.removeprefix("llmc.").replace(".", "/")))
        for pattern in patterns:
            matched = {path.relative_to(ROOT) for path in (ROOT / folder).glob(pattern)}
            assert matched or pattern.endswith(COMPILED), f"{pattern} of {name} matches nothing"
            unlisted -= matched
    assert sorted(map(str, unlisted)) == []
