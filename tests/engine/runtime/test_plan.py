"""What a step asks of its policy: room for drafts of each request; which forwards tell what steps cost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from draft.policy import CostModel
from engine.model.linear import Int8Weight
from engine.runtime import core
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


@pytest.mark.parametrize("matrices, most", [(True, 64), (False, 16)])
def test_what_is_timed_tells_of_more_rows(matrices, most):
    """Where 16 rows take as long as one, 64 are timed: the slope behind the last point is that of all rows beyond it."""
    cpu, gpu = (SimpleNamespace(device=torch.device(name), multiplies_matrices=matrices) for name in ("cpu", "cuda"))
    counts = core._measured_counts(cpu)
    assert counts[0] == 1 and counts[-1] == most and core._measured_counts(gpu)[-1] == 64
    step_ms = (
        {1: 16.1, 4: 16.4, 8: 17.3, 16: 19.6, 32: 26.2, 64: 47.0} if matrices else {1: 10.0, 4: 11.0, 8: 15.0, 16: 24.0, 32: 42.0, 64: 79.0}
    )
    costs = CostModel(draft=((1, 1.0),), verify=tuple((n, step_ms[n]) for n in counts))
    assert all(costs.verify_seconds(n) == pytest.approx(ms, rel=0.15) for n, ms in step_ms.items())


def test_the_weights_decide_what_is_timed(monkeypatch, random_decoder):
    """A processor multiplies matrices of bf16; of float32, or of weights in few bits, more rows take longer there as on any other."""
    matrices = core._MEASURED_COUNTS_MATRICES
    monkeypatch.setattr("engine.model.decoder.allows_tiles", lambda: True)
    plain, whole = random_decoder(0).bfloat16(), random_decoder(0)
    assert core._measured_counts(plain) == matrices != core._measured_counts(whole)
    projection, _ = plain.layers[0].projections()[0]
    projection.packed, projection.plain = cast(torch.Tensor, Int8Weight(projection.weight)), None
    assert core._measured_counts(plain) == core._measured_counts(whole) == core._MEASURED_COUNTS_CPU
    monkeypatch.setattr("engine.model.decoder.allows_tiles", lambda: False)
    assert core._measured_counts(random_decoder(0).bfloat16()) == core._MEASURED_COUNTS_CPU
