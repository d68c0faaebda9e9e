"""Whole blocks of drafts in one compiled call: a target's first layers, a draft head's own layers and its head, pass after pass, for a batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from kernels.cpu_decode.step import _FUNCTIONS, CompiledLayers, Matrix, _at, _numbers, _place, whole_rows
from kernels.cpu_decode.stopping import Stopping

_SPARE_PLACES = 16  # that attention may overwrite behind a row's scores


class Part(NamedTuple):
    """Layers, their angles by position (cos, sin [*, d/2] float32), and their page tables, int64 [B, P]."""

    layers: CompiledLayers
    angles: tuple[torch.Tensor, torch.Tensor]
    tables: np.ndarray


class Vocabulary(NamedTuple):
    """embeddings: bf16 [V, E]. norm [E], head [R, E]: of the draft head, R a multiple of 16. token_ids: int64 [R], what its rows stand for."""

    embeddings: torch.Tensor
    norm: torch.Tensor
    head: Matrix
    token_ids: torch.Tensor


class Drafted(NamedTuple):
    """counts: drafts of each request, int64 [B]. tokens, probabilities: at each depth the likeliest tokens, the draft first, [B, K, candidates] int64
    and float32; undefined beyond a request's drafts."""

    counts: np.ndarray
    tokens: np.ndarray
    probabilities: np.ndarray


def draft(
    first: Part,
    own: Part,
    vocabulary: Vocabulary,
    last: Sequence[int],
    positions: Sequence[int],
    pending: Sequence[torch.Tensor | None],
    lengths: Sequence[int],
    candidates: int,
    stopping: Stopping,
) -> Drafted:
    """Draft up to lengths[b] >= 1 tokens after last[b], each the likeliest.

    Keys and values are written at positions[b] on, in the first layers' pool and in the own ones'; the latter's of `pending` states right before, too.

    Args:
        last: each request's last token, which is in no cache. positions: its place.
        pending: states [n, E] of the n tokens before it that the own layers have not run; None: of none.
        candidates: likeliest tokens that are told at each depth.
    """
    batch, longest, shape = len(last), max(lengths), first.layers.shape
    assert own.layers.shape == shape and len(stopping.passes) == batch + 1, "one shape of layers, and a price of each number of requests"
    counts = [0 if states is None else len(states) for states in pending]
    ends = list(itertools.accumulate(count + 1 for count in counts))
    rows, width = ends[-1], vocabulary.embeddings.shape[1]
    stream = torch.empty(rows, width, dtype=torch.float32)
    for end, count, states in zip(ends, counts, pending, strict=True):
        if states is not None:
            stream[end - 1 - count : end - 1] = states
    at = np.array(positions, np.int64)
    own_positions = np.concatenate([np.arange(p - n, p + 1, dtype=np.int64) for p, n in zip(positions, counts, strict=True)])
    own_requests = np.repeat(np.arange(batch, dtype=np.int64), np.array(counts, np.int64) + 1)
    places = max(positions) + longest + _SPARE_PLACES
    wide = max((shape.heads + 2 * shape.kv_heads) * shape.head_dim, 2 * shape.intermediate)
    joined, outputs = shape.heads * shape.head_dim, vocabulary.head.shape[0]
    most = max(rows, batch)
    sizes = (
        batch * width, most * shape.head_dim // 2, most * shape.head_dim // 2, most * width, most * wide, most * joined,
        shape.heads // shape.kv_heads * places, whole_rows(most) * max(width, joined, shape.intermediate) // 2, batch * outputs, batch,
    )  # fmt: skip
    starts = [0, *itertools.accumulate(-(-size // 16) * 16 for size in sizes)]
    space = torch.empty(starts[-1], dtype=torch.float32)
    rest, cos, sin, normed, spread, attended, scores, packed, logits, before = (space.data_ptr() + 4 * start for start in starts[:-1])
    tokens, own_last, wanted = (np.array(values, np.int64) for values in (last, [end - 1 for end in ends], lengths))
    index, row_positions, found_counts = (np.zeros(batch, np.int64) for _ in range(3))
    found, chances = np.zeros((batch, longest, candidates), np.int64), np.zeros((batch, longest, candidates), np.float32)
    told = [part.layers.told(*part.angles) for part in (first, own)]
    norm = _numbers(vocabulary.norm)
    assert vocabulary.embeddings.dtype == torch.bfloat16 and vocabulary.embeddings.is_contiguous()
    _FUNCTIONS["draft"](
        _at(told[0]), _at(told[1]), width, shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate,
        vocabulary.embeddings.data_ptr(), _at(norm), *_place(vocabulary.head), outputs, vocabulary.token_ids.data_ptr(),
        batch, _at(tokens), _at(at), _at(first.tables), first.tables.shape[1], _at(own.tables), own.tables.shape[1],
        stream.data_ptr(), rows, _at(own_positions), _at(own_requests), _at(own_last), _at(wanted), longest, candidates,
        _at(stopping.heights), _at(stopping.slopes), _at(stopping.rates), stopping.row, _at(stopping.passes),
        _at(found_counts), _at(found), _at(chances),
        rest, _at(index), _at(row_positions), before, cos, sin, normed, spread, wide, attended, scores, places, packed, logits,
        shape.eps, shape.scale,
    )  # fmt: skip
    return Drafted(found_counts, found, chances)
