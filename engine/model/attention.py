"""What all layers of one forward pass share: angles, slots of the new tokens, and how to find the keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from draft.tree import TreePosition
from engine.errors import InvalidOption
from engine.kv.pool import KvSequence, PagedPool
from engine.kv.quantized_pool import QuantizedBatch, QuantizedPool
from engine.model.config import DecoderConfig
from engine.model.rope import RopeTable
from kernels.dispatch import use_triton
from kernels.paged_attention.reference import Plan, plan
from kernels.quantized_kv import NUM_SINKS, RING
from kernels.rope.reference import widen


class ReferenceBatch(NamedTuple):
    """For the plain PyTorch path, laid out so that a layer needs few small operations."""

    wide: tuple[torch.Tensor, torch.Tensor]  # angles as `kernels.rope.reference.rotate` wants them
    slots: torch.Tensor | slice  # [N] int64; a slice where the slots follow one another
    attention: Plan


class TritonBatch(NamedTuple):
    """For the Triton kernels: tensors on the device."""

    cos: torch.Tensor  # [N, d/2] float32
    sin: torch.Tensor  # [N, d/2] float32
    slots: torch.Tensor  # [N] int64
    page_table: torch.Tensor  # [B, max_pages] int32
    query_lens: torch.Tensor  # [B] int32
    context_lens: torch.Tensor  # [B] int32, the new tokens included
    max_query_len: int


def prepare(
    sequences: list[KvSequence],
    query_lens: list[int],
    starts: list[int],
    config: DecoderConfig,
    rope: RopeTable,
    *,
    deterministic: bool,
    placements: list[TreePosition] | None = None,
) -> ReferenceBatch | TritonBatch | QuantizedBatch:
    """Own the pages of the new tokens and gather what the layers need.

    Args:
        sequences: one per request, all of one pool.
        query_lens: new tokens of each request.
        starts: position of each request's first new token.
        deterministic: see `Decoder.forward`.
        placements: where tokens stand that do not follow one another; only for the plain PyTorch path.

    Raises:
        PoolExhausted: the pool has too few pages.
        InvalidOption: placements where the Triton kernels run.
    """
    pool = sequences[0].pool
    device, size = pool.device, pool.page_size
    contexts = [start + count for start, count in zip(starts, query_lens, strict=True)]
    if placements is not None:
        contexts = [max(placement.slots) + 1 for placement in placements]
    for sequence, context in zip(sequences, contexts, strict=True):
        assert sequence.pool is pool, "the sequences of a batch share one pool"
        sequence.ensure(context)
    if placements is None:
        cos, sin = rope.gather(list(zip(starts, contexts, strict=True)))
        places: list[Sequence[int]] = [range(start, context) for start, context in zip(starts, contexts, strict=True)]
    else:
        cos, sin = rope.at([position for placement in placements for position in placement.positions])
        places = [placement.slots for placement in placements]
    numbers = [
        sequence.pages[slot // size] * size + slot % size for sequence, slots in zip(sequences, places, strict=True) for slot in slots
    ]
    pages = [sequence.pages for sequence in sequences]
    if isinstance(pool, QuantizedPool) or use_triton(cos):
        if placements is not None:
            raise InvalidOption("the Triton kernels take tokens that follow one another", "draft without siblings there")
        width = max(len(own) for own in pages)
        table = [own + [0] * (width - len(own)) for own in pages]
        batch = TritonBatch(
            cos,
            sin,
            torch.tensor(numbers, dtype=torch.int64, device=device),
            torch.tensor(table, dtype=torch.int32, device=device),
            torch.tensor(query_lens, dtype=torch.int32, device=device),
            torch.tensor(contexts, dtype=torch.int32, device=device),
            max(query_lens),
        )
        if not isinstance(pool, QuantizedPool):
            return batch
        rows = [pool.exact_row(sequence) for sequence in sequences]
        since = [pool.note_written(sequence, start, end) for sequence, start, end in zip(sequences, starts, contexts, strict=True)]
        return QuantizedBatch(
            *batch,
            rope.table(max(contexts)),
            torch.tensor(rows, dtype=torch.int32, device=device),
            torch.tensor(since, dtype=torch.int32, device=device),
            _new_sinks(starts, query_lens, rows, device),
            _new_recent(starts, query_lens, rows, device),
        )
    assert isinstance(pool, PagedPool)
    first, last = numbers[0], numbers[-1]
    slots: torch.Tensor | slice = slice(first, last + 1)
    if numbers != list(range(first, last + 1)):
        slots = torch.tensor(numbers, dtype=torch.int64, device=device)
    group = config.num_heads // config.num_kv_heads
    attention = plan(pages, query_lens, contexts, size, group, pool.kv.dtype, device, deterministic=deterministic, placements=placements)
    return ReferenceBatch(widen(cos, sin), slots, attention)


def _new_sinks(starts: list[int], query_lens: list[int], rows: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Which of the new tokens, one request's after another's, are first ones, and where these are kept: each [M] int64; None without any."""
    if min(starts) >= NUM_SINKS:
        return None
    found, before = [], 0
    for start, count, row in zip(starts, query_lens, rows, strict=True):
        found += [(before + t, row * NUM_SINKS + start + t) for t in range(count) if start + t < NUM_SINKS]
        before += count
    new, slots = torch.tensor(found, dtype=torch.int64, device=device).unbind(1)
    return new, slots.contiguous()


def _new_recent(
    starts: list[int], query_lens: list[int], rows: list[int], device: torch.device
) -> tuple[torch.Tensor | slice, torch.Tensor]:
    """Which of the new tokens are among their request's last RING ones (a slice for all), [M] int64, and where these are kept."""
    new, slots, before = [], [], 0
    for start, count, row in zip(starts, query_lens, rows, strict=True):
        last = range(max(0, count - RING), count)
        new += [before + t for t in last]
        slots += [row * RING + (start + t) % RING for t in last]
        before += count
    which = slice(None) if len(new) == before else torch.tensor(new, dtype=torch.int64, device=device)
    return which, torch.tensor(slots, dtype=torch.int64, device=device)
