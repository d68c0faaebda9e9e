"""The session lock: two processes at once, dead holders, places without one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import CacheNotWritable, SessionInUse
from engine.files import session_lock

ROOT = Path(__file__).resolve().parents[2]

HOLDER = """
import sys, time
from engine.files import session_lock
with session_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_the_session(tmp_path):
    file = tmp_path / "a.kv"
    (tmp_path / "link.kv").symlink_to("a.kv")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(file)], stdout=subprocess.PIPE, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        for name in ("a.kv", "link.kv"):
            told = rf"in use by process {holder.pid} on .+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
            with pytest.raises(SessionInUse, match=told), session_lock(tmp_path / name):
                pass
        with session_lock(tmp_path / "b.kv"):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert list(tmp_path.glob("*.lock")) or list(tmp_path.glob(".*.lock")), "the dead process left its file"
    with session_lock(file):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.kv"]


def test_a_lock_beside_a_name_as_long_as_the_system_takes(tmp_path):
    with session_lock(tmp_path / ("n" * 255)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_in_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CacheNotWritable, match="choose another path"), session_lock(tmp_path / "none" / "a.kv"):
        pass
