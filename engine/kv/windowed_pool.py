"""A KV pool of a model some of whose layers attend within a window: these keep pages of their own, and give them back as the window leaves them.

A sequence has a page table for the layers that attend to everything, and one for the layers of each window. Tokens are committed to all at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from engine.kv.pool import KvPool, KvSequence, LayerAngles, PagedPool

REWIND_TOKENS = 128
"""Tokens that can be taken back from a text's end, or kept as ids by a session, without the text being run again: a window's rows are held so much
longer than attention asks for them."""


@dataclass(frozen=True)
class WindowGroup:
    """Layers of one window, by number, and the pool of their pages."""

    window: int
    layers: tuple[int, ...]
    pool: KvPool


class WindowSequence(KvSequence):
    """The pages of one sequence in a group's pool. first_token: rows before it are not held, or hold nothing that may be read."""

    def __init__(self, pool: KvPool, window: int, step_tokens: int) -> None:
        super().__init__(pool)
        self.window, self.first_token = window, 0
        self._rewind = REWIND_TOKENS + pool.page_size  # a text is shared, and goes on elsewhere, from where its last whole page ends
        self.most_pages = -(-(window + self._rewind + step_tokens) // pool.page_size) + 1

    def sees(self, position: int) -> bool:
        """See `KvSequence.sees`."""
        return self.first_token <= max(0, position + 1 - self.window)

    def slide(self, length: int) -> None:
        """See `KvSequence.slide`."""
        self.give_up(length + 1 - self.window - self._rewind)

    def give_up(self, first_token: int) -> None:
        """Hold no row before `first_token`; pages that end before it go back, and are not taken for tokens to come."""
        if first_token <= self.first_token:
            return
        self.first_token, page = first_token, first_token // self.pool.page_size
        gone = min(page - self.first_page, len(self.pages))
        self.pool.release(self.pages[:gone])
        del self.pages[:gone]
        self.first_page = page

    def truncate(self, length: int) -> None:
        """See `KvSequence.truncate`."""
        super().truncate(length)
        if not length:
            self.first_token = 0

    def take(self, end: WindowEnd, length: int) -> None:
        """Begin this empty sequence with a window that others own, of a text of `length` tokens."""
        self.share(list(end.pages), length, end.first_token // self.pool.page_size)
        self.first_token = end.first_token


class WindowEnd(NamedTuple):
    """Pages of the last window of a text, and what their pool keeps beside them."""

    first_token: int
    pages: tuple[int, ...]
    exact: Any | None


@dataclass(frozen=True)
class TextEnd:
    """What a text of `length` tokens goes on from, beside the pages of layers without a window. exact: what these keep beside their pages."""

    length: int
    exact: Any | None
    windows: tuple[WindowEnd, ...]


class WindowedSequence(KvSequence):
    """A sequence with its part in every group of windowed layers."""

    pool: WindowedPool
    windows: tuple[WindowSequence, ...]

    def __init__(self, pool: WindowedPool) -> None:
        super().__init__(pool)
        self.windows = tuple(WindowSequence(group.pool, group.window, pool.step_tokens) for group in pool.windowed)

    def held_from(self, layer: int) -> int:
        """See `KvSequence.held_from`."""
        number = self.pool.group_of[layer]
        return 0 if number is None else self.windows[number].first_token

    def sees(self, position: int) -> bool:
        """See `KvSequence.sees`."""
        return all(window.sees(position) for window in self.windows)

    def slide(self, length: int) -> None:
        """See `KvSequence.slide`."""
        if self.pool.slides:
            for window in self.windows:
                window.slide(length)

    def hold_only_seen(self, length: int) -> None:
        """See `KvSequence.hold_only_seen`."""
        for window in self.windows:
            window.give_up(length - window.window)

    def needs(self, tokens: int, start: int | None = None, *, whole: bool = False) -> list[tuple[KvPool, int]]:
        """See `KvSequence.needs`."""
        found = super().needs(tokens, start, whole=whole)
        for window in self.windows:
            missing = window.missing_pages(tokens, start)
            if whole and self.pool.slides:
                missing = min(missing, max(0, window.most_pages - len(window.pages)))
            found.append((window.pool, missing))
        return found

    def at_most(self, tokens: int) -> list[tuple[KvPool, int]]:
        """See `KvSequence.at_most`."""
        [(pool, pages)] = super().at_most(tokens)
        return [(pool, pages)] + [(window.pool, min(pages, window.most_pages) if self.pool.slides else pages) for window in self.windows]

    def ensure(self, tokens: int, start: int | None = None) -> None:
        """See `KvSequence.ensure`; windowed layers take no page that was given back."""
        for window in self.windows:
            window.pool.check_room(window.missing_pages(tokens, start))
        super().ensure(tokens, start)
        for window in self.windows:
            window.ensure(tokens, start)

    def holds(self, start: int, tokens: int) -> bool:
        """See `KvSequence.holds`."""
        return super().holds(start, tokens) and all(window.holds(start, tokens) for window in self.windows)

    def check_writable(self, start: int, end: int) -> None:
        """See `KvSequence.check_writable`."""
        super().check_writable(start, end)
        for window in self.windows:
            window.check_writable(start, end)

    def fork(self, length: int | None = None) -> KvSequence:
        """See `KvSequence.fork`; the copy is empty where a token at `length` would see what was given back."""
        length = self.length if length is None else length
        if not self.sees(length):
            return self.pool.new_sequence()
        copy = super().fork(length)
        for mine, theirs in zip(self.windows, copy.windows, strict=True):
            assert isinstance(theirs, WindowSequence)
            pages = mine.pages[: max(0, -(-length // mine.pool.page_size) - mine.first_page)]
            theirs.take(WindowEnd(mine.first_token, tuple(pages), None), length)
            mine.pool.forked(mine, theirs)
        return copy

    def advance(self, n: int) -> None:
        """See `KvSequence.advance`."""
        super().advance(n)
        for window in self.windows:
            window.advance(n)
        self.slide(self.length)

    def truncate(self, length: int) -> None:
        """See `KvSequence.truncate`."""
        length = length if self.sees(length) else 0
        super().truncate(length)
        for window in self.windows:
            window.truncate(length)

    def free(self) -> None:
        """See `KvSequence.free`."""
        for window in self.windows:
            window.free()
        super().free()


class WindowedPool(KvPool):
    """Pages of the layers that attend to everything, and for each window a pool of its layers' pages, which are fewer.

    Args:
        main_layers, main: numbers of the layers that attend to everything (there may be none), and a pool of so many layers. Who owns its pages is
            known here alone.
        windowed: the other layers' pools, of the same page size.
        heads, head_dim: G, d.
        step_tokens: most tokens that a step writes.
    """

    def __init__(
        self, main_layers: Sequence[int], main: KvPool, windowed: Sequence[WindowGroup], heads: int, head_dim: int, step_tokens: int
    ) -> None:
        super().__init__(main.num_pages, main.page_size, main.max_pages)
        self.main_layers, self.main, self.windowed = tuple(main_layers), main, tuple(windowed)
        self._heads, self._head_dim, self.step_tokens = heads, head_dim, step_tokens
        self.slides = True  # whether sequences give back what has left their windows
        self.is_plain = main.is_plain and all(group.pool.is_plain for group in windowed)
        of = {layer: number for number, group in enumerate(windowed) for layer in group.layers}
        self.group_of: tuple[int | None, ...] = tuple(of.get(layer) for layer in range(len(of) + len(self.main_layers)))

    @property
    def device(self) -> torch.device:
        """Where the pages lie."""
        return self.main.device

    @property
    def bytes(self) -> int:
        """Of all layers."""
        return self.main.bytes + sum(group.pool.bytes for group in self.windowed)

    @property
    def page_bytes(self) -> int:
        """Of a page of the layers that attend to everything."""
        return self.main.page_bytes

    def bytes_of(self, sequence: KvSequence) -> int:
        """Of its pages in all layers."""
        return self.main.bytes_of(sequence) + sum(window.pool.bytes_of(window) for window in sequence.windows)

    @property
    def groups(self) -> tuple[KvPool, ...]:
        """See `KvPool.groups`."""
        return (self, *(group.pool for group in self.windowed))

    @property
    def num_free_tokens(self) -> int:
        """See `KvPool.num_free_tokens`."""
        return min(pool.num_free_pages for pool in self.groups) * self.page_size

    def layer(self, index: int) -> Any:
        """As the layer's own pool has it."""
        number = self.group_of[index]
        if number is None:
            return self.main.layer(self.main_layers.index(index))
        group = self.windowed[number]
        return group.pool.layer(group.layers.index(index))

    def _empty_sequence(self) -> KvSequence:
        return WindowedSequence(self)

    def new_sequence(self, tokens: int = 0) -> KvSequence:
        """See `KvPool.new_sequence`."""
        sequence = super().new_sequence(tokens)
        for window in sequence.windows:
            window.pool.register(window)
        return sequence

    def _parts(self, sequence: KvSequence, first_layer: int) -> Iterator[tuple[KvPool, KvSequence, int, list[int], int]]:
        """Of every pool with layers from `first_layer` on: (pool, the sequence in it, its layers before these, their numbers from `first_layer` on,
        first token that is held)."""
        owned = [(self.main, sequence, self.main_layers, 0)]
        for group, window in zip(self.windowed, sequence.windows, strict=True):
            assert isinstance(window, WindowSequence)
            owned.append((group.pool, window, group.layers, window.first_token))
        for pool, own, layers, held in owned:
            numbers = [layer - first_layer for layer in layers if layer >= first_layer]
            if numbers:
                yield pool, own, len(layers) - len(numbers), numbers, held

    def read(self, sequence: KvSequence, start: int, end: int, first_layer: int, inverse: LayerAngles) -> torch.Tensor:
        """See `KvPool.read`; zeros where a windowed layer holds nothing."""
        count = len(self.group_of) - first_layer
        kv = torch.zeros(end - start, count, 2, self._heads, self._head_dim, dtype=torch.float32, device=self.device)
        for pool, own, skipped, numbers, held in self._parts(sequence, first_layer):
            if (first := max(start, held)) < end:
                kv[first - start :, numbers] = pool.read(
                    own, first, end, skipped, _of_part(inverse, first - start, numbers, first_layer, skipped)
                )
        return kv

    def write(self, sequence: KvSequence, start: int, kv: torch.Tensor, first_layer: int, angles: LayerAngles) -> None:
        """See `KvPool.write`; what a windowed layer does not hold is passed over."""
        for pool, own, skipped, numbers, held in self._parts(sequence, first_layer):
            if (before := max(0, held - start)) < len(kv):
                pool.write(own, start + before, kv[before:, numbers], skipped, _of_part(angles, before, numbers, first_layer, skipped))

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """See `KvPool.copy_pages`; of the layers that attend to everything."""
        self.main.copy_pages(sources, targets)

    @property
    def takes_tree_positions(self) -> bool:
        """Where all pools do."""
        return self.main.takes_tree_positions and all(group.pool.takes_tree_positions for group in self.windowed)

    def move(self, sequence: KvSequence, source: int, target: int) -> None:
        """See `KvPool.move`."""
        self.main.move(sequence, source, target)
        for window in sequence.windows:
            window.pool.move(window, source, target)

    def settle(self, sequence: KvSequence) -> None:
        """As plain pages do."""
        if isinstance(self.main, PagedPool) and self.main_layers:
            self.move_together(sequence)

    def forked(self, source: KvSequence, copy: KvSequence) -> None:
        """See `KvPool.forked`."""
        self.main.forked(source, copy)

    def emptied(self, sequence: KvSequence) -> None:
        """See `KvPool.emptied`."""
        self.main.emptied(sequence)

    @property
    def keeps_beside(self) -> bool:
        """Windows are beside the pages of layers without one."""
        return True

    def beside(self, sequence: KvSequence, length: int) -> TextEnd | None:
        """See `KvPool.beside`; `length` is where a page ends."""
        exact = self.main.beside(sequence, length) if self.main.keeps_beside else None
        if not sequence.sees(length) or (self.main.keeps_beside and exact is None):
            return None
        ends = []
        for window in sequence.windows:
            assert isinstance(window, WindowSequence)
            own = window.pool.beside(window, length) if window.pool.keeps_beside else None
            if window.pool.keeps_beside and own is None:
                return None
            first = max(window.first_token, length + 1 - window.window - REWIND_TOKENS, 0)
            last = length // self.page_size - window.first_page
            ends.append(WindowEnd(first, tuple(window.pages[first // self.page_size - window.first_page : last]), own))
        return TextEnd(length, exact, tuple(ends))

    def restore_beside(self, sequence: KvSequence, beside: TextEnd) -> None:
        """See `KvPool.restore_beside`."""
        assert sequence.length == beside.length, "a window belongs to a text of one length"
        if beside.exact is not None:
            self.main.restore_beside(sequence, beside.exact)
        for window, end in zip(sequence.windows, beside.windows, strict=True):
            assert isinstance(window, WindowSequence)
            window.take(end, beside.length)
            if end.exact is not None:
                window.pool.restore_beside(window, end.exact)

    def keep_beside(self, beside: TextEnd) -> None:
        """See `KvPool.keep_beside`."""
        for group, end in zip(self.windowed, beside.windows, strict=True):
            group.pool.keep(list(end.pages))

    def drop_beside(self, beside: TextEnd) -> None:
        """See `KvPool.drop_beside`."""
        for group, end in zip(self.windowed, beside.windows, strict=True):
            group.pool.drop(list(end.pages))

    def check_integrity(self) -> None:
        """Also of the windowed layers' pools. Raises AssertionError."""
        super().check_integrity()
        self.main.check_contents(self._sequences)
        assert self.main.num_pages == self.num_pages, "the main layers have another page count"
        for sequence in self._sequences:
            for window in sequence.windows:
                assert window.length == sequence.length, "a windowed layer holds another text"
        for group in self.windowed:
            group.pool.check_integrity()

    def _extend(self, num_pages: int) -> None:
        self.main.resize(num_pages)


def _of_part(angles: LayerAngles, before: int, numbers: Sequence[int], first_layer: int, skipped: int) -> LayerAngles:
    """Angles of the tokens from the `before`-th on, of a pool's layers: `skipped` ones that are not asked for, then those of `numbers`."""
    tables = tuple((cos[before:], sin[before:]) for cos, sin in angles.tables)
    return LayerAngles(tables, (0,) * skipped + tuple(angles.which[number + first_layer] for number in numbers))
