"""The decoder through the Triton kernels: in Triton's interpreter on a CPU, and on a CUDA device where there is one."""

from __future__ import annotations

import pytest
import torch

from bench.interpreter import compute_like_hardware
from engine.model.decoder import Decoder, forward_reserved
from kernels.dispatch import triton_importable
from tests.engine.conftest import NEW_FAMILIES


@pytest.mark.skipif(
    not triton_importable() or torch.cuda.is_available(), reason="needs Triton's interpreter, which a GPU's process has not"
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@torch.inference_mode()
def test_interpreted_kernels_agree_with_the_reference(tiny_model, family, monkeypatch):
    compute_like_hardware()
    decoder = Decoder.from_pretrained(tiny_model(family).folder, dtype=torch.float32)
    ids = torch.randint(0, 97, (18,), generator=torch.Generator().manual_seed(1))

    def run(kernels, deterministic):
        monkeypatch.setenv("FORETOLD_KERNELS", kernels)
        pool = decoder.new_pool(8, 8)
        a, b = pool.new_sequence(), pool.new_sequence()
        rows = [forward_reserved(decoder, ids[:12], [a, b], [7, 5], deterministic=deterministic).logits]
        a.advance(7)
        b.advance(5)
        rows.append(forward_reserved(decoder, ids[12:], [a, b], [1, 5], deterministic=deterministic).logits)
        a.advance(1)
        return torch.cat([*rows, decoder.read_kv(a, 0, 8)[:, :97]])

    for deterministic in (False, True):
        want = run("reference", deterministic)
        difference = (run("triton", deterministic) - want).abs().max().item()
        assert difference < 1e-4, (deterministic, difference)
        assert want.abs().max() > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernels", ["reference", ""])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", *NEW_FAMILIES])
@torch.inference_mode()
def test_cuda_agrees_with_the_cpu(tiny_model, monkeypatch, family, kernels):
    monkeypatch.setenv("FORETOLD_KERNELS", kernels)
    model = tiny_model(family)
    decoder = Decoder.from_pretrained(model.folder, dtype=torch.float32, device="cuda")
    ids = torch.randint(0, 97, (60,), generator=torch.Generator().manual_seed(1))

    def feed(sizes, deterministic):
        sequence = decoder.new_pool(8, 16).new_sequence()
        rows, start = [], 0
        for size in sizes:
            block = ids[start : start + size].cuda()
            rows.append(forward_reserved(decoder, block, [sequence], [size], deterministic=deterministic).logits)
            sequence.advance(size)
            start += size
        return torch.cat(rows)

    want = model.logits(ids)
    assert (feed([40, 1, 5, 14], False).cpu() - want).abs().max() < 1e-3
    whole = feed([60], True)
    assert (whole.cpu() - want).abs().max() < 1e-3
    assert torch.equal(feed([1] * 60, True), whole)
    assert torch.equal(feed([33, 5, 5, 17], True), whole)
