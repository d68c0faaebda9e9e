"""Spans of a stored text that refer to other stored texts: which they may refer to when they are coded, and what those lend when they are restored.

The same tokens after other text have other keys and values, but what the model's prediction leaves over of them is much the same. A span is coded
against it where that is shorter (`codec.references`). Lent are only spans that refer to nothing themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from torch import Tensor

from codec.codec import Earlier, KvCodec
from codec.container import SCALES_PER_ONE, Reference, write_span
from codec.errors import CodecError, CorruptedCode
from codec.match import MIN_TOKENS, matches_in
from codec.references import Lent, choose_scales, scaled_sources
from codec.residuals import Residuals
from codec.spec import step_of
from engine.store.runs import MAX_DONORS, PAGE_TOKENS, RUN_PAGES, RUN_TOKENS, Donor, PageKeys, Run, span_bounds
from engine.store.store import Borrowed, RunStore, StoredPrefix

_REMEDY = "let the store be verified with --repair: what is lost is computed again"


def first_slot(start_page: int, page: int) -> int:
    """Which token of its run the span of the run's page `page` begins with: the attention sinks have no span."""
    return span_bounds(start_page + page)[0] - start_page * PAGE_TOKENS


class Resolved(NamedTuple):
    """A stored prefix, with what its spans refer to.

    lent: for `SessionCodec.restore`; None where none refers to any. spans: of every page, as a session keeps them: those that refer to this very text
    alone count from where it stands. borrows: of every page, whether its span needs other texts.
    """

    lent: Lent | None
    spans: list[bytes]
    borrows: list[bool]


def resolved(codec: KvCodec, found: StoredPrefix) -> Resolved:
    """Find what the spans of a stored prefix refer to. Raises the codec's errors."""
    if not found.borrowed:
        return Resolved(None, found.spans, [False] * len(found.spans))
    codes = codec.read(found.spans)
    places: list[list[_Place]] = []  # of each span's references
    for page, code in enumerate(codes, found.start_page):
        at = page - page % RUN_PAGES
        places.append([_place(found.borrowed.get(at), at, page - at, reference) for reference in code.references])
    wanted = {(place.key, place.page): place.data for own in places for place in own}
    starts: dict[tuple[bytes, int], int] = {}
    begins = list(accumulate((code.num_tokens for code in codes), initial=0))
    for key, page in list(wanted):  # of this very text: decoded anyway
        number = found.first_pages.get(key, -RUN_PAGES) + page - found.start_page
        if 0 <= number < len(codes):
            starts[key, page] = begins[number]
            if codes[number].references:
                raise CorruptedCode("a stored span refers to one that refers to another", _REMEDY)
            wanted.pop((key, page))
    lent = dict(zip(wanted, codec.read(list(wanted.values())), strict=True))
    if any(code.references for code in lent.values()):
        raise CorruptedCode("a stored span refers to one that refers to another", _REMEDY)
    at = sum(code.num_tokens for code in lent.values())
    starts = {name: at + start for name, start in starts.items()}
    starts |= zip(lent, accumulate((code.num_tokens for code in lent.values()), initial=0), strict=False)
    counted, spans, borrows = [], [], []
    for page, (code, own, data) in enumerate(zip(codes, places, found.spans, strict=True), found.start_page):
        references, inside = [], []
        for reference, place in zip(code.references, own, strict=True):
            name = place.key, place.page
            references.append(reference._replace(distance=at + reference.first - starts[name] - place.token))
            if name not in lent:
                source = span_bounds(found.first_pages[place.key] + place.page)[0] + place.token
                inside.append(reference._replace(distance=span_bounds(page)[0] + reference.first - source))
        counted.append(replace(code, references=references))
        borrows.append(len(inside) < len(references))
        spans.append(write_span(replace(code, references=inside)) if references and not borrows[-1] else data)
        at += code.num_tokens
    return Resolved(Lent(counted, list(lent.values())), spans, borrows)


class _Place(NamedTuple):
    """Where a reference goes: a donor's key, its page, that page's span, and the token of it."""

    key: bytes
    page: int
    data: bytes
    token: int


