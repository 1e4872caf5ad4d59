"""Samples of products: those that the fast suite takes, and those that every suite takes."""

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


def every_nth(n: int, *lists: Iterable[Any]) -> list[Any]:
    """Return an n-th of the product of `lists`, its diagonals: the sum of a row's indices is a multiple of n.

    Each value is met. If a third list has n values or more, each pair of values of two others is met, too.
    """
    rows = itertools.product(*(enumerate(each) for each in lists))
    return [tuple(value for _, value in row) for row in rows if sum(index for index, _ in row) % n == 0]
