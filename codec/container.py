"""Byte formats: a coded span, and files made of checked sections (session files).

Everything is little endian. A span is its header, its rANS states, its words and a tail (step levels, references to earlier tokens,
escape remainders), one crc32 over all of it.
A section file is magic, version, section count, then per section a four-letter name, a length, a crc32 and the bytes; a crc32 of the
table closes the head, so a cut or altered file is named before anything is decoded.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from codec.errors import BadInput, CorruptedCode, ForeignCode, NewerCode, TruncatedCode
from codec.quantize import MIN_LEVEL
from codec.spec import MAX_SPAN_TOKENS

SPAN_VERSION = 2
"""Of spans that refer to earlier tokens; others are written as the version before, which knows no references."""
_FIRST_SPAN_VERSION = 1
FILE_MAGIC = b"FTLDKV\r\n"
FILE_VERSION = 1
_REMEDY = "restore it from a copy, or start again without it"

# magic, version, flags, tokens per lane, step (float32), tokens, components, words, tail bytes, pack tag, crc32 of all but itself
_SPAN = struct.Struct("<2sBBBxfHHIII")
_CRC = struct.Struct("<I")
_NUM_REFERENCES = struct.Struct("<H")
_REFERENCE = struct.Struct("<HHIB")  # first token, length, distance, scale in sixteenths
REFERENCE_BYTES = _REFERENCE.size
_HAS_LEVELS, _HAS_REFERENCES = 1, 2
_SPAN_MAGIC = b"fS"
_FILE_HEAD = struct.Struct("<8sHHI")
_SECTION = struct.Struct("<4sQI")
MAX_SECTIONS = 65535
MIN_STEP, MAX_STEP = 2.0**-12, 2.0**12
"""Quantiser steps that a span may have: others make nothing, or no finite number, of its integers."""
_VARINT_BYTES = 9  # of seven bits: a non-negative int64


SCALES_PER_ONE = 16
MAX_REFERENCE_SCALE = 16
MAX_DISTANCE = (1 << 32) - 1


class Reference(NamedTuple):
    """Tokens [first, first + length) of a span are coded against the decoded components of those `distance` tokens earlier, times `scale` sixteenths.

    The earlier tokens all lie before the span.
    """

    first: int
    length: int
    distance: int
    scale: int


def fitting_references(references: Sequence[Reference], num_tokens: int) -> bool:
    """Whether they are references of a span of so many tokens: in order, without overlap, and to tokens before it."""
    done = 0
    for first, length, distance, scale in references:
        if first < done or length < 1 or not first + length <= distance <= MAX_DISTANCE or not 0 < scale <= MAX_REFERENCE_SCALE:
            return False
        done = first + length
    return done <= num_tokens


@dataclass
class SpanCode:
    """A coded span, unpacked.

    Args:
        step: quantiser step.
        tokens_per_lane: how many tokens a rANS lane codes.
        num_tokens, num_components: T and K.
        pack_tag: first four bytes of the pack's digest; spans of another pack are refused.
        states: uint32 [lanes]; words: uint16 [n].
        levels: int8 [T] step levels, or None when all are zero.
        escapes: remainders of escaped integers, in (token, component) order, as variable-length integers.
        references: to earlier tokens.
    """

    step: float
    tokens_per_lane: int
    num_tokens: int
    num_components: int
    pack_tag: int
    states: np.ndarray
    words: np.ndarray
    levels: np.ndarray | None
    escapes: bytes
    references: Sequence[Reference] = ()


def write_span(code: SpanCode) -> bytes:
    """The span's bytes."""
    if not MIN_STEP <= code.step <= MAX_STEP:
        raise BadInput(f"a quantiser step of {code.step}", f"choose one from {MIN_STEP:g} to {MAX_STEP:g}")
    if not 0 < code.num_tokens <= MAX_SPAN_TOKENS:
        raise BadInput(f"a span of {code.num_tokens} tokens", f"code 1 to {MAX_SPAN_TOKENS} tokens a span")
    if not fitting_references(code.references, code.num_tokens):
        raise BadInput("references that do not fit their span", "refer, in order, to tokens before it")
    tail = b"" if code.levels is None else _pack_levels(code.levels)
    if code.references:
        tail += _NUM_REFERENCES.pack(len(code.references)) + b"".join(_REFERENCE.pack(*r) for r in code.references)
    tail += code.escapes
    head = _SPAN.pack(
        _SPAN_MAGIC,
        SPAN_VERSION if code.references else _FIRST_SPAN_VERSION,
        _HAS_LEVELS * (code.levels is not None) | _HAS_REFERENCES * bool(code.references),
        code.tokens_per_lane,
        code.step,
        code.num_tokens,
        code.num_components,
        len(code.words),
        len(tail),
        code.pack_tag,
    )
    body = head + code.states.astype("<u4").tobytes() + code.words.astype("<u2").tobytes() + tail
    return body + _CRC.pack(zlib.crc32(body))


