"""Coded spans into pool pages: the same KV as decode_many, rotated and scattered; nothing else touched."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from codec.codec import Earlier, KvCodec, SpanSetting
from codec.container import Reference, read_span, write_span, write_varints
from codec.errors import BadInput, CorruptedCode
from codec.pack import CodecPack
from codec.pages import LayerRows, PageDecoder
from codec.predictor.dense import DensePredictor
from codec.predictor.features import FeatureSpec
from kernels.rope.reference import apply_rope

SIZES, PAGE, FEATURES = (40, 7, 20), 8, 21
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def predictor_of(dim: int, device: str = DEVICE, scale: float = 0.3) -> DensePredictor:
    """A full-rank predictor of FEATURES features with random weights."""
    generator = torch.Generator().manual_seed(3)
    weight, mu = (scale * torch.randn(*shape, generator=generator).to(device) for shape in ((FEATURES, dim), (dim,)))
    zeros, ones = torch.zeros(FEATURES, device=device), torch.ones(FEATURES, device=device)
    return DensePredictor(FeatureSpec((0,), ()), weight, zeros, ones, mu, FEATURES)


def pages_of(
    rows: torch.Tensor, like: torch.Tensor, slots: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, first_layer: int
) -> torch.Tensor:
    """The pool after a plain write of rows float32 [T, D]."""
    kv, flat = like.clone(), rows.unflatten(1, (like.shape[0] - first_layer, 2, *like.shape[4:]))
    for layer in range(first_layer, like.shape[0]):
        kv[layer].flatten(1, 2)[0, slots] = apply_rope(flat[:, layer - first_layer, 0], cos, sin).to(like.dtype)
        kv[layer].flatten(1, 2)[1, slots] = flat[:, layer - first_layer, 1].to(like.dtype)
    return kv


@pytest.mark.parametrize("kind", ["global", "per_layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_pages_hold_what_decode_many_gives(source, make_pack, dtype: torch.dtype, kind: str) -> None:
    codec = KvCodec(make_pack(source, kind), DEVICE)
    layout, generator = codec.layout, torch.Generator().manual_seed(4)
    rows = source.draw(sum(SIZES)).to(DEVICE)
    predictor, inputs = predictor_of(layout.dim), torch.randn(len(rows), FEATURES, generator=generator).to(DEVICE)
    guess = predictor.predict(inputs, None)
    pairs = list(zip((rows + guess).split(SIZES), guess.split(SIZES), strict=True))
    spans = [codec.encode(*pair, quality) for pair, quality in zip(pairs, ("tiny", "near-lossless", "tiny"), strict=True)]
    kv = torch.randn(layout.num_layers, 2, 11, PAGE, layout.num_kv_heads, layout.head_dim, generator=generator).to(DEVICE, dtype)
    slots = torch.randperm(11 * PAGE, generator=generator)[: len(rows)].to(DEVICE)
    angle = (torch.rand(len(rows), layout.head_dim // 2, generator=generator) * 60).to(DEVICE)
    cos, sin = angle.cos(), angle.sin()
    decoded = torch.cat(codec.decode_many(spans, [g for _, g in pairs]))
    want = pages_of(decoded, kv, slots, cos, sin, layout.first_layer)
    got, pages = kv.clone(), PageDecoder(codec, predictor, dtype)
    parts = pages.start(spans)
    pages.write_pages(parts, inputs, None, got, slots, cos, sin, layout.first_layer)
    pages.check(parts)
    found = torch.zeros_like(decoded)
    for tokens, part in pages.rows(pages.start(spans), inputs, None):
        found[tokens] = part
    assert float((found - decoded).norm() / decoded.norm()) < (1e-5 if dtype == torch.float32 else 4e-3)
    assert float((got.float() - want.float()).norm() / want.float().norm()) < (1e-5 if dtype == torch.float32 else 4e-3)
    free = torch.ones(11 * PAGE, dtype=torch.bool, device=DEVICE)
    free[slots] = False
    assert torch.equal(got.flatten(2, 3)[:, :, free], kv.flatten(2, 3)[:, :, free])
    assert torch.equal(got[: layout.first_layer], kv[: layout.first_layer])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_spans_in_a_fallback_basis_lie_between_others(completed_pack, source, dtype: torch.dtype) -> None:
    """Spans of three settings in turns: each is decoded with those like it, and every token lands in its own place."""
    codec, generator = KvCodec(completed_pack, DEVICE), torch.Generator().manual_seed(6)
    layout, sizes = codec.layout, (9, 30, 4, 17)
    rows = source.draw(sum(sizes)).to(DEVICE)
    predictor, inputs = predictor_of(layout.dim), torch.randn(len(rows), FEATURES, generator=generator).to(DEVICE)
    guess = predictor.predict(inputs, None)
    settings = [SpanSetting(0.5), SpanSetting(0.5, True), SpanSetting(0.5), SpanSetting(0.25, True)]
    spans = codec.encode_many(list(zip((rows + guess).split(sizes), guess.split(sizes), strict=True)), settings)
    decoded = torch.cat(codec.decode_many(spans, guess.split(sizes)))
    kv = torch.randn(layout.num_layers, 2, 9, PAGE, layout.num_kv_heads, layout.head_dim, generator=generator).to(DEVICE, dtype)
    slots = torch.randperm(9 * PAGE, generator=generator)[: len(rows)].to(DEVICE)
    angle = (torch.rand(len(rows), layout.head_dim // 2, generator=generator) * 60).to(DEVICE)
    want = pages_of(decoded, kv, slots, angle.cos(), angle.sin(), layout.first_layer)
    pages = PageDecoder(codec, predictor, dtype)
    parts = pages.start(spans)
    assert [part.starts for part in parts] == [[0, 39], [9], [43]]
    pages.write_pages(parts, inputs, None, kv, slots, angle.cos(), angle.sin(), layout.first_layer)
    pages.check(parts)
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    assert float((kv.float() - want.float()).norm() / want.float().norm()) < bound
    found = torch.zeros_like(decoded)
    for tokens, part in pages.rows(pages.start(spans), inputs, None):
        found[tokens] = part
    assert float((found - decoded).norm() / decoded.norm()) < bound


@pytest.mark.parametrize("referring", [False, True])
def test_pages_of_spans_with_escapes_chunk_by_chunk(completed_pack, source, monkeypatch: pytest.MonkeyPatch, referring: bool) -> None:
    """Chunks end within runs of a setting; integers far beyond their limits; where a span refers to another, components come from elsewhere."""
    monkeypatch.setattr("codec.pages.PAGE_TOKENS", 50)
    codec, generator, sizes = KvCodec(completed_pack, DEVICE), torch.Generator().manual_seed(9), (32,) * 5
    layout, rows = codec.layout, source.draw(160).to(DEVICE)
    rows[torch.randint(160, (60,), generator=generator), torch.randint(layout.dim, (60,), generator=generator)] *= 300
    predictor, inputs = predictor_of(layout.dim), torch.randn(160, FEATURES, generator=generator).to(DEVICE)
    guess = predictor.predict(inputs, None)
    pairs = list(zip((rows + guess).split(sizes), guess.split(sizes), strict=True))
    settings = [SpanSetting(s, f) for s, f in ((0.5, True), (1.0, False), (0.5, True), (0.5, False), (0.25, True))]
    spans = codec.encode_many(pairs, settings)
    if referring:
        earlier = [None, None, None, Earlier([Reference(0, 20, 96, 16)], codec.components(*pairs[0], 6)), None]
        spans[3] = codec.encode_with_components(pairs[3:4], settings[3:4], None, earlier[3:4])[0][0]
    assert sum(len(read_span(span).escapes) for span in spans) > 100
    kv = torch.randn(layout.num_layers, 2, 21, PAGE, layout.num_kv_heads, layout.head_dim, generator=generator).to(DEVICE)
    slots = torch.randperm(21 * PAGE, generator=generator)[:160].to(DEVICE)
    cos, sin = (part(torch.rand(160, layout.head_dim // 2, generator=generator) * 60).to(DEVICE) for part in (torch.cos, torch.sin))
    pages, want = PageDecoder(codec, predictor, torch.float32), torch.zeros_like(rows)
    for tokens, part in pages.rows(pages.start(spans), inputs, None):
        want[tokens] = part
    parts, got = pages.start(spans), kv.clone()
    pages.write_pages(parts, inputs, None, got, slots, cos, sin, layout.first_layer)
    pages.check(parts)
    expected = pages_of(want, kv, slots, cos, sin, layout.first_layer)
    assert float((got - expected).norm() / expected.norm()) < 1e-5


def test_escapes_that_do_not_fit_are_found_by_the_check(codec: KvCodec, source) -> None:
    rows = source.draw(32)
    rows[5:9] *= 500
    span = read_span(codec.encode(rows, torch.zeros_like(rows), "tiny"))
    layout = codec.layout
    kv = torch.zeros(layout.num_layers, 2, 4, PAGE, layout.num_kv_heads, layout.head_dim)
    pages, angles = PageDecoder(codec, predictor_of(layout.dim, "cpu"), torch.float32), torch.ones(32, layout.head_dim // 2)
    more = replace(span, escapes=span.escapes + write_varints(np.array([3])))
    parts = pages.start([write_span(more)])
    pages.write_pages(parts, torch.zeros(32, FEATURES), None, kv, torch.arange(32), angles, angles, layout.first_layer)
    with pytest.raises(CorruptedCode):
        pages.check(parts)
    parts = pages.start([write_span(replace(span, escapes=span.escapes[:-1] + bytes([span.escapes[-1] | 128])))])
    with pytest.raises(CorruptedCode, match="malformed"):
        pages.write_pages(parts, torch.zeros(32, FEATURES), None, kv, torch.arange(32), angles, angles, layout.first_layer)


def test_a_token_gives_the_same_bits_whatever_is_decoded_behind_it(codec: KvCodec, source) -> None:
    rows, generator = source.draw(300), torch.Generator().manual_seed(5)
    predictor, inputs = predictor_of(codec.layout.dim, "cpu"), torch.randn(300, FEATURES, generator=generator)
    spans = codec.encode_many([(part, torch.zeros_like(part)) for part in rows.split(64)], "balanced")
    pages = PageDecoder(codec, predictor, torch.bfloat16)
    whole = torch.cat([part for _, part in pages.rows(pages.start(spans), inputs, None)])
    (_, first), *none = pages.rows(pages.start(spans[:3]), inputs[:192], None)
    assert not none and len(whole) == 300 and torch.equal(whole[:192], first)


def test_layers_give_the_same_bits_whatever_lies_between_their_tokens(completed_pack, source) -> None:
    """Spans of three settings in turns, more tokens than a block of the product has rows: as every span alone."""
    codec, generator = KvCodec(completed_pack, "cpu"), torch.Generator().manual_seed(8)
    settings = [SpanSetting(0.5), SpanSetting(0.25), SpanSetting(0.5, True)] * 4
    rows, sizes = source.draw(59 * 12), [59] * 12
    predictor, inputs = predictor_of(codec.layout.dim, "cpu"), torch.randn(len(rows), FEATURES, generator=generator)
    spans = codec.encode_many([(part, torch.zeros_like(part)) for part in rows.split(sizes)], settings)
    pages = PageDecoder(codec, predictor, torch.bfloat16)

    def layers(first: int, last: int) -> LayerRows:
        parts = pages.start(spans[first:last])
        return pages.layers(parts, pages.chunks(parts), inputs[59 * first : 59 * last], None)

    whole = layers(0, 12)
    for n in range(whole.num_layers):
        found = whole.layer(n)
        assert bool(found.isfinite().all())
        for number, part in enumerate(found.split(59)):
            assert torch.equal(part, layers(number, number + 1).layer(n))


def test_rounding_adds_little_to_the_codes_own_error(codec: KvCodec, source) -> None:
    rows = source.draw(64)
    zero, layout = torch.zeros_like(rows), codec.layout
    span = codec.encode(rows, zero, "near-lossless")
    kv = torch.zeros(layout.num_layers, 2, 8, PAGE, layout.num_kv_heads, layout.head_dim, dtype=torch.bfloat16)
    slots, cos = torch.arange(64), torch.ones(64, layout.head_dim // 2)
    own = codec.decode(span, zero)
    pages = PageDecoder(codec, predictor_of(layout.dim, "cpu", scale=0.0), torch.bfloat16)
    pages.write_pages(pages.start([span]), torch.zeros(64, FEATURES), None, kv, slots, cos, torch.zeros_like(cos), layout.first_layer)
    back = kv[layout.first_layer :].flatten(2, 3).permute(2, 0, 1, 3, 4).reshape(64, -1).float()
    errors = [float(codec.weighting.whiten(x - rows).pow(2).mean()) for x in (own, back)]
    assert errors[1] < 1.01 * errors[0]


def test_refusals(codec: KvCodec, source, pack: CodecPack) -> None:
    rows = source.draw(8)
    zero, layout = torch.zeros_like(rows), codec.layout
    span = codec.encode(rows, zero, "tiny")
    kv = torch.zeros(layout.num_layers, 2, 1, PAGE, layout.num_kv_heads, layout.head_dim)
    slots, angles = torch.arange(8), torch.ones(8, layout.head_dim // 2)
    pages, inputs = PageDecoder(codec, predictor_of(layout.dim, "cpu"), torch.float32), torch.zeros(8, FEATURES)
    parts = pages.start([span])
    with pytest.raises(BadInput, match="4 slots"):
        pages.write_pages(parts, inputs, None, kv, slots[:4], angles, angles, 1)
    with pytest.raises(BadInput, match="features of 4 tokens"):
        pages.write_pages(parts, inputs[:4], None, kv, slots, angles, angles, 1)
    with pytest.raises(BadInput, match="features of 4 tokens"):
        list(pages.rows(parts, inputs[:4], None))
    with pytest.raises(BadInput, match="do not fit"):
        pages.write_pages(parts, inputs, None, kv, slots, angles, angles, 0)
    with pytest.raises(CorruptedCode):
        pages.start([span[:-9] + bytes([span[-9] ^ 1]) + span[-8:]])
    assert not kv.any()
