"""The files of the clone that an installation has, and the names they get there."""

from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("cli", "compiler", "passes", "plugins", "runtime", "model_zoo")
# The checkpoint of `make demo` and the script that trained it stay in the clone.
CLONE_ONLY = ("model_zoo/llama/tales/*", "model_zoo/llama/train_tales.py")


def files() -> list[Path]:
    """Every file of the rooms that could be installed, relative to the root."""
    found = [path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file()]
    kept = [path for path in found if not any(fnmatch(path.as_posix(), pattern) for pattern in CLONE_ONLY)]
    return [path for path in kept if path.suffix != ".pyc"]


def package(folder: Path) -> str:
    """The name under which a folder of the tree is installed."""
    return "llmc" if folder == Path("runtime/_llmc") else ".".join(("llmc", *folder.parts))


def module(file: Path) -> str:
    """The name under which a file of the tree is imported."""
    name = package(file.parent)
    return name if file.name == "__init__.py" else f"{name}.{file.stem}"
