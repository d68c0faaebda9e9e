"""The target's states of the documents that a training has gone through once: later epochs look them up instead of running the target again.

Axes: N tokens of all documents, k layers whose states are kept, E hidden size, P positions of a batch that count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.train.documents import Batch, TokenDocuments, to_device
from engine.train.loss import TeacherHead, Totals, totals_of
from engine.train.model import TargetStates, Teacher


class KeptStates:
    """States of whole documents, in memory of `num_bytes` on the target's device.

    Args:
        teacher: the target.
        documents: those that are trained on, n of them.
        taps: numbers of layers whose residual streams are kept, ascending; the last layer's is kept besides, for the states after the final norm.
    """

    def __init__(self, teacher: Teacher, documents: TokenDocuments, taps: Sequence[int]) -> None:
        self.teacher, self.taps, device = teacher, tuple(taps), teacher.norm.device
        self._layers = _layers(teacher, taps)
        self._offsets, self._lengths = documents.offsets, documents.lengths
        self._known = np.zeros(len(documents), dtype=bool)
        self._padding = len(documents.tokens)  # the row that padded tokens share
        shape = (self._padding + 1, teacher.embed.shape[1])
        self._states = [torch.empty(shape, dtype=teacher.norm.dtype, device=device) for _ in self._layers]
        self._log_sum = torch.empty(shape[0], device=device)
        self._best = torch.empty(shape[0], dtype=torch.int32, device=device)

    @staticmethod
    def num_bytes(teacher: Teacher, documents: TokenDocuments, taps: Sequence[int]) -> int:
        """What the states of all documents take."""
        row = len(_layers(teacher, taps)) * teacher.embed.shape[1] * teacher.norm.dtype.itemsize + 8
        return (len(documents.tokens) + 1) * row

    def of(self, indices: np.ndarray, batch: Batch, head: TeacherHead, chunk: int) -> tuple[TargetStates, Totals]:
        """The states of a batch, the documents `indices`, after the layers `taps`, and the totals [P] of the logits at its positions: looked up where
        the target has run all of these documents, else computed (chunk: see `totals_of`) and kept."""
        shape = tuple(batch.token_ids.shape)
        rows = to_device(self._rows(indices, shape[1]), batch.token_ids.device)
        spoken = rows[batch.positions]
        if self._known[indices].all():
            streams = [own[rows].unflatten(0, shape) for own in self._states]
            found = TargetStates(self._taken(streams), self.teacher.normed(streams[-1]))
            return found, Totals(self._log_sum[spoken], self._best[spoken].long())
        streams, final = self.teacher.run_taps(batch.token_ids, self._layers)
        totals = totals_of(final.flatten(0, 1)[batch.positions], head, chunk=chunk)
        for own, stream in zip(self._states, streams, strict=True):
            own.index_copy_(0, rows, stream.flatten(0, 1))
        self._log_sum.index_copy_(0, spoken, totals.log_sum)
        self._best.index_copy_(0, spoken, totals.best.int())
        self._known[indices] = True
        return TargetStates(self._taken(streams), final), totals

    def _taken(self, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        return [streams[self._layers.index(tap)] for tap in self.taps]

    def _rows(self, indices: np.ndarray, width: int) -> torch.Tensor:
        """Where the tokens of padded documents [B, width] stand, flattened, int64."""
        places = np.arange(width)
        rows = np.where(places < self._lengths[indices, None], self._offsets[indices, None] + places, self._padding)
        return torch.from_numpy(rows.reshape(-1))


def _layers(teacher: Teacher, taps: Sequence[int]) -> list[int]:
    return sorted({*taps, len(teacher.layers)})
