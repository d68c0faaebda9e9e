"""A long random sequence of operations against a model of the trie: a tier for every known page prefix."""

from __future__ import annotations

import random
from typing import Any

import pytest

from engine.kv.trie import Match, Node, Payload, Tier, Trie

S = 4


class Model:
    """What a trie must know: the tier of every page prefix, by namespace."""

    def __init__(self) -> None:
        self.tiers: dict[tuple[str, tuple[int, ...]], Tier] = {}

    def known(self, namespace: str, tokens: list[int]) -> int:
        count = 0
        while (count + 1) * S <= len(tokens) and (namespace, tuple(tokens[: (count + 1) * S])) in self.tiers:
            count += 1
        return count

    def hold(self, namespace: str, tokens: list[int], tier: Tier) -> None:
        for count in range(1, len(tokens) // S + 1):
            key = (namespace, tuple(tokens[: count * S]))
            self.tiers[key] = min(tier, self.tiers.get(key, Tier.GONE))

    def pages_in(self) -> list[int]:
        return [sum(held == tier for held in self.tiers.values()) for tier in range(4)]


def prefix_of(node: Node) -> list[int]:
    tokens: list[int] = []
    at: Node | None = node
    while at is not None:
        tokens = [*at.tokens.tolist(), *tokens]
        at = at.parent
    return tokens


@pytest.mark.parametrize("collide", [False, True], ids=["hash", "one-hash"])
def test_a_long_random_sequence_of_operations(collide: bool) -> None:
    rng = random.Random(20)
    live = [0]

    def make(count: int, tier: Tier) -> list[Payload]:
        live[0] += count

        def gone(_: Any) -> None:
            live[0] -= 1

        return [Payload(0, tier, rng.randrange(5), gone) for _ in range(count)]

    trie = Trie(S, half_life_s=5.0, **({"hash_page": lambda data: sum(data) % 2} if collide else {}))
    model = Model()
    held: list[tuple[Match, str, list[int]]] = []

    def random_text() -> list[int]:
        return [token for _ in range(rng.randrange(7)) for token in [rng.randrange(2)] * (S - 1) + [rng.randrange(2)]]

    for step in range(1500):
        namespace, tokens = rng.choice("ab"), random_text()
        action = rng.choice(["insert", "match", "release", "record", "demote", "demote", "promote"])
        if action == "insert":
            tier = rng.choice([Tier.HOT, Tier.HOST, Tier.DISK])
            bits = None if rng.random() < 0.3 else [-rng.random() for _ in tokens]
            after = trie.match(tokens, namespace) if rng.random() < 0.5 else None
            within = 0  # pages that lie in the tier or a hotter one
            while model.tiers.get((namespace, tuple(tokens[: (within + 1) * S])), Tier.GONE) <= tier and within < len(tokens) // S:
                within += 1
            first = rng.randrange(within + 1)
            new = make(len(tokens) // S - first, tier)
            match = trie.insert(tokens, new, namespace=namespace, tier=tier, log2_p=bits, after=after, first_payload=first)
            if after is not None:
                after.release()
            model.hold(namespace, tokens, tier)
            held.append((match, namespace, tokens))
        elif action == "match":
            match = trie.match(tokens, namespace)
            assert match.num_pages == model.known(namespace, tokens)
            held.append((match, namespace, tokens[: match.num_tokens]))
        elif action == "release" and held:
            held.pop(rng.randrange(len(held)))[0].release()
        elif action == "record" and held:
            trie.record_request(rng.choice(held)[0], float(step))
        elif action == "promote" and held:
            match, where, covered = rng.choice(held)
            tier = rng.choice([Tier.HOT, Tier.HOST])
            trie.promote(match, tier, make(match.num_pages, tier))
            model.hold(where, covered, tier)
        elif action == "demote":
            choices = [(n, t) for n in trie.nodes() for t in range(4) if n.is_tail(t) and n.num_unlocked(t)]
            if choices:
                node, from_tier = rng.choice(choices)
                lower = next((t for t in range(from_tier + 1, 5) if t == 4 or node.children_in[t] or node.size(t)), 4)
                destination = Tier(rng.randint(from_tier + 1, lower))
                count = rng.randint(1, node.num_unlocked(from_tier))
                before, end = prefix_of(node), node.start_page + node.ends[from_tier]
                new = make(count, destination) if destination < Tier.TOKENS else None
                trie.demote(node, Tier(from_tier), count, destination, new)
                for pages in range(end - count + 1, end + 1):
                    key = (node.namespace, tuple(before[: pages * S]))
                    if destination == Tier.GONE:
                        del model.tiers[key]
                    else:
                        model.tiers[key] = destination
        if len(held) > 6:
            held.pop(0)[0].release()
        trie.check_integrity()
        assert trie.pages_in == model.pages_in()
        for match, where, covered in held:
            assert model.known(where, covered) * S >= match.num_tokens
        assert live[0] == sum(trie.pages_in[:3]), "every payload that is not in the trie was freed"
    assert trie.hash_collisions > 100 or not collide
