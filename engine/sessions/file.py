"""The file a suspended session is kept in: token ids, coded spans of KV, and what they belong to.

Sections (see `codec.container`): META JSON; TOKS token ids (a frame of `codec.token_ids`); SIZE the spans' starts, ends and byte counts;
SPAN the spans' bytes, end to end.
Spans are bound to their place, to the ids up to their end, to each other and to the models by a chain of digests (BLAKE2b), whose last link META names
as "bound": a span that was moved, exchanged, or taken from another file is refused, and so are other ids. The chain has no key: it tells mistakes and
patched files, not somebody who writes the whole file anew. Files of earlier versions have none, and open.
The first tokens' KV (attention sinks) is not stored: it depends on those tokens alone, so running them again restores it, for the price of a step.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import zstandard

from codec.container import FILE_MAGIC, read_sections, write_sections
from codec.errors import CodecError, CorruptedCode, ForeignCode, NewerCode, PackMismatch, TruncatedCode
from codec.spec import NUM_SINKS
from codec.token_ids import MAX_TOKENS, decode_ids, decompress, encode_ids, num_ids
from engine.errors import BadSessionFile, CacheNotWritable, Corrupted, DiskFull, ForeignModel, NewerVersion, Truncated
from engine.files import write_bytes
from engine.hub.cache import is_disk_full
from engine.inputs import Fields, open_regular, parse_json, shown

MAX_META_BYTES = 1 << 20
_LINK_BYTES = 16
_SPAN_ENTRY_BYTES = 12  # start, end and size of a span, uint32 each
_REMEDY = "restore it from a copy, or start a new session"
_UNBOUND = "the session's spans do not belong to its tokens, to each other or to its models"
_ERRORS: dict[type[CodecError], type[BadSessionFile]] = {
    TruncatedCode: Truncated,
    CorruptedCode: Corrupted,
    ForeignCode: Corrupted,
    NewerCode: NewerVersion,
    PackMismatch: ForeignModel,
}


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) coded once; `data` never changes afterwards (a view of the file's bytes where it was read from one). divergence: what its
    error is expected to cause, nats a position; of a span from a file the mean of the file's; None where it is not known. link: its digest in the
    chain that binds it (`bound`), of a span that came from a file; None before. borrows: it refers to other texts of a store, and decodes only
    there."""

    start: int
    end: int
    data: bytes | memoryview
    divergence: float | None = field(default=None, compare=False)
    link: bytes | None = field(default=None, compare=False)
    borrows: bool = field(default=False, compare=False)


def mean_divergence(spans: Sequence[Span]) -> float | None:
    """Over the tokens of all spans; None where one's is not known, or there are none."""
    known = [(s.divergence, s.end - s.start) for s in spans if s.divergence is not None]
    return sum(d * n for d, n in known) / sum(n for _, n in known) if known and len(known) == len(spans) else None


def bound(spans: Sequence[Span], token_ids: Sequence[int], fingerprints: dict[str, str], *, anew: bool = False) -> list[Span]:
    """The spans with their links. A link stands for the models, the ids up to the span's end, its place, its bytes, and all before it.

    anew: also of spans that have a link: what a reader compares with. Otherwise those keep theirs, which then no longer fit if anything was exchanged.
    """
    link = blake2b(json.dumps(fingerprints, sort_keys=True).encode(), digest_size=_LINK_BYTES).digest()
    linked, known = [], 0
    for span in spans:
        digest = blake2b(link, digest_size=_LINK_BYTES)
        digest.update(np.array([span.start, span.end], "<u8").tobytes())
        digest.update(np.array(token_ids[known : span.end], "<u8").tobytes())
        digest.update(span.data)
        link = digest.digest() if anew or span.link is None else span.link
        linked.append(Span(span.start, span.end, span.data, span.divergence, link))  # five times as fast as dataclasses.replace
        known = span.end
    return linked


class _LinkCheck(threading.Thread):
    """Compares, in a thread of its own, the checksums of a file's sections, and the links of its spans with the one it states. The hash is a chain,
    of a few hundred megabytes a second, and needs no interpreter meanwhile."""

    def __init__(self, data: bytes, spans: Sequence[Span], token_ids: Sequence[int], fingerprints: dict[str, str], link: str) -> None:
        super().__init__(name="session links")
        self._data, self._of, self._link, self._fits = data, (spans, token_ids, fingerprints), link, False
        self._fault: CodecError | None = None
        self.start()

    def run(self) -> None:
        try:
            read_sections(self._data)
        except CodecError as error:
            self._fault = error
            return
        spans = bound(*self._of, anew=True)
        self._fits = bool(spans) and spans[-1].link == _unhex(self._link)

    def result(self) -> None:
        """Waits. Raises CorruptedCode where they differ."""
        self.join()
        if self._fault is not None:
            raise self._fault
        if not self._fits:
            raise CorruptedCode(_UNBOUND, _REMEDY)


