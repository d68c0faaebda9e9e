"""`foretold`: its subcommands are named where somebody asks or errs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from engine.cli.main import main


@pytest.mark.parametrize("given", [["--help"], ["-h"]])
def test_help_names_every_subcommand(given, capsys):
    assert main(given) == 0
    out, err = capsys.readouterr()
    assert all(f"foretold {name}" in out for name in ("generate", "serve", "store")) and err == ""


@pytest.mark.parametrize("given", [[], ["sing"], ["\x1b[31m"]])
def test_no_subcommand_of_that_name(given, capsys):
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.strip().isprintable()
    assert all(f"foretold {name}" in err for name in ("generate", "serve", "store"))


COMMANDS = [["--help"], ["generate", "--help"], ["serve", "--help"], ["store", "--help"]]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("given", COMMANDS, ids=lambda given: given[0])
def test_help_that_cannot_be_written_is_an_error(given, capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(given) == 2
    assert capsys.readouterr().err.startswith("error: standard output cannot be written: No space left on device (")


@pytest.mark.parametrize("given", COMMANDS, ids=lambda given: given[0])
def test_help_whose_reader_has_left_says_nothing(given, capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(given) == 141
    assert capsys.readouterr().err == ""
