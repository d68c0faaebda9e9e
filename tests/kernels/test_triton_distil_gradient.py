"""The gradient of a distillation: the Triton kernel (interpreted without a GPU) against its twin, and the twin against autograd."""

from __future__ import annotations

import pytest
import torch

from kernels.distil_gradient import reference

triton_kernel = pytest.importorskip("kernels.distil_gradient.triton")

SHAPES = [(1, 1), (3, 40), (5, 2048), (2, 2049), (4, 5003)]


def case(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """(draft's logits, the target's, their log sums, weights); the first row's are the same in both."""
    generator = torch.Generator().manual_seed(rows * size)
    draft, target = (3 * torch.randn(rows, size, generator=generator) for _ in range(2))
    draft[0] = target[0]
    # the rest of the vocabulary, a tenth of the mass or so
    log_sum = target.to(dtype).float().logsumexp(-1) + 0.2 * torch.rand(rows, generator=generator)
    weight = torch.rand(rows, generator=generator)
    return draft.to(device, dtype), target.to(device, dtype), log_sum.to(device), weight.to(device)


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows,size", SHAPES)
def test_the_kernel_matches_its_twin(rows, size, dtype, weighted, mix, device, assert_close, poisoned):
    draft, target, log_sum, weight = case(rows, size, dtype, device)
    want, got = draft.clone(), draft.clone()
    expected = reference.distil_gradient(want, target, log_sum, mix, weight if weighted else None)
    found = triton_kernel.distil_gradient(got, target, log_sum, mix, weight if weighted else None)
    if size > 1:
        # where q is nearly p, rounding alone says which of the two is larger
        assert_close(got, want, 1e-2 if dtype == torch.bfloat16 else 1e-3)
    for name in ("accepted", "covered"):
        assert_close(getattr(found, name), getattr(expected, name), 1e-5)
    assert torch.allclose(found.divergence, expected.divergence, atol=1e-4) and torch.equal(found.best, expected.best)


def test_the_first_of_equal_logits_is_the_best(device):
    draft = torch.zeros(2, 4100, device=device)
    draft[0, [3000, 70, 4099]] = 2.0
    found = triton_kernel.distil_gradient(draft, torch.zeros_like(draft), torch.full((2,), 9.0, device=device), 0.0)
    assert found.best.tolist() == [70, 0]


@pytest.mark.parametrize("mix", [0.0, 0.4, 1.0])
def test_the_twin_is_the_gradient_of_the_loss(mix):
    draft, target, log_sum, weight = case(6, 50, torch.float64, torch.device("cpu"))
    logits = draft.clone().requires_grad_()
    p, log_q = (target - log_sum[:, None]).exp(), torch.log_softmax(logits, -1)
    divergence = (p * (p.log() - log_q)).sum(-1)
    accepted = torch.minimum(p, log_q.exp()).sum(-1)
    (weight * ((1 - mix) * divergence + mix * (1 - accepted))).sum().backward()
    found = reference.distil_gradient(draft, target, log_sum, mix, weight)
    assert torch.allclose(draft[1:], logits.grad[1:], atol=1e-5), "the first row has p and q alike up to a factor"
    assert torch.allclose(found.divergence.double(), divergence.detach(), atol=1e-5)
    assert torch.allclose(found.accepted.double(), accepted.detach(), atol=1e-5)
