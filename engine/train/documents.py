"""Token documents a draft head is trained on, the reduced vocabulary counted from them, and batches of them.

Axes: N tokens of all documents, n documents, R reduced vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from draft.errors import TrainingDataError
from engine.files import atomic_file

VERSION = 1
LENGTH_STEP = 64  # documents are padded to a multiple of it: few different shapes, little padding
_REMEDY = "draw the data again with scripts/train_draft.py"


@dataclass(frozen=True)
class TokenDocuments:
    """Documents one after another.

    tokens: [N] uint16 or int32. offsets: [n + 1] int64, document i is tokens[offsets[i]:offsets[i + 1]]. starts: [n] int32, where in the
    document its own text begins (what stands before is the same in all, a template's opening). answers: [n] int32, where the answer begins
    (the document's length when it has none). facts: how they were made, for reports.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    answers: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, documents: Sequence[Sequence[int] | np.ndarray], starts: Sequence[int], answers: Sequence[int], facts: dict[str, Any]
    ) -> TokenDocuments:
        """From lists or arrays of token ids. Raises TrainingDataError when there are none."""
        if not documents:
            raise TrainingDataError("there are no documents to train on", "draw more tokens")
        highest = max(int(np.max(document)) for document in documents)
        dtype = np.uint16 if highest < 2**16 else np.int32
        offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype(np.int64)
        tokens = np.concatenate([np.asarray(document, dtype=dtype) for document in documents])
        return cls(tokens, offsets, np.asarray(starts, np.int32), np.asarray(answers, np.int32), facts)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, [n] int64."""
        return np.diff(self.offsets)

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, a view."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def take(self, indices: np.ndarray) -> TokenDocuments:
        """These documents, in this order."""
        pieces = [self.document(int(i)) for i in indices]
        offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
        tokens = np.concatenate(pieces) if pieces else self.tokens[:0]
        return TokenDocuments(tokens, offsets, self.starts[indices], self.answers[indices], self.facts)

    def joined(self, other: TokenDocuments) -> TokenDocuments:
        """Both, the other's after these; these facts are kept."""
        tokens = np.concatenate([self.tokens, other.tokens.astype(self.tokens.dtype)])
        offsets = np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]])
        starts, answers = np.concatenate([self.starts, other.starts]), np.concatenate([self.answers, other.answers])
        return TokenDocuments(tokens, offsets, starts, answers, self.facts)

    def split(self, held_out: int, seed: int) -> tuple[TokenDocuments, TokenDocuments]:
        """(the rest, `held_out` documents drawn by the seed). Raises TrainingDataError when nothing would be left."""
        if not 0 < held_out < len(self):
            raise TrainingDataError(f"{held_out} of {len(self)} documents cannot be held out", "draw more tokens, or hold out fewer")
        order = np.random.default_rng((seed, 0)).permutation(len(self))
        return self.take(np.sort(order[held_out:])), self.take(np.sort(order[:held_out]))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over tokens and their division into documents."""
        sha = hashlib.sha256(self.tokens.astype(np.int32).tobytes())
        for part in (self.offsets, self.starts, self.answers):
            sha.update(part.tobytes())
        return sha.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a .npz file, whole or not at all."""
        header = json.dumps({"version": VERSION, "facts": self.facts})
        with atomic_file(path) as file:
            np.savez(file, tokens=self.tokens, offsets=self.offsets, starts=self.starts, answers=self.answers, header=np.array(header))

    @classmethod
    def load(cls, path: str | Path) -> TokenDocuments:
        """Read what `save` wrote. Raises TrainingDataError for anything else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                header = json.loads(str(file["header"]))
                found = cls(file["tokens"], file["offsets"], file["starts"], file["answers"], header["facts"])
        except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise TrainingDataError(f"{path} holds no training documents: {error}", _REMEDY) from error
        if header.get("version") != VERSION:
            raise TrainingDataError(f"{path} has version {header.get('version')}, this program reads {VERSION}", _REMEDY)
        if len(found.offsets) != len(found) + 1 or found.offsets[-1] != len(found.tokens) or len(found.answers) != len(found):
            raise TrainingDataError(f"the documents in {path} do not fit their offsets", _REMEDY)
        return found


def reduced_vocabulary(documents: TokenDocuments, vocab_size: int, size: int, always: Iterable[int]) -> Tensor:
    """The `size` most frequent tokens of the documents' own text, int64 [R] ascending; those in `always` are among them.

    Ties go to the lower id. Raises TrainingDataError for a size that the vocabulary or `always` does not allow.
    """
    kept = sorted({int(token) for token in always if 0 <= int(token) < vocab_size})
    if not max(1, len(kept)) <= size <= vocab_size:
        what = f"a reduced vocabulary of {size} tokens, for one of {vocab_size} with {len(kept)} special ones"
        raise TrainingDataError(what, f"choose between {max(1, len(kept))} and {vocab_size}")
    counts = np.bincount(documents.tokens, minlength=vocab_size).astype(np.int64)
    counts[kept] = np.iinfo(np.int64).max
    order = np.lexsort((np.arange(vocab_size), -counts))
    return torch.from_numpy(np.sort(order[:size]).astype(np.int64))


def coverage(documents: TokenDocuments, token_ids: Tensor) -> float:
    """Share of the documents' tokens that lie in the reduced vocabulary."""
    return float(np.isin(documents.tokens, token_ids.numpy()).mean())


