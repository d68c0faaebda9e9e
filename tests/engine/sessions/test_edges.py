"""Sessions at the edges: a draft that predicts exactly, and sessions that nobody closes."""

from __future__ import annotations

import gc

import pytest

from engine.runtime.sampling import SamplingParams

GREEDY = SamplingParams(max_new_tokens=20, draft_length=3, ignore_eos=True)


@pytest.mark.parametrize("quality", ["near-lossless", "tiny"])
def test_a_draft_that_predicts_exactly_leaves_next_to_nothing_to_code(chat_engine, tmp_path, quality):
    """The target as its own draft: its states tell the keys and values, and there may be no integer left but zeros."""
    engine = chat_engine("target")
    with engine.session(quality=quality, log=lambda _: None) as session:
        assert session.generate("the same again, and again", GREEDY).speculation.acceptance_rate == 1
        session.suspend(tmp_path / "a.kv")
        wanted = session.token_ids[:]
    with engine.session(tmp_path / "a.kv", restore="decode", log=lambda _: None) as session:
        assert session.token_ids == wanted
        assert session.generate(" more", GREEDY).new_tokens == 20


def test_sessions_that_are_dropped_give_their_pages_back(chat_engine):
    engine = chat_engine("none", pool_tokens=64)
    for _ in range(4):  # two fill the 4 pages
        session = engine.session(quality="tokens", log=lambda _: None)
        session.generate("hello", GREEDY)
        del session
        gc.collect()
    assert engine.core.pool.num_free_pages == engine.core.pool.max_pages == 4