def read_span(data: bytes | memoryview) -> SpanCode:
    """Inverse of write_span; the parts are views of `data`. Raises ForeignCode, NewerCode, TruncatedCode or CorruptedCode."""
    data = memoryview(data)
    if data[:2] != _SPAN_MAGIC[: len(data[:2])]:
        raise ForeignCode("these bytes are not a coded span", "pass what KvCodec.encode wrote")
    if len(data) < _SPAN.size + _CRC.size:
        raise TruncatedCode("a coded span ends inside its header", _REMEDY)
    _, version, flags, per_lane, step, tokens, components, words, tail, tag = _SPAN.unpack_from(data)
    if version > SPAN_VERSION:
        raise NewerCode(f"the span has format version {version}, this program reads up to {SPAN_VERSION}", "update the program")
    lanes = -(-tokens // per_lane) if per_lane else 0
    size = _SPAN.size + 4 * lanes + 2 * words + tail + _CRC.size
    if len(data) < size:
        raise TruncatedCode(f"a coded span has {len(data)} of {size} bytes", _REMEDY)
    if len(data) > size or zlib.crc32(data[: -_CRC.size]) != _CRC.unpack_from(data, size - _CRC.size)[0]:
        raise CorruptedCode("a coded span's checksum does not match", _REMEDY)
    most_flags = _HAS_LEVELS if version == _FIRST_SPAN_VERSION else _HAS_LEVELS | _HAS_REFERENCES
    level_bytes = -(-tokens // 2) if flags & _HAS_LEVELS else 0
    sound = 0 < tokens <= MAX_SPAN_TOKENS and per_lane and version and flags <= most_flags and MIN_STEP <= step <= MAX_STEP
    if not sound or tail < level_bytes:
        raise CorruptedCode("a coded span's header contradicts itself", _REMEDY)
    at = _SPAN.size
    states = np.frombuffer(data, "<u4", lanes, at)
    stream = np.frombuffer(data, "<u2", words, at + 4 * lanes)
    rest = data[at + 4 * lanes + 2 * words : size - _CRC.size]
    levels = _unpack_levels(rest[:level_bytes], tokens) if level_bytes else None
    references, rest = _read_references(rest[level_bytes:], tokens) if flags & _HAS_REFERENCES else ((), rest[level_bytes:])
    return SpanCode(step, per_lane, tokens, components, tag, states, stream, levels, bytes(rest), references)


def _read_references(data: memoryview, tokens: int) -> tuple[list[Reference], memoryview]:
    """A span's references, and what follows them."""
    count = _NUM_REFERENCES.unpack_from(data)[0] if len(data) >= _NUM_REFERENCES.size else 0
    end = _NUM_REFERENCES.size + count * _REFERENCE.size
    if not count or len(data) < end:
        raise CorruptedCode("a coded span's references are cut short", _REMEDY)
    found = [Reference(*fields) for fields in _REFERENCE.iter_unpack(data[_NUM_REFERENCES.size : end])]
    if not fitting_references(found, tokens):
        raise CorruptedCode("a coded span's references do not fit it", _REMEDY)
    return found, data[end:]


def _pack_levels(levels: np.ndarray) -> bytes:
    """Half a byte a token: levels lie in -8..7."""
    shifted = (np.asarray(levels, np.int16) - MIN_LEVEL).astype(np.uint8)
    shifted = np.concatenate([shifted, np.zeros(len(shifted) % 2, np.uint8)])
    return (shifted[::2] | shifted[1::2] << 4).tobytes()


def _unpack_levels(data: memoryview, tokens: int) -> np.ndarray:
    packed = np.frombuffer(data, np.uint8)
    return (np.stack([packed & 15, packed >> 4], 1).reshape(-1)[:tokens].astype(np.int16) + MIN_LEVEL).astype(np.int8)


def write_varints(values: np.ndarray) -> bytes:
    """Non-negative integers int64 [n], seven bits a byte, low bits first."""
    groups = np.asarray(values, np.int64)[:, None] >> 7 * np.arange(_VARINT_BYTES)
    more = groups[:, 1:] > 0
    written = np.concatenate([np.ones((len(groups), 1), bool), more], 1)
    groups = (groups & 127).astype(np.uint8)
    groups[:, :-1] |= more.astype(np.uint8) << 7
    return groups[written].tobytes()


def read_varints(data: bytes, count: int) -> np.ndarray:
    """Exactly count integers, int64 [count], from all of data; CorruptedCode otherwise."""
    stored = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(stored < 128) + 1
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(ends)]
    sizes = ends - starts
    if len(ends) != count or int(sizes.sum()) != len(stored) or sizes.max(initial=0) > _VARINT_BYTES:
        raise CorruptedCode("a list of integers is malformed", _REMEDY)
    if not count:
        return np.zeros(0, np.int64)
    place = np.arange(len(stored)) - np.repeat(starts, sizes)
    return np.add.reduceat((stored & 127).astype(np.int64) << 7 * place, starts)


def read_varint_lists(parts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """All integers of several lists, int64 [n], and how many each list has, int64 [len(parts)]. Raises CorruptedCode."""
    stored = np.frombuffer(b"".join(parts), np.uint8)
    ends = np.cumsum([0, *map(len, parts)])
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(stored < 128)])
    last = ends[1:][np.diff(ends) > 0] - 1
    if (stored[last] >= 128).any():  # a list ends within an integer
        raise CorruptedCode("a list of integers is malformed", _REMEDY)
    return read_varints(stored.tobytes(), int(before[-1])), np.diff(before[ends])


