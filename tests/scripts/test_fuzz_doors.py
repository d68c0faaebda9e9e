"""The fuzzer itself: its inputs repeat, it finds what is wrong, and a few inputs of every door hold."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

import fuzz_doors
from engine.errors import ModelNotFound
from fuzz.doors import DOORS, Door
from fuzz.mutate import change_bytes, change_json


def test_changes_repeat_with_their_seed_and_leave_the_original_alone():
    value = {"a": [1, {"b": 2}], "c": "x"}
    first = [repr(change_json(value, random.Random(n))) for n in range(50)]
    assert first == [repr(change_json(value, random.Random(n))) for n in range(50)] and len(set(first)) > 20
    assert value == {"a": [1, {"b": 2}], "c": "x"}
    content = [change_bytes(b"0123456789" * 5, random.Random(n)) for n in range(50)]
    assert content == [change_bytes(b"0123456789" * 5, random.Random(n)) for n in range(50)] and len(set(content)) > 30
    assert change_bytes(b"", random.Random(0)) == change_bytes(b"", random.Random(0))


def test_foreign_errors_slow_inputs_and_control_characters_are_findings():
    def prepare(scratch: Path):
        def attempt(rng: random.Random) -> None:
            kind = rng.randrange(4)
            if kind == 0:
                raise KeyError("x")
            if kind == 1:
                raise ModelNotFound("named", "so")
            if kind == 2:
                sum(range(3_000_000))

        return attempt

    tally = fuzz_doors.fuzz(Door("x", prepare, patience=0.01), 40, 0)
    assert tally.inputs == 40 and tally.named["ModelNotFound"] > 2 and tally.accepted > 10
    assert any("KeyError" in f for f in tally.findings) and any("CPU time" in f for f in tally.findings)
    assert fuzz_doors.table({"x": tally}).splitlines()[1].split()[:2] == ["x", "40"]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
def test_a_few_inputs_of_every_door(door, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tally = fuzz_doors.fuzz(Door(door.name, door.prepare, patience=20), 40 // door.slowness, 1)
    assert tally.findings == []


def test_the_command_refuses_doors_that_do_not_exist(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fuzz_doors.py", "--doors", "window"])
    with pytest.raises(SystemExit):
        fuzz_doors.main()
