"""The trie: matching, splitting, namespaces, probabilities, counts, tiers, locks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from engine.kv.donors import distance, nearest_donor
from engine.kv.trie import Node, Payload, Tier, Trie

S = 4


def page(n: int) -> list[int]:
    return [n] * S


def text(*pages: int) -> list[int]:
    return [token for n in pages for token in page(n)]


def payloads(count: int, tier: Tier = Tier.HOT, num_bytes: int = 10, freed: list[Any] | None = None) -> list[Payload]:
    return [Payload(i, tier, num_bytes, None if freed is None else freed.append) for i in range(count)]


def node_of(trie: Trie, *pages: int, namespace: str = "") -> Node:
    match = trie.match(text(*pages), namespace)
    match.release()
    return match.node


class TestMatch:
    def test_longest_known_prefix_in_whole_pages(self) -> None:
        trie = Trie(S)
        trie.insert([*text(1, 2, 3), 9, 9]).release()
        for tokens, known in [
            ([], 0),
            (text(1), 1),
            (text(1)[:3], 0),
            (text(1, 2, 3, 4), 3),
            (text(1, 2, 4), 2),
            (text(2), 0),
            ([*text(1, 2, 3), 9, 9], 3),
        ]:
            with trie.match(tokens) as match:
                assert match.num_pages == match.num_restorable_pages == known and match.num_tokens == known * S
        trie.check_integrity()

    def test_a_page_that_differs_in_its_last_token_is_another(self) -> None:
        trie = Trie(S)
        trie.insert([1, 1, 1, 1, 1, 1, 1, 2]).release()
        with trie.match([1, 1, 1, 1, 1, 1, 1, 3]) as match:
            assert match.num_pages == 1

    def test_hash_hits_are_confirmed_by_tokens(self) -> None:
        trie = Trie(S, hash_page=lambda data: 7)
        for first in range(5):
            trie.insert(text(first, first)).release()
        for first in range(5):
            with trie.match(text(first, first, 8)) as match:
                assert match.num_pages == 2 and match.node.tokens[0] == first
        with trie.match(text(6)) as match:
            assert match.num_pages == 0
        assert trie.hash_collisions > 0
        trie.check_integrity()

    def test_matching_changes_nothing_but_locks(self) -> None:
        trie = Trie(S)
        trie.insert(text(1, 2, 3)).release()
        before = (trie.num_nodes, list(trie.pages_in))
        trie.match(text(1, 2)).release()
        trie.check_integrity()
        assert (trie.num_nodes, trie.pages_in) == before and node_of(trie, 1, 2, 3).requests == 0

    @pytest.mark.parametrize("tokens", [[-1, 2], [2**31], [[1, 2]], [1.5, 2.5], ["a"]])
    def test_what_is_no_row_of_token_ids_is_refused(self, tokens: Any) -> None:
        with pytest.raises(ValueError, match="token ids"):
            Trie(S).match(tokens)

    def test_used_after_release(self) -> None:
        trie = Trie(S)
        match = trie.insert(text(1))
        match.release()
        match.release()
        with pytest.raises(ValueError, match="released"):
            match.payloads()
        with pytest.raises(ValueError, match="released"):
            trie.record_request(match, 0.0)


class TestInsert:
    def test_splits_at_the_page_where_texts_part(self) -> None:
        trie = Trie(S)
        trie.insert(text(1, 2, 3, 4), payloads(4)).release()
        trie.insert(text(1, 2, 5), payloads(3)).release()
        assert trie.num_nodes == 3 and node_of(trie, 1, 2).num_pages == 2
        assert [p.data for p in trie.match(text(1, 2, 3, 4)).payloads()] == [0, 1, 2, 3]
        assert [p.data for p in trie.match(text(1, 2, 5)).payloads()] == [0, 1, 2]
        trie.check_integrity()

    def test_a_known_page_keeps_its_payload_and_the_new_one_is_freed(self) -> None:
        freed: list[Any] = []
        trie = Trie(S)
        first = payloads(2)
        trie.insert(text(1, 2), first).release()
        match = trie.insert(text(1, 2, 3), [Payload(f"new{i}", Tier.HOT, 10, freed.append) for i in range(3)])
        assert freed == ["new0", "new1"] and match.payloads()[:2] == first and match.payloads()[2].data == "new2"
        assert trie.bytes_in[Tier.HOT] == 30
        trie.check_integrity()

    def test_payloads_of_the_new_pages_are_enough(self) -> None:
        trie = Trie(S)
        first, new = payloads(2), payloads(2)
        trie.insert(text(1, 2), first).release()
        match = trie.insert(text(1, 2, 3, 4), new, first_payload=2)
        assert match.payloads() == [*first, *new]
        with pytest.raises(ValueError, match="before number 3"):
            trie.insert(text(1, 2, 9, 10), payloads(1), first_payload=3)
        with pytest.raises(ValueError, match="need as many payloads"):
            trie.insert(text(1, 2, 3, 4), payloads(4), first_payload=2)
        trie.insert(text(7), payloads(1, Tier.DISK), tier=Tier.DISK).release()
        with pytest.raises(ValueError, match="before number 1"):
            trie.insert(text(7, 8), payloads(1), first_payload=1)
        trie.check_integrity()

    def test_goes_on_after_a_match(self) -> None:
        trie = Trie(S)
        trie.insert(text(1, 2, 3)).release()
        with trie.match(text(1, 2, 4, 5)) as match:
            whole = trie.insert(text(1, 2, 4, 5), after=match, kind="tool")
            assert whole.num_pages == 4 and whole.node.kind == "tool" and match.num_pages == 2
            trie.check_integrity()

    def test_handles_follow_their_pages_through_a_split(self) -> None:
        trie = Trie(S)
        whole = trie.insert(text(1, 2, 3, 4), payloads(4))
        short, long = trie.match(text(1)), trie.match(text(1, 2, 3))
        trie.insert(text(1, 2, 9), payloads(3)).release()
        trie.check_integrity()
        assert [len(match.payloads()) for match in (short, long, whole)] == [1, 3, 4]
        assert [p.data for p in long.payloads()] == [0, 1, 2]
        upper = node_of(trie, 1, 2)
        assert upper.locks == 2 and upper.handles == {short}
        for match in (short, long, whole):
            match.release()
        trie.check_integrity()
        assert upper.locks == 0

    def test_bad_input(self) -> None:
        trie = Trie(S)
        for wrong in ({"payloads": payloads(1)}, {"payloads": payloads(2, Tier.HOST)}, {"tier": Tier.GONE}, {"log2_p": [-1.0]}):
            with pytest.raises(ValueError, match=r"payloads|inserted|log2_p"):
                trie.insert(text(1, 2), **wrong)
        for log2_p in ([0.5] * 8, [math.nan] * 8, [-math.inf] * 8):
            with pytest.raises(ValueError, match="log2_p"):
                trie.insert(text(1, 2), log2_p=log2_p)
        for size, half_life_s, page_bytes in [(0, 1.0, None), (4, 0.0, None), (4, 1.0, [1, 2]), (4, 1.0, [0, 0, 0, -1])]:
            with pytest.raises(ValueError, match="page"):
                Trie(size, half_life_s=half_life_s, page_bytes=page_bytes)
        trie.check_integrity()
        assert trie.num_nodes == 0


class TestPayload:
    def test_copy_on_write(self) -> None:
        freed: list[Any] = []
        payload = Payload([1], Tier.HOT, 5, freed.append)
        assert payload.writable(list) is payload
        other = payload.share()
        mine = other.writable(list)
        assert mine is not payload and mine.data == [1] and mine.data is not payload.data and payload.references == 1
        mine.release()
        payload.release()
        assert freed == [[1], [1]]

    def test_misuse(self) -> None:
        payload = Payload(0, Tier.DISK, 5)
        payload.release()
        for misuse in (payload.release, payload.share, lambda: Payload(0, Tier.TOKENS, 1), lambda: Payload(0, Tier.HOT, -1)):
            with pytest.raises(ValueError, match="payload"):
                misuse()

    def test_one_payload_in_two_namespaces_counts_its_bytes_once(self) -> None:
        freed: list[Any] = []
        trie = Trie(S)
        shared = payloads(2, freed=freed)
        trie.insert(text(1, 2), shared, namespace="a").release()
        trie.insert(text(1, 2), [p.share() for p in shared], namespace="b").release()
        assert trie.bytes_in[Tier.HOT] == 20 and trie.pages_in[Tier.HOT] == 4
        trie.check_integrity()
        trie.demote(node_of(trie, 1, 2, namespace="a"), Tier.HOT, 2, Tier.GONE)
        assert trie.bytes_in[Tier.HOT] == 20 and not freed
        trie.demote(node_of(trie, 1, 2, namespace="b"), Tier.HOT, 2, Tier.GONE)
        assert trie.bytes_in == [0] * 4 and sorted(freed) == [0, 1]
        trie.check_integrity()

    def test_a_request_may_outlive_the_tree(self) -> None:
        freed: list[Any] = []
        trie = Trie(S)
        match = trie.insert(text(1), payloads(1, freed=freed))
        kept = match.payloads()[0].share()
        match.release()
        trie.demote(node_of(trie, 1), Tier.HOT, 1, Tier.TOKENS)
        assert not freed
        kept.release()
        assert freed == [0]


class TestNamespaces:
    def test_a_namespace_sees_nothing_of_another(self) -> None:
        trie = Trie(S)
        trie.insert(text(1, 2), namespace="alice").release()
        assert trie.match(text(1, 2), "bob").num_pages == trie.match(text(1, 2)).num_pages == 0
        trie.insert(text(1, 2, 3), namespace="bob").release()
        assert trie.match(text(1, 2, 3), "alice").num_pages == 2
        own = trie.match(text(1, 2, 3), "bob")
        assert own.num_pages == 3 and own.namespace == "bob"
        trie.check_integrity()


class TestProbabilities:
    def test_log2_p_adds_up_over_edges_and_splits(self) -> None:
        trie = Trie(S)
        bits = -np.arange(12, dtype=np.float32) / 4
        trie.insert(text(1, 2, 3), log2_p=bits).release()
        trie.insert(text(1, 4), log2_p=np.concatenate([bits[:4], np.full(4, -2.0)])).release()
        for tokens, expected in [(text(1), bits[:4]), (text(1, 2, 3), bits), (text(1, 2), bits[:8]), (text(1, 4), [*bits[:4], -8.0])]:
            with trie.match(tokens) as match:
                assert match.log2_p() == pytest.approx(sum(expected))
        trie.check_integrity()

    def test_unknown_probability_stays_unknown_below(self) -> None:
        trie = Trie(S)
        trie.insert(text(1)).release()
        trie.insert(text(1, 2), log2_p=[-1.0] * 8).release()
        assert trie.match(text(1, 2)).log2_p() is None
        with pytest.raises(ValueError, match="no probability"):
            distance(trie, text(1, 2), text(1, 3))

    def test_d_t_and_its_flaws(self) -> None:
        trie = Trie(S)
        a, b, c = text(1, 2), text(1, 3), text(4, 5)
        for tokens in (a, b, c):
            trie.insert(tokens, log2_p=[-1.0] * 8).release()
        assert distance(trie, a, b) == distance(trie, b, a) == 4.0
        assert distance(trie, a, c) == 0.0
        # a metric would have d(a, a) = 0 and smaller d for sequences that are closer
        assert distance(trie, a, a) == 8.0 > distance(trie, a, b) > distance(trie, a, c)
        # the ultrametric inequality d(a, a) <= max(d(a, c), d(c, a)), which the paper prints, does not hold
        assert distance(trie, a, a) > max(distance(trie, a, c), distance(trie, c, a))

    def test_nearest_donor_counts_tokens_inside_the_last_page(self) -> None:
        trie = Trie(S)
        trie.insert([*text(1), 2, 2, 2, 2], log2_p=[-1.0] * 8).release()
        trie.insert([*text(1), 2, 2, 3, 3], log2_p=[-1.0] * 8).release()
        donor = nearest_donor(trie, [*text(1), 2, 2, 3, 4])
        assert donor.num_tokens == 7 and donor.distance == 7.0 and donor.match.num_pages == 1 and donor.node.tokens[2] == 3
        donor.match.release()
        inside = nearest_donor(trie, [*text(1), 2, 2])
        assert inside.num_tokens == 6
        inside.match.release()
        nothing = nearest_donor(trie, text(8))
        assert nothing.num_tokens == 0 and nothing.distance == 0.0
        nothing.match.release()
        trie.check_integrity()

    def test_the_donor_used_last_wins_among_equals(self) -> None:
        trie = Trie(S)
        for now, first in [(5.0, 2), (9.0, 3), (1.0, 4)]:
            match = trie.insert([*text(1), 7, 7, first, first])
            trie.record_request(match, now)
            match.release()
        assert nearest_donor(trie, [*text(1), 7, 7, 9, 9]).node.tokens[2] == 3


class TestCounts:
    def test_one_a_request_not_one_a_page(self) -> None:
        trie = Trie(S, half_life_s=10.0)
        for now, last in [(0.0, 8), (10.0, 9)]:
            match = trie.insert(text(1, 2, 3, 4, 5, last))
            trie.record_request(match, now)
            match.release()
        shared, tail = node_of(trie, 1, 2, 3, 4, 5), node_of(trie, 1, 2, 3, 4, 5, 9)
        assert (shared.requests, shared.count, shared.gap_s, shared.last_s) == (2, 1.5, 10.0, 10.0)
        assert (tail.requests, tail.count, tail.gap_s) == (1, 1.0, math.inf)
        assert trie.decayed_count(shared, 30.0) == 0.375 and trie.decayed_count(shared, 0.0) == 1.5

    def test_a_request_that_ends_inside_a_node_counts_only_what_it_used(self) -> None:
        trie = Trie(S)
        trie.insert(text(1, 2, 3)).release()
        with trie.match(text(1, 2)) as match:
            trie.record_request(match, 1.0)
        assert node_of(trie, 1, 2).requests == 1 and node_of(trie, 1, 2, 3).requests == 0
        trie.check_integrity()


class TestShrink:
    def test_the_tail_leaves_first_and_locked_pages_stay(self) -> None:
        trie = Trie(S)
        match = trie.insert(text(1, 2, 3, 4), payloads(4))
        trie.insert(text(1, 2, 5), payloads(3)).release()
        upper, lower = node_of(trie, 1, 2), node_of(trie, 1, 2, 3, 4)
        for node, count in [(upper, 1), (lower, 1), (lower, 0)]:
            with pytest.raises(ValueError, match="pages"):
                trie.demote(node, Tier.HOT, count, Tier.GONE)
        match.release()
        with pytest.raises(ValueError, match="behind them"):
            trie.demote(upper, Tier.HOT, 1, Tier.GONE)
        with pytest.raises(ValueError, match="payloads of tier HOST"):
            trie.demote(lower, Tier.HOT, 1, Tier.HOST, payloads(1, Tier.DISK))
        trie.demote(lower, Tier.HOT, 1, Tier.HOST, payloads(1, Tier.HOST, 3))
        trie.check_integrity()
        assert trie.bytes_in[:2] == [40, 3] and not upper.is_tail(Tier.HOT) and upper.size(Tier.HOST) == 0
        with pytest.raises(ValueError, match="behind them"):
            trie.demote(lower, Tier.HOT, 1, Tier.DISK, payloads(1, Tier.DISK))
        trie.demote(lower, Tier.HOT, 1, Tier.HOST, payloads(1, Tier.HOST, 3))
        trie.demote(lower, Tier.HOST, 2, Tier.GONE)
        trie.check_integrity()
        assert trie.match(text(1, 2, 3)).num_pages == 2

    def test_a_match_that_ends_inside_a_node_locks_only_its_part(self) -> None:
        trie = Trie(S)
        trie.insert(text(1, 2, 3)).release()
        match = trie.match(text(1, 2))
        node = match.node
        assert node.num_unlocked(Tier.HOT) == 1
        trie.demote(node, Tier.HOT, 1, Tier.GONE)
        with pytest.raises(ValueError, match="not locked"):
            trie.demote(node, Tier.HOT, 1, Tier.GONE)
        match.release()
        trie.demote(node, Tier.HOT, 2, Tier.GONE)
        assert trie.num_nodes == 0 and trie.bytes_in == [0] * 4
        trie.check_integrity()

    def test_tokens_alone_match_but_cannot_be_restored(self) -> None:
        trie = Trie(S)
        trie.insert(text(1, 2, 3), payloads(3)).release()
        trie.demote(node_of(trie, 1, 2, 3), Tier.HOT, 2, Tier.TOKENS)
        match = trie.match(text(1, 2, 3))
        assert (match.num_pages, match.num_restorable_pages) == (3, 1) and match.payloads()[1:] == [None, None]
        assert trie.promote(match, Tier.HOT, payloads(3)) == 2 and match.num_restorable_pages == 3
        trie.check_integrity()
        with pytest.raises(ValueError, match="payloads"):
            trie.promote(match, Tier.HOT, payloads(2))

    def test_integrity_check_sees_damage(self) -> None:
        def bytes_off(trie: Trie, node: Node) -> None:
            trie.bytes_in[0] += 1

        def lost_lock(trie: Trie, node: Node) -> None:
            node.locks += 1

        def wrong_token(trie: Trie, node: Node) -> None:
            node.tokens = node.tokens + 1

        def hotter_tail(trie: Trie, node: Node) -> None:
            node.parent.ends[0] -= 1  # type: ignore[union-attr]

        def more_requests(trie: Trie, node: Node) -> None:
            node.requests += 5

        for damage in (bytes_off, lost_lock, wrong_token, hotter_tail, more_requests):
            trie = Trie(S)
            trie.insert(text(1, 2), payloads(2)).release()
            trie.insert(text(1, 3), payloads(2)).release()
            trie.check_integrity()
            damage(trie, node_of(trie, 1, 2))
            with pytest.raises(AssertionError):
                trie.check_integrity()


def test_matching_costs_the_length_of_the_text_not_the_size_of_the_tree() -> None:
    """Comparisons are counted through the hash, which is called once an edge."""
    calls = [0]

    def counted(data: bytes) -> int:
        calls[0] += 1
        return hash(data)

    trie = Trie(S, hash_page=counted)
    for first in range(2000):
        trie.insert(text(first, first + 1, first + 2)).release()
    calls[0] = 0
    trie.match(text(5, 6, 7)).release()
    assert calls[0] <= 2