class Batch(NamedTuple):
    """Padded documents on a device, and which positions count.

    token_ids: [B, T] int64, padded with 0 at the end (a causal model's earlier positions do not see it). positions: [N] int64 into the
    flattened [B * T], those that predict a token of the documents' own text. labels: [N] int64, that token. answer: [N] bool, whether it
    belongs to an answer.
    """

    token_ids: Tensor
    positions: Tensor
    labels: Tensor
    answer: Tensor


def epoch_order(documents: TokenDocuments, tokens_per_batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Documents of each batch of an epoch: shuffled, then put beside others of about their length; the batches shuffled too."""
    rng = np.random.default_rng((seed, 1, epoch))
    order = rng.permutation(len(documents))
    steps = -(-documents.lengths[order] // LENGTH_STEP)
    order = order[np.argsort(steps, kind="stable")]
    steps = np.sort(steps, kind="stable")
    batches: list[np.ndarray] = []
    for step in np.unique(steps):
        same = order[steps == step]
        count = max(1, tokens_per_batch // (int(step) * LENGTH_STEP))
        batches += [same[a : a + count] for a in range(0, len(same), count)]
    return [batches[i] for i in rng.permutation(len(batches))]


def make_batch(documents: TokenDocuments, indices: np.ndarray, device: torch.device, *, answers_only: bool = False) -> Batch:
    """The padded batch of these documents; assembled on the host, so that nothing is read back. answers_only: of a document with an answer, only the
    positions that predict it."""
    lengths = documents.lengths[indices]
    width = int(-(-lengths.max() // LENGTH_STEP)) * LENGTH_STEP
    ids = np.zeros((len(indices), width), np.int64)
    positions, answer = [], []
    for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
        ids[row, :length] = documents.document(int(index))
        answer_at = int(documents.answers[index])
        begin = answer_at if answers_only and answer_at < length else int(documents.starts[index])
        at = np.arange(max(begin, 1) - 1, length - 1)
        positions.append(at + row * width)
        answer.append(at + 1 >= answer_at)
    where = np.concatenate(positions)
    labels = ids.reshape(-1)[where + 1]
    arrays = (ids, where, labels, np.concatenate(answer))
    return Batch(*(to_device(torch.from_numpy(array), device) for array in arrays))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, without waiting for what the device is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def batches(documents: TokenDocuments, tokens_per_batch: int, device: torch.device) -> Iterator[Batch]:
    """All documents once, in a fixed order, for measuring."""
    for indices in epoch_order(documents, tokens_per_batch, 0, 0):
        yield make_batch(documents, indices, device)
