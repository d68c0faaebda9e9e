"""Automatic drafts beside plain decoding: modes take steps in turn over the same prompts, and every token is counted."""

from __future__ import annotations

import time

from bench.speculation_in_turn import equal_tokens, one_turn
from draft.source import NgramSource
from engine.engine import Engine


def test_a_turn_counts_every_token_of_every_mode(random_decoder):
    target = random_decoder(0)
    modes = {"plain": (Engine(target), 0), "drafts": (Engine(target, draft=NgramSource()), 3)}
    found = one_turn(modes, [[1, 2, 3], [4, 5] * 6], 12, time.process_time)
    for name, own in found.items():
        assert [len(text) for text in own["texts"]] == [12, 12] and own["tokens"] == 2 * 11, name
        assert own["seconds"] > 0 and own["texts"] == found["plain"]["texts"]
    assert found["plain"]["steps"] == 11 and found["plain"]["proposed"] == 0
    assert found["drafts"]["steps"] <= 11 and found["drafts"]["accepted"] <= found["drafts"]["proposed"]
    assert all(engine.core.scheduler.idle for engine, _ in modes.values())


def test_equal_tokens_end_at_the_first_that_differs():
    assert equal_tokens([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.5
    assert equal_tokens([[1, 2], [5, 6]], [[1, 2], [5, 6]]) == 1.0
    assert equal_tokens([[1, 2], [7, 6]], [[1, 2], [5, 6]]) == 0.5
