"""Attention backends: what one forward pass asks of the KV cache, whatever pages hold and whichever kernels run.

A backend is planned for a batch, once for all layers; then each layer rotates, writes its new keys and values and attends. Pages are the caller's
business: a plan only reads the sequences' page lists.

Axes: B requests, N new tokens over the batch, H query heads, G KV heads, d head size, S page size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from draft.tree import TreePosition
from engine.errors import InvalidOption, PagesNotReserved
from engine.kv.pool import KvPool, KvSequence, PagedPool
from engine.kv.quantized_pool import QuantizedPool
from engine.model.config import DecoderConfig
from engine.model.device import on_device
from engine.model.rope import RopeTable
from kernels.cpu_decode.elementwise import turn_rows
from kernels.cpu_decode.prompts import attends_prompts
from kernels.dispatch import use_triton
from kernels.kv_write import kv_write
from kernels.kv_write.reference import store
from kernels.paged_attention import paged_attention
from kernels.paged_attention.reference import TREE_SPAN, Plan, attend, plan
from kernels.quantized_kv import NUM_SINKS, RING, ExactRecent, ExactSinks, quantized_kv_write, quantized_paged_attention
from kernels.rope import apply_rope
from kernels.rope.reference import rotate, widen
from kernels.upload import upload

_LISTED_TOKENS = 512


class AttentionBatch(NamedTuple):
    """New tokens of a ragged batch, one request's after another's, as the host knows them.

    sequences: one per request, all of one pool, with pages for the new tokens. query_lens: new tokens of each. starts: position of each request's
    first one. tree_positions: where they stand, if they do not follow one another from there on.
    """

    sequences: Sequence[KvSequence]
    query_lens: Sequence[int]
    starts: Sequence[int]
    tree_positions: Sequence[TreePosition] | None = None

    @property
    def contexts(self) -> list[int]:
        """Places of the cache that each request needs, new tokens included."""
        if self.tree_positions is not None:
            return [max(tree_position.slots) + 1 for tree_position in self.tree_positions]
        return [start + count for start, count in zip(self.starts, self.query_lens, strict=True)]

    def check_pages(self) -> None:
        """Raises PagesNotReserved unless every sequence owns the pages of its new tokens alone, and holds what they attend to."""
        for sequence, start, context in zip(self.sequences, self.starts, self.contexts, strict=True):
            sequence.check_writable(start, context)
            if not sequence.sees(start):
                raise PagesNotReserved(
                    f"layers with a window hold no longer what a token at {start} attends to", "run the text again from its beginning"
                )

    @property
    def slots(self) -> list[int]:
        """Where in the pool each new token is written: page * S + offset."""
        contexts = self.contexts
        places: list[Sequence[int]]
        if self.tree_positions is None:
            places = [range(start, context) for start, context in zip(self.starts, contexts, strict=True)]
        else:
            places = [tree_position.slots for tree_position in self.tree_positions]
        found = []
        for sequence, own, context in zip(self.sequences, places, contexts, strict=True):
            assert context <= sequence.capacity, "pages are owned before a plan is made"
            pages, first, size = sequence.pages, sequence.first_page, sequence.pool.page_size
            found += [pages[place // size - first] * size + place % size for place in own]
        return found

    def slots_on(self, device: torch.device) -> Tensor:
        """`slots` as [N] int64 on a device: a long pass's are worked out there, as a list of them takes the host a millisecond."""
        if self.tree_positions is not None or sum(self.query_lens) <= _LISTED_TOKENS:
            return upload(self.slots, device)
        parts = [
            torch.stack(sequence.addresses(start, context, device))
            for sequence, start, context in zip(self.sequences, self.starts, self.contexts, strict=True)
        ]
        pages, offsets = torch.cat(parts, 1)
        return pages * self.sequences[0].pool.page_size + offsets

    @property
    def positions(self) -> list[int]:
        """Position in its text of each new token."""
        if self.tree_positions is not None:
            return [position for tree_position in self.tree_positions for position in tree_position.positions]
        return [p for start, count in zip(self.starts, self.query_lens, strict=True) for p in range(start, start + count)]

    def angles(self, rope: RopeTable) -> tuple[Tensor, Tensor]:
        """cos, sin of the new tokens' positions, each [N, d/2] float32."""
        if self.tree_positions is not None:
            return rope.at(self.positions)
        return rope.gather(list(zip(self.starts, self.contexts, strict=True)))

    def tree(self) -> tuple[list[int], list[int]] | None:
        """(visible: N bit masks, windows: N first places they speak of), as `kernels.paged_attention` takes them; None without tree_positions.

        Raises:
            InvalidOption: a token lies farther behind its position than a mask has bits.
        """
        if self.tree_positions is None:
            return None
        slots = [slot for tree_position in self.tree_positions for slot in tree_position.slots]
        windows = self.positions
        behind = [slot - position for slot, position in zip(slots, windows, strict=True)]
        if max(behind) >= TREE_SPAN or min(behind) < 0:
            what = f"draft tree places {min(behind)} to {max(behind)} behind their positions"
            raise InvalidOption(what, f"keep them from 0 to {TREE_SPAN - 1}")
        return [1 << distance for distance in behind], windows


