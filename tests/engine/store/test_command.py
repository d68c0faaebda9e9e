"""`python -m engine.store`: list, verify, shrink, delete."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from engine.store.__main__ import main
from engine.store.runs import PAGE_TOKENS, root_key
from engine.store.store import RunStore, byte_count

IDENTITY = {"target": "t", "quality": "balanced", "namespace": "home", "label": "tiny"}


@pytest.fixture
def folder(tmp_path):
    store = RunStore(tmp_path / "store")
    for number in range(3):
        namespace = {"namespace": "work"} if number == 2 else {}
        store.insert(IDENTITY | namespace, [number] * (5 * PAGE_TOKENS), [b"span" * 50] * 5, saved_token_s=1e-3)
    store.close()
    return tmp_path / "store"


def run(capsys, *options: str):
    """(exit status, the printed object or text, what went to standard error)."""
    status = main(list(options))
    out, err = capsys.readouterr()
    return status, json.loads(out) if "--json" in options and out else out, err


def test_list(folder, capsys) -> None:
    status, found, _ = run(capsys, str(folder), "--json")
    assert status == 0 and (found["runs"], found["bytes"]) == (6, 6 * 4096) and found["index_bytes"] > 0
    rows = {row["namespace"]: row for row in found["roots"]}
    assert rows["home"] | {"root": "", "used_at": 0} == {
        **{"namespace": "home", "label": "tiny", "quality": "balanced", "root": "", "used_at": 0},
        **{"runs": 4, "coded_runs": 4, "tokens": 640, "bytes": 4 * 4096},
    }
    status, text, _ = run(capsys, str(folder), "list")
    assert status == 0 and "namespace 'work', tiny, balanced: 2 runs (2 coded), 320 tokens, 8,192 bytes" in text


def test_verify_and_repair(folder, capsys) -> None:
    assert run(capsys, str(folder), "verify", "--json")[:2] == (
        0,
        {
            "runs": 6,
            "tokens": 960,
            "bytes": 24576,
            "referring": 0,
            "damaged": [],
            "unreachable": [],
            "unindexed": 0,
            "missing": 0,
            "repaired": False,
            "sound": True,
        },
    )
    victim = next(path for path in (folder / "runs" / root_key(IDENTITY).hex()).glob("*.run"))
    victim.write_bytes(victim.read_bytes()[:-1])
    status, found, _ = run(capsys, str(folder), "verify", "--json")
    assert status == 1 and len(found["damaged"]) == 1 and victim.exists()
    status, text, _ = run(capsys, str(folder), "verify", "--repair")
    assert status == 0 and "damaged: " in text and text.endswith("repaired\n") and not victim.exists()
    assert run(capsys, str(folder), "verify", "--json")[1]["sound"]


NOBODY = 65534
UNABLE = 98  # exit status


@pytest.fixture
def looked_at(folder):
    """`looked_at(*options)` -> what the command gives of a copy of the store: as another user where the tests run as root, who may open every folder.
    `looked_at.folder`: the copy; `looked_at.lock()` leaves the right to read it alone."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    copy, closed = place / "store", place / "closed"
    closed.touch(0)

    def look(*options: str):
        files = place / "out", place / "err"
        said = [file.open("w") for file in files]
        child = os.fork()  # another user may not read Python's own files: what is needed is imported
        if child == 0:
            status = 99
            try:
                if os.geteuid() == 0:
                    with suppress(OSError):  # this root may not
                        os.setgroups([])
                        os.setgid(NOBODY)
                        os.setuid(NOBODY)
                if os.access(closed, os.R_OK) or not os.access(place, os.X_OK):
                    os._exit(UNABLE)
                sys.stdout, sys.stderr = said
                status = main([str(copy), *options])
                for file in said:
                    file.flush()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in said:
            file.close()
        if status == UNABLE:
            pytest.skip("there is no user here who reaches the temporary folder, and may not do everything")
        return status, *(file.read_text() for file in files)

    def lock(mode_of_folders: int = 0o555, mode_of_files: int = 0o444) -> None:
        copy.chmod(mode_of_folders)  # first: nothing is found in a folder that may not be read
        for path in copy.rglob("*"):
            path.chmod(mode_of_folders if path.is_dir() else mode_of_files)

    shutil.copytree(folder, copy)
    look.folder, look.lock = copy, lock
    yield look
    lock(0o755, 0o644)
    shutil.rmtree(place)


