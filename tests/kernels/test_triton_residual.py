"""residual_decode_pages in Triton against its twin."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels.residual_decode import reference as decode_reference
from kernels.residual_decode import triton as decode_triton

pytestmark = pytest.mark.usefixtures("poisoned")
SMALL = decode_triton.ProductConfig(block_m=32, block_n=32, block_k=16, num_warps=4, num_stages=2)
CONFIG = None if torch.cuda.is_available() else SMALL
SHAPES = [(1, 1, 1, 16, 5, 0), (9, 2, 3, 32, 40, 7), (70, 3, 2, 64, 33, 16)]  # T, L, G, d, K, r
if torch.cuda.is_available():
    SHAPES += [(1000, 28, 2, 128, 1349, 300), (513, 30, 3, 64, 894, 64)]


def _pool(layers, pages, page_size, heads, head_dim, dtype, generator):
    kv = torch.randn(layers, 2, pages, page_size, heads, head_dim, generator=generator)
    kv[:, 0] += 20 * torch.randn(layers, 1, 1, heads, head_dim, generator=generator)
    return kv.to(dtype)


def _setup(shape, dtype, device):
    tokens, layers, heads, head_dim, _, rank = shape
    generator = torch.Generator().manual_seed(tokens)
    page_size = 8
    pages = -(-tokens // page_size) + 2
    kv = _pool(layers, pages, page_size, heads, head_dim, dtype, generator).to(device)
    slots = torch.randperm(pages * page_size, generator=generator)[:tokens].to(device)
    angle = (torch.rand(tokens, head_dim // 2, generator=generator) * 60).to(device)
    latents = torch.randn(tokens, rank, generator=generator).to(device, dtype) if rank else None
    return kv, slots, angle.cos(), angle.sin(), latents, generator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_decode_pages(shape, dtype, device, assert_close):
    tokens, layers, heads, head_dim, components, rank = shape
    kv, slots, cos, sin, latents, generator = _setup(shape, dtype, device)
    bound = 1e-5 if dtype == torch.float32 else 6e-3
    for first_layer in {0, layers - 1}:
        dim = (layers - first_layer) * 2 * heads * head_dim
        weight = (torch.randn(components + rank, dim, generator=generator) / components**0.5).to(device, dtype)
        mean = torch.randn(dim, generator=generator).to(device)
        step = (torch.rand(tokens, generator=generator) + 0.5).to(device)
        q = torch.randint(-200, 200, (tokens, components), generator=generator).to(device, torch.int16)
        got_kv, want_kv = kv.clone(), kv.clone()
        layout = q.t().contiguous().t() if first_layer else q  # tokens adjacent, as the entropy decoder lays them out, and rows
        decode_triton.residual_decode_pages(layout, step, latents, weight, mean, got_kv, slots, cos, sin, first_layer, config=CONFIG)
        decode_reference.residual_decode_pages(q, step, latents, weight, mean, want_kv, slots, cos, sin, first_layer)
        assert_close(got_kv, want_kv, bound)
        untouched = torch.ones(kv.shape[2] * kv.shape[3], dtype=torch.bool, device=device)
        untouched[slots] = False
        assert torch.equal(got_kv.flatten(2, 3)[:, :, untouched], kv.flatten(2, 3)[:, :, untouched])
        assert torch.equal(got_kv[:first_layer], kv[:first_layer])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] * shape[3] % 16 == 0], ids=str)
def test_what_is_added_layer_by_layer(shape, dtype, device, assert_close):
    """Layers with several tiles of columns, one and none; the rows lie beside the product's own in wider ones."""
    tokens, layers, heads, head_dim, components, _ = shape
    kv, slots, cos, sin, _, generator = _setup(shape, dtype, device)
    multiple = decode_reference.REST_MULTIPLE
    starts = torch.tensor([0, *(multiple * (n % 3) for n in range(1, layers + 1))]).cumsum(0)
    extra, width, dim = int(starts[-1]), 2 * heads * head_dim, layers * 2 * heads * head_dim
    left = (torch.randn(tokens, components + extra, generator=generator) / 4).to(device, dtype)
    q, rows = left[:, :components], left[:, components:]
    weight = (torch.randn(components, dim, generator=generator) / components**0.5).to(device, dtype)
    basis = torch.randn(extra, width, generator=generator).to(device, dtype)
    mean, step = torch.randn(dim, generator=generator).to(device), torch.ones(tokens, device=device)
    rest = decode_reference.Rest(rows, basis, starts.to(device, torch.int32))
    got_kv, want_kv, without = kv.clone(), kv.clone(), kv.clone()
    decode_triton.residual_decode_pages(q, step, None, weight, mean, got_kv, slots, cos, sin, rest=rest, config=CONFIG)
    decode_reference.residual_decode_pages(q, step, None, weight, mean, want_kv, slots, cos, sin, rest=rest)
    assert_close(got_kv, want_kv, 1e-5 if dtype == torch.float32 else 6e-3)
    decode_reference.residual_decode_pages(q, step, None, weight, mean, without, slots, cos, sin)
    changed = (want_kv.flatten(2, 3)[:, :, slots] != without.flatten(2, 3)[:, :, slots]).flatten(1).any(1).tolist()
    assert changed == [n % 3 > 0 for n in range(1, layers + 1)]
    with pytest.raises(ValueError, match="does not fit"):
        decode_triton.residual_decode_pages(
            q, step, None, weight, mean, got_kv, slots, cos, sin, rest=rest._replace(starts=rest.starts[1:])
        )


def test_inputs_that_do_not_fit_are_refused(device):
    kv, ones = torch.zeros(1, 2, 2, 4, 1, 8, device=device), torch.ones(4, 8, device=device)
    q, step, angles = ones.short(), torch.ones(4, device=device), torch.ones(4, 4, device=device)
    for rows, columns, mean, what in ((7, 16, 16, "weight has 7 rows"), (8, 16, 3, "mean of shape"), (8, 12, 12, "weight has 12 columns")):
        with pytest.raises(ValueError, match=what):
            weight, added = torch.ones(rows, columns, device=device), torch.zeros(mean, device=device)
            decode_triton.residual_decode_pages(q, step, None, weight, added, kv, torch.arange(4, device=device), angles, angles)
    with pytest.raises(ValueError, match="contiguous pool"):
        weight, added, halves = torch.ones(8, 16, device=device), torch.zeros(16, device=device), kv.transpose(2, 3)
        decode_triton.residual_decode_pages(q, step, None, weight, added, halves, torch.arange(4, device=device), angles, angles)
