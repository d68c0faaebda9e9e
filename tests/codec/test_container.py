"""Section files and spans: exact round trips; every kind of damage has its named error."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.container import (
    FILE_VERSION,
    SPAN_VERSION,
    SpanCode,
    read_sections,
    read_span,
    read_varint_lists,
    read_varints,
    write_sections,
    write_span,
    write_varints,
)
from codec.errors import CodecError, CorruptedCode, ForeignCode, NewerCode, TruncatedCode

FIXED = settings(max_examples=150, deadline=None, derandomize=True)
SECTIONS = [("META", b"{}"), ("TOKS", bytes(range(50))), ("SPAN", b""), ("SPAN", b"abc" * 40)]


@given(st.lists(st.tuples(st.sampled_from(["META", "TOKS", "SPAN"]), st.binary(max_size=200)), max_size=8))
@FIXED
def test_sections_round_trip(sections: list[tuple[str, bytes]]) -> None:
    assert read_sections(write_sections(sections)) == sections


@given(st.integers(0, 10**6))
@FIXED
def test_any_flipped_bit_is_named(bit: int) -> None:
    data = bytearray(write_sections(SECTIONS))
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CodecError):
        read_sections(bytes(data))


def test_every_truncation_is_named() -> None:
    data = write_sections(SECTIONS)
    for size in range(1, len(data)):
        with pytest.raises(TruncatedCode):
            read_sections(data[:size])
    with pytest.raises(ForeignCode):
        read_sections(b"")
    with pytest.raises(CorruptedCode):
        read_sections(data + b"x")


def test_foreign_and_newer_files() -> None:
    with pytest.raises(ForeignCode):
        read_sections(b"PK\x03\x04" + bytes(100))
    with pytest.raises(NewerCode, match=str(FILE_VERSION + 1)):
        read_sections(write_sections(SECTIONS, version=FILE_VERSION + 1))


def span(levels: bool = True) -> bytes:
    code = SpanCode(
        1.0,
        4,
        10,
        7,
        0xABCD,
        np.arange(3, dtype=np.uint32) + 70_000,
        np.arange(20, dtype=np.uint16),
        np.arange(10, dtype=np.int8) - 5 if levels else None,
        write_varints(np.array([3, 300])),
    )
    return write_span(code)


@pytest.mark.parametrize("levels", [True, False])
def test_span_round_trip(levels: bool) -> None:
    code = read_span(span(levels))
    assert (code.num_tokens, code.num_components, code.tokens_per_lane, code.pack_tag) == (10, 7, 4, 0xABCD)
    assert code.words.tolist() == list(range(20)) and code.states[2] == 70_002
    assert (code.levels is not None) == levels and read_varints(code.escapes, 2).tolist() == [3, 300]


def test_every_span_truncation_and_bit_flip_is_named() -> None:
    data = span()
    for size in range(len(data)):
        with pytest.raises((TruncatedCode, ForeignCode)) as raised:
            read_span(data[:size])
        assert size < 2 or raised.type is TruncatedCode
    for bit in range(8 * len(data)):
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CodecError):
            read_span(bytes(altered))


def test_newer_span() -> None:
    data = bytearray(span())
    data[2] = SPAN_VERSION + 1
    with pytest.raises(NewerCode):
        read_span(bytes(data))


@pytest.mark.parametrize("field,value", [(8, struct.pack("<f", float("nan"))), (8, struct.pack("<f", -1.0)), (4, b"\0"), (3, b"\7")])
def test_a_contradictory_header_with_a_right_checksum_is_refused(field: int, value: bytes) -> None:
    data = bytearray(span()[:-4])
    data[field : field + len(value)] = value
    data += struct.pack("<I", zlib.crc32(bytes(data)))
    with pytest.raises(CodecError):
        read_span(bytes(data))


def test_lists_of_varints() -> None:
    lists = [[], [3, 300], [], [1 << 30], [0] * 5, []]
    parts = [write_varints(np.array(values, np.int64)) for values in lists]
    values, counts = read_varint_lists(parts)
    assert values.tolist() == [3, 300, 1 << 30, 0, 0, 0, 0, 0] and counts.tolist() == [0, 2, 0, 1, 5, 0]
    assert [part.tolist() for part in read_varint_lists([b"", b""])] == [[], [0, 0]]
    cut = parts[3][:-1], parts[3][-1:]  # an integer may not go on in the next list
    with pytest.raises(CorruptedCode):
        read_varint_lists([parts[1], *cut])


@given(st.lists(st.integers(0, 2**40), max_size=20))
@FIXED
def test_varints(values: list[int]) -> None:
    data = write_varints(np.array(values, np.int64))
    assert read_varints(data, len(values)).tolist() == values
    for wrong in (len(values) + 1, len(values) - 1):
        with pytest.raises(CorruptedCode):
            read_varints(data, wrong)


@given(st.binary(max_size=60), st.integers(0, 10))
@FIXED
def test_random_bytes_are_never_accepted_as_something_else(data: bytes, count: int) -> None:
    for read in (read_span, read_sections):
        with pytest.raises(CodecError):
            read(data)
    try:
        values = read_varints(data, count)
    except CodecError:
        return
    assert len(values) == count
