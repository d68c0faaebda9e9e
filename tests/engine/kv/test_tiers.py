"""Budgets of the tiers, the order in which pages leave them, and what hits are worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.errors import InvalidOption
from engine.kv.eviction import POLICIES, Value
from engine.kv.tiers import Curve, RestoreTimes, TierManager
from engine.kv.trie import Match, Payload, Tier, Trie

S = 2
TIMES = RestoreTimes(
    Curve([(10, 1.0), (20, 3.0)]), {Tier.HOST: Curve([(10, 0.2), (20, 0.4)]), Tier.DISK: Curve([(10, 0.5), (20, 1.0)])}, "made up"
)


def text(*pages: int) -> list[int]:
    return [token for n in pages for token in [n] * S]


def manager(budgets: dict[Tier, int], policy: str = "lru", **options: Any) -> TierManager:
    return TierManager(Trie(S, half_life_s=100.0, page_bytes=[10, 4, 2, 1]), budgets, TIMES, policy, **options)


def request(tiers: TierManager, tokens: list[int], now_s: float, **options: Any) -> int:
    """One request from lookup to pressure; returns its restored tokens."""
    with tiers.match(tokens, options.get("namespace", "")) as match:
        restored = tiers.hit(match)
        tiers.finish(tiers.insert(tokens, after=match, **options), now_s)
    tiers.rebalance()
    tiers.trie.check_integrity()
    return restored


def known(tiers: TierManager, *pages: int) -> int:
    """Pages of a text that are there."""
    with tiers.match(text(*pages)) as match:
        return match.num_pages


class TestTimes:
    def test_curve(self) -> None:
        curve = Curve([(20, 3.0), (10, 1.0)])
        assert [curve.first(n) for n in (0, 5, 10, 15, 20, 30)] == [0.0, 0.5, 1.0, 2.0, 3.0, 5.0]
        assert curve.between(5, 15) == 1.5
        for wrong in ([], [(0, 1.0)], [(10, 2.0), (20, 1.0)], [(10, -1.0)], [(10, 1.0), (10, 2.0)]):
            with pytest.raises(ValueError, match="curve"):
                Curve(wrong)

    def test_saved_seconds(self) -> None:
        assert TIMES.saved_s(Tier.HOT, 0, 10) == 1.0 and TIMES.saved_s(Tier.HOST, 0, 10) == pytest.approx(0.8)
        assert TIMES.saved_s(Tier.DISK, 10, 20) == pytest.approx(1.5) and TIMES.saved_s(Tier.TOKENS, 0, 20) == 0.0

    def test_a_tier_slower_than_computing_anew_is_skipped_and_says_so(self) -> None:
        slow = RestoreTimes(Curve([(10, 1.0)]), {Tier.HOST: Curve([(10, 0.5)]), Tier.DISK: Curve([(10, 1.0)])})
        budgets = {Tier.HOT: 10, Tier.HOST: 100, Tier.DISK: 100}
        trie = Trie(S, page_bytes=[10, 4, 2, 1])
        tiers = TierManager(trie, budgets, slow)
        assert tiers.tiers == [Tier.HOT, Tier.HOST]
        reason = tiers.report()["disk"]["skipped"]
        assert "10 tokens from disk takes 1 s" in reason and "skipped" in reason and tiers.report()["host"]["skipped"] is None
        tiers.finish(tiers.insert(text(*range(50))), 0.0)
        tiers.rebalance()
        assert trie.pages_in == [1, 25, 0, 0]
        assert TierManager(Trie(S), budgets, slow, skip_unprofitable=False).tiers == list(budgets)

    def test_no_usable_tier_keeps_nothing(self) -> None:
        slow = RestoreTimes(Curve([(10, 1.0)]), {Tier.DISK: Curve([(10, 1.0)])})
        tiers = TierManager(Trie(S), {Tier.DISK: 100}, slow)
        freed: list[Any] = []
        tiers.finish(tiers.insert(text(1, 2), [Payload(i, Tier.DISK, 1, freed.append) for i in range(2)]), 0.0)
        assert tiers.trie.num_nodes == 0 and freed == [0, 1] and tiers.rebalance() == 0

    @pytest.mark.parametrize(
        "table", [{}, {"recompute": []}, {"recompute": [[1, 1]], "restore": {"hot": [[1, 1]]}}, {"recompute": [[1]]}, {"recompute": 3}, []]
    )
    def test_bad_tables(self, table: Any) -> None:
        with pytest.raises(InvalidOption, match="restore times"):
            RestoreTimes.from_json(table)

    def test_table(self) -> None:
        times = RestoreTimes.from_json({"source": "here", "recompute": [[10, 1.0]], "restore": {"disk": [[10, 0.5]]}})
        assert times.source == "here" and times.saved_s(Tier.DISK, 0, 20) == 1.0


class TestTiers:
    def test_bad_options(self) -> None:
        with pytest.raises(InvalidOption, match="no eviction policy 'best'"):
            manager({Tier.HOT: 10}, "best")
        for budgets in ({Tier.GONE: 1}, {Tier.HOT: -1}):
            with pytest.raises(InvalidOption, match="budgets"):
                manager(budgets)

    def test_pages_go_down_one_tier_at_a_time_from_the_tail(self) -> None:
        tiers = manager({Tier.HOT: 20, Tier.HOST: 8, Tier.DISK: 4, Tier.TOKENS: 2})
        request(tiers, text(1, 2, 3, 4, 5, 6, 7, 8, 9), 0.0)
        match = tiers.match(text(1, 2, 3, 4, 5, 6, 7, 8, 9))
        assert tiers.trie.pages_in == [2, 2, 2, 2] and match.num_pages == 8 and match.num_restorable_pages == 6
        assert tiers.hit(match) == 12
        match.release()
        report = tiers.report()
        assert [report[name]["hit_tokens"] for name in ("hot", "host", "disk", "tokens")] == [4, 4, 4, 0]
        assert report["host"]["restore_s"] == pytest.approx(TIMES.restore_s(Tier.HOST, 4, 8))
        assert report["disk"]["saved_s"] == pytest.approx(TIMES.saved_s(Tier.DISK, 8, 12))
        assert [report[name]["bytes"] for name in ("hot", "host", "disk", "tokens")] == [20, 8, 4, 2]
        assert report["hot"]["pages_left"] == 7 and report["tokens"]["pages_left"] == 1

    def test_a_request_needs_no_more_than_its_tokens(self) -> None:
        tiers = manager({Tier.HOT: 20})
        request(tiers, text(1, 2), 0.0)
        with tiers.match(text(1, 2)) as match:
            assert tiers.hit(match, 3) == 3

    def test_locked_pages_stay_and_leave_after_release(self) -> None:
        for policy in POLICIES:
            tiers = manager({Tier.HOT: 20}, policy)
            held = tiers.insert(text(1, 2, 3))
            assert tiers.rebalance() == 0 and tiers.trie.bytes_in[0] == 30
            tiers.finish(held, 1.0)
            assert tiers.rebalance() == 1 and tiers.trie.bytes_in[0] == 20
            tiers.trie.check_integrity()

    def test_moves_in_small_portions(self) -> None:
        tiers = manager({Tier.HOT: 0, Tier.HOST: 100})
        tiers.finish(tiers.insert(text(1, 2, 3, 4, 5)), 0.0)
        assert [tiers.rebalance(2) for _ in range(4)] == [2, 2, 1, 0] and tiers.trie.pages_in == [0, 5, 0, 0]

    def test_payloads_are_moved_by_the_caller(self) -> None:
        calls = []

        def move(payloads: list[Payload], source: Tier, to: Tier) -> list[Payload]:
            calls.append((len(payloads), source, to))
            return [Payload((p.data, to), to, 3, freed.append) for p in payloads]

        freed: list[Any] = []
        tiers = manager({Tier.HOT: 10, Tier.HOST: 3}, move=move)
        tiers.finish(tiers.insert(text(1, 2, 3), [Payload(i, Tier.HOT, 10, freed.append) for i in range(3)]), 0.0)
        tiers.rebalance()
        tiers.trie.check_integrity()
        assert calls == [(2, Tier.HOT, Tier.HOST)] and freed == [1, 2, (2, Tier.HOST)] and tiers.trie.bytes_in[:2] == [10, 3]
        with pytest.raises(ValueError, match="function that moves"):
            unable = manager({Tier.HOT: 0, Tier.HOST: 3})
            unable.finish(unable.insert(text(1), [Payload(0, Tier.HOT, 10)]), 0.0)
            unable.rebalance()

    def test_a_full_disk_drops_kv_but_keeps_the_tree_whole(self) -> None:
        full = [False]

        def move(payloads: list[Payload], source: Tier, to: Tier) -> list[Payload] | None:
            return None if full[0] else [Payload(p.data, to, 1) for p in payloads]

        for last in ({Tier.TOKENS: 100}, {}):
            full[0] = False
            tiers = manager({Tier.HOT: 20, Tier.DISK: 10, **last}, move=move)
            for now, tail in enumerate((4, 5)):
                tokens = text(1, 2, 3, tail)
                tiers.finish(tiers.insert(tokens, [Payload(0, Tier.HOT, 10) for _ in range(4)]), now)
                tiers.rebalance()
            assert tiers.trie.pages_in[Tier.DISK] == 3
            full[0] = True
            tiers.metrics[Tier.HOT].budget_bytes = 10
            tiers.rebalance()
            tiers.trie.check_integrity()
            assert tiers.trie.pages_in[:3] == [1, 0, 0] and tiers.metrics[Tier.HOT].failed_moves == 1
            assert tiers.match(text(1, 2, 3, 4)).num_pages == (4 if last else 1)


class TestPolicies:
    @pytest.mark.parametrize("policy", POLICIES)
    def test_prefixes_outlive_what_follows_them(self, policy: str) -> None:
        tiers = manager({Tier.HOT: 50}, policy)
        for now in range(40):
            request(tiers, text(1, 2, 3, 100 + now), float(now))
            assert tiers.match(text(1, 2, 3)).num_pages == 3
            assert tiers.trie.bytes_in[0] <= 50

    def test_lru_drops_the_oldest(self) -> None:
        tiers = manager({Tier.HOT: 20})
        for now, first in enumerate([1, 2, 1, 3]):
            request(tiers, text(first), float(now))
        assert [tiers.match(text(first)).num_pages for first in (1, 2, 3)] == [1, 0, 1]

    def test_t_lru_takes_the_ends_of_all_texts_first(self) -> None:
        tiers = manager({Tier.HOT: 120}, "t-lru", safe_pages=2)
        for now, first in enumerate((10, 20, 30)):
            request(tiers, text(*range(first, first + 4)), float(now))
        left = []
        for budget in (100, 60, 40):
            tiers.metrics[Tier.HOT].budget_bytes = budget
            tiers.rebalance()
            tiers.trie.check_integrity()
            left.append([known(tiers, *range(first, first + 4)) for first in (10, 20, 30)])
        assert left == [[2, 4, 4], [2, 2, 2], [0, 2, 2]], "two of each text, the oldest's first; then the oldest"
        request(tiers, text(20, 21, 22, 23), 9.0)  # computed again: its end may go again
        tiers.rebalance()
        assert [known(tiers, *range(first, first + 4)) for first in (20, 30)] == [2, 2]

    def test_t_lru_remembers_what_left_behind_a_branch(self) -> None:
        tiers = manager({Tier.HOT: 100}, "t-lru", safe_pages=2)
        request(tiers, text(1, 2, 3, 4), 0.0)
        request(tiers, text(1, 2, 5, 6), 1.0)
        request(tiers, text(7), 2.0)
        tiers.metrics[Tier.HOT].budget_bytes = 30
        tiers.rebalance()
        assert [known(tiers, *pages) for pages in ((1, 2), (7,))] == [2, 1]
        tiers.metrics[Tier.HOT].budget_bytes = 20
        tiers.rebalance()
        assert [known(tiers, *pages) for pages in ((1, 2), (7,))] == [2, 0], "behind the branch both texts lost what they may"

    @pytest.mark.parametrize("policy", ["lfu", "gdsf", "s3-fifo", "value"])
    def test_what_was_used_often_survives_a_scan(self, policy: str) -> None:
        tiers = manager({Tier.HOT: 40, Tier.TOKENS: 20}, policy)
        for now in range(8):
            request(tiers, text(1), float(now))
        for now in range(8, 14):
            request(tiers, text(100 + now), float(now))
        assert tiers.match(text(1)).num_restorable_pages == 1
        lru = manager({Tier.HOT: 40})
        for now in range(14):
            request(lru, text(1 if now < 8 else 100 + now), float(now))
        assert lru.match(text(1)).num_pages == 0

    def test_gdsf_and_value_prefer_seconds_saved_a_byte(self) -> None:
        # in TIMES tokens beyond the tenth cost twice as much to compute
        for policy in ("gdsf", "value"):
            tiers = manager({Tier.HOT: 140}, policy)
            tiers.finish(tiers.insert(text(1)), 0.0)
            for _ in range(2):
                tiers.finish(tiers.insert(text(*range(10, 22))), 0.0)
            tiers.finish(tiers.insert(text(*range(10, 22), 2)), 0.0)
            tiers.finish(tiers.insert(text(3)), 0.0)
            tiers.rebalance()
            assert tiers.match(text(*range(10, 22), 2)).num_pages == 13
            assert tiers.match(text(1)).num_pages + tiers.match(text(3)).num_pages == 1

    def test_gdsf_ages_what_is_no_longer_used(self) -> None:
        tiers = manager({Tier.HOT: 20}, "gdsf")
        for _ in range(3):
            request(tiers, text(1), 0.0)
        for now in range(1, 40):
            request(tiers, text(100 + now // 2), float(now))
        assert tiers.match(text(1)).num_pages == 0

    def test_s3_fifo_takes_what_comes_back_into_its_main_queue(self) -> None:
        tiers = manager({Tier.HOT: 40, Tier.TOKENS: 40}, "s3-fifo")
        for now, first in enumerate([1, 2, 3, 4, 5, 1]):
            request(tiers, text(first), float(now))
        node = tiers.match(text(1)).node
        assert node.size(Tier.HOT) == 1 and node.state[Tier.HOT][1] is True

    def test_value_expects_what_the_model_does_behind_what_was_counted(self) -> None:
        """Unlikely is what all requests begin with, so only what follows it tells them apart."""
        tiers = manager({Tier.HOT: 10**6}, "value")
        policy = tiers._policies[Tier.HOT]
        assert isinstance(policy, Value)
        for now, (first, bits) in enumerate([(10, -1.0), (11, -8.0), (12, -1.0), (13, -8.0), (14, -8.0)]):
            tokens = text(1, first)
            log2_p = np.full(len(tokens), -9.0)
            log2_p[S:] = bits / S
            tiers.finish(tiers.insert(tokens, log2_p=log2_p), float(now))
        worth = [policy._foretold_rate(tiers.match(text(1, first)).node) for first in (10, 11)]
        counted = tiers.match(text(1)).node
        assert worth == pytest.approx([counted.count * np.log(2) / 100 * 2.0**bits for bits in (-1, -8)], rel=0.05)
        plain = tiers.insert(text(2, 3))
        tiers.finish(plain, 5.0)
        assert policy._foretold_rate(tiers.match(text(2, 3)).node) == 0.0, "its probability is not known"

    def test_value_learns_which_gaps_end_in_a_reuse(self) -> None:
        """Pages of one kind come back after 10 s or never: once those 10 s have passed, their worth falls."""
        tiers = manager({Tier.HOT: 10**6}, "value")
        now = 0.0
        for first in range(400):
            now += 1.0
            request(tiers, text(first), now, kind="tool")
            if first >= 10 and first % 2:
                request(tiers, text(first - 10), now + 0.5, kind="tool")
        policy = tiers._policies[Tier.HOT]
        assert isinstance(policy, Value)
        fresh, stale = tiers.match(text(399)).node, tiers.match(text(369)).node
        assert fresh.requests == stale.requests - 1 == 1
        request(tiers, text(1000), now + 30, kind="tool")
        unused = tiers.match(text(398)).node
        policy._now_s = now
        worth_now = policy.value(unused)
        policy._now_s = now + 60
        assert worth_now > 10 * policy.value(unused)

    def test_value_takes_the_models_probability_before_anything_was_counted(self) -> None:
        tiers = manager({Tier.HOT: 10**6}, "value")
        for _ in range(20):
            request(tiers, text(9), 0.0, log2_p=[-2.0] * S)
        for first, bits in [(1, -0.1), (2, -20.0)]:
            request(tiers, text(first), 0.0, log2_p=[bits] * S)
        policy = tiers._policies[Tier.HOT]
        assert isinstance(policy, Value)
        likely, unlikely = (policy.value(tiers.match(text(first)).node) for first in (1, 2))
        assert likely > unlikely > 0

    def test_same_requests_same_order(self) -> None:
        for policy in POLICIES:
            left = []
            for _ in range(2):
                tiers = manager({Tier.HOT: 60, Tier.TOKENS: 30}, policy)
                for now in range(60):
                    request(tiers, text(now * now % 11, now % 5, now % 3), float(now))
                left.append(sorted((n.start_page, n.tokens.tolist(), n.ends) for n in tiers.trie.nodes()))
            assert left[0] == left[1]


class Pressure(RuleBasedStateMachine):
    """Any order of requests, holds and moves: the tree stays whole and budgets are kept once nothing is locked."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.failing = False
        self.live = 0
        self.held: list[Match] = []
        self.tiers: TierManager | None = None

    def payload(self, tier: Tier, num_bytes: int) -> Payload:
        def gone(_: Any) -> None:
            self.live -= 1

        self.live += 1
        return Payload(0, tier, num_bytes, gone)

    def move(self, payloads: list[Payload], source: Tier, to: Tier) -> list[Payload] | None:
        return None if self.failing else [self.payload(to, 1 + p.num_bytes // 2) for p in payloads]

    @precondition(lambda self: self.tiers is None)
    @rule(policy=st.sampled_from(sorted(POLICIES)), tiers=st.sets(st.sampled_from(list(Tier)[:4]), min_size=1))
    def start(self, policy: str, tiers: set[Tier]) -> None:
        self.tiers = TierManager(Trie(S), {tier: 12 for tier in tiers}, TIMES, policy, self.move)

    @precondition(lambda self: self.tiers is not None)
    @rule(
        pages=st.lists(st.integers(0, 2), max_size=6), hold=st.booleans(), wait=st.sampled_from([0.0, 1.0, 100.0]), size=st.integers(0, 9)
    )
    def ask(self, pages: list[int], hold: bool, wait: float, size: int) -> None:
        assert self.tiers is not None
        self.now += wait
        tokens = text(*pages)
        match = self.tiers.match(tokens)
        restored = self.tiers.hit(match)
        assert restored == match.num_restorable_pages * S
        first = self.tiers.tiers[0]
        new = None if first == Tier.TOKENS else [self.payload(first, size) for _ in pages]
        whole = self.tiers.insert(tokens, new, after=match)
        assert whole.num_pages == len(pages)
        match.release()
        if hold:
            self.held.append(self.tiers.match(tokens))
        self.tiers.finish(whole, self.now)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 100))
    def let_go(self, which: int) -> None:
        self.held.pop(which % len(self.held)).release()

    @precondition(lambda self: self.tiers is not None)
    @rule(most=st.sampled_from([None, 1, 3]), failing=st.booleans())
    def make_room(self, most: int | None, failing: bool) -> None:
        assert self.tiers is not None
        self.failing = failing
        moved = self.tiers.rebalance(most)
        if most is not None:
            assert moved <= most
        elif not self.held:
            for tier in self.tiers.tiers:
                assert self.tiers.trie.bytes_in[tier] <= 12

    @invariant()
    def whole(self) -> None:
        if self.tiers is not None:
            self.tiers.trie.check_integrity()
            assert self.live == sum(self.tiers.trie.pages_in[:3])


TestPressure = Pressure.TestCase
TestPressure.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
