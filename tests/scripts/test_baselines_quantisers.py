"""Parts of the baselines against outside truth: published distortions, brute force, another coder's sizes."""

from __future__ import annotations

import itertools

import constriction
import numpy as np
import pytest
import torch

from baselines.gaussian_grids import lloyd_max, plane_grid
from baselines.histogram_coder import TOTAL, decode, encode, frequencies
from baselines.kvtc import Kvtc
from baselines.kvtc_allocation import Option, allocate, dequantise, options, quantise
from baselines.packing import deflate, inflate, pack_codes, unpack_codes
from baselines.turboquant import TurboQuant
from codec.errors import CorruptedCode
from codec.spec import NUM_SINKS, KvLayout


@pytest.mark.parametrize(("bits", "published"), [(1, 0.36), (2, 0.117), (3, 0.0345), (4, 0.0095)])
def test_turboquant_reaches_the_published_distortion(bits: int, published: float) -> None:
    """TurboQuant (2504.19874): D_mse of unit vectors at 1..4 bits, within 3%."""
    layout = KvLayout(num_layers=1, num_kv_heads=1, head_dim=128)
    kv = torch.randn(3000, layout.dim, generator=torch.Generator().manual_seed(0))
    baseline = TurboQuant(layout, bits)
    decoded = baseline.decode(baseline.encode(kv))
    a, b = kv[NUM_SINKS:].reshape(-1, 128), decoded[NUM_SINKS:].reshape(-1, 128)
    distortion = ((a - b).pow(2).sum(1) / a.pow(2).sum(1)).mean().item()
    assert abs(distortion / published - 1) < 0.03


def test_published_codebooks() -> None:
    """The paper's 1- and 2-bit centroids, times sqrt(d)."""
    torch.testing.assert_close(lloyd_max(1), torch.tensor([-0.798, 0.798]), atol=1e-3, rtol=0)
    torch.testing.assert_close(lloyd_max(2), torch.tensor([-1.510, -0.453, 0.453, 1.510]), atol=1e-3, rtol=0)


def test_plane_grid_beats_the_product_of_scalars() -> None:
    points = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(5))
    error = torch.cdist(points, plane_grid(2)).amin(1).pow(2).mean().item() / 2
    assert 0.100 < error < 0.1120  # product of 2-bit Lloyd-Max: 0.1175


def brute_force(choices: list[Option], energies: list[float], budget: int) -> float:
    """Least error over every subset of disjoint options within the budget."""
    best = sum(energies)
    for count in range(1, len(energies) + 1):
        for subset in itertools.combinations(choices, count):
            covered = [i for c in subset for i in range(c.start, c.start + c.size)]
            if len(covered) == len(set(covered)) and sum(c.cost for c in subset) <= budget:
                best = min(best, sum(c.error for c in subset) + sum(e for i, e in enumerate(energies) if i not in covered))
    return best


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("budget_per_token", [0, 10, 21, 40, 55, 90])
def test_allocation_equals_brute_force(group: int, budget_per_token: int) -> None:
    generator = torch.Generator().manual_seed(budget_per_token)
    coefficients = torch.randn(16, 5, generator=generator) * torch.tensor([8.0, 4.0, 2.0, 1.0, 0.3])
    energies = coefficients.pow(2).sum(0).tolist()
    choices = options(coefficients, group, (1, 2, 4))
    budget = budget_per_token * group
    blocks = allocate(choices, energies, budget)
    picked = [next(c for c in choices if (c.start, c.size, c.kind) == (b.start, b.size, b.kind)) for b in blocks]
    covered = {i for b in blocks for i in range(b.start, b.start + b.size)}
    assert len(covered) == sum(b.size for b in blocks) and sum(c.cost for c in picked) <= budget
    error = sum(c.error for c in picked) + sum(e for i, e in enumerate(energies) if i not in covered)
    assert error == pytest.approx(brute_force(choices, energies, budget), rel=1e-6)


