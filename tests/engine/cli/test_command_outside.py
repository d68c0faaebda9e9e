"""The command's outside: closed, full and narrow streams, readers that leave, signals. Whatever comes, an answer that was made is in its file.

The runs are forks of one process that has imported the command already; what happens in an interpreter's first second has runs of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.reduction import DupFd
from pathlib import Path

import pytest

from engine.sessions.file import SessionFile

ROOT = Path(__file__).resolve().parents[3]
NULL = os.open(os.devnull, os.O_RDWR)
LONG = ("--max-new-tokens", "900")
HELD = 800, 1  # tokens of so many answers
PATIENCE_S = 300.0  # for what is over in a second, unless the machine stands still


def _child(argv, streams, encoding, home, ignored, held):
    """The command with these descriptors (None: closed), in a process of its own, as a fresh interpreter would run it."""
    import io

    os.environ["FORETOLD_HOME"] = home
    taken = [None if stream is None else stream.detach() for stream in streams]
    for number, source in enumerate(taken):
        if source is None:
            with suppress(OSError):
                os.close(number)
        else:
            os.dup2(source, number)
            os.close(source)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        opened = None
        if taken[number] is not None:
            opened = io.TextIOWrapper(open(number, mode + "b", closefd=False), encoding or "utf-8", line_buffering=mode == "w")  # noqa: SIM115
        setattr(sys, name, opened)
        setattr(sys, f"__{name}__", opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if ignored is not None:
        signal.signal(getattr(signal, ignored), signal.SIG_IGN)
    from engine.generate import main

    if held:
        sys.path.append(str(Path(__file__).parent))
        from held_command import hold_answers

        hold_answers(*held)
    status = 99
    try:
        status = main(argv)
        with suppress(AttributeError):
            sys.stdout.flush()
    finally:
        os._exit(status)


class Run:
    """The command running: `out` and `err` are the reading ends of pipes, `pid` takes signals. held: of `hold_answers`."""

    def __init__(self, argv, *, stdin=NULL, stdout=None, stderr=None, closed=(), encoding=None, ignored=None, held=None):
        out, err = os.pipe(), os.pipe()
        self.out, self.err = out[0], err[0]
        streams = [stdin, out[1] if stdout is None else stdout, err[1] if stderr is None else stderr]
        handed = [None if number in closed else DupFd(stream) for number, stream in enumerate(streams)]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["warm_command"])
        given = [str(a) for a in argv], handed, encoding, os.environ["FORETOLD_HOME"], ignored, held
        self.process = context.Process(target=_child, args=given)
        self.process.start()
        self.pid = self.process.pid
        os.close(out[1])
        os.close(err[1])

    def begun(self, timeout=PATIENCE_S):
        """Wait for the answer's first bytes."""
        assert select.select([self.out], [], [], timeout)[0], "no answer"
        return os.read(self.out, 1 << 16)

    def end(self, timeout=PATIENCE_S):
        """(exit status, rest of standard output, standard error)."""
        shown = {self.out: b"", self.err: b""}
        left, ends = [fd for fd in shown if fd >= 0], time.monotonic() + timeout
        while left:
            ready = select.select(left, [], [], max(0.0, ends - time.monotonic()))[0]
            assert ready, f"no end; {shown}"
            for fd in ready:
                piece = os.read(fd, 1 << 16)
                shown[fd] += piece
                if not piece:
                    os.close(fd)
                    left.remove(fd)
        self.process.join(timeout)
        said = shown[self.err].decode()
        assert "Traceback" not in said and "Exception ignored" not in said, said
        return self.process.exitcode, shown[self.out], said


@pytest.fixture
def options(chat_folders, pack_home, monkeypatch):
    """The target alone, and no template: what is tried here is neither drafts nor chats."""
    found = ["--target", str(chat_folders.target), "--dtype", "float32", "--device", "cpu", "--raw", "--draft-length", "0"]
    monkeypatch.setenv("WARM_COMMAND", json.dumps(found))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}")  # the preloading process looks nowhere else
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return found


