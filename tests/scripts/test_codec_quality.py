"""The quality protocol's figures against closed forms, with a target whose answers are known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from eval.codec_quality import Quality, Scores

UNTOUCHED, REPLACED = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.5, 0.3])


class _Sequence:
    def __init__(self, _reserved):
        self.replaced = False

    def advance(self, count):
        pass

    def free(self):
        pass


class _Target:
    """Says UNTOUCHED everywhere, and REPLACED where a cache was written."""

    device = torch.device("cpu")

    def new_pool(self, *_):
        return SimpleNamespace(new_sequence=_Sequence)

    def read_kv(self, sequence, start, end):
        return torch.zeros(end - start, 2)

    def write_kv(self, sequence, start, kv):
        sequence.replaced = True

    def __call__(self, ids, sequences, lengths, logits="all"):
        rows = [REPLACED if s.replaced else UNTOUCHED for s, n in zip(sequences, lengths, strict=True) for _ in range(n)]
        return SimpleNamespace(logits=torch.stack(rows).log())


def test_the_divergence_is_of_the_replaced_from_the_untouched():
    quality = Quality(_Target(), 16, "cpu")
    cases = quality.untouched([[0, 1, 2, 0] * 4, [0] * 16, [1] * 16])
    scores = Scores()
    quality.score(cases, [case.kv for case in cases], scores)
    wanted = sum(p * math.log(p / r) for p, r in zip(UNTOUCHED.tolist(), REPLACED.tolist(), strict=True))
    reverse = sum(r * math.log(r / p) for p, r in zip(UNTOUCHED.tolist(), REPLACED.tolist(), strict=True))
    assert abs(wanted - reverse) > 0.01
    assert scores.kl == pytest.approx(wanted, rel=1e-5)
    assert scores.positions == 12 and scores.predictions == 9 and scores.agree == 0
    following = [1, 2, 0, 0, 0, 0, 1, 1, 1]
    assert scores.nll == pytest.approx(-sum(math.log(REPLACED[t]) for t in following), rel=1e-5)
    assert scores.nll_untouched == pytest.approx(-sum(math.log(UNTOUCHED[t]) for t in following), rel=1e-5)
