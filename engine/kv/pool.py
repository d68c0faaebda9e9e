"""Paged pool of keys and values, and the sequences that own its pages."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch

from engine.errors import PagesNotReserved, PoolExhausted
from kernels.memory import mapped
from kernels.rope import apply_rope
from kernels.upload import upload


class LayerAngles(NamedTuple):
    """Rotary angles of some tokens, by layer.

    tables: cos and sin [T, d/2] float32, one pair for each RoPE of the model. which: of every layer, the number of its table.
    """

    tables: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    which: tuple[int, ...]

    def of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of a layer."""
        return self.tables[self.which[layer]]

    def turn(self, keys: torch.Tensor, first_layer: int) -> torch.Tensor:
        """keys [T, L - first_layer, G, d] turned by their layers' angles."""
        if len(self.tables) == 1:
            return apply_rope(keys, *self.tables[0])
        out = torch.empty_like(keys)
        for number, angles in enumerate(self.tables):
            layers = [at for at, table in enumerate(self.which[first_layer:]) if table == number]
            out[:, layers] = apply_rope(keys[:, layers], *angles)
        return out


class KvPool(ABC):
    """Who owns which pages of S tokens. A subclass holds what is in them.

    A page may have several owners: sequences that share a prefix, and whoever keeps it for later (`retain`). Nobody writes into a page with several:
    `KvSequence.ensure` gives the writer a copy first (copy-on-write), and a forward over pages that were not ensured is refused. Pages that only a
    cache owns (`keep`) count as free: it gives them up when they are needed.

    A new sequence starts in the middle of the longest run of free pages, so that sequences grow without meeting: pages that follow one
    another let attention on a CPU read a view of the pool instead of a copy.

    Args:
        num_pages: P at the start.
        page_size: S, tokens a page.
        max_pages: the pool grows on demand up to this many pages (default: num_pages, so it does not grow). Growing replaces its tensors:
            take views through `layer` each time.
    """

    slides = False  # whether sequences give back pages that no layer's window reaches any more
    is_plain = False  # whether all pages hold keys (rotated) and values as they are

    def __init__(self, num_pages: int, page_size: int, max_pages: int | None) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a pool needs pages and tokens in them, not {num_pages} pages of {page_size}")
        self.page_size = page_size
        self.max_pages = max(num_pages, max_pages or 0)
        self._references = [0] * num_pages
        self._num_free = num_pages
        self._next = 0  # where a search for free pages begins, on a GPU
        self._sequences: list[KvSequence] = []
        self._kept: dict[int, int] = {}  # of a page's owners, those that are caches
        self._num_reclaimable = 0
        self.sharings = 0  # times that pages were given a further owner
        self.reclaim: Callable[[KvPool, int], None] | None = None  # asks the cache for so many pages
        self.steps_follow_tables = False  # whether steps of few tokens read a sequence's pages wherever they lie

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the pages lie."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Size of all pages, and of what is kept beside them, in bytes."""

    @property
    @abstractmethod
    def page_bytes(self) -> int:
        """Size of one page over all layers, in bytes."""

    @abstractmethod
    def layer(self, index: int) -> Any:
        """What a layer's attention reads and writes, views."""

    @abstractmethod
    def read(self, sequence: KvSequence, start: int, end: int, first_layer: int, inverse: LayerAngles) -> torch.Tensor:
        """Keys before rotation and values of tokens [start, end), float32 [T, L - first_layer, 2, G, d]; `inverse`: angles that turn back."""

    @abstractmethod
    def write(self, sequence: KvSequence, start: int, kv: torch.Tensor, first_layer: int, angles: LayerAngles) -> None:
        """Inverse of `read`, into pages the sequence owns; `angles`: of the tokens' positions."""

    @abstractmethod
    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """Put the contents of each source page, of all layers, into a target page."""

    @property
    def takes_tree_positions(self) -> bool:
        """Whether tokens can be written elsewhere than at their position, and be moved there."""
        return False

    def move(self, sequence: KvSequence, source: int, target: int) -> None:
        """Put one token's keys and values, of all layers, where another's were; both in pages the sequence owns."""
        raise NotImplementedError(f"a {type(self).__name__} takes no tree_positions")

    @abstractmethod
    def _extend(self, num_pages: int) -> None:
        """Make room for `num_pages` pages in all, the old ones' contents kept."""

    def settle(self, sequence: KvSequence) -> None:  # noqa: B027 (nothing to do is a right answer)
        """Called when a sequence took more pages; it may be given others, with the same contents."""

    def move_together(self, sequence: KvSequence) -> None:
        """On a CPU: to pages that follow one another, where `settle` would."""
        pages = sequence.pages
        if self.device.type != "cpu" or sequence.is_contiguous or (self.steps_follow_tables and sequence.shares):
            return
        if self.longest_free_run() < 2 * len(pages):
            return
        target = self.allocate(len(pages))
        self.copy_pages(pages, target)
        self.release(pages)
        sequence.pages = target

    def forked(self, source: KvSequence, copy: KvSequence) -> None:  # noqa: B027
        """Called when `copy` was given the pages of `source`'s first tokens: what is kept beside pages is each sequence's own."""

    @property
    def keeps_beside(self) -> bool:
        """Whether a sequence's attention needs more than its pages."""
        return False

    def beside(self, sequence: KvSequence, length: int) -> Any:
        """A copy of what attention over a sequence's first `length` tokens needs beside their pages; None when that is nothing, or no longer there."""
        return None

    def restore_beside(self, sequence: KvSequence, beside: Any) -> None:
        """Give a sequence that was begun with `KvSequence.share` what `beside` returned for another of these tokens."""
        raise NotImplementedError(f"a {type(self).__name__} keeps nothing beside its pages")

    def emptied(self, sequence: KvSequence) -> None:  # noqa: B027
        """Called when a sequence gave its last page back."""

    def keep_beside(self, beside: Any) -> None:  # noqa: B027 (copies need no owner)
        """A cache keeps what `beside` returned, pages of it included."""

    def drop_beside(self, beside: Any) -> None:  # noqa: B027
        """It no longer does."""

    @property
    def groups(self) -> tuple[KvPool, ...]:
        """The pools that own pages of its sequences: itself, and those of layers that keep pages of their own."""
        return (self,)

    @property
    def num_free_tokens(self) -> int:
        """Tokens that one new sequence could have."""
        return self.num_free_pages * self.page_size

    @property
    def num_pages(self) -> int:
        """Pages now in memory."""
        return len(self._references)

    @property
    def num_free_pages(self) -> int:
        """Pages that can be had: nobody owns them, the pool may still grow by them, or only a cache keeps them."""
        return self.num_unowned_pages + self._num_reclaimable

    @property
    def num_unowned_pages(self) -> int:
        """Pages that nobody owns, those the pool may still grow by included."""
        return self._num_free + self.max_pages - self.num_pages

    def bytes_of(self, sequence: KvSequence) -> int:
        """What a sequence takes of the pool, in bytes; shared pages count in full."""
        return len(sequence.pages) * self.page_bytes

    def new_sequence(self, tokens: int = 0) -> KvSequence:
        """An empty sequence, with pages for so many tokens. Raises PoolExhausted."""
        sequence = self._empty_sequence()
        sequence.ensure(tokens)
        self.register(sequence)
        return sequence

    def register(self, sequence: KvSequence) -> None:
        """Its pages count as owned by it, until `forget`."""
        self._sequences.append(sequence)

    def _empty_sequence(self) -> KvSequence:
        return KvSequence(self)

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Take `count` pages, if possible those following page `after`, or else a run of neighbours.

        Raises:
            PoolExhausted: there are not that many, even after growing.
        """
        self.check_room(count)
        if count > self.num_unowned_pages and self.reclaim is not None:
            self.reclaim(self, count - self.num_unowned_pages)
        if count > self._num_free:
            self._grow(count - self._num_free)
        pages = self._find(count, after)
        for page in pages:
            self._references[page] = 1
        self._num_free -= count
        return pages

    def check_room(self, count: int) -> None:
        """Raises PoolExhausted unless so many pages can be had."""
        if count > self.num_free_pages:
            raise PoolExhausted(
                f"the KV pool needs {count} more pages of {self.page_size} tokens, {self.num_free_pages} are free of {self.max_pages}",
                "use a larger pool, fewer requests at once, or a shorter context",
            )

    # These four meet every page of a long text, for each request that begins with it.

    def retain(self, pages: list[int]) -> None:
        """Add an owner to each page, so that sequences can share it."""
        self.sharings += 1
        references, kept = self._references, self._kept
        for page in pages:
            owners = references[page]
            assert owners > 0, "only an owned page can be shared"
            if page in kept and kept[page] == owners:
                self._num_reclaimable -= 1
            references[page] = owners + 1

    def release(self, pages: list[int]) -> None:
        """Take one owner off each page; pages without owner are free."""
        references, kept = self._references, self._kept
        for page in pages:
            owners = references[page] - 1
            assert owners >= 0, "page released twice"
            references[page] = owners
            if not owners:
                self._num_free += 1
            elif page in kept and kept[page] == owners:
                self._num_reclaimable += 1

    def keep(self, pages: list[int]) -> None:
        """Add a cache as owner of each page: it goes on being kept, and gives the page up when pages are needed."""
        if not pages:
            return
        self.sharings += 1
        references, kept = self._references, self._kept
        for page in pages:
            caches = kept.get(page, 0)
            assert references[page] > caches, "a cache keeps what a sequence owns"
            references[page] += 1
            kept[page] = caches + 1

    def drop(self, pages: list[int]) -> None:
        """Take one cache off the owners of each page."""
        references, kept = self._references, self._kept
        for page in pages:
            caches = kept.get(page, 0)
            assert caches > 0, "no cache keeps the page"
            if references[page] == caches:
                self._num_reclaimable -= 1
            if caches > 1:
                kept[page] = caches - 1
            else:
                del kept[page]
            self.release([page])

    def _only_kept(self, page: int) -> bool:
        return self._references[page] == self._kept.get(page, 0) > 0

    def is_free(self, page: int) -> bool:
        """True when nobody owns the page."""
        return self._references[page] == 0

    def is_shared(self, page: int) -> bool:
        """True when more than one sequence owns the page."""
        return self._references[page] > 1

    def _free_runs(self) -> list[tuple[int, int]]:
        """(start, length) of every run of free pages."""
        runs, start = [], None
        for page, owners in enumerate([*self._references, 1]):
            if owners == 0 and start is None:
                start = page
            elif owners and start is not None:
                runs.append((start, page - start))
                start = None
        return runs

    def _find(self, count: int, after: int | None) -> list[int]:
        if after is not None and after + count < self.num_pages and not any(self._references[after + 1 : after + 1 + count]):
            return list(range(after + 1, after + 1 + count))
        if self.device.type != "cpu":  # whose kernels follow page tables: any free pages, found without a look at all the others
            found = list(islice(self._free_from(self._next), count))
            self._next = found[-1] + 1 if found else self._next
            return found
        runs = self._free_runs()
        start, length = max(runs, key=lambda run: run[1])
        if length >= count:
            # in the middle, so that whoever ends just before the run keeps half of it to grow into
            first = start if start == 0 else start + (length - count) // 2
            return list(range(first, first + count))
        return [page for start, length in runs for page in range(start, start + length)][:count]

    def _free_from(self, first: int) -> Iterator[int]:
        """Free pages from `first` on, then those before it."""
        for at, end in ((first, self.num_pages), (0, first)):
            while at < end:
                try:
                    at = self._references.index(0, at, end)
                except ValueError:
                    break
                yield at
                at += 1

    def _grow(self, missing: int) -> None:
        old = self.num_pages
        self.resize(min(self.max_pages, max(old + missing, 2 * old)))

    def resize(self, num_pages: int) -> None:
        """Grow to `num_pages` pages in all."""
        more = num_pages - self.num_pages
        self._extend(num_pages)
        self._references += [0] * more
        self._num_free += more

    def longest_free_run(self) -> int:
        """Length of the longest run of free pages now in memory."""
        return max((length for _, length in self._free_runs()), default=0)

    def check_integrity(self) -> None:
        """Assert that page owners, free count and sequences agree.

        Raises:
            AssertionError: they do not.
        """
        owners = [0] * self.num_pages
        for sequence in self._sequences:
            assert 0 <= sequence.length <= sequence.capacity, "a sequence is longer than its pages"
            assert len(set(sequence.pages)) == len(sequence.pages), "a sequence owns a page twice"
            for page in sequence.pages:
                owners[page] += 1
        # retain() may have added owners that are no sequence, never fewer
        assert all(have >= want for have, want in zip(self._references, owners, strict=True)), "a page has fewer owners than sequences"
        assert self._num_free == self._references.count(0), "the free count is wrong"
        assert self._num_reclaimable == sum(map(self._only_kept, self._kept)), "pages that only caches keep are miscounted"
        both = zip(self._references, owners, strict=True)
        assert all(have >= want + self._kept.get(page, 0) for page, (have, want) in enumerate(both)), "a cache keeps a page it does not own"
        assert self.num_pages <= self.max_pages, "the pool grew too far"
        self.check_contents(self._sequences)

    def check_contents(self, sequences: Sequence[KvSequence]) -> None:  # noqa: B027
        """Assert that what is in the pages, and beside them, fits the pages' number and these sequences, which are all. Raises AssertionError."""

    def forget(self, sequence: KvSequence) -> None:
        """Called by a sequence that was freed."""
        self._sequences.remove(sequence)


