"""Hot pages on a CUDA device: against the CPU, to the bit in deterministic mode, and what they cost the qwen2.5-coder pair."""

from __future__ import annotations

import pytest
import torch

import eval_hot
from engine.calibrate.corpus import documents, library_texts
from engine.engine import Engine
from engine.hub.cache import cache_home
from engine.kv.formats import KV_CACHE_DTYPES
from engine.kv.quantized_pool import QuantizedPool
from engine.model.decoder import Decoder, forward_reserved
from engine.runtime.sampling import SamplingParams
from kernels.quantized_kv import FORMATS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PAIR = "qwen2.5-coder"
KL = {"q4": 0.0025, "q3": 0.008, "q2": 0.035}  # half as much again as on 24 windows of other text


@pytest.mark.parametrize("kv_format", FORMATS)
@torch.inference_mode()
def test_cuda_agrees_with_the_cpu(tiny_model, kv_format):
    model = tiny_model("qwen2", hidden_size=48, head_dim=32, num_attention_heads=4, num_key_value_heads=2)
    cuda = Decoder.from_pretrained(model.folder, dtype=torch.float32, device="cuda")
    ids = torch.randint(0, 97, (200,), generator=torch.Generator().manual_seed(1))
    c = cuda.config
    means = torch.randn(c.num_layers, 2, c.num_kv_heads, c.head_dim, generator=torch.Generator().manual_seed(2)) * 0.3

    def feed(decoder, sizes, deterministic):
        pool = QuantizedPool(FORMATS[kv_format], means.to(decoder.device), 2, 64, dtype=torch.float32, max_pages=8)
        sequence = pool.new_sequence()
        rows = []
        for block in ids.to(decoder.device).split(sizes):
            rows.append(forward_reserved(decoder, block, [sequence], [len(block)], deterministic=deterministic).logits)
            sequence.advance(len(block))
        return torch.cat(rows).cpu(), decoder.read_kv(sequence, 0, len(ids)).cpu()

    (want, kv), (got, own) = feed(model.decoder, [150, 1, 5, 44], False), feed(cuda, [150, 1, 5, 44], False)
    # codes half way between two levels may fall to either side, and later layers see that
    kl = (want.softmax(-1) * (want.log_softmax(-1) - got.log_softmax(-1))).sum(-1)
    assert float((got[:4] - want[:4]).abs().max()) < 1e-2 and float(kl.median()) < 1e-2
    first_layer = slice(0, c.kv_width)
    assert float((own[:, first_layer] - kv[:, first_layer]).norm() / kv[:, first_layer].norm()) < 2e-2
    whole, _ = feed(cuda, [200], True)
    assert torch.equal(feed(cuda, [1] * 200, True)[0], whole)
    assert torch.equal(feed(cuda, [3, 64, 5, 100, 28], True)[0], whole)


@pytest.fixture(scope="module")
def qwen():
    if len(list((cache_home() / "models").glob(f"{PAIR}-*/config.json"))) < 2:
        pytest.skip(f"the {PAIR} pair is not in the cache")
    return Engine.from_pair(PAIR, device="cuda")


def test_loss_and_acceptance_of_the_qwen_pair(qwen):
    texts, _ = documents(library_texts(seed=1), qwen.tokenizer, 30_000, 1024, per_text=1)
    windows = [ids for ids in texts if len(ids) == 1024][:8]
    rows = {kv_format: eval_hot.loss(qwen, kv_format, windows, 1024) for kv_format in KV_CACHE_DTYPES}
    for kv_format, row in rows.items():
        print(f"{kv_format}: KL {row['kl']:.5f}, running {row['running']['kl']:.5f}, accepted {row['running']['expected_acceptance']:.4f}")
    plain = rows["bf16"]["running"]["expected_acceptance"]
    assert 0.6 < plain < 0.95
    for kv_format, bound in KL.items():
        assert rows[kv_format]["kl"] < bound, kv_format
        assert abs(rows[kv_format]["running"]["expected_acceptance"] - plain) < 0.01, kv_format


@pytest.mark.parametrize("kv_format", ["q4", "q2"])
def test_deterministic_text_of_the_qwen_pair(qwen, kv_format):
    engine = Engine(
        qwen.core.target,
        qwen.tokenizer,
        draft=qwen.core.source,
        kv_cache_dtype=kv_format,
        deterministic=True,
        pool_tokens=1 << 14,
        target_dir=qwen.core.config.target_dir,
    )
    prompts = [[{"role": "user", "content": text}] for text in ("Write a function that reverses a list.", "What is a hash table?")]
    alone = [engine.generate([prompt], SamplingParams(32, draft_length=0))[0].token_ids for prompt in prompts]
    together = engine.generate(prompts, SamplingParams(32, draft_length=4))
    assert [r.token_ids for r in together] == alone
    assert sum(r.speculation.accepted for r in together) > 20
