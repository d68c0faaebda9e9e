"""A draft head on the last states of a Qwen2 target in captured steps: biases, grouped queries, heads of 128 channels, an untied head, odd widths."""

from __future__ import annotations

import pytest

from engine.runtime.drafters import load_draft_head
from engine.runtime.sampling import SamplingParams
from tests.engine.runtime.test_block_runner import DEVICE, GPU
from tests.engine.runtime.test_state_head import talkative
from tests.engine.runtime.test_state_head_captured import captured, check_rows, plain_texts

pytestmark = [pytest.mark.gpu] if GPU else []
STATES = (1, 2, 4)
PROMPT = [*range(7, 60), *range(90, 30, -1)]


@pytest.fixture(scope="module")
def target(tiny_model):
    shape = {"hidden_size": 104, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 152, "vocab_size": 613}
    decoder = tiny_model("qwen2", **shape, head_dim=128, num_hidden_layers=4, tie_word_embeddings=False).decoder
    assert decoder.config.qkv_bias and decoder.config.head_dim == 128 and decoder.lm_head is not None
    return talkative(decoder, 0.1).to(DEVICE)


@pytest.fixture(scope="module")
def source(target, make_draft_head, tmp_path_factory):
    folder = make_draft_head(tmp_path_factory.mktemp("head"), target, size=401, head="tied", state_layers=STATES)
    return load_draft_head(folder, target)


@pytest.mark.parametrize("batch, length", [(1, 2), (1, 4), (3, 3), (8, 3), (32, 2), (32, 3)])
def test_text_is_the_targets_with_fixed_drafts(target, source, batch, length):
    prompts = [[*PROMPT[b:], b] for b in range(batch)]
    params = SamplingParams(max_new_tokens=10, ignore_eos=True, draft_length=length)
    engine = captured(target, source, max_batch=batch, pool_tokens=1 << 13)
    results = engine.generate(prompts, params)
    assert [r.token_ids for r in results] == plain_texts(target, params, prompts)
    assert sum(r.speculation.proposed for r in results) >= batch * length
    keys = engine.core.scheduler.blocks._blocks
    assert keys and all(key.length == length and key.source == "model" for key in keys), "every step of drafts was a captured one"


def test_a_long_prompt_in_chunks_leaves_rows_of_all_its_tokens(target, source):
    engine = captured(target, source, prefill_chunk=96)
    prompt = [(7 * n) % 600 for n in range(301)]
    conversation = engine.core.open_sequence_state()
    engine.core.run(conversation, prompt, SamplingParams(max_new_tokens=9, ignore_eos=True, draft_length=2))
    assert conversation.draft_state.num_skipped == 0 and conversation.draft_state.knows_text
    check_rows(engine, target, source, conversation)


@pytest.mark.parametrize("draft_length", [2, "auto"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_requests_with_and_without_drafts_beside_one_another(target, source, draft_length, temperature):
    """Automatic drafts and fixed ones, beside one another."""
    engine = captured(target, source, max_batch=4)
    params = [
        SamplingParams(max_new_tokens=40, ignore_eos=True, draft_length=length, temperature=temperature, seed=None if n else 3)
        for n, length in enumerate((draft_length, draft_length, 0))
    ]
    results = engine.generate([PROMPT, PROMPT[5:], PROMPT[9:]], params)
    assert [len(r.token_ids) for r in results] == [40] * 3
    if not temperature:
        plain = plain_texts(target, params, [PROMPT, PROMPT[5:], PROMPT[9:]])
        assert [r.token_ids for r in results] == plain
