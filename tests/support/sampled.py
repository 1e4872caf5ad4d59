"""Parameters of which the fast suite takes some, and the whole suite all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def sampled(*lists: Iterable[Any], every: int) -> list[Any]:
    """Return the product of `lists` as parameters. Each `every`-th is fast, the others are marked slow.

    An `every` without a common divisor with the length of the last list meets each of its values.
    """
    return [
        pytest.param(*row, marks=pytest.mark.slow if number % every else (), id="-".join(map(str, row)))
        for number, row in enumerate(itertools.product(*lists))
    ]
