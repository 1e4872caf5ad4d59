"""Compile the native CPU engine before setuptools collects the package's files. See pyproject.toml."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BUILD = Path(__file__).parent / "plugins" / "cpu" / "build.py"


class BuildPyWithEngine(build_py):
    """`build_py`, with the engine's libraries. Without a compiler the package has no native engine."""

    def run(self) -> None:
        spec = importlib.util.spec_from_file_location("build_cpu_engine", BUILD)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            module.compile_libraries()
        except FileNotFoundError as error:
            self.warn(f"the native CPU engine is left out: {error}")
        super().run()


setup(cmdclass={"build_py": BuildPyWithEngine})
