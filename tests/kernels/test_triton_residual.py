"""gather_kv, residual_encode and residual_decode in Triton against their twins."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels.residual_decode import reference as decode_reference
from kernels.residual_decode import triton as decode_triton
from kernels.residual_encode import reference as encode_reference
from kernels.residual_encode import triton as encode_triton

pytestmark = pytest.mark.usefixtures("poisoned")
SMALL = encode_triton.ProductConfig(block_m=32, block_n=32, block_k=16, num_warps=4, num_stages=2)
CONFIG = None if torch.cuda.is_available() else SMALL
SHAPES = [(1, 1, 1, 16, 5, 0), (9, 2, 3, 32, 40, 7), (70, 3, 2, 64, 33, 16)]  # T, L, G, d, K, r
if torch.cuda.is_available():
    SHAPES += [(1000, 28, 2, 128, 1349, 300), (513, 30, 3, 64, 894, 64)]


def _pool(layers, pages, page_size, heads, head_dim, dtype, generator):
    kv = torch.randn(layers, 2, pages, page_size, heads, head_dim, generator=generator)
    kv[:, 0] += 20 * torch.randn(layers, 1, 1, heads, head_dim, generator=generator)
    return kv.to(dtype)


def _setup(shape, dtype, device):
    tokens, layers, heads, head_dim, components, rank = shape
    generator = torch.Generator().manual_seed(tokens)
    page_size = 8
    pages = -(-tokens // page_size) + 2
    kv = _pool(layers, pages, page_size, heads, head_dim, dtype, generator).to(device)
    slots = torch.randperm(pages * page_size, generator=generator)[:tokens].to(device)
    angle = (torch.rand(tokens, head_dim // 2, generator=generator) * 60).to(device)
    dim = layers * 2 * heads * head_dim
    latents = torch.randn(tokens, rank, generator=generator).to(device, dtype) if rank else None
    weight = torch.randn(dim + rank, components, generator=generator).to(device, dtype) / dim**0.5
    return kv, slots, angle.cos(), angle.sin(), latents, weight, generator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_kv(shape, dtype, device, assert_close):
    kv, slots, cos, sin, _, _, generator = _setup(shape, dtype, device)
    for first_layer in {0, shape[1] - 1}:
        dim = (shape[1] - first_layer) * 2 * shape[2] * shape[3]
        mean = torch.randn(dim, generator=generator).to(device) * 20
        want = encode_reference.gather_kv(kv, slots, cos, sin, mean, first_layer)
        assert_close(encode_triton.gather_kv(kv, slots, cos, sin, mean, first_layer), want, 1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_encode(shape, dtype, device):
    tokens, layers, heads, head_dim, components, _ = shape
    _, _, _, _, latents, weight, generator = _setup(shape, dtype, device)
    y = torch.randn(tokens, layers * 2 * heads * head_dim, generator=generator).to(device, dtype)
    bias = torch.randn(components, generator=generator).to(device)
    inverse_step = (torch.rand(tokens, generator=generator) * 3 + 0.5).to(device)
    want = encode_reference.residual_encode(y, latents, weight, bias, inverse_step, limit=4)
    row_major = encode_triton.residual_encode(y, latents, weight, bias, inverse_step, limit=4, config=CONFIG)
    token_major = encode_triton.residual_encode(y, latents, weight, bias, inverse_step, limit=4, component_major=True, config=CONFIG)
    assert torch.equal(row_major, token_major)
    padded = encode_triton.padded_columns(weight)
    assert padded.stride(0) % 64 == 0
    assert torch.equal(row_major, encode_triton.residual_encode(y, latents, padded, bias, inverse_step, limit=4, config=CONFIG))
    assert row_major.dtype == torch.int16
    # Sums in another order move a component over a rounding edge now and then, by one.
    difference = (row_major.int() - want.int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 2e-3
    assert int(want.abs().max()) <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_decode_rows_and_pages(shape, dtype, device, assert_close):
    tokens, layers, heads, head_dim, components, rank = shape
    kv, slots, cos, sin, latents, _, generator = _setup(shape, dtype, device)
    bound = 1e-5 if dtype == torch.float32 else 6e-3
    for first_layer in {0, layers - 1}:
        dim = (layers - first_layer) * 2 * heads * head_dim
        weight = (torch.randn(components + rank, dim, generator=generator) / components**0.5).to(device, dtype)
        mean = torch.randn(dim, generator=generator).to(device)
        step = (torch.rand(tokens, generator=generator) + 0.5).to(device)
        q = torch.randint(-200, 200, (tokens, components), generator=generator).to(device, torch.int16)
        predicted = mean + torch.randn(tokens, dim, generator=generator).to(device)
        for layout, added in ((q, mean), (q.t().contiguous().t(), predicted)):
            want = decode_reference.residual_decode(q, step, latents, weight, added)
            assert_close(decode_triton.residual_decode(layout, step, latents, weight, added, config=CONFIG), want, bound)
        mean = mean if first_layer else predicted
        got_kv, want_kv = kv.clone(), kv.clone()
        decode_triton.residual_decode_pages(q, step, latents, weight, mean, got_kv, slots, cos, sin, first_layer, config=CONFIG)
        decode_reference.residual_decode_pages(q, step, latents, weight, mean, want_kv, slots, cos, sin, first_layer)
        assert_close(got_kv, want_kv, bound)
        untouched = torch.ones(kv.shape[2] * kv.shape[3], dtype=torch.bool, device=device)
        untouched[slots] = False
        assert torch.equal(got_kv.flatten(2, 3)[:, :, untouched], kv.flatten(2, 3)[:, :, untouched])
        assert torch.equal(got_kv[:first_layer], kv[:first_layer])


def test_a_weight_of_the_wrong_height_is_refused(device):
    ones = torch.ones(4, 8, device=device)
    with pytest.raises(ValueError, match="weight has"):
        encode_triton.residual_encode(ones, ones, torch.ones(8, 3, device=device), torch.zeros(3), torch.ones(4))
    with pytest.raises(ValueError, match="mean of shape"):
        decode_triton.residual_decode(
            ones.short(), torch.ones(4, device=device), None, torch.ones(8, 16, device=device), torch.zeros(3, 16)
        )
    with pytest.raises(ValueError, match="weight has"):
        decode_triton.residual_decode(ones.short(), torch.ones(4), ones, torch.ones(8, 16, device=device), torch.zeros(16))
