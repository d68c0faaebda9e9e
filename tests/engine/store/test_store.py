"""Runs on disk: what is found again, what is evicted, and that no fault makes a wrong answer."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from codec.errors import CodecError
from engine.errors import BadStore, CacheNotWritable, DiskFull
from engine.store.index import RunIndex
from engine.store.runs import PAGE_TOKENS, RUN_PAGES, Run, id_bytes, page_keys, root_key, span_bounds
from engine.store.store import RunStore

IDENTITY = {"target": "t", "draft": "d", "tokenizer": "k", "pack": "p", "quality": "balanced", "namespace": "default"}
ROOT = root_key(IDENTITY)


def text(pages: int, seed: int = 0, before: list[int] | None = None) -> list[int]:
    """Token ids of so many pages, after those of `before`."""
    generator = random.Random(seed)
    return [*(before or []), *(generator.randrange(49_152) for _ in range(pages * PAGE_TOKENS))]


def spans_of(tokens: list[int], first: int = 0, size: int = 300) -> list[bytes]:
    """A span for every page, which says what text it stands for: its key."""
    return [key * (size // len(key)) for key in page_keys(ROOT, tokens)[first:]]


def keep(store: RunStore, tokens: list[int], first: int = 0, identity=IDENTITY, **options):
    return store.insert(identity, tokens, spans_of(tokens, first), first, **{"saved_token_s": 1e-3} | options)


def run_files(store: RunStore) -> list[Path]:
    return sorted((store.folder / "runs").rglob("*.run"))


@pytest.fixture
def store(tmp_path):
    opened = RunStore(tmp_path / "store")
    yield opened
    opened.close()


# --- what is stored comes back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [1, 3, 4, 5, 8, 11])
def test_the_longest_prefix_comes_back_to_the_page(store, pages) -> None:
    tokens = text(pages)
    report = keep(store, tokens)
    assert (report.runs, report.tokens, report.whole) == (-(-pages // RUN_PAGES), pages * PAGE_TOKENS, True)
    for extra in (0, 1, 63, 64, 300):
        found = store.lookup(ROOT, [*tokens, *([7] * extra)])
        assert (found.start_page, found.end_page) == (0, pages) and found.spans == spans_of(tokens)
    for cut in (PAGE_TOKENS - 1, PAGE_TOKENS, 3 * PAGE_TOKENS + 5):
        found = store.lookup(ROOT, tokens[:cut])
        assert found.end_page == min(cut, len(tokens)) // PAGE_TOKENS and found.spans == spans_of(tokens)[: found.end_page]


@pytest.mark.parametrize("parting", [0, 1, 63, 64, 65, 200, 256, 300, 700])
def test_a_text_that_parts_gets_what_it_shares(store, parting) -> None:
    tokens = text(11)
    keep(store, tokens)
    other = [*tokens[:parting], tokens[parting] ^ 1, *tokens[parting + 1 :]]
    found = store.lookup(ROOT, other)
    assert found.end_page == parting // PAGE_TOKENS and found.spans == spans_of(tokens)[: found.end_page]


@pytest.mark.parametrize("start", [0, 1, 4, 5, 7, 8])
def test_a_lookup_beyond_what_is_known_already(store, start) -> None:
    tokens = text(10)
    keep(store, tokens)
    found = store.lookup(ROOT, tokens, start)
    assert (found.start_page, found.end_page, found.spans) == (start, 10, spans_of(tokens)[start:])
    # of a text that parts before, nothing
    other = [*tokens[: start * PAGE_TOKENS], *text(4, 9)]
    assert store.lookup(ROOT, other, start).end_page == start and not store.lookup(ROOT, other, start).spans


def test_a_longer_run_takes_the_place_of_the_shorter(store) -> None:
    tokens = text(7)
    keep(store, tokens[: 6 * PAGE_TOKENS])
    assert len(run_files(store)) == 2
    report = keep(store, tokens, 4)
    assert report.runs == 1 and len(run_files(store)) == 2 and store.totals[0] == 2
    assert store.lookup(ROOT, tokens).end_page == 7 and store.lookup(ROOT, tokens[: 6 * PAGE_TOKENS]).end_page == 6
    # another branch at the same place keeps its own
    branch = text(2, 3, tokens[: 4 * PAGE_TOKENS])
    keep(store, branch, 4)
    assert store.lookup(ROOT, branch).spans == spans_of(branch) and store.lookup(ROOT, tokens).end_page == 7
    assert len(run_files(store)) == 3


def test_what_is_stored_is_not_written_again(store) -> None:
    tokens = text(9)
    keep(store, tokens)
    before = {path: path.stat().st_mtime_ns for path in run_files(store)}
    assert keep(store, tokens).runs == 0
    assert {path: path.stat().st_mtime_ns for path in run_files(store)} == before
    assert store.known_pages(ROOT, tokens) == 8 and store.known_pages(ROOT, text(9, 5)) == 0


def test_ids_alone_are_no_hit_until_they_are_coded(store) -> None:
    tokens = text(6)
    report = store.insert(IDENTITY, tokens, [None] * 6)
    assert report.runs == 2 and not run_files(store)
    assert store.lookup(ROOT, tokens).end_page == 0
    assert store.known_pages(ROOT, tokens, coded=False) == 4 and store.known_pages(ROOT, tokens) == 0
    assert store.insert(IDENTITY, tokens, [None] * 6).runs == 0
    assert keep(store, tokens).runs == 2 and store.lookup(ROOT, tokens).end_page == 6
    assert not list(store.folder.rglob("*.ids")) and store.totals[0] == 2
    assert store.insert(IDENTITY, tokens, [None] * 6).runs == 0  # what is coded stays so


@pytest.mark.parametrize("role", [role for role in IDENTITY])
def test_other_models_and_namespaces_see_nothing(store, role) -> None:
    tokens = text(5)
    keep(store, tokens)
    other = IDENTITY | {role: "another"}
    assert store.lookup(root_key(other), tokens).end_page == 0
    assert root_key(IDENTITY | {"label": "a name"}) == ROOT


def test_keys_are_hashes_of_everything_before(store) -> None:
    tokens = text(9)
    keys = page_keys(ROOT, tokens)
    assert len(keys) == 9 and len(set(keys)) == 9 and page_keys(keys[3], tokens[4 * PAGE_TOKENS :]) == keys[4:]
    for at in (0, 200, 500):
        other = list(tokens)
        other[at] ^= 1
        changed = [a != b for a, b in zip(keys, page_keys(ROOT, other), strict=True)]
        assert changed == [page >= at // PAGE_TOKENS for page in range(9)]
    assert span_bounds(0) == (4, 64) and span_bounds(2) == (128, 192)


def test_equal_hashes_are_told_apart_by_tokens(store, monkeypatch) -> None:
    class Constant:
        def __init__(self, data: bytes = b"") -> None: ...
        def update(self, data: bytes) -> None: ...
        def digest(self) -> bytes:
            return b"x" * 32

    monkeypatch.setattr("engine.store.runs.sha256", Constant)
    tokens, other = text(4), text(4, 1)
    assert store.insert(IDENTITY, tokens, [b"span"] * 4).runs == 1
    assert store.lookup(b"x" * 20, other).end_page == 0 and store.lookup(b"x" * 20, tokens).end_page == 4


# --- files and folders --------------------------------------------------------------------------------------------------


def test_files_are_private(store) -> None:
    keep(store, text(5))
    assert json.loads((store.folder / "store.json").read_text()) == {"format": 1}
    paths = [store.folder, *store.folder.rglob("*")]
    assert len(paths) > 8
    assert not [path for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077]


def test_another_process_finds_it(store) -> None:
    tokens = text(6)
    keep(store, tokens)
    other = RunStore(store.folder, create=False)
    assert other.lookup(ROOT, tokens).spans == spans_of(tokens)
    assert other.roots() == {ROOT: IDENTITY} and other.describe()["roots"][0]["tokens"] == 6 * PAGE_TOKENS
    other.close()


@pytest.mark.parametrize("what", ["file", "strangers", "newer", "malformed", "not an object", "index of another", "no folder"])
def test_what_is_no_store_is_refused(tmp_path, what) -> None:
    folder = tmp_path / "store"
    if what == "file":
        folder.write_text("x")
    elif what == "strangers":
        folder.mkdir()
        (folder / "letter.txt").write_text("dear")
    elif what == "no folder":
        folder = Path("a\0b")
    else:
        RunStore(folder).close()
        marker = {"newer": '{"format": 99}', "malformed": "{", "not an object": "[]"}.get(what, '{"format": "1"}')
        (folder / "store.json").write_text(marker)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadStore):
        RunStore(folder)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(BadStore):
        RunStore(tmp_path / "not there", create=False)


def test_a_folder_that_cannot_be_written_is_refused(store, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests' user may be allowed everything
    with pytest.raises(CacheNotWritable):
        RunStore(store.folder)
    with pytest.raises(CacheNotWritable):
        RunStore("/proc/nowhere/store")


# --- room ---------------------------------------------------------------------------------------------------------------


def test_the_limit_is_kept_and_the_tail_of_the_least_used_goes_first(tmp_path) -> None:
    store = RunStore(tmp_path / "store", limit_bytes=10 * 4096)
    first, second = text(16), text(16, 1)
    keep(store, first)
    store.touch(store.lookup(ROOT, first).keys)
    keep(store, second)
    assert store.totals == (8, 8 * 4096)
    third = text(16, 2)
    report = keep(store, third)
    assert report.evicted == 2 and report.runs == 4 and store.totals == (10, 10 * 4096)
    assert (
        store.lookup(ROOT, first).end_page == 16 and store.lookup(ROOT, second).end_page == 8 and store.lookup(ROOT, third).end_page == 16
    )
    on_disk = sum(-(-path.stat().st_size // 4096) * 4096 for path in run_files(store))
    assert on_disk == store.totals[1]


def test_more_value_a_byte_stays_longer(tmp_path) -> None:
    store = RunStore(tmp_path / "store", limit_bytes=4 * 4096)
    slow, quick = text(4), text(4, 1)
    keep(store, slow, saved_token_s=1.0)
    keep(store, quick, saved_token_s=1e-4)
    keep(store, text(12, 2))
    assert store.lookup(ROOT, slow).end_page == 4 and store.lookup(ROOT, quick).end_page == 0


@pytest.mark.parametrize("days", [1, 20_000])
def test_runs_of_a_clock_that_was_wrong_leave_as_others_do(tmp_path, monkeypatch, days) -> None:
    """By their uses of a day to come they would have stayed, and whatever is new would have gone first, until then."""
    store = RunStore(tmp_path / "store", limit_bytes=8 * 4096)
    wrong = [text(4, seed) for seed in range(6)]
    with monkeypatch.context() as patch:
        patch.setattr("engine.store.store.time", SimpleNamespace(**vars(time) | {"time": lambda now=time.time: now() + 86_400 * days}))
        for tokens in wrong:
            keep(store, tokens)
    right = [text(4, seed) for seed in range(10, 26)]
    for tokens in right:
        keep(store, tokens)
    assert not any(store.lookup(ROOT, tokens).end_page for tokens in wrong)
    assert all(store.lookup(ROOT, tokens).end_page == 4 for tokens in right[-8:])
    assert store.totals == (8, 8 * 4096)
    store.close()


def test_a_text_larger_than_the_store_keeps_its_beginning(tmp_path) -> None:
    store = RunStore(tmp_path / "store", limit_bytes=3 * 4096)
    tokens = text(30)
    report = keep(store, tokens)
    assert not report.whole and report.runs == 3 and store.lookup(ROOT, tokens).end_page == 12 and store.totals[1] == 3 * 4096
    assert keep(store, text(4, 1)).evicted == 1 and store.totals[1] == 3 * 4096
    tiny = RunStore(tmp_path / "tiny", limit_bytes=100)
    assert keep(tiny, tokens).runs == 0 and not run_files(tiny)


def test_what_was_looked_up_survives_its_eviction(store) -> None:
    tokens = text(8)
    keep(store, tokens)
    found = store.lookup(ROOT, tokens)
    other = RunStore(store.folder)
    assert other.shrink(0) == 2 and not run_files(store)
    assert found.spans == spans_of(tokens) and store.lookup(ROOT, tokens).end_page == 0
    # its parent is gone: what follows it is not stored without it
    report = keep(store, text(12, 0), 8)
    assert report.runs == 0 and not report.whole and store.totals == (0, 0)
    other.close()


def test_an_open_file_survives_its_eviction(store) -> None:
    tokens = text(4)
    keep(store, tokens)
    with run_files(store)[0].open("rb") as file:
        RunStore(store.folder).shrink(0)
        assert Run.from_bytes(file.read()).token_ids == tokens


def test_a_namespace_is_deleted_alone(store) -> None:
    tokens, other = text(5), IDENTITY | {"namespace": "other"}
    keep(store, tokens)
    store.insert(other, tokens, [b"span"] * 5)
    assert store.delete("other") == 2 and store.delete("nobody") == 0
    assert store.lookup(ROOT, tokens).end_page == 5 and store.lookup(root_key(other), tokens).end_page == 0
    assert len(list((store.folder / "runs").iterdir())) == 1 and store.totals[0] == 2


# --- faults -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digest", [True, False])
def test_every_flipped_bit_is_noticed(digest) -> None:
    tokens = text(2)
    data = bytearray(Run(ROOT, ROOT, 0, id_bytes(tokens), (b"one", b"two")).to_bytes())
    assert Run.from_bytes(bytes(data), digest=digest).spans == (b"one", b"two")
    for at in range(len(data)):
        for bit in (1 << at % 8, 255):
            data[at] ^= bit
            with pytest.raises(CodecError):
                Run.from_bytes(bytes(data), digest=digest)
            data[at] ^= bit
    for end in range(len(data)):
        with pytest.raises(CodecError):
            Run.from_bytes(bytes(data[:end]), digest=digest)
    with pytest.raises(CodecError):
        Run.from_bytes(bytes(data) + b"x")


@pytest.mark.parametrize("fault", ["flip", "truncate", "empty", "foreign", "swap", "link", "folder"])
def test_a_damaged_run_is_a_miss_and_is_mended(store, fault) -> None:
    tokens = text(12)
    keep(store, tokens)
    keys = page_keys(ROOT, tokens)
    victim, other = (store.folder / "runs" / ROOT.hex() / f"{keys[page].hex()}.run" for page in (7, 3))
    content = victim.read_bytes()
    if fault == "flip":
        victim.write_bytes(content[:500] + bytes([content[500] ^ 4]) + content[501:])
    elif fault == "swap":
        victim.write_bytes(other.read_bytes())
    elif fault == "link":
        victim.unlink()
        victim.symlink_to(other)
    elif fault == "folder":
        victim.unlink()
        victim.mkdir()
    else:
        victim.write_bytes({"truncate": content[:-7], "empty": b"", "foreign": b"hello" * 300}[fault])
    found = store.lookup(ROOT, tokens)
    assert found.end_page == 4 and found.spans == spans_of(tokens)[:4]
    if fault == "folder":
        victim.rmdir()
    assert keep(store, tokens).runs == 1
    assert store.lookup(ROOT, tokens).spans == spans_of(tokens)


def test_a_newer_run_is_left_alone(store) -> None:
    tokens = text(4)
    keep(store, tokens)
    path = run_files(store)[0]
    content = bytearray(path.read_bytes())
    content[8] = 9  # the version, with the checksum of the table that goes with it
    import zlib

    count = int.from_bytes(content[10:12], "little")
    table = bytes(content[16 : 16 + 16 * count])
    content[12:16] = zlib.crc32(table, zlib.crc32(bytes(content[:8]) + bytes([9, 0]))).to_bytes(4, "little")
    path.write_bytes(bytes(content))
    assert store.lookup(ROOT, tokens).end_page == 0 and path.read_bytes() == bytes(content)


@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
def test_a_full_disk_leaves_whole_runs_only(store, monkeypatch, call) -> None:
    tokens = text(12)
    keep(store, tokens[: 4 * PAGE_TOKENS])
    calls = 0

    def full(*args):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    if call == "write":
        real = RunStore.insert.__globals__["stage_bytes"]
        monkeypatch.setattr("engine.store.store.stage_bytes", full)
    else:
        real = getattr(os, call)
        monkeypatch.setattr(os, call, full)
    with pytest.raises(DiskFull):
        keep(store, tokens, 4)
    monkeypatch.undo()
    assert not list((store.folder / "tmp").iterdir())
    end = store.lookup(ROOT, tokens).end_page
    assert end == (8 if call == "replace" else 4)
    keep(store, tokens)
    assert store.lookup(ROOT, tokens).spans == spans_of(tokens) and store.verify().sound


@pytest.mark.parametrize("fault", ["gone", "garbage", "foreign database", "foreign tables", "newer", "damaged pages"])
def test_the_index_is_made_anew_from_the_files(store, fault) -> None:
    first, second = text(6), text(9, 1)
    keep(store, first)
    keep(store, second)
    totals = store.totals
    store.close()
    index = store.folder / "index.sqlite"
    if fault == "gone":
        index.unlink()
    elif fault == "garbage":
        index.write_bytes(b"garbage" * 1000)
    elif fault == "damaged pages":
        content = bytearray(index.read_bytes())
        content[4096:] = b"\xaa" * (len(content) - 4096)
        index.write_bytes(bytes(content))
    else:
        index.unlink()
        with sqlite3.connect(index) as other:
            other.execute(f"PRAGMA user_version={ {'newer': 7, 'foreign tables': 0}.get(fault, 1) }")
            other.execute(f"CREATE TABLE {'runs' if fault == 'foreign tables' else 'letters'}(a)")
        other.close()
    again = RunStore(store.folder)
    assert again.lookup(ROOT, first).end_page >= 4  # whole runs need no index
    third = text(5, 2)
    keep(again, third)
    assert again.totals[0] == totals[0] + 2 and again.verify().sound
    assert [again.lookup(ROOT, tokens).end_page for tokens in (first, second, third)] == [6, 9, 5]
    again.close()


def test_verify_names_what_is_wrong_and_repair_removes_it(store) -> None:
    tokens = text(12)
    keep(store, tokens)
    keep(store, text(4, 1))
    assert store.verify().sound
    files = {page: store.folder / "runs" / ROOT.hex() / f"{page_keys(ROOT, tokens)[page].hex()}.run" for page in (3, 7, 11)}
    files[7].write_bytes(files[7].read_bytes()[:-1])
    report = store.verify()
    assert [files[7].name in report.damaged[0], files[11].name in report.unreachable[0]] == [True, True]
    assert (report.runs, report.missing, report.unindexed, report.repaired) == (2, 2, 0, False) and files[7].exists()
    assert store.verify(repair=True).repaired and not files[7].exists() and not files[11].exists()
    assert store.verify().sound and store.totals[0] == 2
    files[3].unlink()
    files[3].mkdir()
    (files[3] / "inside").write_bytes(b"x")
    assert files[3].name in store.verify(repair=True).damaged[0] and not files[3].exists()
    assert store.verify().sound and store.totals[0] == 1
    keep(store, tokens)
    assert store.lookup(ROOT, tokens).spans == spans_of(tokens)


def test_files_of_others_between_the_runs_do_not_matter(store) -> None:
    """What file managers and file systems leave, in a new store and in one whose index is gone."""
    (store.folder / "runs" / ".DS_Store").write_bytes(b"x")
    (store.folder / "runs" / "lost+found").mkdir()
    (store.folder / "runs" / "link").symlink_to(store.folder)
    tokens = text(6)
    assert keep(store, tokens).runs == 2 and store.verify(repair=True).sound
    store.close()
    (store.folder / "index.sqlite").unlink()
    again = RunStore(store.folder)
    keep(again, text(5, 1))
    assert again.totals[0] == 4 and again.verify().sound and again.lookup(ROOT, tokens).end_page == 6
    assert (store.folder / "runs" / ".DS_Store").read_bytes() == b"x"
    again.close()


def test_uses_survive_a_repair(tmp_path) -> None:
    store = RunStore(tmp_path / "store", limit_bytes=3 * 4096)
    used, idle = text(4), text(4, 1)
    keep(store, used)
    for _ in range(5):
        store.touch(store.lookup(ROOT, used).keys)
    keep(store, idle)
    damaged = text(4, 2)
    keep(store, damaged)
    path = store.folder / "runs" / ROOT.hex() / f"{page_keys(ROOT, damaged)[-1].hex()}.run"
    path.write_bytes(b"")
    store.verify(repair=True)
    keep(store, text(8, 3))
    assert store.lookup(ROOT, used).end_page == 4 and store.lookup(ROOT, idle).end_page == 0


# --- several at once ----------------------------------------------------------------------------------------------------


def test_threads_and_stores_at_once_agree(tmp_path) -> None:
    """Four writers with two handles and a limit that makes them evict each other's: what is found is right, and the books agree with the disk."""
    stores = [RunStore(tmp_path / "store", limit_bytes=14 * 4096) for _ in range(2)]
    shared = text(4)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            store, generator = stores[number % 2], random.Random(number)
            for _ in range(12):
                tokens = text(generator.randrange(1, 9), generator.randrange(6), shared)
                found = store.lookup(ROOT, tokens)
                assert found.spans == spans_of(tokens)[: found.end_page]
                keep(store, tokens)
                store.touch(found.keys)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    report = stores[0].verify()
    assert report.sound and report.bytes == stores[1].totals[1] <= 14 * 4096


