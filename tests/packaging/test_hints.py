"""No text tells a user to install `llmc` from the package index: that name is another project's."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOREIGN = re.compile(r"\b(?:pipx? install|uv add|uv tool install)\b[^\n`#&;|]*?(?<![\w./-])llmc(?![\w./-])")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("pip install 'llmc[build]'", True),
        ("pip install --upgrade llmc", True),
        ('pip install "llmc>=9.1"', True),
        ("uv pip install llmc", True),
        ("uv add llmc", True),
        ("pip install 'llmc-aot[build]'", False),
        ("pip install -e '.[build]'", False),
        ("pip install -e ./llmc", False),
        ("pip install -e . && llmc --version", False),
        ("pip installed llmc", False),
    ],
)
def test_what_is_wrong(text, wrong):
    assert bool(FOREIGN.search(text)) is wrong


def test_no_text_installs_another_project():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout: only a clone knows which files are its own")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path == Path(__file__) or path.suffix == ".safetensors" or not path.is_file():
            continue
        lines = path.read_text(errors="replace").splitlines()
        found += [
            f"{name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if FOREIGN.search(line)
        ]
    assert found == []
