"""What a step asks of its policy: room for drafts of each request."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engine.runtime.sampling import SamplingParams
from engine.runtime.step import _plan


class Policy:
    """Remembers what it was asked."""

    draft_by_draft = True

    def plan(self, requests, tokens, room, *, drafter_room, **_):
        self.room, self.drafter_room = room, drafter_room
        return None


def request_of(wanted, knows_text, num_new=100):
    return SimpleNamespace(
        params=SamplingParams(draft_length=wanted), token_ids=[1] * 20, context=100, remaining=50, num_new=num_new, drafting=None,
        draft_state=SimpleNamespace(knows_text=knows_text), longest=lambda drafts: 0,
    )  # fmt: skip


@pytest.mark.parametrize("captured", [False, True])
def test_automatic_drafts_of_captured_steps_come_from_a_draft_that_knows_the_text(captured):
    """Where every pass can be caught up with, or a number of drafts was asked for, nothing changes."""
    policy, drafter = Policy(), SimpleNamespace(begins_after=0, max_positions=60, takes_leaves=False, takes_given=False)
    requests = [request_of("auto", True), request_of("auto", False), request_of(2, False)]
    _plan(requests, drafter, policy, False, (lambda kind: (2,)) if captured else None)
    assert policy.room == [49] * 3 and policy.drafter_room == [40, 0 if captured else 40, 40]


def test_automatic_drafts_wait_for_their_copies():
    policy, drafter = Policy(), SimpleNamespace(begins_after=64, max_positions=60, takes_leaves=False, takes_given=False)
    _plan([request_of("auto", True, 3), request_of("auto", True, 64), request_of(2, True, 3)], drafter, policy, False)
    assert policy.drafter_room == [0, 40, 40]
