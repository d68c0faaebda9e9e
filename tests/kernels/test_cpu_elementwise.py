"""Compiled norms and rotation of a prompt's rows beside their plain twins."""

from __future__ import annotations

import pytest
import torch

from kernels.cpu_decode import compiled_available, elementwise
from kernels.cpu_decode.elementwise import norm_rows, turn_rows
from kernels.dispatch import VARIABLE
from kernels.rms_norm import reference as norms
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope
from kernels.rope import reference as ropes

pytestmark = pytest.mark.skipif(not compiled_available(), reason="llvmlite is not installed here")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """`torch.empty` gives memory full of NaN."""
    monkeypatch.delenv(VARIABLE, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def ulps(found: torch.Tensor, want: torch.Tensor) -> int:
    """The greatest distance in bf16 numbers, of numbers with the same sign."""
    assert bool(found.isfinite().all()) and torch.equal(found.sign(), want.sign())
    return int((found.view(torch.int16).int() - want.view(torch.int16).int()).abs().max())


@pytest.mark.parametrize("shape", [(1, 16), (7, 576), (3, 5, 48), (300, 1536)])
@pytest.mark.parametrize("adds", [False, True])
def test_norms(shape, adds: bool) -> None:
    x, weight = randn(*shape, scale=3), randn(shape[-1], seed=1)
    other = randn(*shape, seed=2) if adds else None
    found = norm_rows(x, weight, 1e-5, other)
    assert found is not None
    want = norms.rms_norm(x, weight, 1e-5, other)
    assert ulps(found[0], want[0]) <= 1 and torch.equal(found[1], want[1])
    again = rms_norm(x, weight, 1e-5, other)
    assert torch.equal(again[0], found[0]) and torch.equal(again[1], found[1])
    assert (found[1] is x) == (not adds)
    if len(shape) == 2:  # a row is the same bits alone
        one = norm_rows(x[-1:], weight, 1e-5, None if other is None else other[-1:])
        assert one is not None and torch.equal(one[0], found[0][-1:])


@pytest.mark.parametrize(("rows", "heads", "d"), [(1, 1, 32), (7, 3, 64), (130, 12, 96)])
def test_rotation_has_the_same_bits(rows: int, heads: int, d: int) -> None:
    wide = randn(rows, heads + 2, d)
    x, angles = wide[:, 1:-1], torch.rand(rows, d // 2, generator=torch.Generator().manual_seed(3)) * 60
    for cos, sin in ((angles.cos(), angles.sin()), (angles.cos(), -angles.sin())):
        found = turn_rows(x, cos, sin)
        assert found is not None and torch.equal(found, ropes.apply_rope(x, cos, sin)) and torch.equal(found, apply_rope(x, cos, sin))


def test_what_does_not_suit_is_for_plain_pytorch(monkeypatch) -> None:
    x, weight, cos = randn(4, 64), randn(64, seed=1), torch.ones(4, 16)
    assert norm_rows(x, weight, 1e-5, None) is not None
    assert norm_rows(x.float(), weight.float(), 1e-5, None) is None and norm_rows(x, weight.float(), 1e-5, None) is None
    assert norm_rows(x[:, :40].contiguous(), weight[:40], 1e-5, None) is None  # not whole vectors
    assert norm_rows(randn(64, 4).t(), weight, 1e-5, None) is None and norm_rows(x, weight, 1e-5, x.t().contiguous().t()) is None
    assert norm_rows(x[:0], weight, 1e-5, None) is None
    heads = x.view(4, 2, 32)
    assert turn_rows(heads, cos, cos) is not None and turn_rows(heads, cos.bfloat16(), cos) is None
    assert turn_rows(heads.transpose(0, 1), cos, cos) is None and turn_rows(x, cos, cos) is None
    assert turn_rows(randn(4, 2, 48), torch.ones(4, 24), torch.ones(4, 24)) is None
    asked = x.clone().requires_grad_()
    assert norm_rows(asked, weight, 1e-5, None) is None
    with torch.no_grad():
        assert norm_rows(asked, weight, 1e-5, None) is not None
    monkeypatch.setattr(elementwise.torch, "get_num_threads", lambda: 16)
    assert norm_rows(x, weight, 1e-5, None) is None
    monkeypatch.undo()
    monkeypatch.setenv(VARIABLE, "reference")
    assert norm_rows(x, weight, 1e-5, None) is None
