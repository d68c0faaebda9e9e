"""A binary range coder (Martin 1979) in exact integers, and bits whose probability is learned as they are coded.

Encoder and decoder share one interface, `code(bit, probability) -> bit`: the decoder ignores the bit it is given. A coding procedure written once
against it therefore both writes and reads, and the two cannot come apart.
"""

from __future__ import annotations

from codec.errors import CorruptedCode

ONE = 1 << 16  # a probability is an integer out of ONE, kept within [FLOOR, ONE - FLOOR]
FLOOR = 24
_TOP = 1 << 56
_BOTTOM = 1 << 48
_STATE_BYTES = 7
_REMEDY = "restore it from a copy, or start again without it"


class BitEncoder:
    """Turns bits into bytes; `finish` returns them."""

    def __init__(self) -> None:
        self._low, self._range, self._out = 0, _TOP, bytearray()

    def code(self, bit: int, probability: int) -> int:
        """Code a bit that is 1 with `probability` / ONE; returns it."""
        bound = (self._range >> 16) * probability
        if bit:
            self._range = bound
        else:
            self._low += bound
            self._range -= bound
        while self._range < _BOTTOM:
            self._carry()
            self._out.append(self._low >> 48)
            self._low = (self._low & (_BOTTOM - 1)) << 8
            self._range <<= 8
        return bit

    def _carry(self) -> None:
        if self._low >= _TOP:
            self._low -= _TOP
            at = len(self._out) - 1
            while self._out[at] == 255:
                self._out[at] = 0
                at -= 1
            self._out[at] += 1

    def finish(self) -> bytes:
        """The bytes; as few as tell the last bits (the decoder reads zeros behind them)."""
        for kept in range(_STATE_BYTES + 1):
            unit = 1 << 8 * (_STATE_BYTES - kept)
            value = -(-self._low // unit) * unit
            if value < self._low + self._range:
                break
        self._low = value
        self._carry()
        return bytes(self._out) + self._low.to_bytes(_STATE_BYTES, "big")[:kept]


class BitDecoder:
    """Reads what BitEncoder wrote. Raises CorruptedCode when asked for more bits than the bytes can hold."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at, self._range = data, _STATE_BYTES, _TOP
        self._value = int.from_bytes(data[:_STATE_BYTES].ljust(_STATE_BYTES, b"\0"), "big")

    def code(self, bit: int, probability: int) -> int:
        """The next bit, which is 1 with `probability` / ONE."""
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


BitCoder = BitEncoder | BitDecoder


class Bit:
    """A bit whose probability follows what was coded: the mean of what came, then of the last `memory` or so.

    probability: the first guess, out of ONE; weight: how many observations it counts for.
    """

    __slots__ = ("_memory", "_seen", "probability")

    def __init__(self, probability: int = ONE // 2, weight: int = 2, memory: int = 255) -> None:
        self.probability, self._seen, self._memory = min(max(probability, FLOOR), ONE - FLOOR), weight, memory

    def code(self, coder: BitCoder, bit: int) -> int:
        """Code the bit and learn from it."""
        bit = coder.code(bit, self.probability)
        self._seen = min(self._seen + 1, self._memory)
        self.probability = min(max(self.probability + (bit * ONE - self.probability) // self._seen, FLOOR), ONE - FLOOR)
        return bit
