"""philox and accept in Triton against their twins: the results are integers, so they must be the same."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels.accept import reference as accept_reference
from kernels.accept import triton as accept_triton
from kernels.philox import reference as philox_reference
from kernels.philox import triton as philox_triton

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("counter", [0, 1, 2, 2**31 + 5])
def test_philox_is_the_same_number(counter, device):
    generator = torch.Generator().manual_seed(counter % 1000)
    seed = torch.randint(-(2**62), 2**62, (301,), generator=generator).to(device)
    position = torch.randint(0, 2**40, (301,), generator=generator).to(device)
    got = philox_triton.philox_uniform(seed, position, counter)
    assert torch.equal(got, philox_reference.philox_uniform(seed, position, counter))
    assert torch.equal(
        philox_triton.philox_uniform(seed[:1], position, counter), philox_reference.philox_uniform(seed[:1], position, counter)
    )


def _distributions(rows, vocab, generator, sharpness):
    return torch.softmax(torch.randn(rows, vocab, generator=generator) * sharpness, -1)


@pytest.mark.parametrize("vocab", [1, 7, 1024, 5000])
@pytest.mark.parametrize("num_drafts", [[0], [3], [0, 2, 5], [1, 1, 0, 4, 2]], ids=str)
def test_accept_matches_the_twin(vocab, num_drafts, device):
    generator = torch.Generator().manual_seed(vocab + sum(num_drafts))
    drafts = sum(num_drafts)
    for sharpness in (0.5, 4.0):
        p = _distributions(drafts + len(num_drafts), vocab, generator, sharpness)
        q = _distributions(max(drafts, 1), vocab, generator, sharpness)[:drafts]
        if drafts > 1:
            p[0] = q[0]  # nothing left over after a rejection that cannot happen
        tokens = torch.multinomial(q, 1, generator=generator)[:, 0] if drafts else torch.zeros(0, dtype=torch.int64)
        seeds = torch.randint(0, 2**60, (len(num_drafts),), generator=generator)
        positions = torch.randint(0, 1000, (len(num_drafts),), generator=generator)
        arguments = [x.to(device) for x in (p, q, tokens, torch.tensor(num_drafts), seeds, positions)]
        got = accept_triton.accept(*arguments, max(num_drafts))
        want = accept_reference.accept(*arguments, max(num_drafts))
        assert torch.equal(got.num_accepted, want.num_accepted)
        assert torch.equal(got.next_token, want.next_token)


def test_accept_never_draws_a_word_of_probability_zero(device):
    vocab, batch = 3000, 16
    p = torch.zeros(batch, vocab)
    p[torch.arange(batch), torch.arange(batch) * 187] = 1.0
    zeros = torch.zeros(batch, dtype=torch.int64)
    arguments = [x.to(device) for x in (p, torch.zeros(0, vocab), torch.zeros(0, dtype=torch.int64), zeros, torch.arange(batch), zeros)]
    got = accept_triton.accept(*arguments, 0)
    assert got.next_token.tolist() == [187 * i for i in range(batch)]
    assert got.num_accepted.tolist() == [0] * batch