@pytest.fixture
def kept(options, tmp_path):
    """Options of a session, and its file."""
    file = tmp_path / "chat.kv"
    return [*options, "--quality", "tokens", "--session", file], file


def answered(file):
    """Tokens of the answer to "Hello", which is five tokens."""
    return SessionFile.load(file).token_ids[5:]


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_in_the_middle_of_an_answer(kept, name, status):
    options, file = kept
    run = Run([*options, *LONG, "Hello"], held=HELD)
    first = run.begun()
    os.kill(run.pid, getattr(signal, name))
    found, rest, said = run.end()
    assert found == status and "suspended" in said
    assert 0 < len(answered(file)) < 900 and len(first + rest) > 0
    assert file.stat().st_mode & 0o777 == 0o600 and [p.name for p in file.parent.iterdir()] == ["chat.kv"], "neither lock nor part is left"


def test_a_terminal_that_closes_between_two_turns_of_a_pipe(kept):
    """The writer of the pipe still lives, so the command waits for a line when the signal comes."""
    options, file = kept
    lines = os.pipe()
    options.remove("--raw")
    run = Run([*options, "--chat", "--max-new-tokens", 8], stdin=lines[0])
    os.write(lines[1], b"Hello\n")
    run.begun()
    deadline = time.monotonic() + PATIENCE_S
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGHUP)
    assert run.end()[0] == 129 and len(answered(file)) > 0
    os.close(lines[0])
    os.close(lines[1])


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_ignored_signals_stay_ignored(kept, name, tmp_path):
    """`nohup` means it."""
    options, file = kept
    run = Run([*options, "--max-new-tokens", 200, "Hello"], ignored=name, held=(100, 1, str(tmp_path / "signalled")))
    run.begun()
    os.kill(run.pid, getattr(signal, name))
    (tmp_path / "signalled").touch()
    found, _, said = run.end()
    assert found == 0 and "tokens/s" in said and len(answered(file)) > 0


def test_a_reader_that_leaves_in_the_middle(kept):
    """`... | head -1`."""
    options, file = kept
    run = Run([*options, *LONG, "Hello"], held=HELD)
    run.begun()
    os.close(run.out)
    run.out = -1
    found, _, said = run.end()
    assert found == 141 and "suspended" in said and 0 < len(answered(file)) < 900


def test_a_reader_that_has_left_before_the_first_word(kept):
    options, file = kept
    run = Run([*options, *LONG, "Hello"], held=HELD)
    os.close(run.out)
    run.out = -1
    assert run.end()[0] == 141 and 0 < len(answered(file)) < 900


def test_an_unknown_pair_is_one_line_and_nothing_else(options):
    found, text, said = Run(["--pair", "nope", "Hello"]).end()
    assert (found, text) == (2, b"") and re.fullmatch(r"error: unknown pair 'nope' \(.+\)\n", said)


def test_a_full_device(kept):
    options, file = kept
    full = os.open("/dev/full", os.O_WRONLY)
    found, _, said = Run([*options, "--max-new-tokens", 40, "Hello"], stdout=full).end()
    os.close(full)
    lines = said.splitlines()
    assert found == 2 and lines[-1].startswith("error: standard output cannot be written: No space left on device (")
    assert len(answered(file)) > 0


def test_a_full_device_for_what_is_said(kept):
    options, file = kept
    full = os.open("/dev/full", os.O_WRONLY)
    found, text, _ = Run([*options, "--max-new-tokens", 12, "Hello"], stderr=full).end()
    os.close(full)
    assert found == 0 and text.endswith(b"\n") and len(answered(file)) > 0


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_closed_streams(kept, closed):
    options, file = kept
    found, text, said = Run([*options, "--max-new-tokens", 12, "Hello"], closed=closed).end()
    assert found == (2 if 1 in closed else 0) and len(answered(file)) > 0
    if 1 in closed and 2 not in closed:
        assert said.splitlines()[-1].startswith("error: standard output cannot be written: it is closed (")
    assert (text == b"") is (1 in closed)