def write_sections(sections: list[tuple[str, bytes]], magic: bytes = FILE_MAGIC, version: int = FILE_VERSION) -> bytes:
    """A section file. Names are four ASCII letters and may repeat; order is kept."""
    if len(sections) > MAX_SECTIONS:
        raise BadInput(f"{len(sections)} sections", f"join them into at most {MAX_SECTIONS}")
    table = b"".join(_SECTION.pack(name.encode("ascii"), len(body), zlib.crc32(body)) for name, body in sections)
    head = _FILE_HEAD.pack(magic, version, len(sections), _table_crc(magic, version, table))
    return b"".join([head, table, *(body for _, body in sections)])


def _table_crc(magic: bytes, version: int, table: bytes | memoryview) -> int:
    return zlib.crc32(table, zlib.crc32(magic + bytes([version & 255, version >> 8])))


def read_sections(
    data: bytes | memoryview, magic: bytes = FILE_MAGIC, version: int = FILE_VERSION, *, unchecked: Collection[str] = ()
) -> list[tuple[str, memoryview]]:
    """Inverse of write_sections, as views of `data`; every checksum is compared, but those of sections named in `unchecked`. Raises ForeignCode,
    NewerCode, TruncatedCode or CorruptedCode."""
    view = memoryview(data)
    if bytes(view[:8]) != magic[: len(view[:8])] or len(view) == 0:
        raise ForeignCode("this is not a Foretold file", "check the path")
    if len(view) < _FILE_HEAD.size:
        raise TruncatedCode("the file ends inside its header", _REMEDY)
    _, found, count, table_crc = _FILE_HEAD.unpack_from(view)
    if found > version:
        raise NewerCode(f"the file has format version {found}, this program reads up to {version}", "update the program")
    at = _FILE_HEAD.size + count * _SECTION.size
    if len(view) < at:
        raise TruncatedCode("the file ends inside its table of contents", _REMEDY)
    if found < 1 or _table_crc(magic, found, view[_FILE_HEAD.size : at]) != table_crc:
        raise CorruptedCode("the file's table of contents is damaged", _REMEDY)
    sections = []
    for n in range(count):
        name, size, crc = _SECTION.unpack_from(view, _FILE_HEAD.size + n * _SECTION.size)
        if at + size > len(view):
            raise TruncatedCode(f"the file ends inside section {n}", _REMEDY)
        body = view[at : at + size]
        if name.decode("ascii", "replace") not in unchecked and zlib.crc32(body) != crc:
            raise CorruptedCode(f"section {n} of the file is damaged", _REMEDY)
        sections.append((name.decode("ascii", "replace"), body))
        at += size
    if at != len(view):
        raise CorruptedCode(f"{len(view) - at} bytes follow the file's last section", _REMEDY)
    return sections
