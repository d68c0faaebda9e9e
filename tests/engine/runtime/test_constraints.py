"""Texts of a given form, and log probabilities: the same with drafts as without, and what the target's own logits say."""

from __future__ import annotations

import json

import pytest
import torch
from scipy import stats

from engine.errors import InvalidOption
from engine.model.decoder import forward_reserved
from engine.runtime.sampling import SamplingParams

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "size": {"type": "integer", "minimum": 0, "maximum": 99},
            "kind": {"enum": ["boat", "buoy"]},
            "sure": {"type": "boolean"},
        },
        "required": ["size", "kind", "sure"],
        "additionalProperties": False,
    }
)
DRAFTS = ["draft", "head", "trunk"]


def generate(engine, count=4, **params):
    return engine.generate([f"prompt {i}" for i in range(count)], SamplingParams(max_new_tokens=80, **params))


@pytest.mark.parametrize(
    "draft,options",
    [
        *((draft, {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.2}) for draft in DRAFTS),
        ("draft", {}),
        ("head", {"temperature": 1.0, "seed": 3}),
    ],
)
def test_a_schemas_text_does_not_depend_on_drafts(chat_engine, draft, options):
    plain = generate(chat_engine("none", deterministic=True), response_format=SCHEMA, **options)
    drafted = generate(chat_engine(draft, deterministic=True), response_format=SCHEMA, **options, draft_length=3)
    assert [r.text for r in drafted] == [r.text for r in plain]
    assert sum(r.speculation.accepted for r in drafted) > 0
    for result in drafted:
        value = json.loads(result.text)
        assert set(value) == {"size", "kind", "sure"} and 0 <= value["size"] <= 99 and value["kind"] in ("boat", "buoy")
        assert result.finish_reason == "eos"


@pytest.mark.parametrize("draft", DRAFTS)
def test_sampled_texts_of_a_schema_have_the_distribution_without_drafts(chat_engine, draft):
    schema, draws = json.dumps({"enum": ["a", "ab", "b", "ba", "c"]}), 160
    counts = []
    for source in ("none", draft):
        engine = chat_engine(source, max_batch=100)
        params = SamplingParams(temperature=1.0, max_new_tokens=8, response_format=schema, draft_length=2)
        texts = [r.text for r in engine.generate(["x"] * draws, params)]
        counts.append([texts.count(json.dumps(word)) for word in ("a", "ab", "b", "ba", "c")])
        assert sum(counts[-1]) == draws
    used = [column for column in zip(*counts, strict=True) if sum(column)]
    assert len(used) > 1 and stats.chi2_contingency(used).pvalue > 1e-4


def test_a_format_is_one_of_several_requests_own(chat_engine):
    engine = chat_engine("draft")
    params = [SamplingParams(max_new_tokens=20), SamplingParams(max_new_tokens=60, response_format=SCHEMA)]
    free, formed = engine.generate(["prompt 0", "prompt 0"], params)
    assert free.text == engine.generate("prompt 0", params[0])[0].text
    json.loads(formed.text)


@pytest.mark.parametrize("schema", ["{", "[1]", '{"type": "nothing"}', '{"pattern": "("}', json.dumps({"enum": ["x" * 70000]}), "\ud800"])
def test_a_schema_that_is_not_understood_is_a_named_error(chat_engine, schema):
    engine = chat_engine("none")
    with pytest.raises(InvalidOption, match="response_format"):
        engine.generate("x", SamplingParams(response_format=schema))
    assert engine.core.scheduler.idle and engine.core.pool.num_free_pages == engine.core.pool.max_pages


@pytest.mark.parametrize("draft", ["none", *DRAFTS])
def test_log_probabilities_are_the_targets_own(chat_engine, draft):
    engine = chat_engine(draft)
    prompt = list(b"prompt")
    params = SamplingParams(max_new_tokens=24, temperature=0.7, seed=1, top_k=20, logprobs=3, draft_length=3, ignore_eos=True)
    result = engine.generate(prompt, params)[0]
    assert result.logprobs is not None and [one.token_id for one in result.logprobs] == result.token_ids
    target = engine.core.target
    sequence = target.new_pool(4, 16).new_sequence()
    ids = torch.tensor([*prompt, *result.token_ids])
    with torch.inference_mode():
        logits = forward_reserved(target, ids, [sequence], [len(ids)], logits="all").logits[len(prompt) - 1 : -1]
    table = torch.log_softmax(logits.double(), -1)
    for row, one in zip(table, result.logprobs, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-3)
        best = row.topk(3)
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-3)
    without = engine.generate(prompt, SamplingParams(max_new_tokens=24, temperature=0.7, seed=1, top_k=20, ignore_eos=True))[0]
    assert without.token_ids == result.token_ids and without.logprobs is None


def test_log_probabilities_follow_a_greedy_text_with_leaves_and_a_stop(chat_engine):
    """Greedy blocks may bring leaves of a draft tree; a stop cuts a block."""
    engine = chat_engine("head")
    whole = engine.generate("prompt", SamplingParams(max_new_tokens=40, logprobs=1, ignore_eos=True))[0]
    assert whole.logprobs is not None and all(one.top[0][0] == one.token_id for one in whole.logprobs)
    cut = engine.generate("prompt", SamplingParams(max_new_tokens=40, logprobs=1, ignore_eos=True, stop_token_ids=(whole.token_ids[9],)))[0]
    assert cut.logprobs is not None and len(cut.logprobs) == cut.new_tokens <= 10


@pytest.mark.parametrize("value", [-1, 1000, 0.5, "2", True])
def test_a_wrong_number_of_log_probabilities_is_refused(value):
    with pytest.raises(InvalidOption, match="logprobs"):
        SamplingParams(logprobs=value)
