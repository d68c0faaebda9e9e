"""Token ids as bytes: the frame every coder of them shares, and the coder that needs no model.

A frame is a coder's number, the number of tokens, the crc32 of the ids (little-endian uint32) and the coder's own bytes. The checksum is over what
comes out, so a decoder that goes astray for any reason is found out.

The coder without a model walks down the bits of each id. The chance of a bit is counted in three contexts, the last two tokens, the last one and
none; the counts of the longer lean on the chance the shorter gives, as in hierarchical Pitman-Yor models (Teh 2006) with no discount, and the
shortest on a law that falls as 1/id: byte-pair vocabularies are numbered by how often their tokens were met. All in integers.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np

from codec.binary_coder import FLOOR, ONE, BitCoder, BitDecoder, BitEncoder
from codec.errors import BadInput, CorruptedCode

COUNTED, MODELLED = 1, 2  # coders
_HEAD = struct.Struct("<BII")
_LEANING = (16, 24, 8)  # sixteenths of an observation that the shorter context's chance counts for, shortest first
_FIRST_IDS = 64  # ids that the 1/id law treats nearly alike
_MOST = 200  # counts are halved beyond it
_REMEDY = "restore it from a copy, or start again without it"


def checksum(ids: Sequence[int]) -> int:
    """crc32 of the ids."""
    return zlib.crc32(np.asarray(ids, "<u4").tobytes())


def write_frame(coder: int, ids: Sequence[int], data: bytes) -> bytes:
    """The frame of ids that `coder` wrote as data."""
    return _HEAD.pack(coder, len(ids), checksum(ids)) + data


def read_frame(frame: bytes) -> tuple[int, int, int, bytes]:
    """(coder, number of tokens, checksum, data). Raises CorruptedCode."""
    if len(frame) < _HEAD.size:
        raise CorruptedCode("the token ids end inside their header", _REMEDY)
    coder, count, crc = _HEAD.unpack_from(frame)
    if coder not in (COUNTED, MODELLED):
        raise CorruptedCode(f"the token ids are written in an unknown way, {coder}", _REMEDY)
    return coder, count, crc, frame[_HEAD.size :]


def encode_ids(ids: Sequence[int]) -> bytes:
    """A frame of any ids below 2^32, coded without a model. Raises BadInput for others."""
    if not all(0 <= token < 1 << 32 for token in ids):
        raise BadInput("a token id is negative or has more than 32 bits", "give ids of a vocabulary")
    width = max(1, max(ids, default=0).bit_length())
    encoder = BitEncoder()
    _walk(encoder, ids, len(ids), width)
    return write_frame(COUNTED, ids, bytes([width]) + encoder.finish())


def decode_ids(frame: bytes) -> list[int]:
    """Inverse of encode_ids. Raises CorruptedCode."""
    coder, count, crc, data = read_frame(frame)
    if coder != COUNTED:
        raise CorruptedCode("the token ids need a model to decode", "resume the session with the models it was made with")
    if not data or not 1 <= data[0] <= 32:
        raise CorruptedCode("the header of the token ids contradicts itself", _REMEDY)
    decoder = BitDecoder(data[1:])
    ids = _walk(decoder, None, count, data[0])
    decoder.finish()
    if checksum(ids) != crc:
        raise CorruptedCode("the checksum of the token ids does not match", _REMEDY)
    return ids


def _walk(coder: BitCoder, ids: Sequence[int] | None, count: int, width: int) -> list[int]:
    """Write ids, or read `count` of them when there are none; returns them."""
    counts: tuple[dict[int, list[int]], ...] = ({}, {}, {})
    found: list[int] = []
    before = last = 0
    for n in range(count):
        token = 0 if ids is None else ids[n]
        # context in the high bits, the path so far (with a leading 1) in the low ones
        keys = (0, (last + 1) << 34, ((before + 1) << 34 | (last + 1)) << 34)
        node = 1
        for depth in range(width):
            half = 1 << (width - depth - 1)
            chance, cells = _prior((node - (1 << depth)) * 2 * half, half), []
            for key, table, leaning in zip(keys, counts, _LEANING, strict=True):
                cell = table.get(key | node)
                if cell is None:
                    cell = table[key | node] = [0, 0]
                else:
                    chance = (16 * cell[1] * ONE + leaning * chance) // (16 * (cell[0] + cell[1]) + leaning)
                cells.append(cell)
            bit = coder.code(token >> (width - depth - 1) & 1, min(max(chance, FLOOR), ONE - FLOOR))
            for cell in cells:
                cell[bit] += 1
                if cell[bit] > _MOST:
                    cell[0], cell[1] = (cell[0] + 1) // 2, (cell[1] + 1) // 2
            node = 2 * node + bit
        before, last = last, node - (1 << width)
        found.append(last)
    return found


def _prior(low: int, half: int) -> int:
    """Chance of the upper half of the ids low .. low + 2 half under the 1/id law, out of ONE."""
    start, split, end = (_logarithm(_FIRST_IDS + low + offset) for offset in (0, half, 2 * half))
    return (end - split) * ONE // (end - start) if end > start else ONE // 2


def _logarithm(value: int) -> int:
    """2^16 log2(value), straight between powers of two, so that every machine finds the same."""
    power = value.bit_length() - 1
    return (power << 16) + ((value - (1 << power) << 16) >> power)
