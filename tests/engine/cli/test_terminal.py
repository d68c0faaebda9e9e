"""What is shown at a terminal, and descriptors of streams that were closed."""

from __future__ import annotations

import os

import pytest

from engine.cli.terminal import harmless
from engine.generate import main


def test_control_characters_are_escapes_and_nothing_else_is():
    assert harmless("a\x1b[2J\r\x07\x08\x0b\x00\x7f\x9b") == "a\\x1b[2J\\x0d\\x07\\x08\\x0b\\x00\\x7f\\x9b"
    for text in ("two\nlines\tof", "caf\u00e9 \u6f22\u5b57 \U0001f642 \u05e9", ""):
        assert harmless(text) == text


@pytest.mark.parametrize("closed", [(0,), (1, 2), (0, 1, 2)])
def test_no_file_takes_a_closed_stream_s_number(closed):
    child = os.fork()
    if child == 0:
        try:
            for number in closed:
                os.close(number)
            main(["--nope"])
            devices = {os.fstat(number).st_rdev for number in closed} == {os.stat(os.devnull).st_rdev}
            os._exit(0 if devices and os.open(os.devnull, os.O_RDONLY) > 2 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
