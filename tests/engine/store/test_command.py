"""`python -m engine.store`: list, verify, shrink, delete."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys

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
    done = subprocess.run([sys.executable, "-m", "engine.store", str(folder), "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and json.loads(done.stdout)["runs"] == 6
