"""The matrices of cases themselves."""

from __future__ import annotations

from types import SimpleNamespace

from tests.kernels.cases import covering, in_turn


def test_chosen_cases_meet_every_value_and_none_is_wasted():
    cases = [
        SimpleNamespace(callspec=SimpleNamespace(params={"size": size, "kind": kind, "flag": flag}))
        for size in (1, 5, [7])
        for kind in "ab"
        for flag in (False, True)
    ]
    chosen = covering(cases)
    assert len(chosen) == 3 and [cases.index(case) for case in chosen] == sorted(cases.index(case) for case in chosen)
    for name in ("size", "kind", "flag"):
        assert {repr(case.callspec.params[name]) for case in chosen} == {repr(case.callspec.params[name]) for case in cases}
    assert covering(cases[:1]) == cases[:1] and covering([]) == []


def test_a_flag_in_turn_meets_every_value_of_every_axis():
    cases = [case.values for case in in_turn([1, 2], ["a", "b", "c"])]
    assert len(cases) == 6 and {(value, case[-1]) for case in cases for value in case[:-1]} == {
        (value, flag) for value in (1, 2, "a", "b", "c") for flag in (False, True)
    }
