"""Which pip command a hint names: that of a clone, or that of the package index."""

from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

from llmc.runtime import installation

CLONE = ["pip install -e '.[build]'", "pip install -e .", "git pull && pip install -e ."]
INDEX = ["pip install 'llmc-aot[build]'", "pip install --upgrade llmc-aot", "pip install 'llmc-aot>=9.1'"]


@pytest.fixture
def hints(monkeypatch):
    """What pip recorded about the origin -> the three hints."""

    def ask(record):
        def distribution(name):
            if record is PackageNotFoundError:
                raise PackageNotFoundError(name)
            assert name == "llmc-aot"
            return SimpleNamespace(read_text=lambda file: {"direct_url.json": record}[file])

        monkeypatch.setattr(installation, "distribution", distribution)
        installation.from_clone.cache_clear()
        return [
            installation.install_hint("build"),
            installation.install_hint(),
            installation.upgrade_hint("9.1"),
        ]

    yield ask
    installation.from_clone.cache_clear()


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ('{"url": "file:///src/llmc", "dir_info": {"editable": true}}', CLONE),
        ('{"url": "file:///src/llmc", "dir_info": {}}', CLONE),
        (PackageNotFoundError, CLONE),
        (None, INDEX),
        ('{"url": "file:///tmp/llmc_aot-0.1.0.whl", "archive_info": {}}', INDEX),
        ("not JSON", INDEX),
    ],
)
def test_hints_follow_the_origin(hints, record, expected):
    assert hints(record) == expected


def test_upgrade_without_a_version(hints):
    hints(None)
    assert installation.upgrade_hint() == "pip install --upgrade llmc-aot"
