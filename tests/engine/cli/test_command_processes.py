"""`python -m engine.generate` as a process: a pipe, a terminal with Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from engine.sessions.file import SessionFile

ROOT = Path(__file__).resolve().parents[3]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_a_real_process(model_options, tmp_path):
    command = [sys.executable, "-m", "engine.generate", *model_options, "--max-new-tokens", "5"]
    done = subprocess.run([*command, "--json"], input=b"Hello", capture_output=True, env=environment(), cwd=tmp_path, timeout=300)
    assert done.returncode == 0 and json.loads(done.stdout)["new_tokens"] <= 5, done.stderr


class Terminal:
    """The command at a pseudo-terminal. held: tokens that none of so many first answers gets beyond, unless it is broken off."""

    def __init__(self, *options, held):
        said = environment() | {"HELD_TOKENS": str(held[0]), "HELD_ANSWERS": str(held[1])}
        self.process, self._fd = pty.fork()
        if self.process == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored, and so inherited, where the tests run in the background
            os.execve(sys.executable, [sys.executable, str(Path(__file__).with_name("held_command.py")), *options], said)
        self.shown = ""

    def until(self, pattern, timeout=300.0):
        """Everything shown up to and including `pattern`."""
        ends = time.monotonic() + timeout
        while (found := re.search(pattern, self.shown)) is None:
            assert select.select([self._fd], [], [], max(0.0, ends - time.monotonic()))[0], (
                f"{pattern!r} did not come; shown: {self.shown!r}"
            )
            try:
                read = os.read(self._fd, 4096)
            except OSError:  # the process has ended
                read = b""
            assert read, f"the end came before {pattern!r}; shown: {self.shown!r}"
            self.shown += read.decode(errors="replace")
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def type(self, text):
        os.write(self._fd, text.encode())

    def end(self, timeout=300.0):
        """Ctrl-C at the prompt; exit status, and the rest of what was shown."""
        ends, rest = time.monotonic() + timeout, self.shown
        self.type("\x03")
        while True:
            assert select.select([self._fd], [], [], max(0.0, ends - time.monotonic()))[0], f"no end; shown: {rest!r}"
            try:
                read = os.read(self._fd, 4096)
            except OSError:
                break
            rest += read.decode(errors="replace")
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1]), rest


def test_a_conversation_at_a_terminal(model_options, tmp_path):
    file = tmp_path / "a.kv"
    terminal = Terminal(*model_options, "--chat", "--session", str(file), "--quality", "tokens", "--max-new-tokens", "400", held=(300, 2))
    terminal.until("an empty line, end of input or Ctrl-C leaves\r\n> ")
    terminal.type("Hello\n")
    terminal.until(r"Hello\r\n.{3}")  # the answer has begun
    terminal.type("\x03")
    first = terminal.until(r"\[interrupted\]\r\n> |tokens/s.*\r\n> ")
    terminal.type("And now?\n")
    terminal.until(r"And now\?\r\n.{3}")
    terminal.type("\x03")
    second = terminal.until(r"\[interrupted\]\r\n> |tokens/s.*\r\n> ")
    terminal.type("Once more\n")
    third = terminal.until(r"tokens/s.*\r\n> ")
    assert "tokens/s" in third, "an answer that is left alone comes to its end"
    assert all("suspended" in turn for turn in (first, second, third)), "an answer is on disk before the next message is read"
    assert "[interrupted]" in first and "[interrupted]" in second
    status, rest = terminal.end()
    assert status == 0 and "Traceback" not in first + second + third + rest
    assert SessionFile.load(file).token_ids.count(258) >= 4
