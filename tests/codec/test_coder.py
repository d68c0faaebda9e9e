"""The codec through the Triton coder (interpreted without a GPU) and through the numpy coder: the same bytes, the same integers, the same refusals."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
import torch

from codec.codec import KvCodec
from codec.container import _CRC, _SPAN
from codec.errors import CorruptedCode
from codec.pack import CodecPack
from kernels.dispatch import VARIABLE

pytest.importorskip("triton")

SIZES = (5, 9)
STEP = 8.0
"""Keeps few components: the interpreter takes milliseconds a symbol."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Chooses the coder: "triton" or "reference" (the numpy one)."""
    return lambda name: monkeypatch.setenv(VARIABLE, name)


def test_one_format(source, pack: CodecPack, through: Callable[[str], None]) -> None:
    codec = KvCodec(pack, DEVICE)
    rows = [source.draw(n) for n in SIZES]
    rows[0][2] *= 300  # some integers must be escapes
    rows[1][7, ::5] = -2e3
    levels = [None, torch.arange(9) - 4]
    pairs = [(r, torch.zeros_like(r)) for r in rows]
    zeros = [z for _, z in pairs]
    through("reference")
    want = codec.encode_many(pairs, STEP, levels)
    through("triton")
    assert codec.encode_many(pairs, STEP, levels) == want
    assert max(_SPAN.unpack_from(span)[8] for span in want) > 20, "no escapes"
    got = codec.decode_many(want, zeros)
    through("reference")
    for ours, theirs in zip(got, codec.decode_many(want, zeros), strict=True):
        assert torch.equal(ours, theirs)


def test_alterations_that_keep_the_checksum_are_refused(source, pack: CodecPack, through: Callable[[str], None]) -> None:
    codec, rows = KvCodec(pack, DEVICE), source.draw(SIZES[0])
    rows[2] *= 300
    zero = torch.zeros_like(rows)
    through("reference")
    span = codec.encode(rows, zero, STEP)
    through("triton")
    head, words = _SPAN.size, _SPAN.unpack_from(span)[7]
    assert words > 8
    for at, bit in ((head, 4), (head + 4 + 2 * (words // 2), 128)):  # the state, a word
        altered = bytearray(span)
        altered[at] ^= bit
        altered[-4:] = _CRC.pack(zlib.crc32(altered[:-4]))
        with pytest.raises(CorruptedCode):
            codec.decode(bytes(altered), zero)
    # words moved out of the header's count: the coder runs out of them
    fields = list(_SPAN.unpack_from(span))
    fields[7], fields[8] = words - 6, fields[8] + 12
    body = _SPAN.pack(*fields) + span[head:-4]
    with pytest.raises(CorruptedCode):
        codec.decode(body + _CRC.pack(zlib.crc32(body)), zero)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_decode_each_others_spans(source, pack: CodecPack) -> None:
    rows = source.draw(640)
    guess = rows + 0.3 * source.draw(640)
    pairs = list(zip(rows.split(64), guess.split(64), strict=True))
    codecs = [KvCodec(pack), KvCodec(pack, "cuda")]
    for quality in ("near-lossless", "balanced", "tiny"):
        coded = [codec.encode_many(pairs, quality) for codec in codecs]
        sizes = [sum(map(len, spans)) for spans in coded]
        assert abs(sizes[0] - sizes[1]) < 0.001 * sizes[0]
        for spans in coded:
            first, second = (torch.cat(codec.decode_many(spans, [p for _, p in pairs])).cpu() for codec in codecs)
            assert (first - second).norm() < 1e-5 * first.norm()
        alone = codecs[1].decode(coded[1][3], pairs[3][1])
        assert torch.equal(alone, codecs[1].decode_many(coded[1], [p for _, p in pairs])[3])