def _zeros(shape: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.zeros`; a CPU's take up memory only as they are written, since the system hands out pages of zeros."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    # not NumPy's memory: that asks for pages of 2 MiB, one of which each layer takes up with its first token
    return torch.frombuffer(mapped(size, "a pool of pages"), dtype=torch.uint8, count=size).view(dtype).view(shape)


class PagedPool(KvPool):
    """Keys (rotated) and values of many sequences as they are, `kv` [L, 2, P, S, G, d] (0 = key, 1 = value).

    Args:
        num_layers, num_kv_heads, head_dim: L, G, d.
        num_pages, page_size, max_pages: see `KvPool`.
    """

    is_plain = True

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int = 64,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        max_pages: int | None = None,
    ) -> None:
        super().__init__(num_pages, page_size, max_pages)
        self.kv = _zeros([num_layers, 2, num_pages, page_size, num_kv_heads, head_dim], dtype, torch.device(device))
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._make_views()

    def _make_views(self) -> None:
        self._views = [(layer[0], layer[1]) for layer in self.kv]

    @property
    def device(self) -> torch.device:
        """Where the pages lie."""
        return self.kv.device

    @property
    def bytes(self) -> int:
        """Size of `kv` in bytes."""
        return self.kv.numel() * self.kv.element_size()

    @property
    def page_bytes(self) -> int:
        """Size of one page over all layers, in bytes."""
        return self.bytes // self.num_pages

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key pages and value pages of a layer, each [P, S, G, d], views."""
        return self._views[index]

    def settle(self, sequence: KvSequence) -> None:
        """On a CPU, move to a run of free pages with room to double, if there is one: one copy, paid back by attention reading views again. The other
        owners of shared pages keep them. A sequence that began in pages of others stays there where small steps follow page tables: the copy would
        take longer than sharing saves to the first token."""
        self.move_together(sequence)

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """See `KvPool.copy_pages`."""
        self.kv[:, :, targets] = self.kv[:, :, sources]

    def check_contents(self, sequences: Sequence[KvSequence]) -> None:
        """See `KvPool.check_contents`."""
        assert self.num_pages == self.kv.shape[2], "the page count is wrong"

    def read(self, sequence: KvSequence, start: int, end: int, first_layer: int, inverse: LayerAngles) -> torch.Tensor:
        """Keys before rotation and values of tokens [start, end), float32 [T, L - first_layer, 2, G, d]; `inverse`: angles that turn back."""
        pages, offsets = sequence.addresses(start, end, self.device)
        kv = self.kv[first_layer:, :, pages, offsets].permute(2, 0, 1, 3, 4).contiguous().float()
        kv[:, :, 0] = inverse.turn(kv[:, :, 0], first_layer)
        return kv

    def write(self, sequence: KvSequence, start: int, kv: torch.Tensor, first_layer: int, angles: LayerAngles) -> None:
        """Inverse of `read`, into pages the sequence owns; `angles`: of the tokens' positions."""
        pages, offsets = sequence.addresses(start, start + len(kv), self.device)
        kv = kv.clone()
        kv[:, :, 0] = angles.turn(kv[:, :, 0], first_layer)
        # two index tensors with a slice of layers before them: the token axis comes first after the permutation
        self.kv[first_layer:, :, pages, offsets] = kv.permute(1, 2, 0, 3, 4).to(self.kv.dtype)

    @property
    def takes_tree_positions(self) -> bool:
        """Yes: a place holds a token whatever its position is."""
        return True

    def move(self, sequence: KvSequence, source: int, target: int) -> None:
        """See `KvPool.move`."""
        (old, new), size = (sequence.page_of(at) for at in (source, target)), self.page_size
        self.kv[:, :, new, target % size] = self.kv[:, :, old, source % size]

    @torch.inference_mode(False)  # outlives the step that asked for it, and is written outside of steps too
    def _extend(self, num_pages: int) -> None:
        shape = list(self.kv.shape)
        old, shape[2] = shape[2], num_pages
        grown = _zeros(shape, self.kv.dtype, self.kv.device)
        grown[:, :, :old] = self.kv
        self.kv = grown
        self._make_views()


class KvSequence:
    """The pages of one sequence and how many of its tokens are committed; reserved and moved by the decoder's caller, written by the decoder.

    first_page: number in the text of the first of its pages; those before it were given back, as their layers see them no more. windows: of the layers
    that keep pages of their own, a sequence in each of their pools (`engine.kv.windowed_pool`).
    """

    windows: Sequence[KvSequence] = ()

    def __init__(self, pool: KvPool) -> None:
        self.pool = pool
        self.pages: list[int] = []
        self.first_page = 0
        self.length = 0
        self.shares = False  # it began with pages that others own
        self._alone = (-1, 0)  # pages of tokens from the second on were its own when the pool's `sharings` was the first

    @property
    def capacity(self) -> int:
        """Tokens that fit the pages owned now."""
        return (self.first_page + len(self.pages)) * self.pool.page_size

    @property
    def table(self) -> list[int]:
        """Page of every page number of the text; of those that were given back another one of its own, which nobody reads there."""
        return self.pages[:1] * self.first_page + self.pages

    @property
    def page_table(self) -> torch.Tensor:
        """[pages] int32 on the pool's device."""
        return torch.tensor(self.table, dtype=torch.int32, device=self.pool.device)

    def page_of(self, position: int) -> int:
        """The page that a token lies in."""
        return self.pages[position // self.pool.page_size - self.first_page]

    def held_from(self, layer: int) -> int:
        """First token of which a layer's keys and values are kept."""
        return 0

    def sees(self, position: int) -> bool:
        """Whether all that a token at `position` attends to is kept, in every layer."""
        return True

    def slide(self, length: int) -> None:
        """Give back what no token from `length` on sees, nor any of the few that may be taken back before it."""

    def hold_only_seen(self, length: int) -> None:
        """Hold of windowed layers only what the last token of a text of `length` tokens sees: the rest of the text is not going to be written."""

    @property
    def is_contiguous(self) -> bool:
        """True when the pages follow one another."""
        return not self.pages or self.pages == list(range(self.pages[0], self.pages[0] + len(self.pages)))

    def addresses(self, start: int, end: int, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and offset in it of tokens [start, end), each [T] int64 on a device, the pool's unless named."""
        size, device = self.pool.page_size, self.pool.device if device is None else device
        pages = self.pages_of(start, end, device)
        return pages, torch.arange(start, end, device=device) % size

    def pages_of(self, start: int, end: int, device: torch.device) -> torch.Tensor:
        """The page that each of tokens [start, end) lies in, [T] int64 on a device, for which nothing is waited."""
        size = self.pool.page_size
        assert start // size >= self.first_page or end <= start, "pages that were given back hold nothing"
        own = upload(self.pages[start // size - self.first_page : -(-end // size) - self.first_page] or [0], device)
        return own[torch.arange(start % size, start % size + max(0, end - start), device=device) // size]

    def reserve(self, n: int) -> None:
        """Own pages for n tokens after the committed ones, to write them.

        Raises:
            PoolExhausted: the pool has too few; the sequence is unchanged.
        """
        self.ensure(self.length + n)

    def holds(self, start: int, tokens: int) -> bool:
        """Whether it owns pages for `tokens` tokens in all, those of tokens from `start` on alone."""
        pool, (since, first) = self.pool, self._alone
        if tokens > (self.first_page + len(self.pages)) * pool.page_size:
            return False
        return (since == pool.sharings and start >= first) or not self._shared(tokens, start)

    def missing_pages(self, tokens: int, start: int | None = None) -> int:
        """Pages that `ensure` would take."""
        last = -(-tokens // self.pool.page_size) - self.first_page
        return len(self._shared(tokens, start)) + max(0, last - len(self.pages))

    def needs(self, tokens: int, start: int | None = None, *, whole: bool = False) -> list[tuple[KvPool, int]]:
        """Pages that `ensure` would take of each pool; whole: those it may take until the text has so many tokens, step by step."""
        return [(self.pool, self.missing_pages(tokens, start))]

    def at_most(self, tokens: int) -> list[tuple[KvPool, int]]:
        """Pages of each pool that it owns at once while its text grows to so many tokens."""
        return [(self.pool, -(-tokens // self.pool.page_size))]

    def _shared(self, tokens: int, start: int | None) -> list[int]:
        """Places in `pages` of those that tokens from `start` on would be written to and others own too."""
        start, size, pool = self.length if start is None else start, self.pool.page_size, self.pool
        since, first = self._alone
        if since == pool.sharings and start >= first:
            return []  # asked several times a step
        last = min(-(-tokens // size) - self.first_page, len(self.pages)) if start < tokens else 0
        found = [i for i in range(max(0, start // size - self.first_page), last) if pool.is_shared(self.pages[i])]
        if not found and last == len(self.pages):
            self._alone = pool.sharings, start
        return found

    def ensure(self, tokens: int, start: int | None = None) -> None:
        """Own pages for `tokens` tokens in all, those of tokens from `start` on (default: the committed ones' end) alone: a shared page among these is
        copied first.

        Raises:
            PoolExhausted: the pool has too few; the sequence is unchanged.
        """
        taken = self.missing_pages(tokens, start)
        if not taken:
            return
        places, pool = self._shared(tokens, start), self.pool
        new = pool.allocate(taken, self.pages[-1] if self.pages else None)
        if places:
            old = [self.pages[i] for i in places]
            pool.copy_pages(old, new[: len(places)])
            for i, page in zip(places, new, strict=False):
                self.pages[i] = page
            pool.release(old)
        self.pages += new[len(places) :]
        pool.settle(self)

    def check_writable(self, start: int, end: int) -> None:
        """Raises PagesNotReserved unless pages for tokens [start, end) are owned, by this sequence alone."""
        size = self.pool.page_size
        if end > self.capacity:
            raise PagesNotReserved(
                f"{end} tokens do not fit the {len(self.pages)} pages of {size} tokens that a sequence owns",
                "call KvSequence.reserve or ensure before the forward pass",
            )
        if self._shared(end, start):
            raise PagesNotReserved(
                f"tokens {start} to {end} lie in pages that another sequence owns too",
                "call KvSequence.reserve, or ensure with the first token to be written, before the forward pass",
            )

    def fork(self, length: int | None = None) -> KvSequence:
        """A new sequence of this one's first `length` committed tokens (default: all), in the same pages until either writes into them."""
        length = self.length if length is None else length
        assert 0 <= length <= self.length, "only committed tokens can be shared"
        copy = self.pool.new_sequence()
        copy.share(self.pages[: max(0, -(-length // self.pool.page_size) - self.first_page)], length, self.first_page)
        self.pool.forked(self, copy)
        return copy

    def share(self, pages: list[int], length: int, first_page: int = 0) -> None:
        """Begin this empty sequence with pages that others own, which hold `length` tokens but for those in pages before `first_page`."""
        assert not self.pages and -(-length // self.pool.page_size) == first_page + len(pages), (
            "only an empty sequence takes over whole pages"
        )
        self.pool.retain(pages)
        self.pages, self.first_page, self.length, self.shares = list(pages), first_page, length, True

    def advance(self, n: int) -> None:
        """Commit n tokens that the decoder has written after the committed ones."""
        length = self.length + n
        assert n >= 0 and length <= (self.first_page + len(self.pages)) * self.pool.page_size, "advanced past the reserved pages"
        self.length = length

    def truncate(self, length: int) -> None:
        """Drop the tokens from `length` on and the pages that only they used; all tokens, where layers have given back what a token there sees
        (`sees`)."""
        assert 0 <= length <= self.length, "a sequence is only truncated to what it holds"
        self.length = length
        keep = max(0, -(-length // self.pool.page_size) - self.first_page)
        self.pool.release(self.pages[keep:])
        del self.pages[keep:]
        if not length:
            self.first_page = 0
        if not self.pages:
            self.shares = False
            self.pool.emptied(self)

    def free(self) -> None:
        """Give all pages back; the sequence must not be used afterwards."""
        self.pool.release(self.pages)
        self.pages = []
        self.first_page = self.length = 0
        self.pool.emptied(self)
        self.pool.forget(self)
