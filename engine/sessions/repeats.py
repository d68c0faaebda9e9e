"""Which spans of a session are coded against earlier ones: where its token ids repeat, what was coded there predicts what comes here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from codec.codec import Earlier, KvCodec
from codec.container import Reference
from codec.match import matches
from codec.references import MAX_DEPTH, SourceComponents, choose_scales, scaled_sources, span_references
from codec.residuals import Residuals
from codec.spec import step_of
from engine.sessions.file import Span

Bounds = tuple[int, int]


class SpanSources(Protocol):
    """What spans that are about to be coded may refer to; `Repeats` is one, and says what each call is for."""

    def wanted(self, start: int, end: int) -> bool: ...

    def groups(self, bounds: Sequence[Bounds]) -> list[list[int]]: ...

    def before(
        self, bounds: Sequence[Bounds], residuals: Residuals, numbers: Sequence[int], quality: str | float
    ) -> list[Earlier | None]: ...

    def add(self, bounds: Sequence[Bounds], components: Sequence[Tensor | None]) -> None: ...


class Repeats:
    """The references of spans that are about to be coded.

    Args:
        codec: of the spans. token_ids: up to the end of the last span. earlier: the spans before those of `bounds`, without a
            gap. bounds: (start, end) of the spans to be coded, in order.

    Raises the codec's errors for earlier spans that cannot be read.
    """

    def __init__(self, codec: KvCodec, token_ids: Sequence[int], earlier: Sequence[Span], bounds: Sequence[Bounds]) -> None:
        self.codec = codec
        every = [(s.start, s.end) for s in earlier] + list(bounds)
        found = span_references(matches(token_ids, bounds[0][0]), every)[len(earlier) :]
        self._candidates = {own: references for own, references in zip(bounds, found, strict=True) if references}
        self._chosen: dict[Bounds, int] = {}  # depth of the chain
        before = [(s.start, s.end, s.data) for s in earlier] if self._candidates else []
        self._sources = SourceComponents(codec, before, bounds)
        self._wanted = torch.zeros(len(token_ids), dtype=torch.bool)
        for (start, _), references in self._candidates.items():
            for first, length, distance, _ in references:
                self._wanted[start + first - distance : start + first - distance + length] = True

    def wanted(self, start: int, end: int) -> bool:
        """Whether a later span may refer to this one."""
        return bool(self._wanted[start:end].any())

    def groups(self, bounds: Sequence[Bounds]) -> list[list[int]]:
        """Numbers of spans that follow those coded so far, in groups: a span comes after those that it may refer to."""
        ranks: list[int] = []
        starts = [start for start, _ in bounds]
        for own in bounds:
            rank = 0
            for first, length, distance, _ in self._candidates.get(own, ()):
                a = own[0] + first - distance
                for n in range(len(ranks)):
                    if starts[n] < a + length and bounds[n][1] > a:
                        rank = max(rank, ranks[n] + 1)
            ranks.append(rank)
        return [[n for n, rank in enumerate(ranks) if rank == group] for group in range(max(ranks) + 1)]

    def before(self, bounds: Sequence[Bounds], residuals: Residuals, numbers: Sequence[int], quality: str | float) -> list[Earlier | None]:
        """What each span of a group is coded against; numbers: theirs among those of the residuals."""
        return [self._before(own, residuals, n, quality) for own, n in zip(bounds, numbers, strict=True)]

    def _before(self, own: Bounds, residuals: Residuals, number: int, quality: str | float) -> Earlier | None:
        self._chosen[own] = 0
        candidates = self._candidates.get(own)
        if not candidates:
            return None
        possible: list[Reference] = []
        sources: list[Tensor] = []
        for reference in candidates:
            at = own[0] + reference.first - reference.distance
            if self._sources.depth(at, at + reference.length) < MAX_DEPTH:
                possible.append(reference)
                sources.append(self._sources.take(at, at + reference.length))
        if not possible:
            return None
        transform = self.codec.transform
        count = transform.num_components if any(part.shape[1] > transform.num_rows for part in sources) else transform.num_rows
        step = step_of(quality) if isinstance(quality, str) else quality
        references, sources = choose_scales(residuals.components([number], count), possible, sources, step)
        if not references:
            return None
        places = [own[0] + r.first - r.distance for r in references]
        self._chosen[own] = 1 + max(self._sources.depth(at, at + r.length) for at, r in zip(places, references, strict=True))
        return Earlier(references, scaled_sources(references, sources, own[1] - own[0]))

    def add(self, bounds: Sequence[Bounds], components: Sequence[Tensor | None]) -> None:
        """Spans of a group are coded; components as `KvCodec.encode_with_components` gives them, of those that are `wanted`."""
        for own, part in zip(bounds, components, strict=True):
            self._sources.put(own[0], part, self._chosen[own])
