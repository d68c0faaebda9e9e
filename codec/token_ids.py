"""Token ids as bytes: their low 2, 3 or 4 bytes through zstandard, in a frame with their number and checksum.

100,000 ids take milliseconds either way, and one to one and a half bytes each. (On 100,000 ids of Python source and of prose, the ids' bytes in order
gave 6 to 9 bits a token; planes of low and high bytes, or fewer bits an id, gave more.) A frame is a coder's number, the number of tokens, the crc32
of the ids (little-endian uint32) and the coder's own bytes. The checksum is over what comes out.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import zstandard

from codec.counted_ids import read_counted
from codec.errors import BadInput, CorruptedCode

COUNTED, MODELLED, COMPRESSED = 1, 2, 3
"""Coders: counted bits (read, no longer written), the draft's predictions (neither), zstandard."""

MAX_TOKENS = 1 << 28

_HEAD = struct.Struct("<BII")
_WIDTHS = (2, 3, 4)  # bytes an id
_SHORT, _SHORT_LEVEL, _LEVEL = 16_384, 19, 9  # lists of up to _SHORT ids can afford the slower level: 4 ms
_REMEDY = "restore it from a copy, or start again without it"


def checksum(ids: Sequence[int] | np.ndarray) -> int:
    """crc32 of the ids."""
    return zlib.crc32(np.ascontiguousarray(ids, "<u4").data)


def encode_ids(ids: Sequence[int]) -> bytes:
    """A frame of any ids below 2^32. Raises BadInput for others, and for more than MAX_TOKENS."""
    wide = np.asarray(ids if len(ids) else [], np.int64)
    if len(wide) > MAX_TOKENS:
        raise BadInput(f"{len(wide)} token ids", f"give at most {MAX_TOKENS}")
    if len(wide) and not 0 <= int(wide.min()) <= int(wide.max()) < 1 << 32:
        raise BadInput("a token id is negative or has more than 32 bits", "give ids of a vocabulary")
    narrow = wide.astype("<u4")
    bits = int(narrow.max(initial=0)).bit_length()
    width = next(w for w in _WIDTHS if bits <= 8 * w)
    planes = np.ascontiguousarray(narrow.view(np.uint8).reshape(-1, 4)[:, :width])
    level = _SHORT_LEVEL if len(narrow) <= _SHORT else _LEVEL
    packed = zstandard.ZstdCompressor(level=level, write_content_size=True).compress(planes.data)
    return _HEAD.pack(COMPRESSED, len(narrow), checksum(narrow)) + bytes([width]) + packed


def num_ids(frame: bytes | memoryview) -> int:
    """How many ids a frame claims to hold. Raises CorruptedCode."""
    return _read_head(frame)[1]


def decode_ids(frame: bytes | memoryview, max_tokens: int = MAX_TOKENS) -> list[int]:
    """Inverse of encode_ids. Nothing larger than `max_tokens` ids is ever reserved, whatever the frame claims.

    Raises:
        CorruptedCode: the frame is damaged, claims more than max_tokens ids, or holds ids that only a model could read.
    """
    coder, count, crc = _read_head(frame)
    if coder == MODELLED:
        raise CorruptedCode(
            "the token ids are coded with a model's predictions, as earlier versions could",
            "suspend it with another quality there",
        )
    if count > max_tokens:
        raise CorruptedCode(f"{count} token ids are claimed where at most {max_tokens} can be", _REMEDY)
    body = memoryview(frame)[_HEAD.size :]
    if coder == COUNTED:
        ids = np.asarray(read_counted(bytes(body), count), "<u4")
    else:
        ids = _decompressed(body, count)
    if checksum(ids) != crc:
        raise CorruptedCode("the checksum of the token ids does not match", _REMEDY)
    return ids.tolist()


def _read_head(frame: bytes | memoryview) -> tuple[int, int, int]:
    """(coder, number of tokens, checksum). Raises CorruptedCode."""
    if len(frame) < _HEAD.size:
        raise CorruptedCode("the token ids end inside their header", _REMEDY)
    coder, count, crc = _HEAD.unpack_from(frame)
    if coder not in (COUNTED, MODELLED, COMPRESSED):
        raise CorruptedCode(f"the token ids are written in an unknown way, {coder}", _REMEDY)
    return coder, count, crc


def _decompressed(body: memoryview, count: int) -> np.ndarray:
    """uint32 [count] from the width and a zstandard frame. Raises CorruptedCode."""
    if not len(body) or body[0] not in _WIDTHS:
        raise CorruptedCode("the header of the token ids contradicts itself", _REMEDY)
    width = body[0]
    planes = np.frombuffer(decompress(body[1:], count * width, "the token ids", exact=True), np.uint8).reshape(count, width)
    ids = np.zeros((count, 4), np.uint8)
    ids[:, :width] = planes
    return ids.reshape(-1).view("<u4")


def decompress(data: bytes | memoryview, size: int, what: str, *, exact: bool = False) -> bytes:
    """At most `size` bytes (or just as many) from one zstandard frame that says how many it holds, which is checked before anything is reserved.

    Raises CorruptedCode, naming `what`.
    """
    try:
        claimed = zstandard.frame_content_size(data)
        if claimed > size or claimed < (size if exact else 0):
            raise CorruptedCode(f"{what} claim {claimed} bytes where {size} are expected", _REMEDY)
        out = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptedCode(f"{what} are damaged", _REMEDY) from error
    if len(out) != claimed:
        raise CorruptedCode(f"{what} are damaged", _REMEDY)
    return out
