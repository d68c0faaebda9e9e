"""Speculative sampling has the target's distribution: chi-square of several tokens jointly, with a draft that is very different and with an early exit.

The models are first-order Markov chains in the shape of a decoder (layers without attention), so the joint distribution is known exactly and thousands
of requests run as one batch.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from draft.acceptance import SAMPLED_PRIOR, AcceptanceEstimator
from draft.early_exit import EarlyExitDrafter
from draft.model import ModelDrafter
from draft.policy import CostModel, DraftingPolicy, RequestDrafting
from draft.protocols import Proposal, RequestProposal
from draft.tree import Leaf
from engine.model.decoder import DecoderOutput
from engine.runtime.metrics import SpeculationMetrics
from engine.runtime.request import Request, SequenceState
from engine.runtime.sampling import BatchSampler, SamplingParams
from engine.runtime.step import decode_step
from engine.runtime.verify import verify
from engine.text.detokenizer import TextStream

VOCAB, LAYERS, WIDTH, TOKENS, DRAWS = 5, 2, 8, 4, 1200


class Counted:
    """A sequence that only counts."""

    pool = SimpleNamespace(takes_tree_positions=False)

    def __init__(self, length=0):
        self.length = length

    def advance(self, n):
        self.length += n

    def truncate(self, length):
        self.length = length

    def free(self):
        self.length = 0


class MarkovDecoder:
    """Next-token logits are a function of the last token, computed layer by layer."""

    device, dtype, weight_bytes = torch.device("cpu"), torch.float32, 0

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.config = SimpleNamespace(vocab_size=VOCAB, num_layers=LAYERS, hidden_size=WIDTH, max_position_embeddings=1000)
        self.embedding = torch.randn(VOCAB, WIDTH, generator=generator)
        self.layers = torch.randn(LAYERS, WIDTH, WIDTH, generator=generator)
        self.output = torch.randn(WIDTH, VOCAB, generator=generator) * 0.8

    def forward(
        self, token_ids, sequences, query_lens, *, starts=None, taps=(), logits="all", first_layer=0, last_layer=None, hidden=None, **_
    ):
        assert len(sequences) == len(query_lens) and sum(query_lens) == len(token_ids)
        assert (hidden is None) == (first_layer == 0)
        hidden = self.embedding[token_ids] if hidden is None else hidden
        for layer in range(first_layer, LAYERS if last_layer is None else last_layer):
            hidden = torch.tanh(hidden @ self.layers[layer])
        return DecoderOutput(self.head(hidden) if logits == "all" and last_layer is None else None, hidden, {})

    def head(self, hidden, *, deterministic=False):
        return hidden @ self.output


def drafter_of(kind, target):
    if kind == "exit":
        return EarlyExitDrafter(target, 1)
    if kind == "model":
        return ModelDrafter(MarkovDecoder(7), SimpleNamespace(new_sequence=Counted, bytes=0))
    return None


def request_of(params, seed, drafter, drafting=None):
    params = params if params.seed is None else replace(params, seed=seed)
    sequence = Counted(2)
    conversation = SequenceState([3, 1, 2], sequence, drafter.open(sequence) if drafter else None)
    return Request(
        conversation,
        params,
        seed=seed,
        context=1000,
        eos_token_ids=frozenset(),
        stream=TextStream(lambda ids: ""),
        drafting=drafting or RequestDrafting(params.draft_length),
        metrics=SpeculationMetrics(),
    )


def run(target, drafter, requests, policy=None):
    policy = policy or DraftingPolicy()
    while active := [r for r in requests if r.finish_reason is None]:
        decode_step(active, target, drafter, drafting=policy, catch_up=64)
        assert all(r.sequence.length == len(r.token_ids) - 1 for r in active)
    return requests


def joint(target, params, naive_probabilities):
    rows = [
        naive_probabilities(row.double().tolist(), params) for row in target.head(target.forward(torch.arange(VOCAB), [0], [VOCAB]).hidden)
    ]
    result = {}
    for cell in itertools.product(range(VOCAB), repeat=TOKENS):
        p, last = 1.0, 2
        for token in cell:
            p *= rows[last][token]
            last = token
        result[cell] = p
    return result


PROCESSORS = [
    {},
    {"temperature": 0.6},
    {"top_k": 3},
    {"top_p": 0.75},
    {"min_p": 0.25},
    {"temperature": 1.7, "top_k": 4, "top_p": 0.9, "min_p": 0.1},
]


def pairs_of(processors):
    """Each processor with each way of verifying, the two drafts in turn: where q comes from, how p and q are processed and how they are compared are
    three separate steps, so every pair of two of them meets, and no more is needed."""
    cases = []
    for n, one in enumerate(processors):
        for m, (seed, way) in enumerate(((None, "rejection"), (0, "race"))):
            kind = ("model", "exit")[(n + m) % 2]
            cases.append(pytest.param(one, kind, seed, id=f"{way}-{kind}-{one}"))
    return cases


@pytest.mark.parametrize("processors,kind,seed", pairs_of(PROCESSORS))
def test_speculative_text_has_the_targets_distribution(kind, processors, seed, naive_probabilities, chi_square_p_value):
    target = MarkovDecoder(1)
    drafter = drafter_of(kind, target)
    params = SamplingParams(**({"temperature": 1.0} | processors), max_new_tokens=TOKENS, draft_length=3, seed=seed)
    requests = run(target, drafter, [request_of(params, seed, drafter) for seed in range(DRAWS)])
    counts = Counter(tuple(r.token_ids[3:]) for r in requests)
    assert chi_square_p_value(dict(counts), joint(target, params, naive_probabilities)) > 1e-3
    accepted = sum(r.metrics.accepted for r in requests)
    proposed = sum(r.metrics.proposed for r in requests)
    assert 0.02 < accepted / proposed < 0.98, "both branches must be taken for the test to mean anything"


@pytest.mark.parametrize("processors,kind,seed", pairs_of(PROCESSORS[:3]))
def test_drafts_chosen_by_their_confidence_leave_the_distribution_alone(kind, processors, seed, naive_probabilities, chi_square_p_value):
    target = MarkovDecoder(1)
    drafter = drafter_of(kind, target)
    params = SamplingParams(**({"temperature": 1.0} | processors), max_new_tokens=TOKENS, seed=seed)
    costs = CostModel(
        draft=((1, 0.12),), verify=((DRAWS, 1.0), (13 * DRAWS, 2.5)), runs_last_draft=drafter.runs_last_draft, last=((1, 0.1),)
    )
    policy = DraftingPolicy(costs)
    made = [policy.request("auto", greedy=False) for _ in range(DRAWS)]
    requests = run(target, drafter, [request_of(params, seed, drafter, c) for seed, c in enumerate(made)], policy)
    counts = Counter(tuple(r.token_ids[3:]) for r in requests)
    assert chi_square_p_value(dict(counts), joint(target, params, naive_probabilities)) > 1e-3
    ends = Counter(length for r in requests for length in _lengths(r.metrics))
    assert len(ends) >= 3 and max(ends.values()) < 0.95 * ends.total(), (
        "blocks must end early, and at different places, for the test to mean anything"
    )
    assert sum(r.metrics.accepted for r in requests) < sum(r.metrics.proposed for r in requests)


def _lengths(metrics):
    """Drafts of each step, in no order."""
    at = [metrics.steps, *metrics.proposed_at, 0]
    return [length for length, (more, fewer) in enumerate(itertools.pairwise(at)) for _ in range(more - fewer)]


@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {}], ids=str)
def test_under_a_seed_the_text_depends_on_no_draft_length_or_batch(params):
    target, other = MarkovDecoder(1), MarkovDecoder(3)
    drafters = [
        None,
        drafter_of("model", target),
        drafter_of("exit", target),
        *(ModelDrafter(model, SimpleNamespace(new_sequence=Counted, bytes=0)) for model in (other, target)),
    ]
    costs = CostModel(draft=((1, 0.01),), verify=((1, 1.0), (13, 1.1)), runs_last_draft=True)
    texts, proposed, accepted = [], 0, 0
    for drafter in drafters:
        for length in (1, 4, "auto") if drafter else (0,):
            own = SamplingParams(**params, seed=0, max_new_tokens=12, draft_length=length)
            requests = [
                request_of(own, seed, drafter, RequestDrafting(length, AcceptanceEstimator(SAMPLED_PRIOR), ngrams=True))
                for seed in range(20)
            ]
            texts.append([r.token_ids for r in run(target, drafter, requests, DraftingPolicy(costs, ngrams=True))])
            proposed += sum(r.metrics.proposed for r in requests)
            accepted += sum(r.metrics.accepted for r in requests)
            [alone] = run(target, drafter, [request_of(own, 17, drafter)])
            assert alone.token_ids == texts[0][17]
    assert 0 < accepted < proposed
    assert all(text == texts[0] for text in texts)
    assert params == {} or len({tuple(text) for text in texts[0]}) > 15, "another seed is another text"


@pytest.mark.parametrize(
    "kind,processors,seed",
    [
        (None, {}, None),
        (None, {"temperature": 0.7, "top_k": 3}, 0),
        ("model", {"temperature": 0.7, "top_k": 3}, None),
        ("model", {}, 0),
        ("exit", {}, None),
        ("exit", {"temperature": 0.7, "top_k": 3}, 0),
    ],
    ids=str,
)
def test_drafts_from_the_text_leave_the_distribution_alone(kind, processors, seed, naive_probabilities, chi_square_p_value, monkeypatch):
    monkeypatch.setattr("draft.acceptance.MATCH_RATES", (0.9,) * 6)  # so that the text is believed at first, beside any drafter
    target = MarkovDecoder(1)
    drafter = drafter_of(kind, target)
    params = SamplingParams(**({"temperature": 1.0} | processors), max_new_tokens=TOKENS, seed=seed)
    costs = CostModel(draft=((1, 0.12),), verify=((DRAWS, 1.0), (13 * DRAWS, 1.5)), runs_last_draft=kind == "exit", last=((1, 0.1),))
    policy = DraftingPolicy(costs, ngrams=True)
    requests = [request_of(params, seed, drafter, policy.request("auto", greedy=False)) for seed in range(DRAWS)]
    for request in requests:  # the last pair has been there before, each time followed by another token
        request.conversation.token_ids[:0] = [4, 1, 2, 0, 1, 2, 3, 2]
        request.prompt_tokens += 8
        request.sequence.length += 8
        if kind == "model":
            request.draft_state.sequence.length = 0
    requests = run(target, drafter, requests, policy)
    counts = Counter(tuple(r.token_ids[11:]) for r in requests)
    assert chi_square_p_value(dict(counts), joint(target, params, naive_probabilities)) > 1e-3
    proposed, accepted = (sum(getattr(r.metrics, name) for r in requests) for name in ("from_text", "from_text_accepted"))
    assert proposed > DRAWS / 2 and 0.02 < accepted / proposed < 0.98
    if kind == "model":
        assert sum(r.metrics.proposed for r in requests) > proposed, "both sources were used"


def test_plain_sampling_has_it_too_and_the_test_can_fail(naive_probabilities, chi_square_p_value):
    target, other = MarkovDecoder(1), MarkovDecoder(7)
    params = SamplingParams(temperature=1.0, max_new_tokens=TOKENS)
    counts = Counter(tuple(r.token_ids[3:]) for r in run(target, None, [request_of(params, seed, None) for seed in range(DRAWS)]))
    assert chi_square_p_value(dict(counts), joint(target, params, naive_probabilities)) > 1e-3
    assert chi_square_p_value(dict(counts), joint(other, params, naive_probabilities)) < 1e-9
    sharper = SamplingParams(temperature=0.85, max_new_tokens=TOKENS)
    assert chi_square_p_value(dict(counts), joint(target, sharper, naive_probabilities)) < 1e-3


@pytest.mark.parametrize("kind", ["model", "exit"])
def test_ragged_requests_keep_their_own_parameters(kind, naive_probabilities, chi_square_p_value):
    target = MarkovDecoder(1)
    drafter = drafter_of(kind, target)
    settings = [
        SamplingParams(temperature=1.0, max_new_tokens=TOKENS, draft_length=1),
        SamplingParams(temperature=0.7, top_k=3, max_new_tokens=TOKENS, draft_length=3),
        SamplingParams(max_new_tokens=TOKENS, draft_length=2),
        SamplingParams(temperature=1.3, top_p=0.8, max_new_tokens=TOKENS, draft_length=0),
    ]
    requests = run(target, drafter, [request_of(settings[i % 4], i, drafter) for i in range(2 * DRAWS)])
    for i, params in enumerate(settings):
        counts = Counter(tuple(r.token_ids[3:]) for r in requests[i::4])
        assert chi_square_p_value(dict(counts), joint(target, params, naive_probabilities)) > 1e-3


@pytest.mark.parametrize("kind", ["model", "exit"])
def test_a_request_draws_the_same_alone_and_in_a_batch(kind):
    target = MarkovDecoder(1)
    drafter = drafter_of(kind, target)
    params = [SamplingParams(temperature=t, top_k=k, max_new_tokens=30, draft_length=k) for t in (0.0, 0.8, 1.5) for k in (0, 2, 4)]
    together = run(target, drafter, [request_of(p, 11 + i, drafter) for i, p in enumerate(params)])
    for i, p in enumerate(params):
        [alone] = run(target, drafter, [request_of(p, 11 + i, drafter)])
        assert alone.token_ids == together[i].token_ids
        assert alone.metrics.as_dict() | {"draft_s": 0, "verify_s": 0} == together[i].metrics.as_dict() | {"draft_s": 0, "verify_s": 0}


@pytest.mark.parametrize("seed", [None, 0], ids=["rejection", "race"])
def test_a_perfect_draft_is_never_rejected(seed):
    target = MarkovDecoder(1)
    drafter = ModelDrafter(target, SimpleNamespace(new_sequence=Counted, bytes=0))
    params = SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=50, draft_length=4, seed=seed)
    for request in run(target, drafter, [request_of(params, seed, drafter) for seed in range(50)]):
        assert request.metrics.acceptance_rate == 1
        assert request.metrics.steps == 10 and request.metrics.accepted_by_position == [1.0] * 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_more_is_drafted_than_the_text_may_still_take(temperature):
    target = MarkovDecoder(1)
    drafter, asked = drafter_of("model", target), []
    propose = drafter.propose

    def watched(states, pending, lengths, *rest):
        asked.append(lengths[0])
        return propose(states, pending, lengths, *rest)

    drafter.propose = watched
    params = SamplingParams(temperature=temperature, max_new_tokens=6, draft_length=4)
    request, left = request_of(params, 3, drafter), []
    while request.finish_reason is None:
        left.append(request.remaining)
        decode_step([request], target, drafter, drafting=DraftingPolicy(), catch_up=64)
    assert asked == [min(4, n - 1) for n in left if n > 1]
    assert len(request.token_ids) == 9


@pytest.mark.parametrize("seed", [None, 5])
def test_a_leaf_takes_the_place_of_the_rejected_draft_beside_it_and_of_no_other(seed):
    """Target's tokens 3, 4, 2 after the pending one, 1 after the leaf's."""
    logits = torch.full((4, VOCAB), -9.0)
    for row, token in enumerate((3, 4, 2, 1)):
        logits[row, token] = 9.0
    sampler = BatchSampler([SamplingParams(seed=seed)], [5], VOCAB)
    for drafts, leaf, gained, number in (
        ([3, 0], Leaf(2, 4), [3, 4, 1], 0),  # beside the draft that is refused
        ([3, 0], Leaf(1, 3), [3, 4], None),  # beside one that is kept
        ([3, 0], Leaf(2, 1), [3, 4], None),  # another token
        ([3, 4], Leaf(3, 2), [3, 4, 2], None),  # behind the chain: nothing was refused
        ([0, 4], Leaf(2, 4), [3], None),  # after the first refusal
    ):
        proposal = Proposal(torch.tensor(drafts), [RequestProposal(2, [None, None], [leaf])])
        assert verify(logits, proposal, sampler, [7]) == [(gained, number)]
