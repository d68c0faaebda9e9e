"""rANS: Triton, its twin and the codec's CPU coder write and read the same words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

from codec import rans as cpu
from codec import rate
from kernels.rans import reference
from kernels.rans import triton as gpu

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(scope="module")
def model():
    return rate.EntropyModel.laplace()


@pytest.fixture(scope="module")
def tables(model):
    return reference.build_tables(*(torch.from_numpy(x.astype(np.int64)) for x in (model.freqs, model.limit, model.gain_freqs)))


def test_the_constants_are_the_codecs():
    ours = (reference.PRECISION_BITS, reference.STATE_LOW, reference.NUM_GAINS, reference.GAIN_ZERO, reference.CLASSES_PER_GAIN)
    assert ours == (rate.PRECISION_BITS, cpu.STATE_LOW, rate.NUM_GAINS, rate.GAIN_ZERO, rate.CLASSES_PER_GAIN)


# span sizes, components, tokens a lane, per-token steps
CASES = [([1], 1, 1, False), ([5, 1, 8], 7, 2, True), ([9, 16], 12, 4, False), ([40], 3, 1, True), ([17], 5, 8, True)]
if torch.cuda.is_available():
    CASES += [([64] * 40 + [63, 1, 37], 300, 2, False), ([64] * 9, 800, 4, True), ([200, 64], 100, 1, False)]


def _problem(sizes, depth, with_shifts, seed):
    generator = np.random.default_rng(seed)
    tokens = sum(sizes)
    classes = np.sort(generator.integers(0, 75, depth))[::-1].astype(np.int32).copy()
    shifts = generator.integers(-8, 8, tokens).astype(np.int32) * -2 if with_shifts else None
    gains = generator.integers(4, 13, tokens).astype(np.uint8)
    own = np.broadcast_to(classes, (tokens, depth)) if shifts is None else np.clip(classes + shifts[:, None], 0, rate.NUM_CLASSES - 1)
    scale = rate.class_scale(np.clip(own + 2 * (gains.astype(int)[:, None] - 8), 0, rate.NUM_CLASSES - 1))
    q = np.rint(generator.laplace(size=(tokens, depth)) * scale * 0.9)
    q[generator.random(q.shape) < 0.02] *= 9  # some escapes
    return classes, shifts, gains, np.ascontiguousarray(own), np.clip(q, -32000, 32000).astype(np.int32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_coders_one_stream(case, model, tables, device):
    sizes, depth, per_lane, with_shifts = case
    classes, shifts, gains, own, q = _problem(sizes, depth, with_shifts, depth)
    streams = cpu.encode(cpu.RansTables.build(model), q, own, gains, sizes, per_lane)
    states = np.concatenate([s.states for s in streams])
    words = np.concatenate([s.words for s in streams])
    tables = tables.to(device)

    arguments = [torch.from_numpy(x).to(device) for x in (q.astype(np.int16), classes, gains)]
    starts = torch.from_numpy(np.cumsum([0, *sizes])).to(device)
    own_shifts = None if shifts is None else torch.from_numpy(shifts).to(device)
    options = {"shifts": own_shifts, "max_span_tokens": max(sizes)}
    twin, no_ballot = {"shifts": own_shifts}, {**options, "ballot": False}
    for coder, more in ((reference.rans_encode, twin), (gpu.rans_encode, options), (gpu.rans_encode, no_ballot)):
        coded = coder(tables, *arguments, starts, per_lane, **more)
        assert coded.word_starts.tolist() == np.cumsum([0] + [len(s.words) for s in streams]).tolist()
        assert np.array_equal(coded.states[: len(states)].cpu().numpy().view(np.uint32), states)
        assert np.array_equal(coded.words[: len(words)].cpu().numpy().view(np.uint16), words)

    limit = model.limit[np.clip(own + 2 * (gains.astype(int)[:, None] - 8), 0, rate.NUM_CLASSES - 1)]
    want = np.where(np.abs(q) > limit, limit + 1, q)
    coded = reference.RansStreams(
        torch.from_numpy(states.view(np.int32)).to(device), torch.from_numpy(words.view(np.int16)).to(device), coded.word_starts
    )
    options["num_tokens"] = no_ballot["num_tokens"] = sum(sizes)
    for coder, more in ((reference.rans_decode, twin), (gpu.rans_decode, options), (gpu.rans_decode, no_ballot)):
        decoded = coder(tables, coded, arguments[1], starts, per_lane, **more)
        assert np.array_equal(decoded.q.cpu().numpy(), want)
        assert np.array_equal(decoded.gains.cpu().numpy(), gains)
        assert decoded.intact.all()


@pytest.mark.parametrize("damage", ["word", "state", "short"])
def test_a_damaged_stream_is_noticed_and_harms_no_neighbour(damage, tables, device):
    sizes = [6, 7]
    classes, _, gains, _, q = _problem(sizes, 9, False, 3)
    tables = tables.to(device)
    q_, classes_, gains_ = (torch.from_numpy(x).to(device) for x in (q.astype(np.int16), classes, gains))
    starts = torch.tensor([0, 6, 13], device=device)
    coded = gpu.rans_encode(tables, q_, classes_, gains_, starts, 2, max_span_tokens=7)
    if damage == "word":
        coded.words[0] ^= 1
    elif damage == "state":
        coded.states[1] ^= 4096
    else:
        coded.word_starts[0] += 2
    decoded = gpu.rans_decode(tables, coded, classes_, starts, 2, num_tokens=13, max_span_tokens=7)
    again = reference.rans_decode(tables, coded, classes_, starts, 2)
    assert decoded.intact.tolist() == again.intact.tolist() == [False, True]
    assert torch.equal(decoded.q[6:], again.q[6:])


def test_tables_that_do_not_sum_up_are_refused(model):
    freqs = torch.from_numpy(model.freqs.astype(np.int64))
    limits, gains = torch.from_numpy(model.limit.astype(np.int64)), torch.from_numpy(model.gain_freqs.astype(np.int64))
    with pytest.raises(ValueError, match="sum to"):
        reference.build_tables(freqs + (torch.arange(len(freqs)) == 3), limits, gains)
    with pytest.raises(ValueError, match="fit together"):
        reference.build_tables(freqs[:-1], limits, gains)
