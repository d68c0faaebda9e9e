"""Where other engines keep keys and values, and how they rotate them: views of their pages that are read and written token by token.

Axes: T tokens, L layers, P pages, S tokens a page, G KV heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from codec.errors import BadInput
from kernels.cpu_decode import compiled_available, compiled_loads
from kernels.rope import apply_rope


@dataclass(frozen=True)
class KeyRotation:
    """Rotary position embedding of keys (Su et al., 2021; halves convention): channel i turns with channel i + d/2.

    Args:
        frequencies: float32 [d/2], angle per position.
        factor: of cosines and sines (YaRN's attention factor).
    """

    frequencies: torch.Tensor
    factor: float = 1.0

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin float32 [T, d/2] of positions [T]."""
        angles = positions.to(self.frequencies.device, torch.float32)[:, None] * self.frequencies
        return angles.cos() * self.factor, angles.sin() * self.factor

    def rotate(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys [T, *, d] of these positions as attention wants them."""
        return apply_rope(keys, *self.angles(positions))

    def unrotate(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Inverse of `rotate`."""
        cos, sin = self.angles(positions)
        square = self.factor**2
        return apply_rope(keys, cos / square, -sin / square)


class PagedKv:
    """Keys and values of all layers in pages, whatever order their axes have in memory.

    Every layer's keys, and its values, are a view [P, S, G, d] of the owner's memory. Token t of a sequence with pages `page_ids` lies in page
    page_ids[t // S], place t % S.

    Raises:
        BadInput: the views do not agree.
    """

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        shapes = {tuple(t.shape) for t in (*keys, *values)}
        if not keys or len(keys) != len(values) or len(shapes) != 1 or len(shape := shapes.pop()) != 4 or min(shape) < 1:
            raise BadInput(
                "pages of keys and values that do not agree", "pass one view [pages, page size, heads, channels] of each a layer"
            )
        self.keys, self.values = list(keys), list(values)
        self.num_pages, self.page_size, self.num_kv_heads, self.head_dim = shape

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.keys)

    @classmethod
    def of_pool(cls, kv: torch.Tensor) -> PagedKv:
        """Of our own pool: kv [L, 2, P, S, G, d] (`engine.kv.pool.PagedPool.kv`)."""
        if kv.ndim != 6 or kv.shape[1] != 2:
            raise BadInput(f"a pool of shape {list(kv.shape)}", "pass [layers, 2, pages, page size, heads, channels]")
        return cls(list(kv[:, 0].unbind(0)), list(kv[:, 1].unbind(0)))

    @classmethod
    def joined(cls, layers: Sequence[torch.Tensor], *, pair: int, heads_first: bool) -> PagedKv:
        """Of layers that keep keys and values in one tensor, as vLLM's backends do.

        Args:
            layers: each [2, P, S, G, d] (pair 0) or [P, 2, S, G, d] (pair 1); with heads_first (vLLM's HND pages) G before S.
            pair: the axis that tells keys from values.
        """
        for layer in layers:
            if layer.ndim != 5 or pair not in (0, 1) or layer.shape[pair] != 2:
                raise BadInput(f"pages of shape {list(layer.shape)}, keys and values along axis {pair}", "name the axis of length 2")
        halves = [[layer.select(pair, half) for layer in layers] for half in (0, 1)]
        if heads_first:
            halves = [[part.transpose(1, 2) for part in own] for own in halves]
        return cls(*halves)

    def _at(self, page_ids: Sequence[int], start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages and places in them, int64 [end - start] each. Raises BadInput when the tokens lie in none."""
        if not 0 <= start <= end <= len(page_ids) * self.page_size:
            raise BadInput(f"tokens {start} to {end} of {len(page_ids)} pages of {self.page_size}", "pass the pages that hold them")
        pages = torch.tensor(list(page_ids), dtype=torch.int64)
        if len(pages) and not 0 <= int(pages.min()) <= int(pages.max()) < self.num_pages:
            raise BadInput(f"pages outside of 0 to {self.num_pages - 1}", "pass pages of this pool")
        at = torch.arange(start, end)
        device = self.keys[0].device
        return pages[at // self.page_size].to(device), (at % self.page_size).to(device)

    def _check(self, kv: torch.Tensor, first_layer: int) -> None:
        """BadInput unless kv [T, layers, 2, G, d] fits the layers from `first_layer` on."""
        expected = (self.num_kv_heads, self.head_dim)
        if kv.ndim != 5 or tuple(kv.shape[2:]) != (2, *expected) or not 0 <= first_layer <= self.num_layers - kv.shape[1]:
            raise BadInput(
                f"KV of shape {list(kv.shape)} for {self.num_layers} layers of {expected} from {first_layer} on", "pass its layers"
            )

    def read(self, page_ids: Sequence[int], start: int, end: int, first_layer: int = 0) -> torch.Tensor:
        """Tokens [start, end) of a sequence, float32 [T, L - first_layer, 2, G, d], keys as they lie there (rotated)."""
        pages, places = self._at(page_ids, start, end)
        layers = range(first_layer, self.num_layers)
        out = torch.empty(len(pages), len(layers), 2, self.num_kv_heads, self.head_dim, dtype=torch.float32, device=pages.device)
        for n, layer in enumerate(layers):
            out[:, n, 0], out[:, n, 1] = self.keys[layer][pages, places], self.values[layer][pages, places]
        return out

    def write(self, page_ids: Sequence[int], start: int, kv: torch.Tensor, first_layer: int = 0) -> None:
        """Inverse of `read`: kv [T, layers, 2, G, d] into layers from `first_layer` on.

        Raises:
            BadInput: another shape.
        """
        self._check(kv, first_layer)
        write = self.writer(page_ids, start, start + len(kv))
        for n in range(kv.shape[1]):
            write(first_layer + n, kv[:, n])

    def writer(self, page_ids: Sequence[int], start: int, end: int) -> Callable[[int, torch.Tensor], None]:
        """What writes tokens [start, end) of a sequence a layer at a time: its arguments are a layer and kv [T, 2, G, d]."""
        pages, places = self._at(page_ids, start, end)

        def write(layer: int, kv: torch.Tensor) -> None:
            keys, values = self.keys[layer], self.values[layer]
            keys[pages, places] = kv[:, 0].to(keys.dtype)
            values[pages, places] = kv[:, 1].to(values.dtype)

        return write


class PackedKv(PagedKv):
    """Pages whose places within a page and head are in an order of their own, as vLLM's CPU attention has them for its matrix products.

    Args:
        keys, values: of every layer a view [P, G, S, d], whose last two axes hold a page's numbers in packed order.
        key_order, value_order: int64 [S * d]: number s * d + c of a page (token s, channel c) lies at this place.

    Raises:
        BadInput: the views do not agree, or an order is no permutation.
    """

    def __init__(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], key_order: torch.Tensor, value_order: torch.Tensor
    ) -> None:
        super().__init__([t.transpose(1, 2) for t in keys], [t.transpose(1, 2) for t in values])
        count = self.page_size * self.head_dim
        for order in (key_order, value_order):
            if order.shape != (count,) or not torch.equal(order.sort().values, torch.arange(count, device=order.device)):
                raise BadInput("an order of a page's places that is no permutation", f"name each of {count} places once")
        self._packed = list(keys), list(values)
        self._orders = key_order, value_order

        self._inverse = key_order.argsort(), value_order.argsort()
        self._compiled_orders = [order.cpu().to(torch.int32).numpy() for order in self._orders]

    def read(self, page_ids: Sequence[int], start: int, end: int, first_layer: int = 0) -> torch.Tensor:
        """See `PagedKv.read`."""
        pages, _ = self._at(page_ids, start, end)
        shape = (self.num_kv_heads, -1, self.head_dim)
        out = torch.empty(
            len(pages), self.num_layers - first_layer, 2, self.num_kv_heads, self.head_dim, dtype=torch.float32, device=pages.device
        )
        for page, low, high, at in self._stretches(page_ids, start, end):
            for half, order in enumerate(self._orders):
                wanted = order[low * self.head_dim : high * self.head_dim]
                for n, layer in enumerate(self._packed[half][first_layer:]):
                    out[at : at + high - low, n, half] = layer[page].flatten(1)[:, wanted].view(shape).transpose(0, 1)
        return out

    @staticmethod
    def _scatters(rows: torch.Tensor, packed: torch.Tensor) -> bool:
        if not (compiled_available() and compiled_loads()):
            return False
        from kernels.cpu_decode.coded import scatters

        return scatters(rows, packed)

    def _stretches(self, page_ids: Sequence[int], start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Page by page of tokens [start, end): its number, the places in it, and how many of the tokens come before."""
        for n in range(start // self.page_size, -(-end // self.page_size)):
            first = n * self.page_size
            low, high = max(start, first), min(end, first + self.page_size)
            yield page_ids[n], low - first, high - first, low - start

    def writer(self, page_ids: Sequence[int], start: int, end: int) -> Callable[[int, torch.Tensor], None]:
        """See `PagedKv.writer`. Without compiled code, whole pages are written at once, of a page that is not covered the places that are."""
        numbers, offsets = (part.cpu().numpy() for part in self._at(page_ids, start, end))
        stretches = list(self._stretches(page_ids, start, end))
        whole = [(page, at) for page, low, high, at in stretches if high - low == self.page_size]
        pages = torch.tensor([page for page, _ in whole], dtype=torch.int64)
        covered = slice(whole[0][1], whole[0][1] + len(whole) * self.page_size) if whole else slice(0, 0)

        def write(layer: int, kv: torch.Tensor) -> None:
            for half, (order, inverse) in enumerate(zip(self._orders, self._inverse, strict=True)):
                packed = self._packed[half][layer]
                rows = kv[:, half].to(packed.dtype)
                if self._scatters(rows, packed):
                    from kernels.cpu_decode.coded import scatter

                    scatter(rows, numbers, offsets, self._compiled_orders[half], packed)
                    continue
                if whole:
                    plain = rows[covered].unflatten(0, (len(whole), self.page_size)).transpose(1, 2).flatten(2)
                    packed[pages] = plain[:, :, inverse].view(len(whole), *packed.shape[1:])
                for page, low, high, at in stretches:
                    if high - low < self.page_size:
                        places = order[low * self.head_dim : high * self.head_dim]
                        own = packed[page].flatten(1).clone()
                        own[:, places] = rows[at : at + high - low].transpose(0, 1).flatten(1)
                        packed[page] = own.view(packed.shape[1:])

        return write
