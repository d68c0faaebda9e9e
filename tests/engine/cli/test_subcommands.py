"""`foretold`: its subcommands are named where somebody asks or errs."""

from __future__ import annotations

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
