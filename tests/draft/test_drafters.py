"""What the drafters run, propose and keep, seen on a decoder that records its calls."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from codec.predictor.features import FeatureBuffer
from draft.early_exit import EarlyExitDrafter
from draft.errors import ExitLayerError, FeatureTapError
from draft.model import ModelDrafter

VOCAB = 10


class Counted:
    def __init__(self, length=0):
        self.length = length
        self.freed = False

    def advance(self, n):
        self.length += n

    def free(self):
        self.freed = True


class Recorder:
    """Layer i adds 100 to the hidden state [token, position, layer sum]; the head prefers token + 1. Keeps what every (layer, position) was run on."""

    device, dtype, weight_bytes = torch.device("cpu"), torch.float32, 12

    def __init__(self):
        self.config = SimpleNamespace(vocab_size=VOCAB, num_layers=4, max_position_embeddings=50)
        self.runs = []

    def forward(self, token_ids, sequences, query_lens, *, starts=None, taps=(), last_layer=None, first_layer=0, **_):
        starts = [s.length for s in sequences] if starts is None else starts
        positions = [p for start, n in zip(starts, query_lens, strict=True) for p in range(start, start + n)]
        owners = [id(s) for s, n in zip(sequences, query_lens, strict=True) for _ in range(n)]
        self.runs += list(zip(owners, positions, token_ids.tolist(), strict=True))
        depth = 4 if last_layer is None else last_layer
        hidden = torch.stack([token_ids.float(), torch.tensor(positions).float(), torch.zeros(len(positions))], 1)
        layer = torch.tensor([0.0, 0.0, 100.0])
        return SimpleNamespace(hidden=hidden + depth * layer, taps={i: hidden + i * layer for i in taps})

    def head(self, hidden, *, deterministic=False):
        return torch.nn.functional.one_hot((hidden[:, 0].long() + 1) % VOCAB, VOCAB).float()


class Argmax:
    """Greedy sampler that records the positions it drew at."""

    def __init__(self):
        self.drawn = []

    def draw(self, logits, rows, positions):
        self.drawn += list(zip(rows, positions, strict=True))
        return logits.argmax(-1), [None] * len(rows)


def feature_rows(tokens, start, taps):
    return torch.tensor([[[t, start + i, 100.0 * tap] for tap in taps] for i, t in enumerate(tokens)])


def drafts_of(proposal):
    return [own.num_drafts for own in proposal.requests]


def runs_of(proposal):
    return [own.num_run for own in proposal.requests]


@pytest.fixture
def model():
    return ModelDrafter(Recorder(), SimpleNamespace(new_sequence=Counted, bytes=7))


def test_a_ragged_batch_is_drafted_and_committed(model):
    model.keep_features((0, 3), lambda: FeatureBuffer(dtype=torch.float32))
    states = [model.open(None) for _ in range(3)]
    model.prefill(states[:2], [[4, 4], [1, 1, 1]])
    model.decoder.runs.clear()
    sampler = Argmax()
    proposal = model.propose(states, [[5, 6], [2], [9]], [3, 1, 0], sampler)
    assert proposal.tokens.tolist() == [7, 8, 9, 3] and drafts_of(proposal) == [3, 1, 0]
    assert sampler.drawn == [(0, 4), (1, 4), (0, 5), (0, 6)]
    assert proposal.hidden is None and runs_of(proposal) == [4, 1, 0] and [own.num_pending for own in proposal.requests] == [2, 1, 0]
    first, second = (id(s.sequence) for s in states[:2])
    assert model.decoder.runs == [(first, 2, 5), (first, 3, 6), (second, 3, 2), (first, 4, 7), (first, 5, 8)]
    assert [s.length for s in states] == [2, 3, 0], "nothing moves before the commit"
    model.commit(states, proposal, [2, 2, 1])  # one draft of three kept; the only draft kept; plain
    assert [s.length for s in states] == [5, 4, 0]
    assert [s.features.length for s in states] == [5, 4, 0]
    assert torch.equal(states[0].features.take(0, 5), torch.cat([feature_rows([4, 4], 0, (0, 3)), feature_rows([5, 6, 7], 2, (0, 3))]))
    assert torch.equal(states[1].features.take(3, 4), feature_rows([2], 3, (0, 3)))


class Script:
    """Keeps and goes on as told: the first ends after a kept draft, the second throws its second draft away, the third's block stays whole, the
    fourth's first is thrown away."""

    candidates = 1

    def __init__(self):
        self.answers, self.more, self.seen = [[1], [1, 0], [1, 1], [0]], [[False], [True], [True, True], []], [[], [], [], []]

    def looks_at(self, b):
        return b != 2

    def select(self, batch, probabilities):
        for b, own in zip(batch, probabilities, strict=True):
            assert len(own) == 1
            self.seen[b].append(own[0])
        return [self.answers[b].pop(0) for b in batch]

    def onward(self, batch):
        return {b for b in batch if self.more[b].pop(0)}

    @property
    def told_all(self):
        return not any(self.answers) and not any(self.more)


