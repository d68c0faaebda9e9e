"""Exponential races: the plain definition against the pruned twin, the Triton kernel against it, the draws against their distribution."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from kernels.race import reference


def rows_of(n, vocab, sharpness, seed=0, support=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocab, generator=generator) * sharpness
    dropped = torch.rand(n, vocab, generator=generator) > support
    dropped[torch.arange(n), torch.randint(vocab, (n,), generator=generator)] = False
    return torch.softmax(logits.masked_fill(dropped, -torch.inf), -1)


def counters(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**62, (n,), generator=generator), torch.randint(0, 2**35, (n,), generator=generator)


CASES = [
    (vocab, sharpness, support)
    for vocab in (1, 3, 64, 65, 1000, 5003)
    for sharpness, support in ((0.0, 1.0), (1.0, 1.0), (6.0, 1.0), (2.0, 0.01))
]


@pytest.mark.parametrize(("vocab", "sharpness", "support"), CASES)
def test_the_winner_is_the_smallest_of_noise_over_probability(vocab, sharpness, support):
    probs = rows_of(12, vocab, sharpness, vocab, support)
    seeds, positions = counters(12, vocab)
    found = reference.race(probs, seeds, positions)
    for row, seed, position, winner in zip(probs, seeds.tolist(), positions.tolist(), found.tolist(), strict=True):
        with np.errstate(divide="ignore"):
            times = reference.exponentials(seed, position, vocab) / row.double().numpy()
        assert times.argmin() == winner and row[winner] > 0


def test_noise_is_exponential_independent_and_a_function_of_seed_position_and_index():
    rows = np.stack([reference.exponentials(seed, 7, 128) for seed in range(2000)])
    for column in (0, 1, 63, 64, 127):
        assert stats.kstest(rows[:, column], "expon").pvalue > 1e-3
    assert stats.kstest(rows[:, 64:].min(1) * 64, "expon").pvalue > 1e-3, "the least of a block has rate 64"
    ranks = np.log(rows[:, :64])  # of one block: the least value, which they share, must not show
    correlation = np.corrcoef(ranks, rowvar=False) - np.eye(64)
    assert np.abs(correlation).max() < 5 / np.sqrt(2000)
    assert np.bincount(rows[:, :64].argmin(1), minlength=64).min() > 5, "every index of a block can have its least"
    assert np.array_equal(reference.exponentials(5, 7, 200)[:128], rows[5]), "the vocabulary's size does not matter"
    for other in (reference.exponentials(6, 7, 128), reference.exponentials(5, 8, 128), reference.exponentials(5, 7 + 2**32, 128)):
        assert not np.isclose(other, rows[5]).any()


@pytest.mark.parametrize("vocab,draws", [(5, 20000), (300, 10000)])
def test_winners_follow_the_probabilities(vocab, draws):
    probs = rows_of(1, vocab, 1.5, 3)
    found = reference.race(probs.expand(draws, -1), torch.arange(draws), torch.full((draws,), 11))
    counts = Counter(found.tolist())
    expected = probs[0].double().numpy() * draws
    large = expected >= 5
    observed = np.array([counts.get(i, 0) for i in range(vocab)])
    cells, wanted = [*observed[large], observed[~large].sum()], [*expected[large], expected[~large].sum()]
    keep = np.array(wanted) > 1
    statistic = ((np.array(cells)[keep] - np.array(wanted)[keep]) ** 2 / np.array(wanted)[keep]).sum()
    assert stats.chi2.sf(statistic, keep.sum() - 1) > 1e-3


def test_two_rows_agree_at_least_as_often_as_the_paper_says():
    p, q = rows_of(1, 300, 1.0, 1), rows_of(1, 300, 1.0, 1)
    q = torch.softmax(q.log() + 0.5 * torch.randn(1, 300, generator=torch.Generator().manual_seed(2)), -1)
    distance = (p - q).abs().sum().item() / 2
    seeds, positions = torch.arange(5000), torch.zeros(5000, dtype=torch.int64)
    agreed = (reference.race(p.expand(5000, -1), seeds, positions) == reference.race(q.expand(5000, -1), seeds, positions)).float().mean()
    deviation = 4 * 0.5 / 5000**0.5
    assert (1 - distance) / (1 + distance) - deviation < agreed < 1 - distance + deviation


def test_a_point_mass_wins_whatever_the_noise():
    probs = torch.zeros(64, 500)
    probs[torch.arange(64), torch.arange(64) * 7] = 1.0
    assert reference.race(probs, *counters(64)).tolist() == [7 * i for i in range(64)]
    assert reference.race(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("vocab", "sharpness", "support"), CASES)
def test_the_kernel_names_the_same_winners(vocab, sharpness, support, device):
    triton_race = pytest.importorskip("kernels.race.triton")
    n = 5
    probs = rows_of(n, vocab, sharpness, vocab, support).to(device)
    seeds, positions = (x.to(device) for x in counters(n, vocab))
    assert torch.equal(triton_race.race(probs, seeds, positions), reference.race(probs, seeds, positions))
    assert triton_race.race(probs[:0], seeds[:0], positions[:0]).shape == (0,)
    # a batch of one flattens into a view of one number, and every second number is a view, too
    one, apart = seeds[:1, None].expand(1, len(probs)).flatten(), positions.repeat_interleave(2)[::2]
    assert one.stride() == (0,) and apart.stride() == (2,)
    assert torch.equal(triton_race.race(probs, one, apart), reference.race(probs, one, apart))
