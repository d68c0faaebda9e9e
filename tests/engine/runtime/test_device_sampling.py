"""Sampling in captured steps is the sampler's: the same distributions, and the same tokens from the same noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.runtime.device_sampling import Drawing, SamplingState
from engine.runtime.filters import NUCLEUS_CANDIDATES, Filters
from engine.runtime.sampling import BatchSampler, SamplingParams, probabilities
from kernels.accept import COUNTER_SAMPLE

PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3, seed=4),
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=1.0, top_p=0.6, seed=5),
    SamplingParams(temperature=0.9, min_p=0.2),
    SamplingParams(temperature=2.0, top_k=7, top_p=0.5, min_p=0.05),
    SamplingParams(temperature=1.0, top_k=10_000, top_p=0.999),
    SamplingParams(top_k=3, top_p=0.1),
]
SEEDS = [11 * i for i in range(len(PARAMS))]


class Copied:
    """A tensor that notes what is copied into it."""

    is_cuda = False

    def __init__(self, tensor, copies):
        self.tensor, self.copies = tensor, copies

    def copy_(self, source, **options):
        self.copies.append(source)
        return self.tensor.copy_(source, **options)


@pytest.mark.parametrize("scale", [3.0, 0.01], ids=["peaked", "flat"])
@pytest.mark.parametrize("each", [1, 3])
def test_distributions_are_the_samplers(scale, each):
    vocab = 3 * NUCLEUS_CANDIDATES  # a flat nucleus is larger than the first candidates
    logits = scale * torch.randn(len(PARAMS) * each, vocab, generator=torch.Generator().manual_seed(1))
    state = SamplingState(16, torch.device("cpu"))
    drawing = state.set(PARAMS, SEEDS, vocab)
    found = state.distributions(logits, drawing, len(PARAMS), each)
    want = probabilities(logits, [p for p in PARAMS for _ in range(each)])
    sampled = [b * each + i for b, p in enumerate(PARAMS) if not p.greedy for i in range(each)]
    assert torch.equal(found[sampled], want[sampled])
    top_k = 3 * each
    assert (found[top_k] > 0).sum() == 5 and found[top_k].sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("chosen", [range(9), [1, 3, 5, 6], [2, 4], [0, 2, 8], [0, 1]], ids=str)
def test_tokens_are_the_samplers(chosen):
    params, seeds = [PARAMS[i] for i in chosen], [SEEDS[i] for i in chosen]
    state = SamplingState(16, torch.device("cpu"))
    for turn in range(20):
        logits = torch.randn(len(params), 97, generator=torch.Generator().manual_seed(turn))
        positions = [7 + turn + b for b in range(len(params))]
        want, _ = BatchSampler(params, seeds, 97).draw(logits, range(len(params)), positions, COUNTER_SAMPLE)
        best = logits.argmax(-1)
        best[-1] = -1 if turn == 19 else best[-1]  # logits that are not finite
        drawing = state.set(params, seeds, 97)
        found = state.draw(logits, best, torch.tensor(positions), drawing)
        assert found.tolist() == [*want[:-1].tolist(), -1 if turn == 19 else int(want[-1])]
    assert drawing.race == any(p.seed is not None and not p.greedy for p in params)


def test_parameters_follow_the_requests():
    state = SamplingState(8, torch.device("cpu"))
    assert state.set([SamplingParams()], [1], 50) == Drawing() and Drawing().greedy
    one = state.set([SamplingParams(temperature=0.5, seed=1)], [1], 50)
    assert (one.race, one.inverse, one.greedy) == (True, False, False) and state.temperature[0] == 0.5
    assert state.set([SamplingParams(temperature=0.5, seed=1)], [2], 50) == one and state.seed[0] == 2
    state.set([SamplingParams()] * 2, [3, 4], 50)
    assert state.greedy[:2].all() and state.temperature[0] == 1 and not state.coupled[:2].any()
    state.set(PARAMS[:8], SEEDS[:8], 50)
    assert state.seed.tolist() == [0, *SEEDS[1:8]] and state.coupled.tolist() == [p.seed is not None for p in PARAMS[:8]]
    assert state.temperature[1:].tolist() == torch.tensor([p.temperature for p in PARAMS[1:8]]).tolist()
    assert state.filters.top_k.tolist() == [p.top_k for p in PARAMS[:8]]
    assert state.filters.top_p.tolist() == [p.top_p for p in PARAMS[:8]]
    assert state.filters.log_min_p.exp().tolist() == pytest.approx([p.min_p for p in PARAMS[:8]])


def test_parameters_are_uploaded_where_they_matter_and_have_changed(monkeypatch):
    """In one copy, into tensors that stay where they are; what random numbers a greedy request would draw by is never looked at."""
    state, copies = SamplingState(8, torch.device("cpu")), []
    columns = [state.seed, state.temperature, state.greedy, state.coupled, *vars(state.filters).values()]
    assert all(column.data_ptr() % column.element_size() == 0 for column in columns)
    monkeypatch.setattr(state, "_device", Copied(state._device, copies))
    drawn = SamplingParams(temperature=0.5)
    for params, seeds, expected in (
        ([SamplingParams()] * 3, [1, 2, 3], 0),
        ([SamplingParams(seed=5)] * 4, [5, 5, 5, 5], 0),
        ([drawn, SamplingParams()], [6, 7], 1),
        ([drawn, SamplingParams()], [6, 8], 0),
        ([replace(drawn), SamplingParams()], [6, 8], 0),
        ([drawn], [6], 0),
        ([drawn, drawn], [6, 8], 1),
        ([drawn, replace(drawn, top_k=3)], [6, 8], 1),
        ([drawn, replace(drawn, top_k=3)], [7, 8], 1),
    ):
        copies.clear()
        state.set(params, seeds, 50)
        assert len(copies) == expected, (params, seeds)
    assert state.seed[:2].tolist() == [7, 8] and state.filters.top_k[:3].tolist() == [0, 3, 0] and state.temperature[1] == 0.5


def test_candidates_are_as_few_as_the_rows_allow():
    def of(*options):
        return Filters.of([SamplingParams(temperature=1.0, **own) for own in options], 1000)

    assert of({}) == Filters() and not of({}).any
    assert of({"min_p": 0.1}) == Filters(0, False, True)
    assert of({"top_k": 40}, {}) == Filters(64, False, True)
    assert of({"top_k": 40, "top_p": 0.9}, {"top_k": 3}) == Filters(64, True, True)
    assert of({"top_p": 0.9}, {"top_k": 3}) == Filters(1000, True, True)  # who knows how many hold the mass
    assert of({"top_k": 999}) == Filters(1000, False, True) and of({"top_k": 1000}).candidates == 0
    assert Filters.of([SamplingParams(top_k=3)], 1000) == Filters()