def _place(borrowed: Borrowed | None, start_page: int, page: int, reference: Reference) -> _Place:
    """Where a reference of a run's page goes. Raises CorruptedCode."""
    back = reference.distance - first_slot(start_page, page) - reference.first
    number, slot = (back - 1) // RUN_TOKENS, -back % RUN_TOKENS
    if borrowed is not None and back > 0 and number in borrowed.runs and borrowed.needs[page] >> number & 1:
        run, lent = borrowed.runs[number], slot // PAGE_TOKENS
        token, end = slot - first_slot(run.start_page, lent), slot % PAGE_TOKENS + reference.length
        if run.spans is not None and lent < len(run.spans) and not run.need(lent) and token >= 0 and end <= PAGE_TOKENS:
            return _Place(borrowed.donors[number].key, lent, run.spans[lent], token)
    raise CorruptedCode("a stored span refers to what is not there", _REMEDY)


class _Candidate(NamedTuple):
    """Tokens [first, first + length) of a span stood in page `page` of a donor from its token `slot` on, counted from the donor's first."""

    first: int
    length: int
    donor: Run
    page: int
    slot: int


@dataclass
class _RunLoans:
    """Of a run that is being coded: its donors so far, what each page needs, and by its pages what else they may refer to."""

    donors: list[Donor] = field(default_factory=list)
    needs: dict[int, int] = field(default_factory=dict)
    candidates: dict[int, list[_Candidate]] = field(default_factory=dict)
    end: int = 0  # of the pages that were searched for


