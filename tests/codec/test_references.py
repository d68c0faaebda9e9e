"""Spans coded against earlier ones: shorter, as good, and refused where what they refer to is not there."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch

from codec.codec import Earlier, KvCodec, SpanSetting
from codec.container import Reference, read_span
from codec.errors import BadInput, CorruptedCode
from codec.match import Match
from codec.pages import PageDecoder
from codec.references import Lent, SourceComponents, chain_depths, choose_scales, scaled_sources, span_references
from tests.codec.test_pages import DEVICE, FEATURES, predictor_of

BOUNDS = [(4, 64), (64, 128), (128, 192), (192, 200)]


def test_matches_are_cut_at_spans_and_refer_before_them():
    found = span_references([Match(60, 8, 100), Match(192, 190, 8)], BOUNDS)
    assert found == [
        [],  # tokens 60 to 64 would refer into their own span
        [Reference(0, 52, 52, 16)],
        [Reference(0, 32, 52, 16)],
        [Reference(0, 2, 2, 16)],
    ]
    assert span_references([Match(70, 0, 20)], BOUNDS)[1] == [], "the first tokens are never coded"


def test_depths_and_references_to_nothing():
    references = [[], [Reference(0, 60, 60, 16)], [Reference(5, 3, 64, 8)], [Reference(0, 4, 180, 16)]]
    with pytest.raises(CorruptedCode, match="not there"):
        chain_depths([[Reference(0, 1, 1, 16)]], BOUNDS[:1])
    assert chain_depths(references, BOUNDS) == [0, 1, 2, 1]


def altered(data: bytes, at: int, value: bytes) -> bytes:
    body = bytearray(data[:-4])
    body[at : at + len(value)] = value
    return bytes(body) + struct.pack("<I", zlib.crc32(bytes(body)))


def coded(codec: KvCodec, rows: torch.Tensor, guess: torch.Tensor, settings: list[SpanSetting], repeats: list[list[Reference]]):
    """Spans of 32 tokens, one after the other, each against what `repeats` says."""
    bounds = [(n, n + 32) for n in range(0, len(rows), 32)]
    sources, spans = SourceComponents(codec, [], bounds), []
    for (start, end), setting, references in zip(bounds, settings, repeats, strict=True):
        earlier = None
        if references:
            parts = [sources.take(start + r.first - r.distance, start + r.first - r.distance + r.length) for r in references]
            earlier = Earlier(references, scaled_sources(references, parts, end - start))
        pair = (rows[start:end], guess[start:end])
        data, components = codec.encode_with_components([pair], [setting], None, [earlier], [True])
        sources.put(start, components[0], int(bool(references)))
        spans.append(data[0])
    return bounds, spans, sources


@pytest.fixture(scope="module")
def repeated(make_source):
    """Rows of five spans, the later ones much like the first."""
    source = make_source(0, rows_seed=1)
    generator = torch.Generator().manual_seed(8)
    first = source.draw(32)
    rows = torch.cat([first] + [first + 0.1 * source.draw(32) for _ in range(4)])
    return rows.to(DEVICE), torch.randn(len(rows), FEATURES, generator=generator).to(DEVICE)


REPEATS = [[], [Reference(0, 32, 32, 16)], [Reference(0, 10, 64, 16), Reference(12, 20, 32, 12)], [], [Reference(4, 28, 64, 16)]]


@pytest.mark.parametrize("mixed", [False, True])
def test_what_refers_decodes_as_it_was_coded(completed_pack, repeated, mixed):
    codec, (rows, inputs) = KvCodec(completed_pack, DEVICE), repeated
    predictor = predictor_of(codec.layout.dim)
    guess = predictor.predict(inputs, None)
    settings = [SpanSetting(0.5, fallback=True)] * 5
    if mixed:
        settings = [SpanSetting(s, f) for s, f in ((0.5, True), (1.0, False), (0.25, True), (0.5, False), (2.0, False))]
    bounds, spans, sources = coded(codec, guess + rows, guess, settings, REPEATS)
    plain = coded(codec, guess + rows, guess, settings, [[]] * 5)[1]
    assert sum(map(len, spans)) < (0.9 if mixed else 0.75) * sum(map(len, plain))
    assert [read_span(span).references for span in spans] == [r or () for r in REPEATS]
    pages = PageDecoder(codec, predictor, torch.float32)
    found, without = torch.zeros_like(rows), torch.zeros_like(rows)
    for tokens, part in pages.rows(pages.start(spans), inputs, None):
        found[tokens] = part
    for tokens, part in pages.rows(pages.start(plain), inputs, None):
        without[tokens] = part
    expected = [codec.weighting.unwhiten(codec.transform.expand(sources.take(a, b), codec.layout.dim)) for a, b in bounds]
    assert torch.allclose(found, torch.cat(expected) + guess, atol=2e-3)
    error, plain_error = (float((x - guess - rows).pow(2).sum()) for x in (found, without))
    assert error < 1.15 * plain_error
    again = SourceComponents(codec, [(a, b, data) for (a, b), data in zip(bounds, spans, strict=True)])
    assert torch.allclose(again.take(70, 150), sources.take(70, 150), atol=1e-5) and again.depth(64, 96) == 2


@pytest.mark.parametrize("num_lent", [0, 2])
def test_a_part_decodes_with_what_it_refers_to_alone(codec, repeated, num_lent):
    """As in the whole, whether the spans it refers to are among the codes or lent; through others, too."""
    rows, inputs = (x.cpu() for x in repeated)
    predictor = predictor_of(codec.layout.dim, "cpu")
    guess = predictor.predict(inputs, None)
    bounds, spans, _ = coded(codec, guess + rows, guess, [SpanSetting(0.5)] * 5, REPEATS)
    pages, codes = PageDecoder(codec, predictor, torch.float32), codec.read(spans)
    whole = Lent(codes[num_lent:], codes[:num_lent])
    begin = bounds[num_lent][0]

    def decoded(some: Lent, start: int, end: int) -> torch.Tensor:
        found = torch.zeros(end - start, codec.layout.dim)
        for tokens, part in pages.rows(pages.begin(some.codes, some.lent), inputs[start:end], None):
            found[tokens] = part
        return found

    expected = decoded(whole, begin, len(rows))
    # the last span refers to the third, that to both before it, the second to the first
    needed = {(0, 1): 0, (1, 2): 1, (2, 3): 2, (3, 4): 0, (4, 5): 3, (2, 5): 2, (3, 5): 3}
    for (first, last), count in needed.items():
        if first < num_lent:
            continue
        part = whole.part(first - num_lent, last - num_lent)
        assert (len(part.codes), len(part.lent)) == (last - first, count)
        start, end = bounds[first][0], bounds[last - 1][1]
        assert torch.allclose(decoded(part, start, end), expected[start - begin : end - begin], atol=1e-5)
    with pytest.raises(CorruptedCode, match="not there"):
        Lent(codes[1:], []).part(0, 1)


def test_spans_are_refused_without_what_they_refer_to(codec, repeated):
    rows, inputs = repeated
    rows, guess = rows.cpu(), predictor_of(codec.layout.dim, "cpu").predict(inputs.cpu(), None)
    _, spans, _ = coded(codec, guess + rows, guess, [SpanSetting(0.5)] * 5, REPEATS)
    pages = PageDecoder(codec, predictor_of(codec.layout.dim, "cpu"), torch.float32)
    with pytest.raises(CorruptedCode, match="not there"):
        list(pages.rows(pages.start(spans[1:2]), inputs[32:64].cpu(), None))
    with pytest.raises(BadInput, match="refers"):
        codec.decode_many(spans[1:2], [guess[32:64]])


@pytest.mark.parametrize(
    "references", [[Reference(0, 33, 40, 16)], [Reference(0, 4, 3, 16)], [Reference(0, 4, 9, 0)], [Reference(3, 2, 9, 16)] * 2]
)
def test_references_that_do_not_fit_are_refused(codec, repeated, references):
    rows = repeated[0][:32].cpu()
    earlier = Earlier(references, torch.zeros(32, 4))
    with pytest.raises(BadInput, match="references"):
        codec.encode_with_components([(rows, torch.zeros_like(rows))], 1.0, None, [earlier])


def test_damaged_references_with_a_right_checksum_are_named(codec, repeated):
    rows = repeated[0][:32].cpu()
    earlier = Earlier([Reference(0, 32, 40, 16)], torch.zeros(32, 4))
    data = codec.encode_with_components([(rows, torch.zeros_like(rows))], 1.0, None, [earlier])[0][0]
    at = data.index(struct.pack("<HHHIB", 1, 0, 32, 40, 16))
    assert read_span(data).references == [Reference(0, 32, 40, 16)]
    for place, value in (
        (at, b"\0\0"),
        (at, b"\xff\xff"),
        (at + 4, b"\x21"),
        (at + 6, b"\x05"),
        (at + 10, b"\x11"),
        (2, b"\1"),
        (2, b"\0"),
    ):
        with pytest.raises(CorruptedCode):
            read_span(altered(data, place, value))


def test_a_scale_is_chosen_by_its_bits():
    generator = torch.Generator().manual_seed(0)
    source = 8 * torch.randn(16, 40, generator=generator)
    c = torch.cat([0.75 * source[:8], torch.randn(8, 40, generator=generator)]) + 0.1
    references = [Reference(0, 8, 100, 16), Reference(8, 8, 100, 16)]
    kept, sources = choose_scales(c, references, [source[:8], source[8:]], 1.0)
    assert kept == [Reference(0, 8, 100, 12)] and torch.equal(sources[0], source[:8])
    assert choose_scales(c, references[1:], [source[8:]], 1.0) == ([], [])
    assert np.isclose(float(scaled_sources(kept, sources, 16).sum()), 0.75 * float(source[:8].sum()), rtol=1e-4)