@pytest.mark.parametrize("kind", ["int2", "int4", "fp8"])
def test_quantiser_error_is_within_half_a_step(kind: str) -> None:
    x = 5 + 3 * torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    decoded = dequantise(*quantise(x, kind), kind)
    spread = x.amax(1) - x.amin(1)
    bound = {"int2": spread / 3 * 0.51, "int4": spread / 15 * 0.51, "fp8": spread / 2 / 16}[kind] + 0.01
    assert bool(((decoded - x).abs().amax(1) <= bound).all())


@pytest.mark.parametrize("group", [1, 32])
def test_kvtc_spends_its_budget_and_no_more(group: int) -> None:
    layout = KvLayout(num_layers=2, num_kv_heads=2, head_dim=64)
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(layout.dim, layout.dim, generator=generator) * torch.logspace(0, -2, layout.dim)[:, None]
    baseline = Kvtc(layout, 1.0, group=group)
    baseline.fit(torch.randn(1500, layout.dim, generator=generator) @ mixing)
    kv = torch.randn(260, layout.dim, generator=generator) @ mixing
    bits = 8 * (len(baseline.encode(kv)) - NUM_SINKS * layout.dim * 2) / ((260 - NUM_SINKS) * layout.dim)
    assert 0.5 < bits < 1.02
    assert len({b.kind for blocks in baseline.blocks for b in blocks}) >= 2
    decoded = baseline.decode(baseline.encode(kv))
    assert (decoded - kv)[NUM_SINKS:].pow(2).sum() < 0.3 * kv[NUM_SINKS:].pow(2).sum()  # one bit without a transform: 0.36


def test_histogram_coder_round_trip_and_size() -> None:
    """Within 1% of the entropy under its own tables plus the lanes' states, and no larger than constriction's ANS plus those states."""
    rng = np.random.default_rng(0)
    channels, tokens, alphabet = 300, 50, 15
    weights = rng.gamma(0.5, size=(channels, alphabet))
    symbols = np.stack([rng.choice(alphabet, tokens, p=w / w.sum()) for w in weights], 1).astype(np.uint8)
    freqs = frequencies(weights * 100, np.ones((channels, alphabet), bool))
    assert (freqs.sum(1) == TOTAL).all() and freqs.min() >= 1
    tables = torch.from_numpy(freqs.astype(np.int32))
    data = encode([torch.from_numpy(symbols)], tables)[0]
    assert np.array_equal(decode([data], tables, [tokens])[0].numpy(), symbols)
    ideal = -np.log2(np.take_along_axis(freqs, symbols.T.astype(int), 1) / TOTAL).sum() / 8
    assert ideal <= len(data) <= 1.01 * ideal + 4 * tokens
    other = constriction.stream.stack.AnsCoder()
    for channel in reversed(range(channels)):
        model = constriction.stream.model.Categorical(freqs[channel] / TOTAL, perfect=False)
        other.encode_reverse(symbols[:, channel].astype(np.int32), model)
    assert len(data) <= 1.01 * other.get_compressed().nbytes + 4 * tokens


def test_histogram_coder_refuses_damage() -> None:
    freqs = torch.from_numpy(frequencies(np.ones((40, 5)), np.ones((40, 5), bool)).astype(np.int32))
    data, other = encode(
        [torch.randint(0, 5, (n, 40), generator=torch.Generator().manual_seed(n)).to(torch.uint8) for n in (30, 20)], freqs
    )
    for bad in (data[:-2], data[:50], data + b"\0\0", data[:-1]):
        with pytest.raises(CorruptedCode):
            decode([other, bad], freqs, [20, 30])


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, 101).astype(np.uint8)
    data = pack_codes(codes, bits)
    assert len(data) == -(-101 * bits // 8) and np.array_equal(unpack_codes(data, bits, 101), codes)
    with pytest.raises(CorruptedCode):
        unpack_codes(data + b"\0", bits, 101)


def test_inflate_refuses_bombs_and_garbage() -> None:
    assert inflate(deflate(b"abc"), 3) == b"abc"
    for data, limit in ((deflate(b"\0" * 10**6), 100), (b"garbage", 100), (deflate(b"abc")[:-3], 3)):
        with pytest.raises(CorruptedCode):
            inflate(data, limit)
