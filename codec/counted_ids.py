"""Reader of the token ids in older session files: bits of each id, their chances counted as they were coded.

The chance of a bit is counted in three contexts, the last two tokens, the last one and none; the counts of the longer lean on the chance the shorter
gives, as in hierarchical Pitman-Yor models (Teh 2006) without a discount, the shortest on a law that falls as 1/id. The bits go through a binary
range coder (Martin 1979). All in integers. A token takes about 0.2 ms, so nothing is written this way any more (`codec.token_ids`).
"""

from __future__ import annotations

from codec.errors import CorruptedCode

_ONE = 1 << 16  # a probability is an integer out of _ONE, kept within [_FLOOR, _ONE - _FLOOR]
_FLOOR = 24
_TOP = 1 << 56
_BOTTOM = 1 << 48
_STATE_BYTES = 7
_LEANING = (16, 24, 8)  # sixteenths of an observation that the shorter context's chance counts for, shortest first
_FIRST_IDS = 64  # ids that the 1/id law treats nearly alike
_MOST = 200  # counts are halved beyond it
_REMEDY = "restore it from a copy, or start again without it"


class _BitDecoder:
    """Reads the range coder's bits. Raises CorruptedCode when asked for more bits than the bytes can hold."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at, self._range = data, _STATE_BYTES, _TOP
        self._value = int.from_bytes(data[:_STATE_BYTES].ljust(_STATE_BYTES, b"\0"), "big")

    def bit(self, probability: int) -> int:
        """The next bit, which is 1 with `probability` / _ONE."""
        bound = (self._range >> 16) * probability
        if self._value < bound:
            self._range, bit = bound, 1
        else:
            self._value -= bound
            self._range -= bound
            bit = 0
        while self._range < _BOTTOM:
            if self._at >= len(self._data) + _STATE_BYTES:
                raise CorruptedCode("the token ids end too early", _REMEDY)
            self._value = self._value << 8 | (self._data[self._at] if self._at < len(self._data) else 0)
            self._at += 1
            self._range <<= 8
        return bit

    def finish(self) -> None:
        """Raise CorruptedCode when bytes are left over."""
        if self._at < len(self._data):
            raise CorruptedCode("bytes follow the token ids", _REMEDY)


def read_counted(data: bytes, count: int) -> list[int]:
    """`count` ids from the bits' width (a byte) and the coded bits. Raises CorruptedCode."""
    if not data or not 1 <= data[0] <= 32:
        raise CorruptedCode("the header of the token ids contradicts itself", _REMEDY)
    width, coder = data[0], _BitDecoder(data[1:])
    counts: tuple[dict[int, list[int]], ...] = ({}, {}, {})
    found: list[int] = []
    before = last = 0
    for _ in range(count):
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
                    chance = (16 * cell[1] * _ONE + leaning * chance) // (16 * (cell[0] + cell[1]) + leaning)
                cells.append(cell)
            bit = coder.bit(min(max(chance, _FLOOR), _ONE - _FLOOR))
            for cell in cells:
                cell[bit] += 1
                if cell[bit] > _MOST:
                    cell[0], cell[1] = (cell[0] + 1) // 2, (cell[1] + 1) // 2
            node = 2 * node + bit
        before, last = last, node - (1 << width)
        found.append(last)
    coder.finish()
    return found


def _prior(low: int, half: int) -> int:
    """Chance of the upper half of the ids low .. low + 2 half under the 1/id law, out of _ONE."""
    start, split, end = (_logarithm(_FIRST_IDS + low + offset) for offset in (0, half, 2 * half))
    return (end - split) * _ONE // (end - start) if end > start else _ONE // 2


def _logarithm(value: int) -> int:
    """2^16 log2(value), straight between powers of two, so that every machine finds the same."""
    power = value.bit_length() - 1
    return (power << 16) + ((value - (1 << power) << 16) >> power)
