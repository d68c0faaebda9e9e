"""A stored run: a few pages of token ids that continue a parent run, with the coded spans of their KV or without.

A page is PAGE_TOKENS tokens; a run fills RUN_PAGES pages, and only the last run of a text may be shorter. Every page has a key: the hash of the
key before it and of its token ids, beginning with the root's, which names models, codec parameters, quality and namespace. A run is named by the key of
its last page, so a name says everything before it too, and equal runs of any process are one file.

File: sections of `codec.container`: HEAD (root, parent, first page, pages, whether coded), TOKS (ids, uint32), SIZE (bytes of each span, uint32), SPAN
(the spans' bytes, end to end), HASH (16 bytes of the SHA-256 of all before).

Spans may refer to those of other runs of the root, its donors: what was decoded where the same tokens stood in another text predicts what the model's
prediction leaves over (`codec.references`). Such a file is of version 2 and has a section DONR before HASH: each donor's key and HASH, and a byte a
page whose bits say which of them its span needs; a span that needs none can be lent itself, so that no chain is longer than one. In a reference,
token s of donor k (from 0) lies RUN_TOKENS * (k + 1) - s tokens before the run's first one. A donor with another HASH is another one: the run that
refers to it is then as good as missing.
"""

from __future__ import annotations

import json
import struct
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import accumulate, pairwise
from typing import NamedTuple, overload

import numpy as np

from codec.container import read_sections, write_sections
from codec.errors import CorruptedCode
from codec.match import ANCHOR_TOKENS, anchors, ngram_hashes
from codec.spec import NUM_SINKS, SPAN_TOKENS

PAGE_TOKENS = SPAN_TOKENS
RUN_PAGES = 4
RUN_TOKENS = PAGE_TOKENS * RUN_PAGES
KEY_BYTES = 20
FORMAT = 1
"""Of keys and files: another number names other runs."""

LABEL = "label"
"""The role under which an identity says, for people, which models it is about."""

MAX_DONORS = 8
DIGEST_BYTES = 16
MAX_RUN_BYTES = 64 << 20
MAGIC = b"FTLDRUN\n"
_HEAD = struct.Struct(f"<{KEY_BYTES}s{KEY_BYTES}sIBB")
_NAMES = ["HEAD", "TOKS", "SIZE", "SPAN", "HASH"]
_REFERRING_NAMES = ["HEAD", "TOKS", "SIZE", "SPAN", "DONR", "HASH"]
_REFERRING_FORMAT = 2
_REMEDY = "let the store be verified with --repair: what is lost is computed again"


def root_key(identity: Mapping[str, str]) -> bytes:
    """The key before a text's first page. identity: role -> what it is, such as the models' fingerprints and the namespace; LABEL changes nothing."""
    named = {role: value for role, value in identity.items() if role != LABEL}
    return sha256(json.dumps({"format": str(FORMAT), **named}, sort_keys=True).encode()).digest()[:KEY_BYTES]


def page_keys(root: bytes, token_ids: Sequence[int]) -> list[bytes]:
    """The keys of all whole pages of a text."""
    return list(PageKeys(root, token_ids))


