"""Coded pages in host memory: what files need not be read for, within a budget."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import InvalidOption
from engine.runtime.sampling import SamplingParams
from engine.sessions.rates import Rates
from engine.store.host_tier import HostTier
from engine.store.runs import PAGE_TOKENS, RUN_PAGES
from engine.store.store import RunStore, StoredPrefix
from tests.engine.store.test_references import FIRST, SECOND, refer
from tests.engine.store.test_store import ROOT, keep, spans_of, text

FAST = Rates(0.0, 1e-6, 0.0, 1e-3)
ONE = SamplingParams(max_new_tokens=1, draft_length=0)
LONG = bytes(np.random.default_rng(5).integers(97, 123, 800, dtype=np.uint8)).decode()  # tokens are bytes


def whole(tokens, start=0):
    return StoredPrefix(start, len(tokens) // PAGE_TOKENS, spans_of(tokens, start), [])


def test_what_was_put_in_comes_back_to_the_page() -> None:
    tier, tokens = HostTier(1 << 20, FAST), text(7)
    assert tier.lookup(ROOT, tokens).end_page == 0
    assert tier.insert(ROOT, tokens, whole(tokens[: 3 * PAGE_TOKENS])) and tier.insert(ROOT, tokens, whole(tokens, 3))
    assert not tier.insert(ROOT, text(5, seed=2), whole(text(5, seed=2), 2)), "its beginning is not here"
    for cut in (PAGE_TOKENS, 2 * PAGE_TOKENS + 9, 7 * PAGE_TOKENS):
        found = tier.lookup(ROOT, tokens[:cut], 1)
        assert (found.start_page, found.end_page) == (1, cut // PAGE_TOKENS) and found.spans == spans_of(tokens)[1 : found.end_page]
    assert tier.lookup(b"\1" * 20, tokens).end_page == 0, "another root's"
    tier.trie.check_integrity()
    assert not tier.trie.handles


def test_the_budget_is_kept_from_the_tails_of_what_is_worth_least() -> None:
    tier = HostTier(12 * 600, FAST)
    often, rarely = text(8, seed=1), text(8, seed=2)
    tier.insert(ROOT, rarely, whole(rarely))
    tier.insert(ROOT, often, whole(often))
    for _ in range(5):
        tier.lookup(ROOT, often)
        tier.insert(ROOT, often, whole(often))
    tier.insert(ROOT, text(2, seed=3), whole(text(2, seed=3)))
    report = tier.report()
    assert report["bytes"] <= report["budget_bytes"] == 12 * 600 and report["pages_left"] > 0
    left = [tier.lookup(ROOT, tokens).end_page for tokens in (often, rarely)]
    assert left[0] > left[1] and tier.lookup(ROOT, rarely).spans == spans_of(rarely)[: left[1]]
    tier.trie.check_integrity()


def test_where_restoring_never_pays_nothing_is_kept() -> None:
    tier, tokens = HostTier(1 << 20, Rates(0.0, 1e-3, 0.0, 1e-6)), text(4)
    assert tier.insert(ROOT, tokens, whole(tokens)) and tier.lookup(ROOT, tokens).end_page == 0
    assert "skipped" in tier.report()["skipped"] and tier.report()["pages"] == 0


def test_what_refers_brings_what_it_refers_to(tmp_path) -> None:
    store, tier = RunStore(tmp_path / "store"), HostTier(1 << 20, FAST)
    keep(store, FIRST)
    refer(store)
    found = store.lookup(ROOT, SECOND, referring=True)
    tier.insert(ROOT, SECOND, found)
    store.shrink(0)
    store.close()
    near = tier.lookup(ROOT, SECOND, 2)
    assert near.spans == found.spans[2:] and near.borrowed == found.borrowed and near.borrows(5) and not near.borrows(4)
    lent = sum(map(len, found.borrowed[RUN_PAGES].runs[0].spans))
    assert tier.report()["bytes"] > sum(map(len, found.spans)) + lent, "what is held for them counts"


def test_an_engine_reads_no_file_for_what_is_in_memory(chat_engine, tmp_path, monkeypatch) -> None:
    options = {"store": tmp_path / "store", "store_memory": 1 << 20, "quality": "near-lossless", "log": lambda _: None}
    first = chat_engine("draft", **options)
    first.prefix_cache.codec.rates = FAST
    first.generate(LONG[:500], ONE)
    first.flush()
    first.generate(LONG, ONE)
    first.flush()
    before = first.prefix_cache.report()["tiers"]
    assert before["host"]["pages"] == 12 and before["host"]["bytes"] > 0 and before["disk"]["bytes"] > 0
    first.core.shared_prefixes.clear()
    monkeypatch.setattr(first.prefix_cache, "finished", lambda _: None)
    monkeypatch.setattr(first.prefix_cache.store, "lookup", lambda *_, **__: pytest.fail("a file is read"))
    result = first.generate(LONG, ONE)[0]
    assert result.restored_tokens == 768
    tiers = first.prefix_cache.report()["tiers"]
    assert tiers["host"]["hits"] == 2 and tiers["host"]["hit_tokens"] == 192 + 768 and tiers["host"]["saved_s"] != 0
    monkeypatch.undo()
    other = chat_engine("draft", **options)
    other.prefix_cache.codec.rates = FAST
    assert other.generate(LONG, ONE)[0].token_ids == result.token_ids
    assert other.prefix_cache.report()["tiers"]["disk"]["hits"] == 1
    assert other.generate(LONG, ONE)[0].restored_tokens == 0 and other.prefix_cache.report()["tiers"]["hot"]["hits"] == 1
    first.close()
    other.close()


@pytest.mark.parametrize("wrong", [-1, 1.5, "1G", True])
def test_bad_budgets_are_refused(chat_engine, tmp_path, wrong) -> None:
    with pytest.raises(InvalidOption, match="in memory"):
        chat_engine("draft", store=tmp_path / "store", quality="tokens", store_memory=wrong)
