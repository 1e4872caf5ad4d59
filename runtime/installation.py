"""The installation of llmc, and the pip commands that add to it.

The distribution is called llmc-aot, the command and the import llmc.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution

DISTRIBUTION = "llmc-aot"


def install_hint(extra: str = "") -> str:
    """Return the command that installs `extra`, or llmc with the libraries of `llmc run` if `extra` is empty.

    The command installs from the clone if llmc was installed from one, otherwise from the package index.
    """
    if from_clone():
        return f"pip install -e '.[{extra}]'" if extra else "pip install -e ."
    return f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install --upgrade {DISTRIBUTION}"


def upgrade_hint(version: str = "") -> str:
    """Return the command that installs llmc `version` or newer, or the newest one."""
    if from_clone():
        return f"git pull && {install_hint()}"
    return f"pip install '{DISTRIBUTION}>={version}'" if version else install_hint()


@lru_cache(maxsize=1)
def from_clone() -> bool:
    """Return whether pip installed llmc from a directory (PEP 610), or llmc is not installed at all."""
    try:
        record = distribution(DISTRIBUTION).read_text("direct_url.json")
        return record is not None and "dir_info" in json.loads(record)
    except PackageNotFoundError:
        return True
    except ValueError:  # a damaged record counts as none
        return False
