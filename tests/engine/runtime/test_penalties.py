"""Biases and penalties: against transformers' processors and the definitions, with and without drafts; speculation stays exact."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from draft.protocols import Proposal, RequestProposal
from draft.tree import Leaf
from engine.engine import Engine
from engine.errors import InvalidOption
from engine.model.decoder import forward_reserved
from engine.runtime.sampling import BatchSampler, SamplingParams, TokenHistory
from engine.runtime.verify import verify

PROMPT = [3, 1, 4, 1, 5]
PENALTIES = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7, "logit_bias": {3: -4.0, 9: 2.5}},
    {"frequency_penalty": 1.1, "presence_penalty": 0.4},
    {"frequency_penalty": -0.6},
    {"presence_penalty": 2.0, "repetition_penalty": 1.2, "logit_bias": {0: 1.0}},
    {"logit_bias": {9: 6.0, 3: -4.0}},
]


def naive(logits, params, prompt, new):
    """The definitions, token by token."""
    result = []
    for token, logit in enumerate(logits):
        value = logit + params.logit_bias.get(token, 0.0)
        if token in prompt or token in new:
            value = value * params.repetition_penalty if value < 0 else value / params.repetition_penalty
        count = new.count(token)
        result.append(value - params.frequency_penalty * count - params.presence_penalty * (count > 0))
    return result


@pytest.mark.parametrize("options", PENALTIES, ids=str)
@pytest.mark.parametrize("reduced", [False, True])
def test_logits_follow_the_definitions_with_drafts_counted_as_text(options, reduced):
    params = SamplingParams(temperature=1.0, **options)
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 2
    columns = torch.tensor([0, 1, 3, 4, 9, 11]) if reduced else None
    history = TokenHistory(params, 12, len(PROMPT), torch.device("cpu"))
    history.follow(PROMPT)
    for new, drafts in (([], []), ([7, 7, 3], [9]), ([7, 7, 3, 9, 0], [0, 0, 11])):
        history.follow([*PROMPT, *new])
        own = logits if columns is None else logits[columns]
        found = history.penalise(own, torch.tensor(drafts, dtype=torch.int64), columns)
        wanted = torch.tensor(naive(logits.tolist(), params, PROMPT, [*new, *drafts]))
        assert torch.allclose(found, wanted if columns is None else wanted[columns], atol=1e-6)


@pytest.mark.parametrize(("penalty", "bias"), [(1.3, {}), (0.8, {2: 3.0}), (1.0, {5: -7.0, 2: 1.5})])
def test_logits_are_what_transformers_processors_make(penalty, bias):
    params = SamplingParams(temperature=1.0, repetition_penalty=penalty, logit_bias=bias)
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)) * 2
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    if bias:
        processors.insert(0, SequenceBiasLogitsProcessor({(i,): b for i, b in bias.items()}))
    history = TokenHistory(params, 12, len(PROMPT), torch.device("cpu")).follow([*PROMPT, 7, 8])
    wanted = processors(torch.tensor([[*PROMPT, 7, 8, 9]]), logits.clone())
    assert torch.allclose(history.penalise(logits[0], torch.tensor([9])), wanted[0], atol=1e-6)


@pytest.fixture(scope="module")
def pair(random_decoder):
    target = random_decoder(1, vocab_size=40, num_hidden_layers=2)
    other = random_decoder(2, vocab_size=40, num_hidden_layers=1)
    return target, {"none": None, "other": other, "itself": target, "exit": 1}


def reference_text(target, params, count):
    """Greedy, one token at a time, the logits changed by `naive`."""
    new, sequence = [], target.new_pool(8, 16).new_sequence()
    logits = forward_reserved(target, torch.tensor(PROMPT), [sequence], [len(PROMPT)], logits="last").logits
    sequence.advance(len(PROMPT))
    while len(new) < count:
        row = naive(logits[0].tolist(), params, PROMPT, new)
        new.append(row.index(max(row)))
        logits = forward_reserved(target, torch.tensor(new[-1:]), [sequence], [1], logits="last").logits
        sequence.advance(1)
    return new


@pytest.mark.parametrize("options", PENALTIES, ids=str)
def test_greedy_text_is_the_same_with_every_draft(pair, options):
    target, drafts = pair
    wanted = reference_text(target, SamplingParams(**options), 16)
    assert wanted != reference_text(target, SamplingParams(), 16)
    for name, draft in drafts.items():
        params = SamplingParams(max_new_tokens=16, draft_length=0 if name == "none" else 4, **options)
        engine = Engine(target, draft=draft, page_size=16)
        [alone] = engine.generate([PROMPT], params)
        assert alone.token_ids == wanted, name
        plain = SamplingParams(max_new_tokens=16, draft_length=params.draft_length)
        assert engine.generate([PROMPT, PROMPT], [plain, params])[1].token_ids == wanted, "beside a request without penalties"
        if name == "itself":
            assert alone.speculation.acceptance_rate == 1, "draft and target see the same penalties"


def test_a_stop_of_the_draft_length_by_itself_meets_leaves_and_penalties(pair):
    target, drafts = pair
    from draft.policy import CostModel

    costs = CostModel(draft=((1, 0.01),), verify=((1, 1.0), (64, 1.02)), runs_last_draft=True)
    for options in PENALTIES:
        wanted = reference_text(target, SamplingParams(**options), 16)
        for draft in (drafts["other"], drafts["exit"]):
            engine = Engine(target, draft=draft, page_size=16, costs=costs)
            assert engine.generate([PROMPT], SamplingParams(max_new_tokens=16, **options))[0].token_ids == wanted


@pytest.mark.parametrize("options", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 1.5}], ids=str)
def test_the_token_after_a_leaf_is_penalised_for_the_leaf(options):
    """The row after a leaf follows the drafts before it and the leaf itself, not the draft it stands beside."""
    params, prompt = SamplingParams(**options), [0]
    history = TokenHistory(params, 6, len(prompt), torch.device("cpu")).follow(prompt)
    sampler = BatchSampler([params], [7], 6, [history])
    logits = torch.zeros(4, 6)  # after the pending token, after each draft, after the leaf
    logits[0, 1] = logits[1, 3] = 8.0  # the first draft is right, the second is not: the leaf beside it is
    logits[3, 3], logits[3, 2], logits[3, 5] = 5.0, 4.5, 4.0  # the leaf's own token, the draft beside it, another
    proposal = Proposal(torch.tensor([1, 2]), [RequestProposal(2, [None, None], [Leaf(2, 3)])])
    [verdict] = verify(logits, proposal, sampler, [1])
    assert verdict.leaf == 0 and verdict.tokens == [1, 3, 2], "the leaf came once and goes back; the draft beside it never came"


@pytest.mark.parametrize("seeded", [False, True], ids=["rejection", "race"])
def test_sampled_text_under_penalties_has_its_distribution(random_decoder, seeded, naive_probabilities, chi_square_p_value):
    shape = {"vocab_size": 4, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    target, draft = random_decoder(3, **shape), random_decoder(4, **shape)
    draws, options = 800, {"repetition_penalty": 1.5, "frequency_penalty": 0.8, "presence_penalty": -0.5, "logit_bias": {2: 0.7}}
    params = [
        SamplingParams(temperature=1.0, max_new_tokens=3, draft_length=2, seed=s if seeded else None, **options) for s in range(draws)
    ]
    with mock.patch("secrets.randbits", side_effect=range(draws)):
        results = Engine(target, draft=draft, page_size=8, max_batch=draws).generate([[1, 2]] * draws, params)
    counts = Counter(tuple(r.token_ids) for r in results)

    def following(cell, own):
        sequence = target.new_pool(1, 8).new_sequence()
        ids = [1, 2, *cell]
        logits = forward_reserved(target, torch.tensor(ids), [sequence], [len(ids)], logits="last").logits
        return naive_probabilities(naive(logits[0].tolist(), own, [1, 2], list(cell)), own)

    def joint(own):
        cells = {(): 1.0}
        for _ in range(3):
            cells = {(*cell, t): p * q for cell, p in cells.items() for t, q in enumerate(following(cell, own))}
        return cells

    assert chi_square_p_value(counts, joint(params[0])) > 1e-3
    assert chi_square_p_value(counts, joint(SamplingParams(temperature=1.0))) < 1e-6, "the test can fail"
    assert 0 < sum(r.speculation.accepted for r in results) < sum(r.speculation.proposed for r in results)


@pytest.mark.parametrize(
    "wrong",
    [
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"frequency_penalty": 2.1},
        {"presence_penalty": -3},
        {"presence_penalty": "1"},
        {"logit_bias": {1: 101.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {"1": 1.0}},
        {"logit_bias": [1, 2]},
        {"ignore_eos": "no"},
        {"ignore_eos": None},
        {"temperature": np.float32("nan")},
        {"temperature": True},
        {"max_new_tokens": 2**63},
        {"max_new_tokens": 3.0},
        {"stop_token_ids": [True]},
        {"seed": 1.0},
    ],
    ids=str,
)
def test_values_outside_their_range_are_named(wrong):
    with pytest.raises(InvalidOption) as caught:
        SamplingParams(**wrong)
    assert next(iter(wrong)) in caught.value.what and caught.value.remedy


def test_a_bias_beyond_the_vocabulary_is_named_and_leaves_nothing_behind(pair):
    engine = Engine(pair[0], page_size=16)
    with pytest.raises(InvalidOption, match="logit_bias names token 40"):
        engine.generate([PROMPT], SamplingParams(logit_bias={40: 1.0}))
    engine.core.pool.check_integrity()


def test_numbers_of_numpy_and_none_for_no_stop_are_taken():
    params = SamplingParams(
        max_new_tokens=np.int64(3),
        seed=np.int64(5),
        temperature=np.float32(0.5),
        stop=None,
        stop_token_ids=[np.int32(2)],
        top_k=np.uint8(3),
    )
    assert params == SamplingParams(max_new_tokens=3, seed=5, temperature=0.5, stop=(), stop_token_ids=(2,), top_k=3)
    assert all(type(x) in (int, float) for x in (params.max_new_tokens, params.seed, params.temperature, params.top_k))
    assert hash(params) == hash(SamplingParams(max_new_tokens=3, seed=5, temperature=0.5, stop_token_ids=(2,), top_k=3))


def test_a_sampler_without_a_history_for_penalties_is_refused():
    with pytest.raises(AssertionError):
        BatchSampler([SamplingParams(presence_penalty=1.0)], [0], 5)
