"""Token ids as bytes: what comes back, what it takes, and frames that are damaged, old or lie about their size."""

from __future__ import annotations

import base64
import random
import struct
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.errors import BadInput, CorruptedCode
from codec.token_ids import COMPRESSED, COUNTED, MODELLED, checksum, decode_ids, decompress, encode_ids, num_ids

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 70_000, 1, 4, 1, 5] * 5
FRAME = encode_ids(IDS)
COUNTED_FRAME = base64.b85decode("0YLx&0E-bYTM_=}IoxO{fV))RV{XX")  # IDS as written before zstandard was used
HEAD = struct.Struct("<BII")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, (1 << 32) - 1) | st.integers(0, 1 << 17) | st.integers(0, 50), max_size=150))
def test_any_ids_come_back(ids):
    frame = encode_ids(ids)
    assert decode_ids(frame) == ids and num_ids(frame) == len(ids)
    assert encode_ids(np.array(ids, np.int64)) == frame


@pytest.mark.parametrize("largest, width", [(0, 2), (65_535, 2), (65_536, 3), ((1 << 24) - 1, 3), (1 << 24, 4)])
def test_ids_take_no_more_bytes_than_they_need(largest, width):
    frame = encode_ids([largest, 0, largest])
    assert frame[HEAD.size] == width and decode_ids(frame) == [largest, 0, largest]


def test_a_hundred_thousand_ids_take_milliseconds(takes_less):
    draw = random.Random(1)
    phrases = [[int(49_152 ** draw.random()) for _ in range(draw.randint(2, 9))] for _ in range(4000)]
    ids = [token for _ in range(20_000) for token in draw.choice(phrases)][:100_000]
    takes_less(0.2, lambda: decode_ids(encode_ids(ids)))  # some 20 ms, and ten times that on a bad day
    frame = encode_ids(ids)
    assert decode_ids(frame) == ids and len(frame) < 1.2 * len(ids)


@pytest.mark.parametrize("ids", [[-1], [1 << 32]])
def test_numbers_that_are_no_ids(ids):
    with pytest.raises(BadInput):
        encode_ids(ids)


# --- damage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [FRAME, COUNTED_FRAME])
def test_altered_frames_are_found_out(frame):
    for at in range(len(frame)):
        for change in (1, 16, 128, 255):
            data = bytearray(frame)
            data[at] ^= change
            try:
                found = decode_ids(bytes(data), 1 << 16)
            except CorruptedCode:
                continue
            assert found == IDS, "a bit that zstandard does not look at changes nothing"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from([COUNTED, COMPRESSED]), st.binary(max_size=60), st.integers(0, 1 << 28))
def test_rubbish_ends_soon(coder, data, count):
    with pytest.raises(CorruptedCode):
        decode_ids(HEAD.pack(coder, count, zlib.crc32(b"other")) + data)


@pytest.mark.parametrize("frame", [*(FRAME[:n] for n in range(len(FRAME))), FRAME + bytes(8), b"\7" + FRAME[1:], b"\1" + FRAME[1:]])
def test_cut_and_foreign_frames(frame):
    with pytest.raises(CorruptedCode):
        decode_ids(frame)


def test_a_frame_of_zeros_reserves_no_more_than_its_count_allows(monkeypatch):
    """72 kB may stand for 2 GiB of zeros: the claim is compared with the count, and the count with the caller's bound, before anything is unpacked."""
    stream = zstandard.ZstdCompressor(level=1).compressobj(size=1 << 31)
    bomb = b"".join([*(stream.compress(bytes(1 << 24)) for _ in range(128)), stream.flush()])
    assert len(bomb) < 1 << 18 and zstandard.frame_content_size(bomb) == 1 << 31
    monkeypatch.setattr(zstandard, "ZstdDecompressor", None)
    for count, bound in ((1 << 29, 4096), (4096, 4096), (0, 4096)):
        with pytest.raises(CorruptedCode, match="claim"):
            decode_ids(HEAD.pack(COMPRESSED, count, 0) + b"\4" + bomb, bound)


def test_sizes_that_a_frame_must_state():
    with pytest.raises(CorruptedCode, match="claim"):
        decompress(zstandard.ZstdCompressor(write_content_size=False).compress(b"abc"), 100, "the ids")
    with pytest.raises(CorruptedCode, match="ids are damaged"):
        decompress(b"no frame", 100, "the ids")
    packed = zstandard.ZstdCompressor().compress(b"abc")
    assert decompress(packed, 3, "the ids") == decompress(packed, 3, "the ids", exact=True) == b"abc"
    for size, exact in ((2, False), (4, True)):
        with pytest.raises(CorruptedCode, match="claim 3 bytes"):
            decompress(packed, size, "the ids", exact=exact)


# --- older frames -------------------------------------------------------------------------------------------------------


def test_counted_ids_of_older_files_are_read():
    assert COUNTED_FRAME[0] == COUNTED and decode_ids(COUNTED_FRAME) == IDS
    assert decode_ids(base64.b85decode("0RR9100000009")) == []


def test_ids_that_a_model_coded_end_in_a_named_error():
    with pytest.raises(CorruptedCode, match="coded with a model's predictions"):
        decode_ids(HEAD.pack(MODELLED, 5, checksum([1] * 5)) + b"anything")
