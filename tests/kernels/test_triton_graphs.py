"""On a GPU: a decode step's kernels are captured in a CUDA graph once and replayed on new data; nothing is read back, no bits differ."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels.accept import triton as accept
from kernels.kv_write import triton as kv_write
from kernels.paged_attention import triton as paged
from kernels.quantized_kv import attention as quantized_attention
from kernels.quantized_kv import triton as quantized_write
from kernels.quantized_kv.reference import ChannelMeans, new_pages

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_step_is_captured_and_replayed():
    device, dtype = torch.device("cuda"), torch.bfloat16
    batch, n, heads, groups, d, size, vocab = 3, 2, 6, 2, 64, 16, 5000
    generator = torch.Generator(device).manual_seed(1)
    pool = torch.randn(2, 40, size, groups, d, device=device, dtype=dtype, generator=generator)
    quantised = new_pages(4, 40, size, groups, d, device)
    means = ChannelMeans(
        torch.randn(groups, d, device=device, generator=generator), torch.randn(groups, d, device=device, generator=generator)
    )
    angle = torch.arange(12 * size, device=device)[:, None] * 0.5 ** torch.arange(d // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    table = torch.randperm(36, device=device, generator=generator).to(torch.int32).view(batch, 12)
    lens = torch.full((batch,), n, dtype=torch.int32, device=device)
    contexts = torch.tensor([190, 20, 77], dtype=torch.int32, device=device)
    qkv = torch.randn(batch * n, heads + 2 * groups, d, device=device, dtype=dtype, generator=generator)
    rows = torch.arange(batch * n, device=device)
    probs = torch.softmax(torch.randn(batch * (n + 1), vocab, device=device, generator=generator), -1)
    drafts = torch.softmax(torch.randn(batch * n, vocab, device=device, generator=generator), -1)
    tokens = torch.zeros(batch * n, dtype=torch.int64, device=device)
    counts, seeds = torch.full((batch,), n, device=device), torch.arange(batch, device=device)

    def step():
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + groups], qkv[:, heads + groups :]
        kv_write.kv_write(k, v, cos[: batch * n], sin[: batch * n], rows, pool[0], pool[1])
        quantized_write.quantized_kv_write(k, v, cos[: batch * n], sin[: batch * n], rows, means, quantised)
        return (
            paged.paged_attention(q, pool[0], pool[1], table, lens, contexts, 0.1, max_query_len=n),
            paged.paged_attention(q, pool[0], pool[1], table, lens, contexts, 0.1, max_query_len=n, deterministic=True),
            quantized_attention.quantized_paged_attention(q, quantised, means, cos, sin, table, lens, contexts, 0.1, max_query_len=n),
            *accept.accept(probs, drafts, tokens, counts, seeds, seeds, n),
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        qkv.normal_(generator=generator.manual_seed(seed))
        contexts.copy_(torch.tensor([60 + seed, 3 + seed, 150 + seed]))
        seeds.add_(10)
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)