class Loans:
    """What the spans of a text that is about to be stored may refer to (`engine.sessions.repeats.SpanSources`).

    Args:
        codec: of the spans. store: opened. root, token_ids: of the text.
        pays: whether a run of so many tokens may need so many lent ones: decoding these takes time at every restore.
    """

    def __init__(self, codec: KvCodec, store: RunStore, root: bytes, token_ids: Sequence[int], pays: Callable[[int, int], bool]) -> None:
        self.codec, self.store, self.root, self.pays = codec, store, root, pays
        self.token_ids = list(token_ids)
        self._keys = PageKeys(root, self.token_ids)
        self._runs: dict[int, _RunLoans] = {}
        self._lent: dict[tuple[bytes, int], Tensor] = {}  # components of donors' spans

    def go_on(self, token_ids: Sequence[int]) -> None:
        """The text goes on to here."""
        if len(token_ids) != len(self.token_ids):
            self.token_ids = list(token_ids)
            self._keys = PageKeys(self.root, self.token_ids)

    def adopt(self, start_page: int, borrowed: Borrowed) -> None:
        """The run that begins at a page goes on with spans that were stored already."""
        run = self._run(start_page)
        run.donors, run.needs = list(borrowed.donors), dict(enumerate(borrowed.needs))

    def borrowed(self) -> dict[int, tuple[tuple[Donor, ...], tuple[int, ...]]]:
        """By a run's first page, what `RunStore.insert` takes."""
        found = {}
        for start, run in self._runs.items():
            pages = min(RUN_PAGES, len(self._keys) - start)
            found[start] = tuple(run.donors), tuple(run.needs.get(page, 0) for page in range(pages))
        return found

    # --- as SpanSources -------------------------------------------------------------------------------------------------

    def groups(self, bounds: Sequence[tuple[int, int]]) -> list[list[int]]:
        """All spans at once: none refers to one of the others."""
        return [list(range(len(bounds)))]

    def wanted(self, start: int, end: int) -> bool:
        """Never: see `groups`."""
        return False

    def add(self, bounds: Sequence[tuple[int, int]], components: Sequence[Tensor | None]) -> None:
        """Nothing to remember: see `groups`."""

    def before(
        self, bounds: Sequence[tuple[int, int]], residuals: Residuals, numbers: Sequence[int], quality: str | float
    ) -> list[Earlier | None]:
        """What each span is coded against; numbers: theirs among those of the residuals."""
        return [self._before(own, residuals, n, quality) for own, n in zip(bounds, numbers, strict=True)]

    def _before(self, bounds: tuple[int, int], residuals: Residuals, span: int, quality: str | float) -> Earlier | None:
        text_page = bounds[0] // PAGE_TOKENS
        start = text_page - text_page % RUN_PAGES
        run, page = self._run(start), text_page - start
        possible: list[tuple[_Candidate, Tensor]] = []
        for candidate in run.candidates.get(page, ()):
            try:
                c = self._components(candidate.donor, candidate.page)
            except CodecError:  # a damaged donor lends nothing
                continue
            at = candidate.slot - first_slot(candidate.donor.start_page, candidate.page)
            possible.append((candidate, c[at : at + candidate.length]))
        if not possible:
            return None
        transform = self.codec.transform
        count = transform.num_components if any(c.shape[1] > transform.num_rows for _, c in possible) else transform.num_rows
        step = step_of(quality) if isinstance(quality, str) else quality
        full = [Reference(own.first, own.length, own.first + own.length, SCALES_PER_ONE) for own, _ in possible]
        chosen, sources = choose_scales(residuals.components([span], count), full, [c for _, c in possible], step)
        by_place = {own.first: own for own, _ in possible}
        references, kept = [], []
        for reference, source in zip(chosen, sources, strict=True):
            own = by_place[reference.first]
            donor = Donor(own.donor.keys[-1], own.donor.digest)
            if donor not in run.donors and len(run.donors) == MAX_DONORS:
                continue
            if donor not in run.donors:
                run.donors.append(donor)
            number = run.donors.index(donor)
            run.needs[page] = run.needs.get(page, 0) | 1 << number
            place = first_slot(start, page) + own.first
            references.append(reference._replace(distance=place + RUN_TOKENS * (number + 1) - own.slot))
            kept.append(source)
        return Earlier(references, scaled_sources(references, kept, bounds[1] - bounds[0])) if references else None

    def _components(self, donor: Run, page: int) -> Tensor:
        """float32 [T, K] of a donor's span. Raises the codec's errors."""
        name = donor.digest, page
        if name not in self._lent:
            assert donor.spans is not None
            codes = self.codec.read([donor.spans[page]])
            if codes[0].references:
                raise CorruptedCode("a stored span refers to another that its run does not name", _REMEDY)
            decoded = self.codec.entropy_decoded(codes)
            decoded.check()
            c = self.codec.components_of(decoded)
            decoded.check()
            self._lent[name] = c
        return self._lent[name]

    # --- the search -----------------------------------------------------------------------------------------------------

    def _run(self, start: int) -> _RunLoans:
        run = self._runs.setdefault(start, _RunLoans())
        end = min(start + RUN_PAGES, len(self._keys))
        if run.end != end:
            self._lent.clear()  # another run's
            run.end = end
            run.candidates = self._candidates(start, end) if self.store.can_refer(self.root, self._keys[end - 1]) else {}
        return run

    def _candidates(self, start: int, end: int) -> dict[int, list[_Candidate]]:
        """By page of the run, where its tokens stood in other stored runs."""
        ids = self.token_ids[start * PAGE_TOKENS : end * PAGE_TOKENS]
        own = self._keys[start:end]  # a shorter run of the same beginning goes when this one is kept
        donors = [run for run in self.store.lenders(self.root, ids) if run.coded and run.keys[-1] not in own]
        donors.reverse()  # of equal places the last is taken
        found: dict[int, list[_Candidate]] = {}
        if not donors:
            return found
        ends = np.cumsum([run.num_tokens for run in donors])
        pages: set[tuple[int, int]] = set()
        for match in matches_in(ids, np.concatenate([run.token_ids for run in donors])):
            done = 0
            while done < match.length:
                place, source = match.start + done, match.source + done
                number = int(np.searchsorted(ends, source, side="right"))
                donor, slot = donors[number], source - (int(ends[number - 1]) if number else 0)
                page, lent = place // PAGE_TOKENS, slot // PAGE_TOKENS
                least = max(0, first_slot(start, page) - place, first_slot(donor.start_page, lent) - slot)
                size = min(match.length - done, PAGE_TOKENS - place % PAGE_TOKENS, PAGE_TOKENS - slot % PAGE_TOKENS)
                if size - least >= MIN_TOKENS and not donor.need(lent):
                    first = place + least - first_slot(start, page)
                    found.setdefault(page, []).append(_Candidate(first, size - least, donor, lent, slot + least))
                    pages.add((number, lent))
                done += size
        return found if self.pays(len(ids), len(pages) * PAGE_TOKENS) else {}