def test_gates_end_a_models_blocks(model):
    states = [model.open(None) for _ in range(4)]
    proposal = model.propose(states, [[1], [3], [5], [7]], [3, 3, 3, 3], Argmax(), policy := Script())
    assert (
        drafts_of(proposal) == [1, 1, 3, 0]
        and proposal.tokens.tolist() == [2, 4, 6, 7, 8]
        and sum(len(own.probs) for own in proposal.requests) == 5
    )
    assert runs_of(proposal) == [1, 2, 3, 1] and policy.told_all
    sure = float(torch.nn.functional.one_hot(torch.tensor(0), VOCAB).float().softmax(-1).max())
    assert policy.seen[1] == pytest.approx([sure, sure])
    model.commit(states, proposal, [2, 2, 4, 1])
    assert [s.length for s in states] == [1, 2, 3, 1], "the second request ran its draft before it gave up on the next"


def test_gates_end_an_early_exits_blocks():
    early_exit = EarlyExitDrafter(Recorder(), 2)
    states = [early_exit.open(Counted(n)) for n in (5, 3, 7, 2)]
    proposal = early_exit.propose(states, [[1], [3], [5], [7]], [3, 3, 3, 3], Argmax(), Script())
    assert drafts_of(proposal) == [1, 1, 3, 0] and proposal.tokens.tolist() == [2, 4, 6, 7, 8]
    wanted = [[1, 5], [2, 6], [3, 3], [4, 4], [5, 7], [6, 8], [7, 9], [8, 10], [7, 2]]
    assert proposal.hidden[:, :2].tolist() == wanted, "every pending token and every kept draft, and no other"
    assert len(early_exit.decoder.runs) == len(wanted) and runs_of(proposal) == [2, 2, 4, 1]


def test_given_drafts_are_proposed_beside_drawn_ones(model):
    states = [model.open(None) for _ in range(3)]
    proposal = model.propose(states, [[1], [2, 3], [5]], [2, 0, 0], Argmax(), None, [[], [8, 8, 9], []])
    assert proposal.tokens.tolist() == [2, 3, 8, 8, 9] and drafts_of(proposal) == [2, 3, 0] and runs_of(proposal) == [2, 0, 0]
    assert [own.point_mass for own in proposal.requests] == [True] * 3
    model.commit(states, proposal, [2, 3, 1])
    assert [s.length for s in states] == [2, 0, 0], "the model has not run what it did not draft"


def test_an_early_exit_runs_given_drafts_in_one_pass():
    early_exit = EarlyExitDrafter(Recorder(), 2)
    early_exit.keep_features((1,), lambda: FeatureBuffer(dtype=torch.float32))
    states = [early_exit.open(Counted()) for _ in range(2)]
    proposal = early_exit.propose(states, [[1], [2]], [1, 0], Argmax(), None, [[], [8, 9]])
    assert proposal.tokens.tolist() == [2, 8, 9] and runs_of(proposal) == [2, 3]
    assert proposal.hidden[:, :2].tolist() == [[1, 0], [2, 1], [2, 0], [8, 1], [9, 2]]
    early_exit.commit(states, proposal, [1, 2])
    assert torch.equal(states[1].features.take(0, 2), feature_rows([2, 8], 0, (1,)))


def test_all_drafts_accepted_leaves_the_last_one_to_be_run(model):
    [state] = states = [model.open(None)]
    proposal = model.propose(states, [[1, 2]], [2], Argmax())
    model.commit(states, proposal, [3])
    assert state.length == 3, "two pending tokens and the first draft; the second was never run"


