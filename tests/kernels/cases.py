"""Matrices of test cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def in_turn(*axes: Sequence[Any], ids: Callable[[Any], str] = str) -> list[Any]:
    """Every combination of the axes' values, each with one of False and True in turn.

    The flag still meets every value of every axis, and every pair of values of axes with two or more, at half of the full matrix' tests.
    """
    cases = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        values, flag = [axis[n] for axis, n in zip(axes, places, strict=True)], sum(places) % 2 == 1
        cases.append(pytest.param(*values, flag, id="-".join([*map(ids, values), "with" if flag else "without"])))
    return cases
