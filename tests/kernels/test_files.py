"""The atomic writer: modes, links, foreign temporaries, kills, and two writers at once."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kernels import files
from kernels.files import STALE_AFTER_S, atomic_file, write_atomically, write_bytes

ROOT = Path(__file__).resolve().parents[2]


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_modes_of_new_and_of_earlier_files(tmp_path, umask):
    file = tmp_path / "a"
    write_atomically(file, "früh")
    assert file.read_text(encoding="utf-8") == "früh" and mode(file) == 0o644
    file.chmod(0o640)
    write_bytes(file, b"2")
    assert file.read_bytes() == b"2" and mode(file) == 0o640
    write_bytes(file, b"3", private=True)
    assert mode(file) == 0o600
    write_bytes(tmp_path / "b", b"", private=True)
    assert mode(tmp_path / "b") == 0o600


def test_a_private_file_is_never_readable_by_others(tmp_path, umask):
    with atomic_file(tmp_path / "a", private=True) as file:
        file.write(b"secret")
        assert [mode(p) for p in tmp_path.iterdir()] == [0o600]


def test_links_are_followed_to_their_target(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/a")
    for content in (b"new", b"again"):  # the first finds a dangling link
        write_bytes(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_bytes() == content
    assert [p.name for p in (tmp_path / "real").iterdir()] == ["a"]


def test_a_link_laid_at_the_temporary_name_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0" * 16)
    (tmp_path / f".foretold-{'0' * 16}.part").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_bytes(tmp_path / "a", b"theirs")
    assert victim.read_bytes() == b"mine" and not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_no_regular_file_stays(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    before = path.stat().st_mode
    with pytest.raises(OSError, match=r"regular file|directory"):
        write_bytes(path, b"x")
    assert path.stat().st_mode == before and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_names_as_long_as_the_system_takes(tmp_path):
    write_bytes(tmp_path / ("n" * 255), b"x")
    assert [len(p.name) for p in tmp_path.iterdir()] == [255]


def test_temporaries_of_dead_writers_are_swept(tmp_path):
    dead, fresh, foreign = (tmp_path / name for name in (f".foretold-{'1' * 16}.part", f".foretold-{'2' * 16}.part", ".other.part"))
    old = time.time() - 2 * STALE_AFTER_S
    for file in (dead, fresh, foreign):
        file.write_bytes(b"x")
    os.utime(dead, (old, old))
    os.utime(foreign, (old, old))
    with atomic_file(tmp_path / "slow") as held:
        name = next(p for p in tmp_path.glob(".foretold-*.part") if p not in (dead, fresh))
        held.write(b"x")
        held.flush()
        os.utime(name, (old, old))
        write_bytes(tmp_path / "a", b"x")
        assert name.exists(), "its writer lives"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([fresh.name, foreign.name, "a", "slow"])


WRITER = """
import sys
from kernels.files import write_bytes
n = 0
while True:
    write_bytes(sys.argv[1], bytes([n % 256]) * 300_000, private=True)
    n += 1
    print(n, flush=True)
"""


def test_two_writers_and_kills_leave_a_whole_file(tmp_path):
    file = tmp_path / "a"
    for _ in range(4):
        both = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
            )
            for _ in range(2)
        ]
        for process in both:
            assert process.stdout is not None and process.stdout.readline()
        for process in both:
            process.kill()
            process.wait()
            process.stdout.close()
        content = file.read_bytes()
        assert len(content) == 300_000 and len(set(content)) == 1 and mode(file) == 0o600
    for left in tmp_path.glob(".foretold-*.part"):
        os.utime(left, (0, 0))
    write_bytes(file, b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
