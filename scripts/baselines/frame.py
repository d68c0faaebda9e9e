"""Bytes of one coded sequence, the same for every baseline: header, exact sinks, sections, checksum.

    magic 4s | version u8 | name length u8 | sections u16 | tokens u32 | elements per token u32 | fit u32 | crc32 u32
    name | section lengths u32 [sections] | sinks bf16 [min(tokens, 4), D] | sections

`fit` is the fingerprint of the fitted state (0 when nothing is fitted); the checksum covers everything but itself. All of it is
counted as cost.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from codec.errors import CorruptedCode, ForeignCode, NewerCode, PackMismatch, TruncatedCode
from codec.spec import NUM_SINKS

MAGIC = b"FTPR"
VERSION = 1
_HEADER = struct.Struct("<4sBBHIII")
_CRC = struct.Struct("<I")
_RESTORE = "restore the bytes from a copy or encode again"


@dataclass(frozen=True)
class Frame:
    """Decoded header and content: tokens [T], sinks as raw bf16 bytes, sections as byte strings."""

    num_tokens: int
    sinks: bytes
    sections: list[bytes]


def write_frame(name: str, dim: int, fit: int, num_tokens: int, sinks: bytes, sections: list[bytes]) -> bytes:
    """Joins the parts; `fit` is the 32-bit fingerprint of the state the decoder will need."""
    label = name.encode()
    header = _HEADER.pack(MAGIC, VERSION, len(label), len(sections), num_tokens, dim, fit)
    body = b"".join([label, struct.pack(f"<{len(sections)}I", *map(len, sections)), sinks, *sections])
    return header + _CRC.pack(zlib.crc32(body, zlib.crc32(header))) + body


def read_frame(data: bytes, name: str, dim: int, fit: int) -> Frame:
    """Checks and splits what write_frame wrote.

    Raises:
        ForeignCode, NewerCode, TruncatedCode, CorruptedCode: the bytes are not an intact frame.
        PackMismatch: an intact frame of another baseline, layout or fit.
    """
    data = bytes(data)
    start = _HEADER.size + _CRC.size
    if data[:4] != MAGIC[: len(data[:4])]:
        raise ForeignCode("these bytes are not a baseline's code", "decode them with what wrote them")
    if len(data) < start:
        raise TruncatedCode("the code ends inside its header", _RESTORE)
    _, version, label_length, count, num_tokens, its_dim, its_fit = _HEADER.unpack_from(data)
    if version > VERSION:
        raise NewerCode(f"the code has format version {version}, this reads up to {VERSION}", "update, or encode again")
    sizes_at = start + label_length
    sinks_at = sizes_at + 4 * count
    if len(data) < sinks_at:
        raise TruncatedCode("the code ends inside its section table", _RESTORE)
    lengths = struct.unpack_from(f"<{count}I", data, sizes_at)
    sink_bytes = min(num_tokens, NUM_SINKS) * its_dim * 2
    expected = sinks_at + sink_bytes + sum(lengths)
    intact = zlib.crc32(data[start:], zlib.crc32(data[: _HEADER.size])) == _CRC.unpack_from(data, _HEADER.size)[0]
    if not intact and len(data) < expected:
        raise TruncatedCode(f"the code has {len(data)} bytes of {expected}", _RESTORE)
    if not intact or len(data) != expected:
        raise CorruptedCode("the code's checksum or length does not match", _RESTORE)
    label = data[start:sizes_at].decode(errors="replace")
    if (label, its_dim, its_fit) != (name, dim, fit):
        raise PackMismatch(
            f"the code was written by {label} for {its_dim} elements a token (fit {its_fit:08x}), this is {name} for {dim} (fit {fit:08x})",
            "decode with the same baseline, layout and calibration",
        )
    position, sections = sinks_at + sink_bytes, []
    for length in lengths:
        sections.append(data[position : position + length])
        position += length
    return Frame(num_tokens, data[sinks_at : sinks_at + sink_bytes], sections)