def files_of(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_looking_needs_no_right_to_write(looked_at) -> None:
    looked_at.lock()
    before = files_of(looked_at.folder)
    status, out, err = looked_at("list", "--json")
    assert (status, err) == (0, "") and json.loads(out)["runs"] == 6 and len(json.loads(out)["roots"]) == 2
    status, out, err = looked_at("verify", "--json")
    assert (status, err) == (0, "") and json.loads(out)["sound"] and json.loads(out)["runs"] == 6
    for options in (["verify", "--repair"], ["shrink", "--bytes", "0"], ["delete", "--namespace", "home"]):
        status, out, err = looked_at(*options)
        assert (status, out) == (2, "") and "cannot be written to" in err and err.count("\n") == 1
    assert files_of(looked_at.folder) == before


def test_looking_while_another_user_writes(looked_at) -> None:
    """What the writer has not yet brought into the index's file is seen."""
    store = RunStore(looked_at.folder)
    store.insert(IDENTITY, [7] * (4 * PAGE_TOKENS), [b"span" * 50] * 4)
    try:
        looked_at.lock()
        assert json.loads(looked_at("list", "--json")[1])["runs"] == 7
        assert json.loads(looked_at("verify", "--json")[1])["sound"]
    finally:
        looked_at.lock(0o755, 0o644)
        store.close()


def test_what_may_not_be_read_is_not_called_damaged(looked_at) -> None:
    run = next(looked_at.folder.glob("runs/*/*.run"))
    looked_at.lock()
    run.chmod(0)
    status, out, err = looked_at("verify")
    assert (status, out) == (2, "") and f"{run.name} may not be read" in err
    looked_at.lock(0o755, 0o644)
    run.write_bytes(b"nothing")
    looked_at.lock()
    status, out, _ = looked_at("verify", "--json")
    assert status == 1 and json.loads(out)["damaged"] == [f"{run.parent.name}/{run.name}"] and run.exists()
    looked_at.folder.chmod(0)
    for action in ("list", "verify"):
        status, out, err = looked_at(action)
        assert (status, out) == (2, "") and err.startswith("error: ") and "Permission denied" in err


def test_an_index_that_is_gone_or_damaged_is_only_looked_for(looked_at) -> None:
    (looked_at.folder / "index.sqlite").write_bytes(b"no index at all" * 300)
    for _ in range(2):
        looked_at.lock()
        status, out, err = looked_at("verify", "--json")
        assert (status, err) == (1, "") and json.loads(out) | {"tokens": 0, "bytes": 0} == {
            **{"runs": 6, "tokens": 0, "bytes": 0, "referring": 0, "damaged": [], "unreachable": []},
            **{"unindexed": 6, "missing": 0, "repaired": False, "sound": False},
        }
        looked_at.lock(0o755, 0o644)
        (looked_at.folder / "index.sqlite").unlink(missing_ok=True)


def test_shrink_and_delete(folder, capsys) -> None:
    assert run(capsys, str(folder), "shrink", "--bytes", "12K", "--json")[1] == {"removed": 3, "runs": 3, "bytes": 12288}
    status, text, _ = run(capsys, str(folder), "delete", "--namespace", "work")
    assert status == 0 and "runs removed" in text
    assert [row["namespace"] for row in run(capsys, str(folder), "--json")[1]["roots"]] == ["home"]
    assert run(capsys, str(folder), "delete", "--namespace", "nobody", "--json")[1]["removed"] == 0


@pytest.mark.parametrize(
    "options",
    [
        ["shrink"],
        ["delete"],
        ["list", "--bytes", "3"],
        ["--repair"],
        ["burn"],
        ["shrink", "--bytes", "-1"],
        ["shrink", "--bytes", "1.5G"],
        ["--x"],
    ],
)
def test_mistakes_end_in_one_line(folder, capsys, options) -> None:
    status, text, err = run(capsys, str(folder), *options)
    assert status == 2 and not text and err.startswith("error: ") and err.count("\n") == 1


def test_what_is_no_store_is_not_made_one(tmp_path, capsys) -> None:
    status, _, err = run(capsys, str(tmp_path / "none"))
    assert status == 2 and "is no store" in err and not (tmp_path / "none").exists()
    assert run(capsys)[0] == 2


def test_numbers_of_bytes() -> None:
    assert [byte_count(text) for text in ("0", "12", "3k", "2M", "8G", "1T")] == [0, 12, 3072, 2 << 20, 8 << 30, 1 << 40]


def test_standard_output_that_is_full_or_closed(folder, monkeypatch, capsys) -> None:
    class Full(io.StringIO):
        def write(self, _text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for stream, why in ((Full(), "No space left on device"), (None, "it is closed")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert main([str(folder)]) == 2
        assert f"error: standard output cannot be written: {why} (" in capsys.readouterr().err


def test_the_module_runs(folder) -> None:
    done = subprocess.run([sys.executable, "-m", "engine.store", str(folder), "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and json.loads(done.stdout)["runs"] == 6
