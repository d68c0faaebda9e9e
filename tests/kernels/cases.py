"""Matrices of test cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest

Case = TypeVar("Case", bound=Any)


def in_turn(*axes: Sequence[Any], ids: Callable[[Any], str] = str) -> list[Any]:
    """Every combination of the axes' values, each with one of False and True in turn.

    The flag still meets every value of every axis, and every pair of values of axes with two or more, at half of the full matrix' tests.
    """
    cases = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        values, flag = [axis[n] for axis, n in zip(axes, places, strict=True)], sum(places) % 2 == 1
        cases.append(pytest.param(*values, flag, id="-".join([*map(ids, values), "with" if flag else "without"])))
    return cases


def covering(cases: Sequence[Case]) -> list[Case]:
    """The fewest cases, chosen one after the other, among which every value of every parameter is; in their old order. cases: parametrised tests."""
    values = [{(name, repr(value)) for name, value in case.callspec.params.items()} for case in cases]
    left, kept = set().union(*values), set()
    while left:
        best = max(range(len(cases)), key=lambda n: len(left & values[n]))
        kept.add(best)
        left -= values[best]
    return [case for n, case in enumerate(cases) if n in kept]
