"""Spans that refer to earlier tokens: what was decoded where the same token ids stood before predicts what the model's prediction leaves over.

A reference works on components: those of the earlier token, times a scale, are taken off before quantising and added after it. They are known from the
spans' bytes alone, without any pass of a model. The earlier token may itself refer to one before it; the encoder bounds such chains.

Axes: T tokens, K components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from codec.codec import DecodedSpans, Earlier, KvCodec, batches
from codec.container import REFERENCE_BYTES, SCALES_PER_ONE, Reference, SpanCode
from codec.errors import CorruptedCode
from codec.match import Match

MAX_DEPTH = 8
"""Of a chain of references: a decoder adds up its links one after the other."""

_SCALES = (16, 12, 8)  # of what is tried, in sixteenths
_REFERENCE_BITS = 8 * REFERENCE_BYTES
_LEAST_SAVING = 0.03  # of a span's bits, by the estimate; less is not worth a chain


class Lent(NamedTuple):
    """Spans that were read, and those before them, in a sequence without a gap, that only their references go to (`PageDecoder.begin`)."""

    codes: Sequence[SpanCode]
    lent: Sequence[SpanCode]

    @property
    def num_lent_tokens(self) -> int:
        """Decoded beside the spans' own."""
        return sum(code.num_tokens for code in self.lent)

    def part(self, first: int, last: int) -> Lent:
        """Spans codes[first:last] alone, and what they refer to before them, directly or through others. Raises CorruptedCode for a reference to tokens
        before the first span."""
        every = [*self.lent, *self.codes]
        ends = np.cumsum([code.num_tokens for code in every])
        starts = ends - [code.num_tokens for code in every]
        own = range(len(self.lent) + first, len(self.lent) + last)
        needed, unread = set(own), list(own)
        while unread:
            n = unread.pop()
            for at, length, distance, _ in every[n].references:
                source = int(starts[n]) + at - distance
                if source < 0:
                    raise CorruptedCode("a coded span refers to tokens that are not there", "restore the file from a copy")
                a, b = np.searchsorted(ends, [source, source + length - 1], side="right").tolist()
                new = set(range(a, b + 1)) - needed
                needed |= new
                unread += new
        kept, moved, length = sorted(needed), {}, 0
        for n in kept:
            moved[n], length = int(starts[n]) - length, length + every[n].num_tokens
        codes = []
        for n in kept:
            references = []
            for reference in every[n].references:
                source = int(np.searchsorted(ends, starts[n] + reference.first - reference.distance, side="right"))
                references.append(reference._replace(distance=reference.distance - moved[n] + moved[source]))
            codes.append(replace(every[n], references=references) if references else every[n])
        return Lent(codes[len(kept) - len(own) :], codes[: len(kept) - len(own)])


def span_references(found: Sequence[Match], bounds: Sequence[tuple[int, int]]) -> list[list[Reference]]:
    """The matches cut at the borders of spans [start, end), at full scale; what lies in the same span or behind it is no source."""
    cut: list[list[Reference]] = [[] for _ in bounds]
    n = 0
    for start, source, length in found:
        distance, end = start - source, start + length
        while n < len(bounds) and bounds[n][1] <= start:
            n += 1
        for number in range(n, len(bounds)):
            a, b = max(start, bounds[number][0]), min(end, bounds[number][1])
            if a >= b:
                break
            first = a - bounds[number][0]
            size = min(b - a, distance - first)  # later tokens would refer into their own span
            if size > 0 and a - distance >= bounds[0][0]:
                cut[number].append(Reference(first, size, distance, SCALES_PER_ONE))
    return cut


def chain_depths(references: Sequence[Sequence[Reference]], bounds: Sequence[tuple[int, int]]) -> list[int]:
    """How many references each span hangs on: 0 for one that has none. Sources lie in `bounds` too, which follow one another.

    Raises CorruptedCode for a reference to tokens before the first span.
    """
    ends = np.array([end for _, end in bounds])
    depths = [0] * len(bounds)
    for n, own in enumerate(references):
        for first, length, distance, _ in own:
            source = bounds[n][0] + first - distance
            if source < bounds[0][0]:
                raise CorruptedCode("a coded span refers to tokens that are not there", "restore the file from a copy")
            a, b = np.searchsorted(ends, [source, source + length - 1], side="right").tolist()
            depths[n] = max(depths[n], 1 + max(depths[a : b + 1]))
    return depths