@dataclass
class SessionFile:
    """A suspended session.

    token_ids: all tokens. num_cached: tokens whose KV the session held, a prefix of them; spans cover [sinks, num_cached) without gaps, or are
    absent altogether (quality "tokens"). quality: of the last tokens coded; auto: it was chosen by what pays. fingerprints: role -> digest of the
    target, draft, tokenizer and, with spans, the pack.
    """

    token_ids: list[int]
    num_cached: int
    quality: str
    fingerprints: dict[str, str]
    spans: list[Span] = field(default_factory=list)
    auto: bool = False
    _check: _LinkCheck | None = field(default=None, repr=False, compare=False)

    def confirm(self) -> None:
        """Wait for the check of a file that was read `beside`; nothing restored from it may be used before. Raises CorruptedCode."""
        if self._check is not None:
            self._check.result()

    def to_bytes(self) -> bytes:
        """The whole file."""
        meta = {
            "quality": self.quality,
            "num_cached": self.num_cached,
            "num_tokens": len(self.token_ids),
            "fingerprints": self.fingerprints,
        } | ({"auto": True} if self.auto else {})
        if (divergence := mean_divergence(self.spans)) is not None:
            meta["divergence"] = float(f"{divergence:.4g}")
        if self.spans:
            last = bound(self.spans, self.token_ids, self.fingerprints)[-1].link
            assert last is not None
            meta["bound"] = last.hex()
        sizes = np.array([(s.start, s.end, len(s.data)) for s in self.spans], "<u4").reshape(-1, 3)
        body = b"".join(s.data for s in self.spans)
        packed = zstandard.ZstdCompressor(level=19).compress
        return write_sections(
            [
                ("META", packed(json.dumps(meta, sort_keys=True).encode())),
                ("TOKS", encode_ids(self.token_ids)),
                ("SIZE", packed(sizes.tobytes())),
                ("SPAN", body),
            ]
        )

    def save(self, path: str | Path) -> int:
        """`write_file` of `to_bytes`; returns the file's bytes."""
        data = self.to_bytes()
        write_file(path, data)
        return len(data)

    @classmethod
    def load(cls, path: str | Path, max_tokens: int = MAX_TOKENS, max_bytes: int | None = None, *, beside: bool = False) -> SessionFile:
        """Read and check a file of at most `max_tokens` tokens and `max_bytes` bytes; its first bytes are looked at before the rest is read.

        beside: the checksum over all spans, and their links, which bind them to each other and to the models, are compared in a thread, for whose end
        `confirm` waits; every span has a checksum of its own, and everything else was compared before this returns.

        Raises:
            BadSessionFile: it cannot be read, is no regular file, or is larger.
            Truncated, Corrupted, NewerVersion: what the bytes say; nothing is used of a file that fails a check.
        """
        where = f"session file {shown(str(path), 200)[1:-1]}"
        try:
            name = Path(path)
        except TypeError as error:
            raise BadSessionFile(f"a session file is named by {shown(path)}", "give a path") from error
        with open_regular(name, BadSessionFile, "check the path and its permissions", max_bytes=max_bytes) as file, session_errors(path):
            try:
                head = file.read(len(FILE_MAGIC))
                if head != FILE_MAGIC[: len(head)] or not head:
                    raise ForeignCode("this is not a Foretold file", "check the path")
                file.seek(0)  # and not `head + file.read()`: that copies it all once more
                data = file.read()
            except OSError as error:
                raise BadSessionFile(f"{where} cannot be read: {error.strerror or error}", "check the path and its permissions") from error
            except MemoryError as error:
                raise BadSessionFile(f"{where} is larger than the memory", _REMEDY) from error
            return cls.from_bytes(data, max_tokens, beside=beside)

    @classmethod
    def from_bytes(cls, data: bytes, max_tokens: int = MAX_TOKENS, *, beside: bool = False) -> SessionFile:
        """Inverse of `to_bytes`; no part that claims more than `max_tokens` tokens is unpacked. beside: as for `load`. Raises the codec's named
        errors."""
        sections = read_sections(data, unchecked=("SPAN",) if beside else ())
        if [name for name, _ in sections] != ["META", "TOKS", "SIZE", "SPAN"]:
            raise CorruptedCode("the file's sections are not a session's", _REMEDY)
        meta_bytes, token_bytes, size_bytes, body = (content for _, content in sections)
        described = decompress(meta_bytes, MAX_META_BYTES, "the fields of the session's description")
        try:
            meta = parse_json(described, "its description", Corrupted, _REMEDY)
            if not isinstance(meta, dict):
                raise Corrupted("its description is no object", _REMEDY)
            fields = Fields(meta, "its description", Corrupted, _REMEDY)
            num_cached, num_tokens = fields.integer("num_cached", 0, MAX_TOKENS), fields.integer("num_tokens", 0, MAX_TOKENS)
            quality, auto, fingerprints = fields.text("quality"), fields.boolean("auto", False), fields.mapping("fingerprints")
            divergence = fields.number("divergence", 0.0, 1e9) if "divergence" in meta else None
            link = fields.text("bound", "")
            if not all(isinstance(digest, str) for digest in fingerprints.values()):
                raise fields.refuse("fingerprints", "texts are needed")
        except Corrupted as error:
            raise CorruptedCode(f"the session's description is malformed: {error.what}", _REMEDY) from error
        if num_cached > num_tokens:
            raise CorruptedCode("the session's token counts contradict each other", _REMEDY)
        if num_tokens > max_tokens:
            raise CorruptedCode(f"it holds tokens the model cannot have: {num_tokens}, where {max_tokens} fit", _REMEDY)
        if num_ids(token_bytes) != num_tokens:
            raise CorruptedCode("the session's token counts contradict each other", _REMEDY)
        tokens = decode_ids(token_bytes, num_tokens)
        raw_sizes = decompress(size_bytes, _SPAN_ENTRY_BYTES * num_cached, "the list of spans")
        if len(raw_sizes) % _SPAN_ENTRY_BYTES:
            raise CorruptedCode("the session's list of spans is malformed", _REMEDY)
        spans: list[Span] = []
        at = 0
        for start, end, size in np.frombuffer(raw_sizes, "<u4").reshape(-1, 3).tolist():
            expected = spans[-1].end if spans else NUM_SINKS
            if start != expected or not start < end <= num_cached or at + size > len(body):
                raise CorruptedCode("the session's spans do not cover its tokens", _REMEDY)
            spans.append(Span(start, end, body[at : at + size], divergence))
            at += size
        if at != len(body) or (spans and spans[-1].end != num_cached):
            raise CorruptedCode("the session's spans do not cover its tokens", _REMEDY)
        if not link:  # of an earlier version
            if beside:
                read_sections(data)
            return cls(tokens, num_cached, quality, fingerprints, bound(spans, tokens, fingerprints, anew=True), auto)
        if beside:
            return cls(tokens, num_cached, quality, fingerprints, spans, auto, _LinkCheck(data, spans, tokens, fingerprints, link))
        spans = bound(spans, tokens, fingerprints, anew=True)
        if not spans or spans[-1].link != _unhex(link):
            raise CorruptedCode(_UNBOUND, _REMEDY)
        return cls(tokens, num_cached, quality, fingerprints, spans, auto)


def _unhex(text: str) -> bytes:
    """The bytes of a hexadecimal text; empty for what is none."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""


def write_file(path: str | Path, data: bytes) -> None:
    """Write a session, readable by its owner alone. A failure leaves an earlier file as it was (`engine.files.atomic_file`).

    Raises:
        DiskFull, CacheNotWritable: as the names say.
    """
    where = Path(path).absolute()
    try:
        write_bytes(where, data, private=True)
    except ValueError as error:  # a zero byte
        raise CacheNotWritable(f"{shown(str(path), 200)} cannot be written: it is no file name", "choose another path") from error
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(f"no room left for the session file {where}", "free space, or choose another folder") from error
        raise CacheNotWritable(f"the session file {where} cannot be written: {error.strerror or error}", "choose another path") from error


class session_errors:
    """Context: the codec's errors leave it as the session's, naming the file."""

    def __init__(self, path: str | Path | None) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, CodecError):
            named = next((engine for codec, engine in _ERRORS.items() if isinstance(error, codec)), BadSessionFile)
            raise named(f"session file {self._path}: {error.what}", error.remedy) from error
