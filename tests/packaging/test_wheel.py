"""The sdist builds the wheel, and the wheel alone runs: in an environment with nothing of the clone."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from llmc import __version__
from support.package_tree import COMPILED, PACKAGE_FOLDERS, ROOT, files, module, package

pytestmark = pytest.mark.slow

IMPORT_ALL = """
import importlib, json, pkgutil, llmc
names = ["llmc"] + [found.name for found in pkgutil.walk_packages(llmc.__path__, "llmc.")]
print(json.dumps({name: importlib.import_module(name).__file__ for name in names}))
"""


def run(*command: object, **options: object) -> str:
    """The output of a command that has to succeed, without the variables that add to Python's path."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of a copy of the tree: a build writes beside pyproject.toml."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("sdist")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "README.pypi.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in PACKAGE_FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(copy / "plugins/cpu/lib", ignore_errors=True)
    run(
        sys.executable, "-c", f"from setuptools import build_meta as b; b.build_sdist({str(out)!r})", cwd=copy
    )
    (archive,) = out.iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", sdist.parent / "wheel", sdist)
    (path,) = (sdist.parent / "wheel").iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The programs of an environment that has the wheel, and of this environment only the libraries."""
    env = wheel.parents[1] / "env"
    run(sys.executable, "-m", "venv", "--without-pip", env)
    python = env / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    paths |= {path for path in sys.path if path.endswith("site-packages")}
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "libraries.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
    return env / "bin"


def test_the_wheel_holds_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {
            name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith(COMPILED)
        }
    assert names == {"/".join((*package(path.parent).split("."), path.name)) for path in files()}


def test_the_commands_answer(installed: Path, tmp_path: Path) -> None:
    assert run(installed / "llmc", "--version", cwd=tmp_path) == f"llmc {__version__}\n"
    assert "llama-tiny" in run(installed / "llmc", "zoo", "list", cwd=tmp_path)
    report = json.loads(run(installed / "llmc", "doctor", "--json", cwd=tmp_path))
    assert report["llmc"] == __version__
    assert report["run"] is True


def test_every_module_can_be_imported(installed: Path, tmp_path: Path) -> None:
    found = json.loads(run(installed / "python", "-c", IMPORT_ALL, cwd=tmp_path).splitlines()[-1])
    assert set(found) == {module(path) for path in files() if path.suffix == ".py"}
    assert [path for path in found.values() if not Path(path).is_relative_to(installed.parent)] == []
