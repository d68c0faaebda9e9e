"""Runs that refer to others: kept together, found together, and missing together."""

from __future__ import annotations

import shutil
import sqlite3

import pytest

from codec.errors import CorruptedCode
from engine.store.runs import KEY_BYTES, PAGE_TOKENS, RUN_PAGES, RUN_TOKENS, Donor, Run, anchor_numbers, anchors_of, page_keys
from engine.store.store import RunStore
from tests.engine.store.test_store import IDENTITY, ROOT, keep, run_files, spans_of, text

SHARED = text(4, seed=9)
FIRST = [*text(4, seed=1), *SHARED]  # the donor is its second run
SECOND = [*text(4, seed=2), *SHARED]


def donor_of(store: RunStore) -> Donor:
    """The second run of FIRST."""
    run = store._read(ROOT, page_keys(ROOT, FIRST)[-1])
    return Donor(run.keys[-1], run.digest)


def refer(store: RunStore, needs=(0, 1, 1, 0)):
    """Keep SECOND, whose second run refers to FIRST's."""
    return store.insert(IDENTITY, SECOND, spans_of(SECOND), 0, 1e-3, {RUN_PAGES: ((donor_of(store),), needs)})


@pytest.fixture
def store(tmp_path):
    opened = RunStore(tmp_path / "store")
    keep(opened, FIRST)
    yield opened
    opened.close()


def test_what_refers_comes_with_what_it_refers_to(store) -> None:
    report = refer(store)
    assert (report.runs, report.referring, report.whole) == (2, 1, True)
    found = store.lookup(ROOT, SECOND, referring=True)
    assert found.end_page == 8 and found.spans == spans_of(SECOND)
    borrowed = found.borrowed[RUN_PAGES]
    assert borrowed.needs == (0, 1, 1, 0) and list(borrowed.runs[0].spans) == spans_of(FIRST)[4:]
    assert [found.borrows(page) for page in range(8)] == [False] * 5 + [True, True, False]
    assert donor_of(store).key in found.keys, "a use of the one is a use of the other"
    # who cannot follow references gets what stands before them
    assert store.lookup(ROOT, SECOND).end_page == 5 and not store.lookup(ROOT, SECOND).borrowed
    # pages that need nothing are had without the donor
    assert store.lookup(ROOT, SECOND[: 5 * PAGE_TOKENS], referring=True).end_page == 5
    assert store.verify().sound and store.verify().referring == 1


def test_a_lender_is_found_wherever_the_stretch_begins(store) -> None:
    keys = page_keys(ROOT, FIRST)
    for before in (1, 30, 63, 100):
        ids = (text(4, seed=3)[:before] + SHARED)[:RUN_TOKENS]
        assert keys[-1] in [run.keys[-1] for run in store.lenders(ROOT, ids)]
    # the runs beside it come along, and a stranger finds nothing
    assert {run.keys[-1] for run in store.lenders(ROOT, SHARED)} == {keys[3], keys[7]}
    assert store.lenders(ROOT, text(4, seed=4)) == [] and store.lenders(b"\1" * KEY_BYTES, SHARED) == []
    assert store.lenders(ROOT, SHARED[:10]) == []


def test_spans_that_refer_are_not_lent(store) -> None:
    refer(store, (1, 1, 1, 1))
    run = store._read(ROOT, page_keys(ROOT, SECOND)[-1])
    assert anchors_of(run) == [] and anchors_of(store._read(ROOT, donor_of(store).key))
    assert run.keys[-1] not in [own.keys[-1] for own in store.lenders(ROOT, SHARED)[:1]]
    assert set(anchor_numbers(ROOT, SHARED)) <= set(anchor_numbers(ROOT, SHARED, every=True))


@pytest.mark.parametrize("gone", ["missing", "other bytes", "damaged"])
def test_without_what_it_refers_to_a_run_is_missing(store, gone) -> None:
    refer(store)
    path = store._path(ROOT, donor_of(store).key, ".run")
    if gone == "missing":
        path.unlink()
    elif gone == "damaged":
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(bytes(data))
    else:  # coded again, from other keys and values
        path.unlink()
        store.insert(IDENTITY, FIRST, [*spans_of(FIRST)[4:7], b"other"], 4)
        assert store.lookup(ROOT, FIRST).end_page == 8
    found = store.lookup(ROOT, SECOND, referring=True)
    assert found.end_page == 5 and found.spans == spans_of(SECOND)[:5] and not found.borrowed, "the first page needs nothing"
    assert store.lookup(ROOT, SECOND, referring=True).end_page == 4, "the rest is of no use, and gone"
    # computed and kept again
    report = keep(store, SECOND)
    assert report.whole and store.lookup(ROOT, SECOND).end_page == 8


def test_verify_names_what_lost_its_donor(store) -> None:
    refer(store)
    store._path(ROOT, donor_of(store).key, ".run").unlink()
    report = store.verify(repair=True)
    assert len(report.unreachable) == 1 and report.missing == 2 and report.repaired
    assert store.verify().sound and store.verify().referring == 0


def test_nothing_evicts_what_is_referred_to(tmp_path) -> None:
    store = RunStore(tmp_path / "store")
    keep(store, FIRST)
    refer(store)
    store.touch(store.keys_of(ROOT, SECOND))
    assert store.shrink(4 * 4096) == 0
    assert store.shrink(3 * 4096) == 1  # the run that refers: only it may leave
    assert store.lookup(ROOT, FIRST).end_page == 8 and store.lookup(ROOT, SECOND, referring=True).end_page == 4
    assert store.shrink(0) == 3 and store.totals == (0, 0)
    store.close()


