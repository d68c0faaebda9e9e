"""rms_norm, silu_mul, gelu_mul, rope and kv_write in Triton against their twins."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels.gelu_mul import reference as gelu_mul_reference
from kernels.gelu_mul import triton as gelu_mul_triton
from kernels.kv_write import reference as kv_write_reference
from kernels.kv_write import triton as kv_write_triton
from kernels.rms_norm import reference as rms_norm_reference
from kernels.rms_norm import triton as rms_norm_triton
from kernels.rope import reference as rope_reference
from kernels.rope import triton as rope_triton
from kernels.silu_mul import reference as silu_mul_reference
from kernels.silu_mul import triton as silu_mul_triton

pytestmark = pytest.mark.usefixtures("poisoned")
BOUND = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("rows,width", [(1, 1), (3, 60), (5, 1000), (2, 1536), (37, 16)])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_rms_norm(rows, width, dtype, with_residual, device, assert_close):
    generator = torch.Generator().manual_seed(rows * width)
    x, residual = (torch.randn(rows, width, generator=generator).to(device, dtype) * 3 for _ in range(2))
    weight = torch.rand(width, generator=generator).to(device, dtype) + 0.5
    extra = residual if with_residual else None
    got, got_sum = rms_norm_triton.rms_norm(x, weight, 1e-6, extra)
    want, want_sum = rms_norm_reference.rms_norm(x, weight, 1e-6, extra)
    assert_close(got, want, BOUND[dtype])
    assert torch.equal(got_sum, want_sum)


def test_rms_norm_with_a_float32_weight(device, assert_close):
    """Of norms stored less 1: half precision does not hold the sum."""
    x = torch.randn(5, 60, device=device).bfloat16()
    weight = 1 + torch.randn(60, device=device) * 1e-3
    want = rms_norm_reference.rms_norm(x.float(), weight, 1e-6)[0].bfloat16()
    for function in (rms_norm_triton.rms_norm, rms_norm_reference.rms_norm):
        got, _ = function(x, weight, 1e-6)
        assert got.dtype == torch.bfloat16
        assert_close(got, want, BOUND[torch.bfloat16])


def test_rms_norm_three_axes_of_a_slice(device, assert_close):
    wide = torch.randn(3, 10, 16, device=device)
    weight = torch.rand(16, device=device)
    got, _ = rms_norm_triton.rms_norm(wide[:, 2:7], weight, 1e-5)
    assert_close(got, rms_norm_reference.rms_norm(wide[:, 2:7], weight, 1e-5)[0], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("rows,width", [(1, 1), (3, 60), (2, 1500), (0, 8)])
def test_silu_mul(rows, width, dtype, device, assert_close):
    x = torch.randn(rows, 2 * width).to(device, dtype) * 3
    assert_close(silu_mul_triton.silu_mul(x), silu_mul_reference.silu_mul(x.clone()), BOUND[dtype])
    x = torch.cat((x, torch.full_like(x[:, :1], -30.0), torch.full_like(x[:, :1], 30.0)), 1)
    # x / 2 (1 + tanh) of the twin loses digits far below zero, up to 2^-24 of each factor
    assert_close(gelu_mul_triton.gelu_mul(x), gelu_mul_reference.gelu_mul(x.clone()), 4 * BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("tokens,heads,head_dim", [(1, 1, 2), (5, 3, 60), (3, 14, 64), (2, 17, 128)])
def test_rope_is_bit_exact_and_reads_slices(tokens, heads, head_dim, dtype, device):
    wide = torch.randn(tokens, heads + 3, head_dim).to(device, dtype)
    angle = torch.rand(tokens, head_dim // 2, device=device) * 100
    x = wide[:, 1 : heads + 1]
    assert torch.equal(rope_triton.apply_rope(x, angle.cos(), angle.sin()), rope_reference.apply_rope(x, angle.cos(), angle.sin()))


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("tokens,heads,head_dim,page_size", [(1, 1, 16, 1), (7, 3, 60, 5), (9, 2, 64, 16)])
def test_kv_write_touches_its_slots_only(tokens, heads, head_dim, page_size, dtype, device):
    pages = 6
    qkv = torch.randn(tokens, 4 * heads, head_dim).to(device, dtype)
    k, v = qkv[:, heads : 2 * heads], qkv[:, 3 * heads :]
    angle = torch.rand(tokens, head_dim // 2, device=device) * 50
    slots = torch.randperm(max(pages * page_size, tokens), device=device)[:tokens] % (pages * page_size)
    slots = torch.unique(slots)
    if len(slots) > 1:
        slots[-1] = -1  # padding
    k, v, angle = k[: len(slots)], v[: len(slots)], angle[: len(slots)]
    before = torch.randn(2, pages, page_size, heads, head_dim).to(device, dtype)
    got, want = before.clone(), before.clone()
    kv_write_triton.kv_write(k, v, angle.cos(), angle.sin(), slots, got[0], got[1])
    kv_write_reference.kv_write(k, v, angle.cos(), angle.sin(), slots, want[0], want[1])
    assert torch.equal(got, want)
    assert not torch.equal(got, before)


def test_kv_write_refuses_permuted_pages(device):
    pages = torch.zeros(2, 2, 4, 8, device=device).transpose(1, 2)
    rows = torch.zeros(1, 2, 8, device=device)
    table = torch.zeros(1, 4, device=device)
    with pytest.raises(ValueError, match="contiguous"):
        kv_write_triton.kv_write(rows, rows, table, table, torch.zeros(1, dtype=torch.int64, device=device), pages, pages)
