"""A stored run: a few pages of token ids that continue a parent run, with the coded spans of their KV or without.

A page is PAGE_TOKENS tokens; a run fills RUN_PAGES pages, and only the last run of a text may be shorter. Every page has a key: the hash of the
key before it and of its token ids, beginning with the root's, which names models, codec parameters, quality and namespace. A run is named by the key of
its last page, so a name says everything before it too, and equal runs of any process are one file.

File: sections of `codec.container`: HEAD (root, parent, first page, pages, whether coded), TOKS (ids, uint32), SIZE (bytes of each span, uint32), SPAN
(the spans' bytes, end to end), HASH (16 bytes of the SHA-256 of all before).
"""

from __future__ import annotations

import json
import struct
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate, pairwise
from typing import overload

import numpy as np

from codec.container import read_sections, write_sections
from codec.errors import CorruptedCode
from codec.spec import NUM_SINKS, SPAN_TOKENS

PAGE_TOKENS = SPAN_TOKENS
RUN_PAGES = 4
RUN_TOKENS = PAGE_TOKENS * RUN_PAGES
KEY_BYTES = 20
FORMAT = 1
"""Of keys and files: another number names other runs."""

LABEL = "label"
"""The role under which an identity says, for people, which models it is about."""

MAX_RUN_BYTES = 64 << 20
MAGIC = b"FTLDRUN\n"
_HEAD = struct.Struct(f"<{KEY_BYTES}s{KEY_BYTES}sIBB")
_NAMES = ["HEAD", "TOKS", "SIZE", "SPAN", "HASH"]
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


@dataclass(frozen=True)
class Run:
    """Pages [start_page, start_page + pages) of a text.

    root, parent: keys before the text, and before this run. ids: of its pages' tokens, little-endian uint32. spans: the coded span of each page
    (`span_bounds`), or None where the ids alone are kept.
    """

    root: bytes
    parent: bytes
    start_page: int
    ids: bytes
    spans: tuple[bytes, ...] | None

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
        return write_sections(list(zip(_NAMES, [*parts, _digest(parts)], strict=True)), MAGIC, FORMAT)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, *, digest: bool = True) -> Run:
        """Inverse of `to_bytes`. digest: False leaves damage to the sections' CRC-32, a tenth of the digest's time.

        Raises:
            ForeignCode, NewerCode, TruncatedCode, CorruptedCode: as the names say; no damaged run comes out.
        """
        sections = read_sections(data, MAGIC, FORMAT)
        if [name for name, _ in sections] != _NAMES:
            raise CorruptedCode("the file's sections are not a run's", _REMEDY)
        head, ids, sizes, body, written = (content for _, content in sections)
        if (digest and _digest([head, ids, sizes, body]) != bytes(written)) or len(head) != _HEAD.size:
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
        return cls(bytes(root), bytes(parent), start_page, bytes(ids), spans)


def _digest(parts: Sequence[bytes | memoryview]) -> bytes:
    hasher = sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()[:16]