def test_a_longer_run_leaves_a_shorter_one_that_is_referred_to(store) -> None:
    short = [*text(4, seed=1), *SHARED[: 3 * PAGE_TOKENS]]
    other = RunStore(store.folder.parent / "other")
    keep(other, short)
    run = other._read(ROOT, page_keys(ROOT, short)[-1])
    donors = {RUN_PAGES: ((Donor(run.keys[-1], run.digest),), (1, 1, 0, 0))}
    assert other.insert(IDENTITY, SECOND, spans_of(SECOND), 0, 0.0, donors).whole
    keep(other, FIRST)
    assert other.lookup(ROOT, SECOND, referring=True).end_page == 8 and other.lookup(ROOT, FIRST).end_page == 8
    assert other.verify().sound and len(run_files(other)) == 5
    other.close()


def test_what_left_before_it_was_written_is_not_referred_to(store) -> None:
    donor = donor_of(store)
    for wrong in (Donor(donor.key, bytes(16)), Donor(bytes(KEY_BYTES), donor.digest)):
        report = store.insert(IDENTITY, SECOND, spans_of(SECOND), 0, 1e-3, {RUN_PAGES: ((wrong,), (1, 0, 0, 0))})
        assert not report.whole and store.lookup(ROOT, SECOND, referring=True).end_page == 4 and store.verify().sound


def test_no_two_runs_hang_on_each_other(store) -> None:
    """A run with ids alone that others continue is not replaced by one that refers to these."""
    tokens = [*text(4, seed=5), *text(4, seed=6)]
    store.insert(IDENTITY, tokens, [None] * 4 + spans_of(tokens)[4:])
    child = store._read(ROOT, page_keys(ROOT, tokens)[-1])
    assert not store.can_refer(ROOT, page_keys(ROOT, tokens)[3]) and store.can_refer(ROOT, page_keys(ROOT, SECOND)[7])
    donors = {0: ((Donor(child.keys[-1], child.digest),), (0, 1, 0, 0))}
    assert not store.insert(IDENTITY, tokens[: 4 * PAGE_TOKENS], spans_of(tokens)[:4], 0, 0.0, donors).whole
    assert store.shrink(0) == 4


def test_an_index_from_before_references_is_used_on(store) -> None:
    store.close()
    with sqlite3.connect(store.folder / "index.sqlite") as db:
        db.executescript("DROP TRIGGER run_left; DROP TABLE donors; DROP TABLE anchors;")
    db.close()
    again = RunStore(store.folder)
    assert again.lookup(ROOT, FIRST).end_page == 8 and again.totals[0] == 2
    assert again.lenders(ROOT, SHARED) == []  # its runs are known without anchors, until they are looked at
    (again.folder / "index.sqlite").unlink()
    for name in ("index.sqlite-wal", "index.sqlite-shm"):
        (again.folder / name).unlink(missing_ok=True)
    again.close()
    again = RunStore(store.folder)
    refer(again)
    assert again.lenders(ROOT, SHARED) and again.lookup(ROOT, SECOND, referring=True).end_page == 8
    again.close()


def test_a_namespace_goes_with_what_refers_inside_it(store) -> None:
    refer(store)
    assert store.delete("default") == 4 and store.verify().sound and store.totals == (0, 0)


def test_damaged_donors_are_named() -> None:
    run = Run(ROOT, ROOT, 0, bytes(4 * RUN_TOKENS), (b"a",) * 4, (Donor(b"k" * 20, b"d" * 16),), (0, 1, 0, 0))
    data = run.to_bytes()
    assert Run.from_bytes(data) == run and Run.from_bytes(data).digest == data[-16:]
    for at in range(len(data)):
        with pytest.raises((CorruptedCode, Exception)) as caught:
            Run.from_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        assert type(caught.value).__module__ == "codec.errors"
    for donors, needs in (((Donor(b"k" * 20, b"d" * 16),), (0, 2, 0, 0)), ((Donor(b"k" * 20, b"d" * 16),), (0, 0, 0, 0))):
        with pytest.raises(CorruptedCode, match="donors"):
            Run.from_bytes(Run(ROOT, ROOT, 0, run.ids, run.spans, donors, needs).to_bytes())


def test_two_processes_see_one_anothers_references(store, tmp_path) -> None:
    other = RunStore(store.folder)
    refer(other)
    assert store.lookup(ROOT, SECOND, referring=True).end_page == 8
    held = store.lookup(ROOT, SECOND, referring=True)
    other.shrink(0)
    assert list(held.borrowed[RUN_PAGES].runs[0].spans) == spans_of(FIRST)[4:], "what was read stays the holder's"
    assert store.lookup(ROOT, SECOND, referring=True).end_page == 0
    other.close()
    shutil.rmtree(store.folder / "runs" / ROOT.hex(), ignore_errors=True)
    assert store.lookup(ROOT, FIRST).end_page == 0


def test_a_run_does_not_remove_the_shorter_one_that_it_refers_to(store) -> None:
    short = SECOND[: 6 * PAGE_TOKENS]
    keep(store, short)
    run = store._read(ROOT, page_keys(ROOT, short)[-1])
    donors = {RUN_PAGES: ((Donor(run.keys[-1], run.digest),), (0, 0, 1, 0))}
    assert store.insert(IDENTITY, SECOND, spans_of(SECOND), 0, 0.0, donors).whole
    assert store.lookup(ROOT, SECOND, referring=True).end_page == 8 and store.verify().sound
