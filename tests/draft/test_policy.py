"""The length controller maximises expected tokens per second."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from draft.policy import FIRST_PROBE, LAST_PROBE, MAX_AUTO_LENGTH, CostModel, LengthController, expected_tokens, measure_costs
from draft.protocols import ScratchPasses

FLAT = ((1, 1.0), (64, 1.1))  # a memory-bound target: a block costs hardly more than a token
LINEAR = ((1, 1.0), (2, 2.0))  # a compute-bound one


def run(controller, steps, accepted_of, batch=1):
    """Choose and observe; accepted_of(length) -> accepted drafts. Returns the lengths chosen."""
    lengths = []
    for _ in range(steps):
        lengths.append(controller.choose(batch))
        controller.observe(lengths[-1], accepted_of(lengths[-1]))
    return lengths


def test_expected_tokens():
    assert expected_tokens(0, 0.5) == 1
    assert expected_tokens(3, 1.0) == 4
    assert expected_tokens(2, 0.5) == 1.75


def test_costs_are_interpolated_and_extrapolated():
    costs = CostModel(draft=((1, 0.1),), verify=((1, 1.0), (4, 2.5), (8, 3.0)))
    assert costs.step_seconds(0, 1) == pytest.approx(1.0)
    assert costs.step_seconds(1, 1) == pytest.approx(0.1 + 1.5)
    assert costs.step_seconds(3, 4) == pytest.approx(0.3 + 3.0 + 8 * 0.125)
    early_exit = CostModel(draft=((1, 0.1),), verify=((1, 1.0), (4, 2.5)), runs_last_draft=True)
    assert early_exit.step_seconds(0, 1) == pytest.approx(1.1)
    assert early_exit.step_seconds(1, 1) == pytest.approx(0.2 + 1.5)


def test_a_useless_draft_is_switched_off_and_probed_now_and_then():
    controller = LengthController("auto", CostModel(draft=((1, 0.25),), verify=FLAT))
    lengths = run(controller, 600, lambda k: 0)
    assert lengths[0] > 0, "the prior is hopeful"
    first_zero = lengths.index(0)
    assert first_zero <= 6
    probes = [i for i in range(first_zero, 600) if lengths[i] > 0]
    assert set(lengths[first_zero:]) == {0, 1} and 3 <= len(probes) <= 10
    gaps = [b - a for a, b in itertools.pairwise(probes)]
    assert probes[0] - first_zero == FIRST_PROBE - 1 and gaps == sorted(gaps) and max(gaps) <= LAST_PROBE


def test_a_perfect_cheap_draft_gets_the_longest_blocks():
    controller = LengthController("auto", CostModel(draft=((1, 0.02),), verify=FLAT))
    assert run(controller, 20, lambda k: k)[-1] == MAX_AUTO_LENGTH


def test_a_middling_draft_gets_a_middling_length():
    generator = torch.Generator().manual_seed(0)

    def accepted(length):
        misses = (torch.rand(length + 1, generator=generator) > 0.6).tolist()
        return min(length, misses.index(True) if True in misses else length)

    controller = LengthController("auto", CostModel(draft=((1, 0.2),), verify=FLAT))
    lengths = run(controller, 200, accepted)[50:]
    assert 1 <= sum(lengths) / len(lengths) <= 4
    assert 0.3 < controller.rate < 0.85


def test_a_draft_that_can_never_pay_is_not_even_probed():
    controller = LengthController("auto", CostModel(draft=((1, 3.0),), verify=FLAT))
    assert set(run(controller, 200, lambda k: k)) == {0}


def test_a_draft_that_became_good_is_taken_up_again():
    controller = LengthController("auto", CostModel(draft=((1, 0.1),), verify=FLAT))
    run(controller, 30, lambda k: 0)
    assert controller.choose() == 0
    assert run(controller, 400, lambda k: k)[-1] > 4


def test_a_large_batch_switches_speculation_off():
    costs = CostModel(draft=((1, 0.2), (32, 0.6)), verify=((1, 1.0), (8, 1.1), (32, 2.0), (64, 4.0)))
    controller = LengthController("auto", costs)
    assert controller.choose(1) > 0
    assert controller.choose(64) == 0


def test_a_linear_target_is_never_speculated_on():
    assert LengthController("auto", CostModel(draft=((1, 0.05),), verify=LINEAR)).choose() == 0


def test_fixed_lengths_are_kept_and_no_costs_mean_no_drafts():
    assert run(LengthController(5), 4, lambda k: 0) == [5, 5, 5, 5]
    assert LengthController("auto").choose() == 0


class SlowDecoder:
    """Takes 2 ms and 0.2 ms a token; counts its calls."""

    device, dtype = torch.device("cpu"), torch.float32

    class config:
        hidden_size = 4

    def __init__(self):
        self.calls = []

    def forward(self, tokens, sequences, query_lens, **options):
        self.calls.append((query_lens, options))
        time.sleep(0.002 + 0.0002 * query_lens[0])
        return type("Out", (), {"hidden": torch.zeros(len(tokens), 4)})

    def head(self, hidden, *, deterministic=False):
        return hidden


@pytest.mark.parametrize("exit_layer", [0, 2])
def test_costs_are_measured_on_scratch_sequences_within_a_budget(exit_layer):
    target, draft, freed = SlowDecoder(), SlowDecoder(), []
    drafter = type("D", (), {"exit_layer": exit_layer, "runs_last_draft": bool(exit_layer)})

    class Sequence:
        def free(self):
            freed.append(self)

    def measure(budget_s):
        own = Sequence()
        passes = ScratchPasses(lambda count: draft.forward([0] * count, [own], [count]), None, own.free)
        return measure_costs(target, drafter, Sequence, passes, token_counts=(1, 2, 4, 64), budget_s=budget_s)

    costs = measure(10)
    assert len(freed) == 2 and costs.runs_last_draft == bool(exit_layer) and costs.last is None
    for curve in (costs.draft, costs.verify):
        assert [n for n, _ in curve] == [1, 2, 4, 64]
        seconds = [s for _, s in curve]
        assert seconds == sorted(seconds) and seconds[0] >= 0.0022 and seconds[-1] >= 0.0148
    assert all(options["first_layer"] == exit_layer and (options["hidden"] is None) == (exit_layer == 0) for _, options in target.calls)
    hurried = measure(0)
    assert len(hurried.draft) == len(hurried.verify) == 3