def added_up(c: torch.Tensor, references: Sequence[Sequence[Reference]], bounds: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Components float32 [T, K] of all spans, from their own ones in c, which is written: spans of the same depth at once. Raises CorruptedCode."""
    begin = bounds[0][0] if bounds else 0
    depths = chain_depths(references, bounds)
    for depth in range(1, max(depths, default=0) + 1):
        targets, distances, scales = [], [], []
        for n, own in enumerate(references):
            for first, length, distance, scale in own if depths[n] == depth else ():
                at = bounds[n][0] - begin + first
                targets.append(torch.arange(at, at + length))
                distances.append(torch.full((length,), distance))
                scales.append(torch.full((length,), scale / SCALES_PER_ONE))
        to = torch.cat(targets)
        sources = (to - torch.cat(distances)).to(c.device)
        c[to.to(c.device)] += torch.cat(scales).to(c.device)[:, None] * c[sources]
    return c


def own_components(codec: KvCodec, parts: Sequence[tuple[Sequence[int], DecodedSpans]], tokens: int, batch_tokens: int) -> torch.Tensor:
    """float32 [tokens, K] of entropy-decoded spans, each part with the first token of every span; K is the most that any has."""
    width = max(decoded.q.shape[1] for _, decoded in parts)
    c = torch.zeros(tokens, width, dtype=torch.float32, device=codec.device)
    for starts, decoded in parts:
        for some in batches(decoded.sizes, batch_tokens):
            own = codec.components_of(decoded, some[0], some[-1] + 1)
            for n, part in zip(some, own.split([decoded.sizes[n] for n in some]), strict=True):
                c[starts[n] : starts[n] + len(part), : part.shape[1]] = part
    return c


def scaled_sources(references: Sequence[Reference], sources: Sequence[torch.Tensor], num_tokens: int) -> torch.Tensor:
    """float32 [num_tokens, K]: components float32 [length, K'] of every reference's earlier tokens, scaled, where they belong."""
    width = max(part.shape[1] for part in sources)
    out = torch.zeros(num_tokens, width, dtype=torch.float32, device=sources[0].device)
    for (first, length, _, scale), part in zip(references, sources, strict=True):
        out[first : first + length, : part.shape[1]] = part * (scale / SCALES_PER_ONE)
    return out


def choose_scales(
    c: torch.Tensor, references: Sequence[Reference], sources: Sequence[torch.Tensor], step: float
) -> tuple[list[Reference], list[torch.Tensor]]:
    """The references that make a span's code shorter, each at its best scale, and their sources; none where all together save too little.

    Bits are estimated as those of a Gaussian component at the step: log2(1 + (c / step)^2) / 2.

    Args:
        c: the span's components, float32 [T, K]. sources: components float32 [length, K'] of every reference's earlier tokens.
    """

    def bits(x: torch.Tensor) -> torch.Tensor:
        return torch.log2(1 + (x / step).square()).sum() / 2

    kept: list[Reference] = []
    kept_sources: list[torch.Tensor] = []
    saved = 0.0
    for reference, source in zip(references, sources, strict=True):
        own = c[reference.first : reference.first + reference.length]
        width = min(own.shape[1], source.shape[1])
        own, shared = own[:, :width], source[:, :width]
        tried = torch.stack([bits(own), *(bits(own - shared * (scale / SCALES_PER_ONE)) for scale in _SCALES)])
        best = int(tried.argmin())
        saving = float(tried[0] - tried[best]) - _REFERENCE_BITS
        if best and saving > 0:
            saved += saving
            kept.append(reference._replace(scale=_SCALES[best - 1]))
            kept_sources.append(source)
    if saved < _LEAST_SAVING * float(bits(c)):
        return [], []
    return kept, kept_sources


class SourceComponents:
    """Components of coded spans, as a decoder will have them, for spans that refer to them.

    Args:
        codec: of the spans.
        spans: (start, end, bytes) of those coded before, following one another; their components are decoded when asked for.
        coming: (start, end) of those that will be coded, behind them; `put` tells their components.
    """

    def __init__(
        self, codec: KvCodec, spans: Sequence[tuple[int, int, bytes | memoryview]], coming: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.codec = codec
        self._bounds = [(start, end) for start, end, _ in spans] + list(coming)
        self._ends = np.array([end for _, end in self._bounds])
        self._codes = codec.read([data for _, _, data in spans])
        self._depths = chain_depths([code.references for code in self._codes], self._bounds[: len(spans)]) + [0] * len(coming)
        self._components: dict[int, torch.Tensor] = {}

    def put(self, start: int, components: torch.Tensor | None, depth: int) -> None:
        """The coming span that begins at `start` was coded. components: None where nobody will ask for them."""
        n = int(np.searchsorted(self._ends, start, side="right"))
        self._depths[n] = depth
        if components is not None:
            self._components[n] = components

    def _numbers(self, first: int, last: int) -> range:
        a, b = np.searchsorted(self._ends, [first, last - 1], side="right").tolist()
        return range(a, b + 1)

    def depth(self, first: int, last: int) -> int:
        """Of the deepest chain among tokens [first, last)."""
        return max(self._depths[n] for n in self._numbers(first, last))

    def take(self, first: int, last: int) -> torch.Tensor:
        """float32 [last - first, K] of tokens [first, last)."""
        parts = []
        for n in self._numbers(first, last):
            start, end = self._bounds[n]
            parts.append(self._of(n)[max(first, start) - start : min(last, end) - start])
        width = max(part.shape[1] for part in parts)
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])

    def _of(self, n: int) -> torch.Tensor:
        """Of one span; what it refers to is decoded first."""
        if n not in self._components:
            code = self._codes[n]
            decoded = self.codec.entropy_decoded([code])
            decoded.check()
            c = self.codec.components_of(decoded)
            decoded.check()
            if code.references:
                start = self._bounds[n][0]
                places = [start + r.first - r.distance for r in code.references]
                sources = [self.take(at, at + r.length) for at, r in zip(places, code.references, strict=True)]
                c = Earlier(code.references, scaled_sources(code.references, sources, len(c))).added_to(c)
            self._components[n] = c
        return self._components[n]
