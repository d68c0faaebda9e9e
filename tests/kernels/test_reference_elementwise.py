"""The reference kernels against definitions written out another way, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.dispatch import use_triton
from kernels.kv_write import kv_write
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope
from kernels.silu_mul import silu_mul

DTYPES = {"f32": (torch.float32, 2e-6), "bf16": (torch.bfloat16, 6e-3)}


@pytest.fixture(params=DTYPES, ids=list(DTYPES))
def precision(request):
    """(dtype, bound of the relative error)."""
    return DTYPES[request.param]


@pytest.fixture(autouse=True)
def reference_kernels(monkeypatch):
    monkeypatch.setenv("FORETOLD_KERNELS", "reference")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got, want, bound):
    return bool((got.double() - want).norm() <= bound * want.norm())


@pytest.mark.parametrize("shape", [(1, 7), (5, 48), (3, 4, 16)])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(precision, shape, residual):
    dtype, bound = precision
    x, weight = randn(*shape).to(dtype), randn(shape[-1], seed=1).to(dtype)
    other = randn(*shape, seed=2).to(dtype) if residual else None
    normed, stream = rms_norm(x, weight, 1e-3, other)
    total = x if other is None else x + other
    wide = total.double()
    want = wide / torch.sqrt((wide * wide).sum(-1, keepdim=True) / shape[-1] + 1e-3) * weight.double()
    assert torch.equal(stream, total) and normed.dtype == dtype
    assert close(normed, want, bound)


@pytest.mark.parametrize("shape", [(1, 2), (5, 66)])
def test_silu_mul(precision, shape):
    dtype, bound = precision
    x = (randn(*shape) * 3).to(dtype)
    gate, up = x.double()[:, : shape[1] // 2], x.double()[:, shape[1] // 2 :]
    got = silu_mul(x)
    assert got.dtype == dtype and close(got, gate / (1 + torch.exp(-gate)) * up, bound)


@pytest.mark.parametrize("shape", [(1, 2, 4), (7, 3, 16), (3, 2, 5, 8), (6, 10)])
def test_apply_rope_is_a_complex_turn_and_back(precision, shape):
    dtype, bound = precision
    x, half = randn(*shape).to(dtype), shape[-1] // 2
    angle = randn(shape[0], half, seed=1).double() * 3
    wide = x.double()
    turned = torch.complex(wide[..., :half], wide[..., half:]) * torch.exp(1j * angle).view(shape[0], *(1,) * (len(shape) - 2), half)
    got = apply_rope(x, angle.cos().float(), angle.sin().float())
    assert got.dtype == dtype and got.shape == x.shape
    assert close(got, torch.cat((turned.real, turned.imag), dim=-1), bound)
    assert close(apply_rope(got, angle.cos().float(), -angle.sin().float()), wide, 2 * bound)


def test_apply_rope_of_nothing_is_nothing():
    assert apply_rope(torch.zeros(0, 3, 8), torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 3, 8)


def test_kv_write_touches_only_its_slots(precision):
    dtype, _ = precision
    k, v = randn(5, 2, 8).to(dtype), randn(5, 2, 8, seed=1).to(dtype)
    angle = randn(5, 4, seed=2)
    slots = torch.tensor([13, 0, 7, 6, 19])
    k_pages, v_pages = torch.full((5, 4, 2, 8), math.nan, dtype=dtype), torch.full((5, 4, 2, 8), math.nan, dtype=dtype)
    kv_write(k, v, angle.cos(), angle.sin(), slots, k_pages, v_pages)
    assert torch.equal(k_pages.view(20, 2, 8)[slots], apply_rope(k, angle.cos(), angle.sin()))
    assert torch.equal(v_pages.view(20, 2, 8)[slots], v)
    others = [slot for slot in range(20) if slot not in slots.tolist()]
    assert k_pages.view(20, 2, 8)[others].isnan().all() and v_pages.view(20, 2, 8)[others].isnan().all()


def test_dispatch_obeys_its_variable(monkeypatch):
    x = torch.zeros(1)
    assert not use_triton(x)
    monkeypatch.delenv("FORETOLD_KERNELS")
    assert not use_triton(x), "tensors on a CPU run the reference"
    monkeypatch.setenv("FORETOLD_KERNELS", "cuda")
    with pytest.raises(ValueError, match="FORETOLD_KERNELS"):
        use_triton(x)
    monkeypatch.setenv("FORETOLD_KERNELS", "triton")
    monkeypatch.setattr("kernels.dispatch.triton_importable", lambda: True)
    assert use_triton(x)
    monkeypatch.setattr("kernels.dispatch.triton_importable", lambda: False)
    with pytest.raises(RuntimeError, match="not installed"):
        use_triton(x)