class PageKeys(Sequence[bytes]):
    """`page_keys`, each made when it is first asked for: a lookup that misses needs those of a run only."""

    def __init__(self, root: bytes, token_ids: Sequence[int]) -> None:
        self._token_ids, self._keys, self._ids = token_ids, [root], bytearray()

    def __len__(self) -> int:
        return len(self._token_ids) // PAGE_TOKENS

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> list[bytes]: ...
    def __getitem__(self, at: int | slice) -> bytes | list[bytes]:
        if isinstance(at, slice):
            pages = range(*at.indices(len(self)))
            if len(pages) > 0:
                self._make(max(pages[0], pages[-1]))
            return [self._keys[page + 1] for page in pages]
        page = range(len(self))[at]
        self._make(page)
        return self._keys[page + 1]

    def ids(self, start_page: int, end_page: int) -> bytes:
        """Token ids of pages [start_page, end_page) of the text, as `Run.ids`."""
        start, end = len(self._ids) // 4, end_page * PAGE_TOKENS
        if start < end:  # a run at a time: converting the whole text would cost a miss more than all the rest
            self._ids += id_bytes(self._token_ids[start : -(-end // RUN_TOKENS) * RUN_TOKENS])
        return bytes(self._ids[4 * start_page * PAGE_TOKENS : 4 * end])

    def _make(self, page: int) -> None:
        made = len(self._keys) - 1
        if made <= page:
            ids, size = self.ids(made, page + 1), 4 * PAGE_TOKENS
            for at in range(0, len(ids), size):
                self._keys.append(sha256(self._keys[-1] + ids[at : at + size]).digest()[:KEY_BYTES])


def id_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32."""
    ids = array("I", token_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def span_bounds(page: int) -> tuple[int, int]:
    """The tokens [start, end) that the span of a page covers: the attention sinks have no span."""
    return max(NUM_SINKS, page * PAGE_TOKENS), (page + 1) * PAGE_TOKENS


class Donor(NamedTuple):
    """A run that another one refers to: its key, and the digest that closes its file."""

    key: bytes
    digest: bytes


@dataclass(frozen=True)
class Run:
    """Pages [start_page, start_page + pages) of a text.

    root, parent: keys before the text, and before this run. ids: of its pages' tokens, little-endian uint32. spans: the coded span of each page
    (`span_bounds`), or None where the ids alone are kept. donors: runs that its spans refer to. needs: of each page the donors that its span needs, a
    bit each; empty where there are no donors. digest: of the file it was read from, else empty.
    """

    root: bytes
    parent: bytes
    start_page: int
    ids: bytes
    spans: tuple[bytes, ...] | None
    donors: tuple[Donor, ...] = ()
    needs: tuple[int, ...] = ()
    digest: bytes = field(default=b"", compare=False)

    def need(self, page: int) -> int:
        """Which donors the span of the run's page `page` needs, a bit each."""
        return self.needs[page] if self.needs else 0

    @property
    def num_pages(self) -> int:
        return self.num_tokens // PAGE_TOKENS

    @property
    def num_tokens(self) -> int:
        return len(self.ids) // 4

    @property
    def token_ids(self) -> list[int]:
        return np.frombuffer(self.ids, "<u4").tolist()  # type: ignore[no-any-return]

    @property
    def coded(self) -> bool:
        return self.spans is not None

    @property
    def keys(self) -> list[bytes]:
        """Of its pages; the last one names it."""
        return page_keys(self.parent, self.token_ids)

    def to_bytes(self) -> bytes:
        """The file."""
        head = _HEAD.pack(self.root, self.parent, self.start_page, self.num_pages, self.coded)
        spans = self.spans or ()
        parts = [head, self.ids, np.array([len(s) for s in spans], "<u4").tobytes(), b"".join(spans)]
        names, version = _NAMES, FORMAT
        if self.donors:
            names, version = _REFERRING_NAMES, _REFERRING_FORMAT
            parts.append(b"".join(donor.key + donor.digest for donor in self.donors) + bytes(self.needs))
        return write_sections(list(zip(names, [*parts, _digest(parts)], strict=True)), MAGIC, version)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, *, digest: bool = True) -> Run:
        """Inverse of `to_bytes`. digest: False leaves damage to the sections' CRC-32, a tenth of the digest's time.

        Raises:
            ForeignCode, NewerCode, TruncatedCode, CorruptedCode: as the names say; no damaged run comes out.
        """
        sections = read_sections(data, MAGIC, _REFERRING_FORMAT)
        if [name for name, _ in sections] not in (_NAMES, _REFERRING_NAMES):
            raise CorruptedCode("the file's sections are not a run's", _REMEDY)
        *parts, written = (content for _, content in sections)
        head, ids, sizes, body = parts[:4]
        if (digest and _digest(parts) != bytes(written)) or len(head) != _HEAD.size or len(written) != DIGEST_BYTES:
            raise CorruptedCode("the run's digest does not match its bytes", _REMEDY)
        root, parent, start_page, pages, coded = _HEAD.unpack(head)
        counts = [] if len(sizes) % 4 else list(struct.unpack(f"<{len(sizes) // 4}I", sizes))
        if (
            not 1 <= pages <= RUN_PAGES
            or start_page % RUN_PAGES
            or (start_page == 0) != (parent == root)
            or coded > 1
            or len(ids) != 4 * pages * PAGE_TOKENS
            or len(counts) != pages * coded
            or len(sizes) != 4 * len(counts)
            or sum(counts) != len(body)
        ):
            raise CorruptedCode("the run's description contradicts itself", _REMEDY)
        ends = list(accumulate(counts, initial=0))
        spans = tuple(bytes(body[a:b]) for a, b in pairwise(ends)) if coded else None
        donors, needs = _read_donors(parts[4], pages, bool(coded)) if len(parts) > 4 else ((), ())
        return cls(bytes(root), bytes(parent), start_page, bytes(ids), spans, donors, needs, bytes(written))


def _read_donors(data: memoryview, pages: int, coded: bool) -> tuple[tuple[Donor, ...], tuple[int, ...]]:
    """A run's donors, and which of them each page needs."""
    size = KEY_BYTES + DIGEST_BYTES
    count, rest = divmod(len(data) - pages, size)
    needs = tuple(data[len(data) - pages :]) if len(data) >= pages else ()
    if rest or not 1 <= count <= MAX_DONORS or not coded or not any(needs) or max(needs) >> count:
        raise CorruptedCode("the run's donors contradict its description", _REMEDY)
    rows = [bytes(data[at : at + size]) for at in range(0, count * size, size)]
    return tuple(Donor(row[:KEY_BYTES], row[KEY_BYTES:]) for row in rows), needs


def anchor_numbers(root: bytes, token_ids: Sequence[int], *, every: bool = False) -> list[int]:
    """What texts of a root that share a long enough stretch have in common (`codec.match.anchors`), as the index knows them: signed, of 64 bits.

    every: of all n-grams, to ask with; a stretch is then found whatever stands beside it in the asking text.
    """
    hashes = ngram_hashes(token_ids, ANCHOR_TOKENS) if every else anchors(token_ids)[1]
    return _numbers(root, hashes)


def anchors_of(run: Run) -> list[int]:
    """Under which a run is found as a donor: those of n-grams whose spans refer to nothing. None where it is not coded."""
    if not run.coded:
        return []
    places, hashes = anchors(run.token_ids)
    pages = np.stack([places, places + ANCHOR_TOKENS - 1]) // PAGE_TOKENS
    free = np.array([not run.need(page) for page in range(run.num_pages)])
    return _numbers(run.root, hashes[free[pages].all(0)])


def _numbers(root: bytes, hashes: np.ndarray) -> list[int]:
    salt = np.frombuffer(root[:8].ljust(8, b"\0"), "<u8")[0]
    return np.unique((hashes ^ salt).view(np.int64)).tolist()  # type: ignore[no-any-return]


def _digest(parts: Sequence[bytes | memoryview]) -> bytes:
    hasher = sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()[:DIGEST_BYTES]