def test_ids_beyond_the_drafts_vocabulary_are_run_as_its_last(model):
    states = [model.open(None)]
    model.prefill(states, [[VOCAB + 5]])
    model.propose(states, [[VOCAB]], [1], Argmax())
    assert [token for _, _, token in model.decoder.runs] == [VOCAB - 1, VOCAB - 1]


def test_closing_frees_the_drafts_own_sequences_only(model):
    state = model.open(None)
    model.close([state])
    assert state.sequence.freed
    early_exit, sequence = EarlyExitDrafter(Recorder(), 2), Counted()
    early_exit.close([early_exit.open(sequence)])
    assert not sequence.freed
    assert (model.weight_bytes, model.pool_bytes) == (12, 7) and (early_exit.weight_bytes, early_exit.pool_bytes) == (0, 0)


def test_an_early_exit_runs_each_token_once_and_hands_over_its_states():
    early_exit = EarlyExitDrafter(Recorder(), 2)
    early_exit.keep_features((1,), lambda: FeatureBuffer(dtype=torch.float32))
    sequences = [Counted(), Counted(), Counted()]
    states = [early_exit.open(s) for s in sequences]
    for sequence, state, length in zip(sequences, states, (5, 3, 7), strict=True):
        early_exit.observe_target([state], [length], {1: torch.zeros(length, 3)})
        sequence.advance(length)
    sampler = Argmax()
    proposal = early_exit.propose(states, [[4], [6], [8]], [2, 0, 1], sampler)
    assert proposal.tokens.tolist() == [5, 6, 9]
    assert len(early_exit.decoder.runs) == len(set(early_exit.decoder.runs)) == 3 + 3, "every pending token and every draft, once"
    assert sampler.drawn == [(0, 6), (2, 8), (0, 7)]
    wanted = [[4, 5, 200], [5, 6, 200], [6, 7, 200], [6, 3, 200], [8, 7, 200], [9, 8, 200]]
    assert proposal.hidden.tolist() == wanted, "request by request, as the target's verification block is laid out"
    assert [own.hidden.tolist() for own in proposal.requests] == [wanted[:3], wanted[3:4], wanted[4:]]
    proposal.requests[2].hidden[0] = 1
    assert proposal.hidden[4].tolist() == [1, 1, 1], "each request's rows are the batch's"
    early_exit.commit(states, proposal, [2, 1, 1])
    assert [s.features.length for s in states] == [7, 4, 8]
    assert torch.equal(states[0].features.take(5, 7), feature_rows([4, 5], 5, (1,)))
    assert [s.length for s in sequences] == [5, 3, 7], "the target's sequence is moved by the decode step"


def test_an_early_exit_opened_over_a_filled_sequence_has_no_features_of_its_tokens():
    early_exit = EarlyExitDrafter(Recorder(), 2)
    early_exit.keep_features((1,), FeatureBuffer)
    state = early_exit.open(Counted(4))
    early_exit.observe_target([state], [1], {1: torch.ones(1, 3)})
    assert state.features.take(0, 4) is None and state.features.take(4, 5) is not None


def test_an_early_exit_prefill_does_not_move_the_target():
    early_exit = EarlyExitDrafter(Recorder(), 2)
    early_exit.keep_features((0,), FeatureBuffer)
    state = early_exit.open(Counted())
    early_exit.prefill([state], [[1, 2]])
    early_exit.prefill([state], [[3]])
    assert [position for _, position, _ in early_exit.decoder.runs] == [0, 1, 2]
    assert state.length == 0 and state.features.length == 3


@pytest.mark.parametrize("layers", [0, 4, 5])
def test_an_early_exit_must_leave_layers_to_verify_with(layers):
    with pytest.raises(ExitLayerError, match="between 1 and 3"):
        EarlyExitDrafter(Recorder(), layers)


def test_taps_beyond_the_drafter_are_refused(model):
    with pytest.raises(FeatureTapError, match="0 to 4"):
        model.keep_features((5,), FeatureBuffer)
    with pytest.raises(FeatureTapError, match="0 to 2"):
        EarlyExitDrafter(Recorder(), 2).keep_features((3,), FeatureBuffer)
