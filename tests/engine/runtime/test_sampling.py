"""Logits to probabilities against a definition without tensors; random numbers against published vectors; draws against their distribution."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from engine.errors import InvalidOption
from engine.runtime.filters import _mass_cuts
from engine.runtime.sampling import BatchSampler, SamplingParams, finite_rows, greatest, probabilities
from kernels.accept import COUNTER_SAMPLE, sample_rows
from kernels.philox import philox_uniform
from kernels.philox.reference import philox_words

FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 0.999999},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 9, "top_p": 0.7},
    {"top_k": 9, "top_p": 0.7, "min_p": 0.2},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_probabilities_match_the_definition(filters, temperature, naive_probabilities):
    params = SamplingParams(temperature=temperature, **filters)
    for seed, size, spread in ((0, 50, 2.0), (1, 3000, 0.1), (2, 3, 5.0)):  # 3000 flat logits: the nucleus needs more than the candidates
        logits = torch.randn(2, size, generator=torch.Generator().manual_seed(seed)) * spread
        found = probabilities(logits, [params, params])
        for row, own in zip(found, logits, strict=True):
            wanted = torch.tensor(naive_probabilities(own.double().tolist(), params))
            assert torch.allclose(row.double(), wanted.double(), atol=1e-6)


def test_the_greatest_is_pytorchs_with_ties_nan_and_infinities():
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randn(3, 1001, generator=generator),
        torch.randn(4, 50, generator=generator).round(),
        torch.zeros(2, 7),
        torch.full((1, 3), -math.inf),
    ]
    rows += [
        torch.tensor([[1.0, math.nan, 3.0, math.nan], [2.0, math.inf, math.inf, 0.0]]),
        torch.randn(6, 40, generator=generator)[::2, ::3],
    ]
    for logits in rows:
        assert torch.equal(greatest(logits), logits.argmax(-1)) and greatest(logits).dtype == torch.int64
    assert greatest(rows[2]).tolist() == [0, 0]


def test_rows_do_not_depend_on_the_batch():
    logits = torch.randn(len(FILTERS) + 1, 3000, generator=torch.Generator().manual_seed(3))
    params = [SamplingParams(temperature=0.8, **f) for f in FILTERS] + [SamplingParams()]
    together = probabilities(logits, params)
    for i, own in enumerate(params):
        assert torch.equal(together[i], probabilities(logits[i : i + 1], [own])[0])


def test_extreme_inputs_stay_distributions():
    logits = torch.tensor([[3e4, -3e4, 0.0, -math.inf]])
    for params in (
        SamplingParams(temperature=1e-6),
        SamplingParams(temperature=1e6),
        SamplingParams(temperature=1.0, top_p=0.5, min_p=0.5),
    ):
        row = probabilities(logits, [params])[0]
        assert row.isfinite().all() and abs(row.sum().item() - 1) < 1e-6 and row[3] == 0


def test_ties_at_the_kth_logit_are_all_kept():
    row = probabilities(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]), [SamplingParams(temperature=1.0, top_k=2, top_p=0.9)])[0]
    assert torch.allclose(row, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3, 0]))


def test_the_nucleus_ends_where_it_holds_exactly_the_mass():
    """Powers of two, whose sums are exact: with top_p at an edge the token after it must go."""
    logits = torch.log2(torch.tensor([[0.5, 0.25, 0.125, 0.125]])) * math.log(2)
    values = torch.tensor([[0.0, -1.0, -2.0, -3.0]]) * math.log(2)
    row = probabilities(logits, [SamplingParams(temperature=1.0, top_p=0.5)])[0]
    assert row.tolist() == [1, 0, 0, 0]
    cuts, reached = _mass_cuts(torch.zeros(1, 4), torch.tensor([-math.inf]), torch.tensor([2.0], dtype=torch.float64))
    assert reached.item() and cuts.item() == 0
    descending = values.double().float()
    ends = descending.exp().double().cumsum(-1)
    for kept in range(4):
        cut, reached = _mass_cuts(descending, torch.tensor([-math.inf]), ends[:, kept])
        assert cut.item() == descending[0, kept].item() and reached.item()
    assert not _mass_cuts(descending, torch.tensor([-math.inf]), ends[:, -1] + 1e-9)[1].item()


def test_min_p_never_lowers_the_cut_of_another_filter():
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    for filters, kept in (
        ({"top_k": 1, "min_p": 0.1}, 1),
        ({"top_p": 0.6, "min_p": 0.1}, 2),
        ({"top_k": 3, "min_p": 0.7}, 2),
        ({"top_p": 0.95, "min_p": 0.45}, 3),
    ):
        row = probabilities(logits, [SamplingParams(temperature=1.0, **filters)])[0]
        assert (row > 0).tolist() == [i < kept for i in range(4)], filters
        mixed = probabilities(
            logits.expand(2, -1), [SamplingParams(temperature=1.0, **filters), SamplingParams(temperature=1.0, min_p=0.3)]
        )
        assert torch.equal(mixed[0], row) and (mixed[1] > 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_callers_default_dtype_does_not_matter(filters):
    params = [SamplingParams(temperature=0.8, **filters, seed=s) for s in (None, 3)]
    logits = torch.randn(2, 3000, generator=torch.Generator().manual_seed(5))
    wanted = BatchSampler(params, [1, 3], 3000).draw(logits, [0, 1], [4, 4])
    torch.set_default_dtype(torch.float64)
    try:
        found = BatchSampler(params, [1, 3], 3000).draw(logits, [0, 1], [4, 4])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(found[1], wanted[1], strict=True))


def test_draft_and_target_draw_the_same_token_from_the_same_distribution_under_a_seed_alone():
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(6))
    rows, places = [0] * 200, list(range(200))
    for seed, same in ((7, True), (None, False)):
        sampler = BatchSampler([SamplingParams(temperature=1.0, seed=seed)], [7], 50)
        draft, target = sampler.draw(logits, rows, places)[0], sampler.draw(logits, rows, places, COUNTER_SAMPLE)[0]
        assert torch.equal(draft, target) == same
    ids = torch.arange(0, 100, 2)
    wide = BatchSampler([SamplingParams(temperature=1.0, seed=7)], [7], 100)
    reduced, found = wide.draw(logits, rows, places, token_ids=ids)
    full = torch.full((200, 100), -math.inf).index_copy_(1, ids, logits)
    assert torch.equal(reduced, wide.draw(full, rows, places, COUNTER_SAMPLE)[0]), "a reduced vocabulary has the noise of the target's ids"
    assert torch.allclose(torch.stack(found), probabilities(full, [wide.params[0]] * 200))


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_that_are_not_finite_are_found(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    logits = torch.zeros(5, 7)
    logits[1, 3], logits[2, 0], logits[4, 6] = math.nan, math.inf, -math.inf
    assert finite_rows(logits).tolist() == [True, False, False, True, False]


def test_a_greedy_row_is_a_point_mass():
    row = probabilities(torch.tensor([[1.0, 5.0, 2.0]]), [SamplingParams(temperature=0)])[0]
    assert row.tolist() == [0.0, 1.0, 0.0]


def _words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([v]) for v in values)


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_matches_the_published_vectors(counter, key, wanted):
    assert tuple(int(w) for w in philox_words(_words(*counter), _words(*key))) == wanted
    assert philox_words(counter, key) == wanted


def test_few_and_many_uniform_numbers_are_the_same():
    seeds, positions = torch.tensor([0, 5, 2**63 - 1, -3])[:, None], torch.tensor([0, 1, 2**40 + 3])
    many = philox_uniform(seeds, positions.repeat(9), 2)
    assert torch.equal(philox_uniform(seeds, positions, 2), many[:, :3]) and torch.equal(many[:, :3], many[:, -3:])
    assert philox_uniform(seeds[0], positions[1], 2).shape == (1,)


def test_uniform_numbers_are_spread_evenly_and_differ_by_every_argument(chi_square_p_value):
    seeds = torch.arange(40000) * (2**33 + 7)
    numbers = philox_uniform(seeds, torch.tensor(5), 1)
    assert numbers.dtype == torch.float32 and numbers.min() >= 0 and numbers.max() < 1
    counts = Counter((numbers * 20).long().tolist())
    assert chi_square_p_value(dict(counts), {i: 0.05 for i in range(20)}) > 1e-3
    for seed, position, counter in ((1, 5, 1), (0, 6, 1), (0, 5, 2)):
        other = philox_uniform(seeds + seed, torch.tensor(position), counter)
        assert (other == numbers).float().mean() < 0.01
        covariance = ((numbers - 0.5) * (other - 0.5)).mean()
        assert abs(covariance * 12) < 0.02  # 1/12 is the variance of a uniform number


@pytest.mark.parametrize("vocab", [1, 2, 1023, 1024, 1025, 5000])
def test_drawn_rows_never_have_weight_zero(vocab):
    generator = torch.Generator().manual_seed(vocab)
    weights = torch.rand(64, vocab, generator=generator) * (torch.rand(64, vocab, generator=generator) < 0.02)
    weights[torch.arange(64), torch.randint(vocab, (64,), generator=generator)] = 0.5
    for uniform in (0.0, 0.5, 1 - 2**-24):
        drawn = sample_rows(weights, torch.full((64,), uniform))
        assert (weights[torch.arange(64), drawn] > 0).all()


def test_draws_follow_the_weights(chi_square_p_value):
    weights = torch.zeros(2500)
    weights[torch.tensor([0, 3, 1023, 1024, 2047, 2499])] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    drawn = sample_rows(weights.expand(6000, -1), philox_uniform(torch.arange(6000), torch.tensor(0), 0))
    expected = {i: w / 21 for i, w in enumerate(weights.tolist()) if w}
    assert chi_square_p_value(dict(Counter(drawn.tolist())), expected) > 1e-3
    assert chi_square_p_value(dict(Counter(drawn.tolist())), {i: 1 / 6 for i in expected}) < 1e-6  # the test can fail


def test_a_sampler_serves_greedy_and_sampled_rows_and_pads_vocabularies():
    params = [SamplingParams(), SamplingParams(temperature=1.0, top_k=2), SamplingParams()]
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 5.0], [9.0, 8.0, 7.0]])
    tokens, probs = BatchSampler(params, [1, 2, 3], vocab_size=5).draw(logits, [0, 1, 2], [7, 7, 7])
    assert tokens[0] == 1 and tokens[2] == 0 and tokens[1] in (0, 2)
    assert probs[0] is None and probs[2] is None and torch.allclose(probs[1], torch.tensor([0.5, 0, 0.5, 0, 0]))
    cut, probs = BatchSampler(params, [1, 2, 3], vocab_size=2).draw(logits[1:2], [1], [7])
    assert probs[0].shape == (2,) and cut.item() in (0, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2},
        {"seed": -1},
        {"seed": 2**63},
        {"stop": "word"},
        {"stop": ("",)},
        {"stop_token_ids": (-1,)},
        {"draft_length": "some"},
        {"draft_length": 65},
        {"draft_length": True},
    ],
    ids=str,
)
def test_values_outside_their_range_are_named_with_a_remedy(wrong):
    with pytest.raises(InvalidOption) as caught:
        SamplingParams(**wrong)
    assert next(iter(wrong)) in caught.value.what and caught.value.remedy


def test_numbers_of_other_libraries_are_numbers():
    import numpy as np

    given = SamplingParams(
        max_new_tokens=np.int64(3),
        temperature=np.float32(0.5),
        top_k=np.int32(4),
        top_p=torch.tensor(0.5),
        seed=torch.tensor(7),
        stop=None,
        stop_token_ids=np.array([5, 6]),
        draft_length=np.int8(2),
    )
    assert given == SamplingParams(max_new_tokens=3, temperature=0.5, top_k=4, top_p=0.5, seed=7, stop_token_ids=(5, 6), draft_length=2)
    assert all(type(getattr(given, name)) is int for name in ("max_new_tokens", "top_k", "seed", "draft_length"))
    assert SamplingParams(stop=["a"], stop_token_ids=[5]) == SamplingParams(stop=("a",), stop_token_ids=(5,))


@pytest.mark.parametrize(
    "name", ["max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "draft_length", "stop", "stop_token_ids"]
)
@pytest.mark.parametrize(
    "value", ["x", b"x", object(), float("nan"), pytest.param(10**400, id="huge"), 1e-300, 1e300, [None], {"a": 1}, True, -1, 1j]
)
def test_parameters_of_a_wrong_kind_are_named(name, value):
    if (name, value) == ("min_p", 1e-300) or (name, value) == ("top_p", 1e-300):
        return  # small, but a share like any other
    with pytest.raises(InvalidOption, match=name):
        SamplingParams(**{name: value})
