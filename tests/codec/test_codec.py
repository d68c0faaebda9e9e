"""KvCodec end to end on synthetic KV: error, length, damage, mixing of spans and qualities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.calibrate_tables import fit_entropy_model
from codec.codec import KvCodec, SpanSetting, tokens_per_lane
from codec.errors import BadInput, CodecError, PackMismatch, UnknownQuality
from codec.pack import CodecPack
from codec.spec import QUALITIES
from codec.transform import Transform


@pytest.mark.parametrize("kind,room", [("global", None), ("global", 0.8), ("per_layer", None)])
def test_error_and_length(make_source, make_pack, kind: str, room: float | None) -> None:
    source = make_source(3)
    codec = KvCodec(make_pack(source, kind, room))
    rows = source.draw(1024)
    prediction = rows + source.draw(1024) * 0.3
    pairs = list(zip(rows.split(64), prediction.split(64), strict=True))
    last_bytes, last_error = float("inf"), 0.0
    for quality, step in QUALITIES.items():
        spans = codec.encode_many(pairs, quality)
        decoded = torch.cat(codec.decode_many(spans, [p for _, p in pairs]))
        error = float(codec.weighting.whiten(decoded - rows).pow(2).mean())
        size, ideal = 8 * sum(map(len, spans)), codec.ideal_bits(pairs, quality)
        assert size < last_bytes and error > last_error
        assert error < step**2 / 8
        lanes = 1024 // tokens_per_lane(step)
        assert ideal < size < 1.02 * ideal + 32 * lanes + 8 * 36 * len(spans)
        last_bytes, last_error = size, error


def test_prediction_saves_bits(codec: KvCodec, source) -> None:
    rows = source.draw(256)
    blind = sum(map(len, codec.encode_many([(r, torch.zeros_like(r)) for r in rows.split(64)], "balanced")))
    guess = rows + 0.2 * source.draw(256)
    told = sum(map(len, codec.encode_many(list(zip(rows.split(64), guess.split(64), strict=True)), "balanced")))
    assert told < 0.7 * blind


@given(st.lists(st.integers(1, 70), min_size=1, max_size=5), st.sampled_from([*QUALITIES]), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_spans_decode_alone_as_together(codec: KvCodec, make_source, sizes: list[int], quality: str, seed: int) -> None:
    source = make_source(0, rows_seed=seed)
    rows = [source.draw(n) for n in sizes]
    zeros = [torch.zeros_like(r) for r in rows]
    spans = codec.encode_many(list(zip(rows, zeros, strict=True)), quality)
    together = codec.decode_many(spans, zeros)
    for span, zero, whole, row in zip(spans, zeros, together, rows, strict=True):
        torch.testing.assert_close(codec.decode(span, zero), whole, atol=1e-4, rtol=1e-4)
        assert codec.encode(row, zero, quality) == span


def test_qualities_mix_in_one_call(codec: KvCodec, source) -> None:
    rows = source.draw(64)
    zero = torch.zeros_like(rows)
    spans = [codec.encode(rows, zero, q) for q in QUALITIES]
    for span, decoded in zip(spans, codec.decode_many(spans, [zero] * len(spans)), strict=True):
        torch.testing.assert_close(decoded, codec.decode(span, zero), atol=1e-4, rtol=1e-4)


def test_products_of_many_spans_at_once(codec: KvCodec, source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codec.codec.PRODUCT_ROWS", 48)
    rows = [source.draw(n) for n in (64, 1, 30)]
    pairs = [(r, r + 0.3 * source.draw(len(r))) for r in rows]
    spans = codec.encode_many(pairs, "balanced")
    joined = KvCodec(codec.pack)
    joined._joined = True  # as on a GPU
    assert joined.ideal_bits(pairs, "balanced") == pytest.approx(codec.ideal_bits(pairs, "balanced"), rel=1e-3)
    guesses = [p for _, p in pairs]
    together = joined.decode_many(spans, guesses)
    for span, guess, whole, own in zip(spans, guesses, together, codec.decode_many(spans, guesses), strict=True):
        torch.testing.assert_close(whole, own, atol=1e-4, rtol=1e-4)
        assert torch.equal(joined.decode(span, guess), whole), "a span's bits do not depend on what is decoded beside it"


def test_a_fallback_basis_codes_what_the_rows_leave_over(completed_pack, source) -> None:
    codec = KvCodec(completed_pack)
    rows = source.draw(96)
    zero = torch.zeros_like(rows)
    pairs = list(zip(rows.split(32), zero.split(32), strict=True))
    error = {}
    for step, fallback in ((0.5, False), (0.5, True), (0.125, True)):
        setting = [SpanSetting(step, fallback)] * 3
        spans = codec.encode_many(pairs, setting)
        decoded = torch.cat(codec.decode_many(spans, [z for _, z in pairs]))
        torch.testing.assert_close(torch.cat(codec.requantised(pairs, setting)), decoded, atol=1e-4, rtol=1e-4)
        assert codec.ideal_bits(pairs, setting) < 8 * sum(map(len, spans))
        error[step, fallback] = float(codec.weighting.whiten(decoded - rows).pow(2).mean())
    assert error[0.5, True] < 0.5**2 / 6 and 2 * error[0.5, True] < error[0.5, False], "the rows alone leave a floor"
    assert error[0.125, True] < 0.15 * error[0.5, True]
    mixed = codec.encode_many(pairs, [SpanSetting(0.5), SpanSetting(0.25, True), SpanSetting(0.5)])
    assert [
        codec.encode_many([pair], [own])[0]
        for pair, own in zip(pairs, (SpanSetting(0.5), SpanSetting(0.25, True), SpanSetting(0.5)), strict=True)
    ] == mixed


def test_a_fallback_basis_is_complete(completed_pack, source) -> None:
    t = completed_pack.transform
    z = source.draw(20) @ torch.randn(completed_pack.layout.dim, completed_pack.layout.dim)  # of no kind that was fitted
    c = t.project(z, t.num_components)
    assert c.shape[1] == t.num_rows + completed_pack.layout.dim
    assert float((t.expand(c, z.shape[1]) - z).norm() / z.norm()) < 0.02, "eight bits a number"
    variance = t.variance[t.num_rows :]
    assert bool((variance[:-1] >= variance[1:]).all())


def test_token_levels_change_the_step(codec: KvCodec, source) -> None:
    rows = source.draw(64)
    zero = torch.zeros_like(rows)
    levels = torch.zeros(64, dtype=torch.int64)
    levels[::2] = -8
    plain, mixed = codec.encode(rows, zero, "tiny"), codec.encode(rows, zero, "tiny", levels)
    error = codec.weighting.whiten(codec.decode(mixed, zero) - rows).pow(2).mean(1)
    assert len(mixed) > len(plain) and error[::2].mean() < 0.5 * error[1::2].mean()


def test_extreme_values_are_codable(codec: KvCodec) -> None:
    rows = torch.zeros(3, codec.layout.dim)
    rows[1] = 1e5
    rows[2, ::7] = -3e4
    decoded = codec.decode(codec.encode(rows, torch.zeros_like(rows), "near-lossless"), torch.zeros_like(rows))
    weighted = codec.weighting.whiten(rows)
    kept = codec.transform.expand(codec.transform.project(weighted, codec.num_components(0.6)), codec.layout.dim)
    assert torch.isfinite(decoded).all()
    assert (codec.weighting.whiten(decoded) - kept).abs().max() < 1e-2 * kept.abs().max()


@pytest.mark.parametrize("kind", ["global", "per_layer"])
def test_a_pack_without_components_codes_what_is_predicted_exactly(source, pack: CodecPack, kind: str, tmp_path) -> None:
    """Nothing is left over, so a span holds its gains alone, and decodes to the prediction."""
    layout = pack.layout
    width, layer = (layout.dim, None) if kind == "global" else (layout.layer_dim, torch.zeros(0, dtype=torch.int64))
    transform, model = Transform(kind, torch.zeros(0, width), layer, torch.zeros(0)), fit_entropy_model(torch.zeros(9, 0), torch.zeros(0))
    CodecPack.build(layout, pack.weighting, transform, model, predictor={}, predictor_settings={}, fingerprints={}).save(
        tmp_path / "none.safetensors"
    )
    codec = KvCodec(CodecPack.load(tmp_path / "none.safetensors"))
    rows = source.draw(70)
    span = codec.encode(rows, rows, "balanced")
    assert torch.equal(codec.decode(span, rows), rows) and len(span) < 160
    assert torch.equal(codec.decode(span, rows + 1), rows + 1)


def test_refusals(codec: KvCodec, source, make_source, make_pack) -> None:
    rows = source.draw(8)
    zero = torch.zeros_like(rows)
    with pytest.raises(UnknownQuality, match="near-lossless"):
        codec.encode(rows, zero, "best")
    with pytest.raises(BadInput):
        codec.encode(rows[:, :-1], zero[:, :-1], "tiny")
    with pytest.raises(BadInput, match="NaN"):
        codec.encode(rows.clone().fill_(float("nan")), zero, "tiny")
    with pytest.raises(BadInput):
        codec.encode(rows[:0], zero[:0], "tiny")
    span = codec.encode(rows, zero, "tiny")
    for wrong in ([SpanSetting(1.0, True)], []):
        with pytest.raises(BadInput, match="settings do not fit"):
            codec.encode_many([(rows, zero)], wrong)
    with pytest.raises(BadInput):
        codec.decode(span, zero[:4])
    with pytest.raises(PackMismatch):
        KvCodec(make_pack(make_source(9))).decode(span, zero)


@given(st.integers(0, 10**6))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_damaged_spans_are_refused(codec: KvCodec, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.ones(5, codec.layout.dim)
    zero = torch.zeros_like(rows)
    span = bytearray(codec.encode(rows, zero, "tiny"))
    kind = seed % 4
    at = int(torch.randint(0, len(span), (1,), generator=generator))
    if kind == 0:
        span[at] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
    elif kind == 1:
        del span[at:]
    elif kind == 2:
        span[at:at] = b"\x5a"
    else:
        span = bytearray(torch.randint(0, 256, (at,), generator=generator).tolist())
    with pytest.raises(CodecError):
        codec.decode(bytes(span), zero)