def _race(folder: Path, number: int) -> None:
    """A process that stores texts which others store too, under a limit that makes them evict each other's."""
    store, generator, shared = RunStore(folder, limit_bytes=10 * 4096), random.Random(number), text(4)
    for _ in range(12):
        tokens = text(generator.randrange(1, 9), generator.randrange(5), shared)
        found = store.lookup(ROOT, tokens)
        assert found.spans == spans_of(tokens)[: found.end_page]
        keep(store, tokens)
    store.close()


def test_processes_race_for_one_store(tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_race, args=(tmp_path / "store", number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    store = RunStore(tmp_path / "store")
    report = store.verify()
    assert report.sound and report.runs > 3 and report.bytes == store.totals[1] <= 10 * 4096
    assert not list((store.folder / "tmp").iterdir())
    store.close()


def test_a_process_that_leaves_takes_no_log_from_others(store) -> None:
    """The second connection's opening must not drop the first one's lock: else whoever closes elsewhere deletes the log that is being written to."""
    path = store.folder / "index.sqlite"
    first, second = RunIndex(path), RunIndex(path)
    with second.writing():
        second.add_root(b"root", {"namespace": "kept"})
    other = multiprocessing.get_context("spawn").Process(target=_open_and_close, args=(path,))
    other.start()
    other.join(timeout=300)
    assert other.exitcode == 0 and path.with_name("index.sqlite-wal").exists()
    with first.writing():
        first.add_root(b"another", {"namespace": "kept too"})
    first.close()
    second.close()
    third = RunIndex(path)
    assert set(third.roots()) >= {b"root", b"another"}
    third.close()


def _open_and_close(path: Path) -> None:
    RunIndex(path).close()


def test_a_held_lock_ends_in_an_error_in_bounded_time(store, monkeypatch) -> None:
    import fcntl

    monkeypatch.setattr("engine.store.store._LOCK_WAIT_S", 0.05)
    with (store.folder / "writer.lock").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CacheNotWritable, match="another process"):
            keep(store, text(4))
    assert not list((store.folder / "tmp").iterdir()) and keep(store, text(4)).runs == 1


def test_a_machine_that_stood_still_has_not_waited_for_a_lock(store, monkeypatch) -> None:
    """The clock goes on meanwhile: who holds the lock has had no time either."""
    import fcntl

    module, slept = sys.modules["engine.store.store"], []
    with (store.folder / "writer.lock").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def sleep(seconds):
            slept.append(seconds)
            if len(slept) == 2:
                fcntl.flock(held, fcntl.LOCK_UN)

        monkeypatch.setattr(module, "time", SimpleNamespace(**vars(time) | {"monotonic": lambda: 3600.0 * len(slept), "sleep": sleep}))
        assert keep(store, text(4)).runs == 1 and len(slept) == 2


def test_random_operations_against_a_plain_model(tmp_path) -> None:
    """Lookups after any insertions, evictions, deletions and damage give a prefix of what was inserted, and without evictions the longest."""
    generator = random.Random(5)
    store = RunStore(tmp_path / "store")
    inserted: list[list[int]] = []
    for step in range(60):
        base = generator.choice(inserted) if inserted and generator.random() < 0.7 else []
        cut = generator.randrange(len(base) + 1)
        tokens = text(generator.randrange(1, 7), step, base[:cut])[: generator.randrange(64, 900)]
        whole = len(tokens) - len(tokens) % PAGE_TOKENS
        best = max((_common(tokens[:whole], other) for other in inserted), default=0)
        found = store.lookup(ROOT, tokens)
        assert found.spans == spans_of(tokens)[: found.end_page] and found.end_page == best // PAGE_TOKENS
        first = store.known_pages(ROOT, tokens)
        store.insert(IDENTITY, tokens, spans_of(tokens, first), first)
        inserted.append(tokens[:whole])
    assert store.verify().sound
    store.shrink(store.totals[1] // 2)
    hits = [store.lookup(ROOT, tokens) for tokens in inserted]
    assert all(found.spans == spans_of(tokens)[: found.end_page] for found, tokens in zip(hits, inserted, strict=True))
    assert 0 < sum(found.end_page for found in hits) < sum(len(tokens) // PAGE_TOKENS for tokens in inserted) and store.verify().sound


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_killed_writers_leave_whole_runs_or_none() -> None:
    """A few of the thousand that `scripts/kill_store.py` kills by default."""
    script = Path(__file__).parents[3] / "scripts" / "kill_store.py"
    memory = Path("/dev/shm")
    command = [sys.executable, str(script), "--kills", "24", "--seed", "3"]
    if os.access(memory, os.W_OK):  # a kill is a matter of order, not of the disk; syncs of a busy one take seconds
        shutil.rmtree(memory / f"foretold-killed-{os.getpid()}", ignore_errors=True)  # of another process that had this number
        command += ["--folder", str(memory / f"foretold-killed-{os.getpid()}")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    finally:
        shutil.rmtree(memory / f"foretold-killed-{os.getpid()}", ignore_errors=True)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["kills"] == 24 and not found["wrong"] and found["pages_found"] > 300


def test_what_followed_a_text_is_found_to_the_token(store) -> None:
    first, other = text(10), [*text(10)[:300], *text(4, 5)]
    for tokens in (first, other[: 8 * PAGE_TOKENS]):
        keep(store, tokens)
    store.insert(IDENTITY, text(3, 9), [None] * 3)  # ids alone are as good
    found = {known.key: known for known in store.continuations(ROOT, first[:300])}
    assert len(found) == 2
    assert sorted(known.token_ids for known in found.values()) == sorted([first[300:], other[300 : 8 * PAGE_TOKENS]])
    [known] = store.continuations(ROOT, first[:301])
    assert known.token_ids == first[301:] and known.uses >= 1
    [known] = store.continuations(ROOT, text(3, 9)[:5])
    assert known.token_ids == text(3, 9)[5:]
    assert store.continuations(ROOT, first) == [] and store.continuations(ROOT, [*first[:299], 1]) == []
    assert store.continuations(root_key(IDENTITY | {"namespace": "other"}), first[:300]) == []
    store.close()
    assert store.continuations(ROOT, first[:300]) == []  # without its index nothing is known, and nothing fails
