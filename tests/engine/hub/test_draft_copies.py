"""Copies that outlive their process: what was written comes back to the byte, and damage, other bytes and a full folder count as nothing there."""

from __future__ import annotations

import os

import numpy as np
import pytest

from engine.hub import draft_copies
from engine.hub.cache import CacheFolder
from engine.hub.draft_copies import CopiesFile

CONTENT = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path))
    return tmp_path / "copies"


def read(file, size=1000):
    """What it holds; None where that is nothing of so many bytes."""
    room = np.full(size, 7, np.uint8)
    return room if file.read_into(room.data) else None


def test_what_is_written_comes_back_under_its_facts_alone(folder):
    file = CopiesFile((1, "a"))
    assert not file.exists and read(file) is None
    file.write(CONTENT.data)
    assert CopiesFile((1, "a")).exists and np.array_equal(read(CopiesFile((1, "a"))), CONTENT)
    assert not CopiesFile((1, "b")).exists and read(CopiesFile((1, "b"))) is None
    [path] = folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["a byte", "a digest", "short", "long", "empty", "folder"])
def test_damage_counts_as_none_and_is_written_over(folder, damage):
    file = CopiesFile(("x",))
    file.write(CONTENT.data)
    path = folder / file.name
    content = bytearray(path.read_bytes())
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        content[500 if damage == "a byte" else 3] ^= damage in ("a byte", "a digest")
        path.write_bytes({"short": content[:-1], "long": content + b"x", "empty": b""}.get(damage, content))
    assert read(file) is None
    file.write(CONTENT.data)
    assert damage == "folder" or np.array_equal(read(file), CONTENT)


def test_copies_of_another_size_are_not_taken(folder):
    file = CopiesFile(("x",))
    file.write(CONTENT.data)
    assert read(file, 999) is None and read(file, 1001) is None


def test_a_file_that_cannot_be_touched_is_taken(folder, monkeypatch):
    def refused(path):
        raise PermissionError

    file = CopiesFile(("x",))
    file.write(CONTENT.data)
    monkeypatch.setattr(draft_copies.os, "utime", refused)
    assert np.array_equal(read(file), CONTENT)


def test_files_used_longest_ago_make_room(folder, monkeypatch):
    monkeypatch.setattr(draft_copies, "MOST_BYTES", 3 * 1032)
    files = [CopiesFile((number,)) for number in range(5)]
    for age, file in zip((30, 20, 10), files, strict=False):
        file.write(CONTENT.data)
        os.utime(folder / file.name, (1e9 - age, 1e9 - age))
    assert read(files[0]) is not None  # used now
    files[3].write(CONTENT.data)
    assert [file.exists for file in files] == [True, False, True, True, False]
    files[4].write(np.zeros(3 * 1032, np.uint8).data)
    assert [file.exists for file in files] == [True, False, True, True, False], "more than all files may have is not kept at all"


def test_without_a_folder_nothing_is_kept_and_nothing_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(CacheFolder, "_warned", False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "file"))
    file = CopiesFile(("x",))
    file.write(CONTENT.data)
    assert not file.exists and read(file) is None and "warning" in capsys.readouterr().err
