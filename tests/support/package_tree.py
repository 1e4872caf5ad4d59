"""The files of the clone that are installed, and their names in the installation."""

from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE_FOLDERS = ("cli", "compiler", "passes", "plugins", "runtime", "model_zoo")
COMPILED = ".so"  # libraries that the build of the package makes, if there is a compiler
# The checkpoint of `make demo`, the script that trained it, and the C sources stay in the clone.
CLONE_ONLY = ("model_zoo/llama/tales/*", "model_zoo/llama/train_tales.py", "plugins/*.c", "plugins/*.h")


def files() -> list[Path]:
    """Return every file that can be installed, relative to the root."""
    found = [
        path.relative_to(ROOT)
        for folder in PACKAGE_FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    ]
    kept = [path for path in found if not any(fnmatch(path.as_posix(), pattern) for pattern in CLONE_ONLY)]
    return [path for path in kept if path.suffix not in (".pyc", COMPILED)]


def package(folder: Path) -> str:
    """Return the name of the package that a folder of the tree becomes."""
    return "llmc" if folder == Path("runtime/_llmc") else ".".join(("llmc", *folder.parts))


def module(file: Path) -> str:
    """Return the name of the module that a file of the tree becomes."""
    name = package(file.parent)
    return name if file.name == "__init__.py" else f"{name}.{file.stem}"
