"""The paged pool: page ownership under random use, contiguity, growth and exhaustion."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import PoolExhausted
from engine.kv.pool import PagedPool


def make(pages=16, size=4, **options):
    return PagedPool(2, 1, 2, pages, size, dtype=torch.float32, device="cpu", **options)


def stamp(sequence, start, end, value):
    """Write `value + position` into tokens [start, end)."""
    size = sequence.pool.page_size
    for position in range(start, end):
        sequence.pool.kv[:, :, sequence.pages[position // size], position % size] = value + position


def stamped(sequence, value):
    size = sequence.pool.page_size
    return all(bool((sequence.pool.kv[:, :, sequence.pages[p // size], p % size] == value + p).all()) for p in range(sequence.length))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["write", "reject", "truncate", "free"]), st.integers(0, 23)), max_size=40),
    st.booleans(),
)
def test_random_use_keeps_owners_and_contents(operations, grows):
    pool = make(6, 4, max_pages=24 if grows else None)
    sequences = [pool.new_sequence() for _ in range(4)]
    for which, action, n in operations:
        sequence = sequences[which]
        value = 1000.0 * (which + 1)
        if action == "write":
            before = (list(sequence.pages), sequence.length)
            try:
                sequence.reserve(n)
            except PoolExhausted:
                assert (sequence.pages, sequence.length) == before
            else:
                stamp(sequence, sequence.length, sequence.length + n, value)
                sequence.advance(n)
        elif action == "reject" and sequence.capacity:
            stamp(sequence, sequence.length, sequence.capacity, -1.0)
        elif action == "truncate":
            sequence.truncate(min(n, sequence.length))
        elif action == "free":
            sequence.free()
            sequences[which] = pool.new_sequence()
        pool.check_integrity()
        assert all(stamped(s, 1000.0 * (i + 1)) for i, s in enumerate(sequences))
    for sequence in sequences:
        sequence.free()
    pool.check_integrity()
    assert pool.num_free_pages == pool.max_pages


def test_sequences_growing_in_turn_stay_contiguous():
    pool = make(64, 4)
    sequences = [pool.new_sequence() for _ in range(3)]
    for _ in range(40):
        for sequence in sequences:
            sequence.reserve(1)
            sequence.advance(1)
            assert sequence.is_contiguous
    pool.check_integrity()


def test_a_blocked_sequence_is_moved_together_with_its_contents():
    pool = make(32, 4)
    first, second = pool.new_sequence(), pool.new_sequence()
    first.reserve(8)
    first.advance(8)
    stamp(first, 0, 8, 50.0)
    second.pages = pool.allocate(1, after=first.pages[-1])
    assert second.pages[0] == first.pages[-1] + 1
    first.reserve(4)
    assert first.is_contiguous and len(first.pages) == 3 and stamped(first, 50.0)
    pool.check_integrity()


def test_shared_pages_are_not_moved_and_outlive_one_owner():
    pool = make(8, 4)
    first, second = pool.new_sequence(), pool.new_sequence()
    first.reserve(8)
    first.advance(8)
    second.pages, second.length = list(first.pages), 8
    pool.retain(second.pages)
    assert pool.is_shared(first.pages[0])
    pool.check_integrity()
    kept = list(second.pages)
    first.free()
    assert second.pages == kept and pool.num_free_pages == 6 and not pool.is_shared(kept[0])
    pool.check_integrity()
    second.free()
    assert pool.num_free_pages == 8


def test_any_free_pages_do_where_kernels_follow_page_tables(monkeypatch):
    """A GPU's pool, without one: pages are given out once, all of them, wherever the last search ended."""
    monkeypatch.setattr(PagedPool, "device", torch.device("cuda"))
    pool, draw, held = make(40), random.Random(3), []
    for _ in range(400):
        count = draw.randrange(1, 9)
        if count <= pool.num_free_pages and draw.random() < 0.6:
            pages = pool.allocate(count, held[-1][-1] if held and draw.random() < 0.5 else None)
            assert len(set(pages)) == count and not set(pages) & {page for own in held for page in own}
            held.append(pages)
        elif held:
            pool.release(held.pop(draw.randrange(len(held))))
        pool.check_integrity()
    assert not pool.num_free_pages or len(pool.allocate(pool.num_free_pages)) > 0
    assert not pool.num_free_pages


def test_sequences_that_share_stay_where_steps_follow_page_tables():
    """Their first token would wait for the copy."""
    pool = make(64)
    pool.steps_follow_tables = True
    first, wall = pool.new_sequence(), None
    first.ensure(8)
    wall = pool.allocate(1, first.pages[-1])
    first.advance(8)
    second = pool.new_sequence()
    second.share(first.pages, 8)
    second.ensure(16)
    assert second.pages[:2] == first.pages and not second.is_contiguous
    first.ensure(16)
    assert first.is_contiguous and first.pages[0] != second.pages[0], "one of its own is moved behind the wall"
    pool.release(wall)
    second.truncate(0)
    assert not second.shares


def test_growth_keeps_contents_and_stops_at_the_budget():
    pool = make(2, 4, max_pages=5)
    sequence = pool.new_sequence()
    sequence.reserve(8)
    sequence.advance(8)
    stamp(sequence, 0, 8, 7.0)
    assert (pool.num_pages, pool.num_free_pages) == (2, 3)
    view = pool.layer(1)
    sequence.reserve(1)
    assert pool.num_pages == 4 and pool.bytes == 4 * pool.page_bytes == pool.kv.numel() * 4
    assert stamped(sequence, 7.0)
    assert pool.layer(1)[0].shape[0] == 4 and pool.layer(1)[1].data_ptr() == pool.kv[1, 1].data_ptr() and view[0].shape[0] == 2
    sequence.reserve(12)
    assert pool.num_pages == 5
    with pytest.raises(PoolExhausted, match="1 more pages of 4 tokens, 0 are free of 5"):
        sequence.reserve(13)
    assert len(sequence.pages) == 5
    pool.check_integrity()


def test_truncate_gives_pages_back():
    pool = make(8, 4)
    sequence = pool.new_sequence()
    sequence.reserve(17)
    sequence.advance(17)
    assert len(sequence.pages) == 5 and sequence.page_table.dtype == torch.int32
    sequence.truncate(9)
    assert len(sequence.pages) == 3 and pool.num_free_pages == 5
    sequence.truncate(0)
    assert sequence.pages == [] and pool.num_free_pages == 8


def test_misuse_is_caught():
    pool = make(8, 4)
    sequence = pool.new_sequence()
    sequence.reserve(3)
    with pytest.raises(AssertionError):
        sequence.advance(5)
    with pytest.raises(AssertionError):
        sequence.truncate(1)
    with pytest.raises(ValueError):
        make(0)
    pool._references[sequence.pages[0]] = 0
    with pytest.raises(AssertionError):
        pool.check_integrity()
