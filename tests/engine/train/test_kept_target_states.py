"""The target's states that a training keeps: what the target would say again, looked up, and a training that learns the same from them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.train.documents import TokenDocuments, epoch_order, make_batch
from engine.train.kept_states import KeptStates
from engine.train.loss import TeacherHead, totals_of
from engine.train.model import Teacher
from engine.train.trainer import Trainer
from tests.engine.train.test_state_model import OPTIONS, model, texts
from tests.engine.train.test_trainer import V

__all__ = ["model", "texts"]


@pytest.mark.parametrize("taps", [(2,), (1, 4)])
def test_what_is_looked_up_is_what_the_target_says(model: Teacher, texts: TokenDocuments, taps: tuple[int, ...]) -> None:
    kept, head = KeptStates(model, texts, taps), TeacherHead.of(model.head, torch.arange(1, V, 3))
    for epoch in range(2):  # of other batches
        for indices in epoch_order(texts, 100, 0, epoch):
            batch = make_batch(texts, indices, torch.device("cpu"), answers_only=True)
            states, totals = kept.of(indices, batch, head, 7)
            expected = model.run_taps(batch.token_ids, taps)
            inside = torch.arange(batch.token_ids.shape[1]) < torch.from_numpy(texts.lengths[indices])[:, None]
            for found, wanted in zip([*states.taken, states.final], [*expected.taken, expected.final], strict=True):
                assert found.shape == wanted.shape
                assert float((found - wanted)[inside].norm()) < 1e-5 * float(wanted[inside].norm())
            whole = totals_of(expected.final.flatten(0, 1)[batch.positions], head, chunk=1000)
            assert torch.allclose(totals.log_sum, whole.log_sum, atol=1e-4) and torch.equal(totals.best, whole.best)
    size = sum(own.nbytes for own in (*kept._states, kept._log_sum, kept._best))
    assert size == KeptStates.num_bytes(model, texts, taps)


def test_totals_are_those_of_the_whole_vocabulary(model: Teacher) -> None:
    states = torch.randn(23, model.embed.shape[1], generator=torch.Generator().manual_seed(4))
    head = TeacherHead.of(model.head, torch.tensor([2, 5, 30]))
    found, logits = totals_of(states, head, chunk=5), states @ model.head.T
    assert torch.allclose(found.log_sum, logits.logsumexp(-1), atol=1e-5)
    assert torch.equal(found.best, head.place[logits.argmax(-1)])


def test_a_training_runs_the_target_once_a_document_and_learns_the_same(model: Teacher, texts: TokenDocuments, monkeypatch) -> None:
    runs: list[int] = []
    run = Teacher.run_taps
    monkeypatch.setattr(Teacher, "run_taps", lambda self, ids, taps: runs.append(len(ids)) or run(self, ids, taps))
    options = replace(OPTIONS, batch_tokens=2048)
    first, again = (Trainer(model, torch.arange(V), texts, options, keep_bytes=size) for size in (0, 1 << 24))
    assert first.kept is None and again.kept is not None
    runs.clear()
    assert again.run() and again.epochs > 2
    assert sum(runs) == len(texts), "each document once"
    runs.clear()
    assert first.run() and sum(runs) > 2 * len(texts)
    for (name, one), other in zip(first.averaged.tensors().items(), again.averaged.tensors().values(), strict=True):
        assert float((one - other).norm()) <= 1e-3 * float(one.norm()), name
    assert np.isclose(float(first._sums[0]), float(again._sums[0]), rtol=1e-3)