class AttentionBackend(ABC):
    """Attention of one model over one pool.

    Args:
        pool: holds the model's keys and values.
        config, rope: of the model. local_rope: table of its layers with a RoPE of their own, if there are any.
        deterministic: a token's result is the same bits alone, in any batch and in any block.
    """

    def __init__(
        self, pool: KvPool, config: DecoderConfig, rope: RopeTable, local_rope: RopeTable | None = None, *, deterministic: bool = False
    ) -> None:
        self.config, self.deterministic = config, deterministic
        self.ropes = (rope,) if local_rope is None else (rope, local_rope)  # a layer's is the one of number shape.local_rope
        self.shapes = [config.layer_shape(number) for number in range(config.num_layers)]
        self.device, self.page_size = pool.device, pool.page_size

    @abstractmethod
    def plan(self, batch: AttentionBatch) -> None:
        """Gather what the layers need for a batch. The sequences own their pages already.

        Raises:
            InvalidOption: tree_positions that this backend cannot attend with.
        """

    @abstractmethod
    def rotate(self, layer: int, qk: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's queries and keys side by side [N, H + G, d] -> the queries [N, H, d] that `run` takes, the keys [N, G, d] that `write` takes:
        rotated here, or there."""

    @abstractmethod
    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write new keys and values [N, G, d] of a layer."""

    @abstractmethod
    def run(self, layer: int, q: Tensor) -> Tensor:
        """Attention of queries [N, H, d] -> [N, H, d], after the layer's `write`."""

    @abstractmethod
    def prepare_for_capture(self, num_requests: int, num_rows: int, max_query_len: int, max_context: int) -> None:
        """Lay out what the layers read in tensors that stay where they are, for batches of exactly so many requests and new tokens.

        Pad a smaller batch with requests on a scratch sequence. max_query_len, max_context: of any request, over all batches to come.
        """

    @abstractmethod
    def prepare_for_replay(self, batch: AttentionBatch) -> None:
        """Fill these tensors for a batch, so that what was captured over them may run again.

        Raises:
            InvalidOption: the batch is not of the captured size, or has tree_positions.
        """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`write`, then `run`."""
        self.write(layer, k, v)
        return self.run(layer, q)


def open_backend(
    pool: KvPool, config: DecoderConfig, rope: RopeTable, local_rope: RopeTable | None = None, *, deterministic: bool = False
) -> AttentionBackend:
    """The backend for a pool, on its device. Making one is cheap; one that is captured must be kept."""
    if isinstance(pool, QuantizedPool):
        return QuantizedBackend(pool, config, rope, local_rope, deterministic=deterministic)
    assert isinstance(pool, PagedPool)
    kind = TritonBackend if use_triton(pool.kv) else ReferenceBackend
    return kind(pool, config, rope, local_rope, deterministic=deterministic)


@dataclass(frozen=True)
class _Capacity:
    """Sizes that a backend was prepared for."""

    num_requests: int
    num_rows: int
    max_query_len: int
    max_context: int

    def check(self, batch: AttentionBatch) -> None:
        if batch.tree_positions is not None:
            raise InvalidOption("a captured step takes no tree_positions", "run draft trees uncaptured")
        found = len(batch.sequences), sum(batch.query_lens)
        if found != (self.num_requests, self.num_rows):
            what = f"{found[0]} requests of {found[1]} new tokens do not fit a step captured for {self.num_requests} of {self.num_rows}"
            raise InvalidOption(what, "pad the batch with requests on a scratch sequence, or capture a step of its size")
        if max(batch.query_lens) > self.max_query_len or max(batch.contexts) > self.max_context:
            what = f"requests of up to {max(batch.query_lens)} new tokens in contexts of up to {max(batch.contexts)} are longer than the step's"
            raise InvalidOption(what, f"capture one for more than {self.max_query_len} new tokens, {self.max_context} in all")


class ReferenceBackend(AttentionBackend):
    """Plain PyTorch over plain pages, laid out so that a layer needs few small operations."""

    def __init__(
        self, pool: PagedPool, config: DecoderConfig, rope: RopeTable, local_rope: RopeTable | None = None, *, deterministic: bool = False
    ) -> None:
        super().__init__(pool, config, rope, local_rope, deterministic=deterministic)
        self.pool = pool
        self._heads = config.num_heads
        self._capacity: _Capacity | None = None
        self._angles: list[tuple[Tensor, Tensor]]  # one a RoPE
        self._wide: list[tuple[Tensor, Tensor] | None]
        self._slots: Tensor | slice
        self._plans: dict[int | None, Plan]  # by window

    def plan(self, batch: AttentionBatch) -> None:
        """See `AttentionBackend.plan`."""
        slots = batch.slots
        first, last = slots[0], slots[-1]
        self._slots = slice(first, last + 1)
        if slots != list(range(first, last + 1)):
            self._slots = torch.tensor(slots, dtype=torch.int64, device=self.device)
        self._angles = [batch.angles(rope) for rope in self.ropes]
        self._wide = [None] * len(self._angles)
        # a request's keys are counted from the first page that it still has
        before = [sequence.first_page * self.page_size for sequence in batch.sequences]
        tree = batch.tree()
        if tree is not None:
            rows = [first for first, count in zip(before, batch.query_lens, strict=True) for _ in range(count)]
            tree = tree[0], [place - first for place, first in zip(tree[1], rows, strict=True)]
        self._plans = {
            window: plan(
                [sequence.pages for sequence in batch.sequences],
                batch.query_lens,
                [context - first for context, first in zip(batch.contexts, before, strict=True)],
                self.page_size,
                self.config.num_heads // self.config.num_kv_heads,
                self.pool.kv.dtype,
                self.device,
                deterministic=self.deterministic,
                tree=None if tree is None else (torch.tensor(tree[0], device=self.device), torch.tensor(tree[1], device=self.device)),
                sliding_window=window,
                in_parts=all(shape.softcap is None for shape in self.shapes),
                compiled=attends_prompts(self.pool.kv.shape[-1], self.pool.kv.dtype, self.device),
            )
            for window in {shape.window for shape in self.shapes}
        }

    def rotate(self, layer: int, qk: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys turn in one go."""
        which = self.shapes[layer].local_rope
        turned = turn_rows(qk, *self._angles[which])
        if turned is None:
            wide = self._wide[which] = self._wide[which] or widen(*self._angles[which])
            turned = rotate(qk, *wide)
        return turned[:, : self._heads], turned[:, self._heads :]

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keys come rotated."""
        k_pages, v_pages = self.pool.layer(layer)
        store(k, self._slots, k_pages)
        store(v, self._slots, v_pages)

    def run(self, layer: int, q: Tensor) -> Tensor:
        """Queries come rotated."""
        shape = self.shapes[layer]
        return attend(q, *self.pool.layer(layer), self._plans[shape.window], shape.scale, shape.softcap)

    def prepare_for_capture(self, num_requests: int, num_rows: int, max_query_len: int, max_context: int) -> None:
        """Only the sizes are kept: plain operations are never captured, and `prepare_for_replay` plans anew."""
        self._capacity = _Capacity(num_requests, num_rows, max_query_len, max_context)

    def prepare_for_replay(self, batch: AttentionBatch) -> None:
        """See `AttentionBackend.prepare_for_replay`."""
        assert self._capacity is not None, "prepare_for_capture comes first"
        self._capacity.check(batch)
        self.plan(batch)


class SpreadBackend(AttentionBackend):
    """Attention of a model whose layers lie on several devices: the backend of each device's layers over its part of the pool.

    Args:
        parts: (first layer, backend of the layers from there on, which counts them from 0), in order.
    """

    def __init__(self, parts: Sequence[tuple[int, AttentionBackend]], *, deterministic: bool) -> None:
        self.parts, self.deterministic = tuple(parts), deterministic
        self.device, self.page_size = parts[0][1].device, parts[0][1].page_size

    def _of(self, layer: int) -> tuple[AttentionBackend, int]:
        return next((backend, layer - first) for first, backend in reversed(self.parts) if first <= layer)

    def plan(self, batch: AttentionBatch) -> None:
        """On every device."""
        for _, backend in self.parts:
            with on_device(backend.device):
                backend.plan(batch)

    def rotate(self, layer: int, qk: Tensor) -> tuple[Tensor, Tensor]:
        """By the layer's backend."""
        backend, own = self._of(layer)
        return backend.rotate(own, qk)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """By the layer's backend."""
        backend, own = self._of(layer)
        backend.write(own, k, v)

    def run(self, layer: int, q: Tensor) -> Tensor:
        """By the layer's backend."""
        backend, own = self._of(layer)
        return backend.run(own, q)

    def prepare_for_capture(self, num_requests: int, num_rows: int, max_query_len: int, max_context: int) -> None:
        """Raises NotImplementedError: a graph is of one device."""
        raise NotImplementedError("a captured step is of one device")

    def prepare_for_replay(self, batch: AttentionBatch) -> None:
        """Raises NotImplementedError: a graph is of one device."""
        raise NotImplementedError("a captured step is of one device")


class WindowedBackend(AttentionBackend):
    """Attention of a model whose windowed layers keep pages of their own: a backend for each pool of them.

    Args:
        parts: (layers, backend of these, which counts them from 0): the layers that attend to everything first, where there are any; then those of each
            window, in the order of a sequence's `windows`.
        whole: whether the first part is that of all tokens.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[int], AttentionBackend]], *, whole: bool, deterministic: bool) -> None:
        self.backends, self.whole, self.deterministic = tuple(backend for _, backend in parts), whole, deterministic
        self._of = {layer: (backend, own) for layers, backend in parts for own, layer in enumerate(layers)}
        self.device, self.page_size = self.backends[0].device, self.backends[0].page_size

    def _batches(self, batch: AttentionBatch) -> list[AttentionBatch]:
        """The same tokens in each backend's pool."""
        whole = [batch] if self.whole else []
        own = zip(*(sequence.windows for sequence in batch.sequences), strict=True)
        return whole + [batch._replace(sequences=sequences) for sequences in own]

    def plan(self, batch: AttentionBatch) -> None:
        """See `AttentionBackend.plan`."""
        for backend, own in zip(self.backends, self._batches(batch), strict=True):
            backend.plan(own)

    def rotate(self, layer: int, qk: Tensor) -> tuple[Tensor, Tensor]:
        """By the layer's backend."""
        backend, own = self._of[layer]
        return backend.rotate(own, qk)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """By the layer's backend."""
        backend, own = self._of[layer]
        backend.write(own, k, v)

    def run(self, layer: int, q: Tensor) -> Tensor:
        """By the layer's backend."""
        backend, own = self._of[layer]
        return backend.run(own, q)

    def prepare_for_capture(self, num_requests: int, num_rows: int, max_query_len: int, max_context: int) -> None:
        """See `AttentionBackend.prepare_for_capture`."""
        for backend in self.backends:
            backend.prepare_for_capture(num_requests, num_rows, max_query_len, max_context)

    def prepare_for_replay(self, batch: AttentionBatch) -> None:
        """See `AttentionBackend.prepare_for_replay`."""
        for backend, own in zip(self.backends, self._batches(batch), strict=True):
            backend.prepare_for_replay(own)


@dataclass
class DeviceBatch:
    """A batch on the device, for the Triton kernels."""

    angles: tuple[tuple[Tensor, Tensor], ...]  # cos and sin [N, d/2] float32, one pair a RoPE
    slots: Tensor  # [N] int64
    page_table: Tensor  # [B, max_pages] int32
    query_lens: Tensor  # [B] int32
    context_lens: Tensor  # [B] int32, the new tokens included
    max_query_len: int
    visible: Tensor | None = None  # [N] int64, of a draft tree (`kernels.paged_attention`)
    windows: Tensor | None = None  # [N] int32, of a draft tree
    usual_context: int | None = None  # keys that launches are laid out for; None: as many as page_table reaches

    @classmethod
    def of(cls, batch: AttentionBatch, ropes: Sequence[RopeTable], device: torch.device) -> DeviceBatch:
        """From the host's lists."""
        pages = [sequence.table for sequence in batch.sequences]
        width = max(len(own) for own in pages)
        tree = batch.tree()
        return cls(
            tuple(batch.angles(rope) for rope in ropes),
            batch.slots_on(device),
            upload([own + [0] * (width - len(own)) for own in pages], device, torch.int32),
            upload(batch.query_lens, device, torch.int32),
            upload(batch.contexts, device, torch.int32),
            max(batch.query_lens),
            None if tree is None else upload(tree[0], device),
            None if tree is None else upload(tree[1], device, torch.int32),
        )

    @classmethod
    def static(cls, capacity: _Capacity, page_size: int, head_dim: int, num_ropes: int, device: torch.device) -> DeviceBatch:
        """Tensors to be filled by `fill`."""
        rows, requests = capacity.num_rows, capacity.num_requests
        angles = tuple((cos, sin) for cos, sin in torch.zeros(num_ropes, 2, rows, head_dim // 2, dtype=torch.float32, device=device))
        query_lens, context_lens = torch.zeros(2, requests, dtype=torch.int32, device=device)
        table = torch.zeros(requests, -(-capacity.max_context // page_size), dtype=torch.int32, device=device)
        slots = torch.zeros(rows, dtype=torch.int64, device=device)
        return cls(angles, slots, table, query_lens, context_lens, capacity.max_query_len)

    def fill(self, other: DeviceBatch) -> None:
        """Take over another batch's values; pages past the longest context are not needed."""
        width = min(self.page_table.shape[1], other.page_table.shape[1])
        self.page_table[:, :width] = other.page_table[:, :width]
        for pair, found in zip(self.angles, other.angles, strict=True):
            for mine, theirs in zip(pair, found, strict=True):
                mine.copy_(theirs)
        for own in fields(self):
            mine, theirs = getattr(self, own.name), getattr(other, own.name)
            if isinstance(mine, Tensor) and mine is not self.page_table:
                mine.copy_(theirs)


class TritonBackend(AttentionBackend):
    """The kernels over plain pages, with all that they read in tensors; on a CPU, unless they are forced, their twins run.

    batch: what the layers read. A caller whose sequences live on the device alone may set it instead of calling `plan`.
    """

    batch: DeviceBatch

    def __init__(
        self, pool: PagedPool, config: DecoderConfig, rope: RopeTable, local_rope: RopeTable | None = None, *, deterministic: bool = False
    ) -> None:
        super().__init__(pool, config, rope, local_rope, deterministic=deterministic)
        self.pool = pool
        self._capacity: _Capacity | None = None

    def plan(self, batch: AttentionBatch) -> None:
        """See `AttentionBackend.plan`."""
        self.batch = DeviceBatch.of(batch, self.ropes, self.device)

    def _angles(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.batch.angles[self.shapes[layer].local_rope]

    def rotate(self, layer: int, qk: Tensor) -> tuple[Tensor, Tensor]:
        """Only the queries turn here."""
        heads = self.config.num_heads
        return apply_rope(qk[:, :heads], *self._angles(layer)), qk[:, heads:]

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keys turn as they are written."""
        kv_write(k, v, *self._angles(layer), self.batch.slots, *self.pool.layer(layer))

    def run(self, layer: int, q: Tensor) -> Tensor:
        """Queries come rotated."""
        batch, shape = self.batch, self.shapes[layer]
        return paged_attention(
            q,
            *self.pool.layer(layer),
            batch.page_table,
            batch.query_lens,
            batch.context_lens,
            shape.scale,
            deterministic=self.deterministic,
            visible=batch.visible,
            windows=batch.windows,
            sliding_window=shape.window,
            softcap=shape.softcap,
            max_query_len=batch.max_query_len,
            usual_context=batch.usual_context,
        )

    def prepare_for_capture(self, num_requests: int, num_rows: int, max_query_len: int, max_context: int) -> None:
        """See `AttentionBackend.prepare_for_capture`."""
        self._capacity = _Capacity(num_requests, num_rows, max_query_len, max_context)
        self.batch = DeviceBatch.static(self._capacity, self.page_size, self.config.head_dim, len(self.ropes), self.device)

    def prepare_for_replay(self, batch: AttentionBatch) -> None:
        """See `AttentionBackend.prepare_for_replay`."""
        assert self._capacity is not None, "prepare_for_capture comes first"
        self._capacity.check(batch)
        self.batch.fill(DeviceBatch.of(batch, self.ropes, self.device))


@dataclass
class ExactRows:
    """Where a batch's tokens that stay exact beside the codes lie, on the device."""

    rows: Tensor  # [B] int32, where each request's first and last tokens lie
    since: Tensor  # [B] int32, first position whose exact row is still held
    sinks: tuple[Tensor, Tensor] | None  # of the N tokens those that are first ones, [M] int64, and their slots [M] int64; None without any
    recent: tuple[Tensor | slice, Tensor]  # those that stay among the last ones (a slice for all), and their slots

    @classmethod
    def of(cls, batch: AttentionBatch, pool: QuantizedPool) -> ExactRows:
        """The batch's tokens count as written from now on."""
        rows = [pool.exact_row(sequence) for sequence in batch.sequences]
        since = [
            pool.note_written(sequence, start, end)
            for sequence, start, end in zip(batch.sequences, batch.starts, batch.contexts, strict=True)
        ]
        device = pool.device
        return cls(
            upload(rows, device, torch.int32),
            upload(since, device, torch.int32),
            _new_sinks(batch, rows, device),
            _new_recent(batch, rows, device),
        )


class QuantizedBackend(AttentionBackend):
    """Attention over quantised pages, with each request's first and last tokens exact beside them."""

    batch: DeviceBatch

    def __init__(
        self,
        pool: QuantizedPool,
        config: DecoderConfig,
        rope: RopeTable,
        local_rope: RopeTable | None = None,
        *,
        deterministic: bool = False,
    ) -> None:
        super().__init__(pool, config, rope, local_rope, deterministic=deterministic)
        self.pool = pool
        self._capacity: _Capacity | None = None
        self._exact: ExactRows
        self._tables: list[
            tuple[Tensor, Tensor]
        ]  # one a RoPE: cos and sin [positions, d/2] float32 of all positions up to the longest context
        self._new: tuple[Tensor, Tensor]  # keys and values of the layer at hand

    def plan(self, batch: AttentionBatch) -> None:
        """See `AttentionBackend.plan`."""
        if batch.tree_positions is not None:
            raise InvalidOption("a quantised KV cache takes tokens that follow one another", "draft without leaves there")
        self.batch = DeviceBatch.of(batch, self.ropes, self.device)
        self._exact = ExactRows.of(batch, self.pool)
        self._tables = [rope.table(max(batch.contexts)) for rope in self.ropes]

    def rotate(self, layer: int, qk: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing turns here: codes are of keys before rotation."""
        heads = self.config.num_heads
        return qk[:, :heads], qk[:, heads:]

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Codes, and first tokens; the last ones only after attention, which still reads what they overwrite."""
        own, batch, sinks = self.pool.layer(layer), self.batch, self._exact.sinks
        cos, sin = batch.angles[self.shapes[layer].local_rope]
        quantized_kv_write(k, v, cos, sin, batch.slots, own.means, own.pages)
        if sinks is not None:
            rows, slots = sinks
            kv_write(k[rows], v[rows], cos[rows], sin[rows], slots, own.k_sinks, own.v_sinks)
        self._new = k, v

    def run(self, layer: int, q: Tensor) -> Tensor:
        """Queries come before rotation."""
        own, batch, exact, shape = self.pool.layer(layer), self.batch, self._exact, self.shapes[layer]
        (k, v), (cos, sin) = self._new, batch.angles[shape.local_rope]
        out = quantized_paged_attention(
            apply_rope(q, cos, sin),
            own.pages,
            own.means,
            *self._tables[shape.local_rope],
            batch.page_table,
            batch.query_lens,
            batch.context_lens,
            shape.scale,
            sinks=ExactSinks(own.k_sinks, own.v_sinks, exact.rows),
            recent=ExactRecent(apply_rope(k, cos, sin), v, own.k_ring, own.v_ring, exact.rows, exact.since),
            deterministic=self.deterministic,
            max_query_len=batch.max_query_len,
            sliding_window=shape.window,
            softcap=shape.softcap,
        )
        last, slots = exact.recent
        kv_write(k[last], v[last], cos[last], sin[last], slots, own.k_ring, own.v_ring)
        return out

    def prepare_for_capture(self, num_requests: int, num_rows: int, max_query_len: int, max_context: int) -> None:
        """See `AttentionBackend.prepare_for_capture`. Capture again when the pool's exact rows have grown (`QuantizedPool.exact_row`)."""
        self._capacity = _Capacity(num_requests, num_rows, max_query_len, max_context)
        self.batch = DeviceBatch.static(self._capacity, self.page_size, self.config.head_dim, len(self.ropes), self.device)
        self._tables = [rope.table(max_context) for rope in self.ropes]
        rows, since = torch.zeros(2, num_requests, dtype=torch.int32, device=self.device)
        everyone = torch.arange(num_rows, device=self.device)
        self._exact = ExactRows(rows, since, (everyone, torch.zeros_like(everyone)), (slice(None), torch.zeros_like(everyone)))

    def prepare_for_replay(self, batch: AttentionBatch) -> None:
        """See `AttentionBackend.prepare_for_replay`."""
        assert self._capacity is not None, "prepare_for_capture comes first"
        self._capacity.check(batch)
        self.batch.fill(DeviceBatch.of(batch, self.ropes, self.device))
        found, spare = ExactRows.of(batch, self.pool), self.pool.spare_row()
        mine = self._exact
        mine.rows.copy_(found.rows)
        mine.since.copy_(found.since)
        assert mine.sinks is not None
        mine.sinks[1].fill_(spare * NUM_SINKS)  # tokens that are no first or last ones are written where nobody reads
        if found.sinks is not None:
            mine.sinks[1][found.sinks[0]] = found.sinks[1]
        mine.recent[1].fill_(spare * RING)
        mine.recent[1][found.recent[0]] = found.recent[1]


def _new_sinks(batch: AttentionBatch, rows: list[int], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Which of the new tokens, one request's after another's, are first ones, and where these are kept: each [M] int64; None without any."""
    if min(batch.starts) >= NUM_SINKS:
        return None
    found, before = [], 0
    for start, count, row in zip(batch.starts, batch.query_lens, rows, strict=True):
        found += [(before + t, row * NUM_SINKS + start + t) for t in range(count) if start + t < NUM_SINKS]
        before += count
    new, slots = upload(found, device).unbind(1)
    return new, slots.contiguous()


def _new_recent(batch: AttentionBatch, rows: list[int], device: torch.device) -> tuple[Tensor | slice, Tensor]:
    """Which of the new tokens are among their request's last RING ones (a slice for all), [M] int64, and where these are kept."""
    new, slots, before = [], [], 0
    for start, count, row in zip(batch.starts, batch.query_lens, rows, strict=True):
        last = range(max(0, count - RING), count)
        new += [before + t for t in last]
        slots += [row * RING + (start + t) % RING for t in last]
        before += count
    which = slice(None) if len(new) == before else upload(new, device)
    return which, upload(slots, device)