def test_a_closed_standard_input_holds_no_prompt(options):
    found, text, said = Run(options, closed=(0,)).end()
    assert (found, text) == (2, b"") and said.startswith("error: there is no prompt (")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_an_encoding_lacks(kept, encoding):
    """The model's own text may need any character; what was asked for is escaped, and the answer is kept as it is."""
    options, file = kept
    found, text, _ = Run([*options, "--max-new-tokens", 60, "--temperature", 2, "--seed", 3, "früh 🙂"], encoding=encoding).end()
    assert found == 0 and b"\\u" in text and len(answered(file)) > 0
    text.decode(encoding)


def test_a_line_break_stands_between_an_answer_and_what_is_said_of_its_file(kept):
    """Both streams on one terminal."""
    options, _ = kept
    master, slave = pty.openpty()
    run = Run([*options, "--max-new-tokens", 12, "Hello"], stdout=slave, stderr=slave)
    os.close(slave)
    shown, deadline = b"", time.monotonic() + PATIENCE_S
    while b"tokens/s" not in shown:
        assert select.select([master], [], [], max(0.0, deadline - time.monotonic()))[0], shown
        shown += os.read(master, 1 << 16)
    assert b"\nsuspended " in shown and b"\n[" in shown
    assert run.end()[0] == 0
    os.close(master)


@pytest.mark.parametrize("module, cpu_s", [("generate", 0.25), ("generate", 0.8), ("serve", 0.25), ("serve", 0.5)])
def test_an_interrupt_before_the_model_is_loaded(options, module, cpu_s, tmp_path):
    """A real interpreter, interrupted among its imports: after so much of its own time, whatever else the machine does."""
    if module == "serve":
        options = [*options[: options.index("--raw")], "--port", "0"]
    else:
        options = [*options, *LONG, "--session", str(tmp_path / "a.kv"), "Hello"]
    code = f"""
import os, runpy, signal
signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), signal.SIGINT))
signal.setitimer(signal.ITIMER_PROF, {cpu_s})
runpy.run_module("engine.{module}", run_name="__main__", alter_sys=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130 and err == b"\ninterrupted\n" and out == b"" and not (tmp_path / "a.kv").exists()


@pytest.mark.parametrize("reaches", ["the process", "the thread that loads"])
def test_an_interrupt_while_a_thread_loads_the_server_s_model(reaches):
    """The system may hand a process's signal to any of its threads; Python's handler runs in the main one, once that one looks."""
    code = f"""
import signal, threading, time
from engine.cli.starting import interrupts_end
from engine.server.loop import EngineThread
def load():
    print("loading", flush=True)
    if {reaches != "the process"}:
        time.sleep(0.2)  # the main thread waits by now
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    time.sleep(600)
with interrupts_end():
    EngineThread().call(load)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == b"loading\n"
    if reaches == "the process":
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (130, b"\ninterrupted\n")


@pytest.mark.parametrize("at", ["a pipe", "a terminal"])
def test_a_signal_that_reaches_another_thread_ends_the_wait_for_a_line(at):
    """Its handler runs in the main thread, which waits for a line that does not come."""
    code = """
import os, signal, threading, time
from engine.cli.options import read_input
from engine.cli.terminal import Ended, ending_signals
def elsewhere():
    time.sleep(0.3)  # the main thread waits by now
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    time.sleep(600)
    os._exit(9)
threading.Thread(target=elsewhere, daemon=True).start()
with ending_signals():
    try:
        read_input(input)
    except Ended as ended:
        os._exit(ended.status)
"""
    ours, theirs = os.pipe()[::-1] if at == "a pipe" else pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, cwd=ROOT)
    try:
        assert process.wait(PATIENCE_S) == 143
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
