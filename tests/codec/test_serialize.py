"""The codec as a library: keys and values of any engine to bytes and back, out of pages of any order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from codec.codec import KvCodec
from codec.divergence import DivergenceCurve
from codec.errors import BadInput, CodecError, ForeignCode, PackMismatch, TruncatedCode, UnknownQuality
from codec.layouts import KeyRotation, PackedKv, PagedKv
from codec.pack import CodecPack
from codec.predictor.features import FeatureSpec
from codec.predictor.low_rank import Predictor
from codec.serialize import Features, KvSerializer, deserialize, serialize

DRAFT, TARGET, RANK, TOKENS, FIRST = 6, 5, 8, 150, 37
SPEC = FeatureSpec((1, 3), (0,))
ROTATION = KeyRotation(1.0 / 10_000 ** (torch.arange(8) / 8), factor=1.25)


@pytest.fixture(scope="module")
def own_pack(pack: CodecPack) -> CodecPack:
    """The synthetic pack with a predictor of two draft taps and the target's embeddings."""
    generator = torch.Generator().manual_seed(5)
    count, dim = SPEC.num_features(DRAFT, TARGET), pack.layout.dim
    down, up = torch.randn(count, RANK, generator=generator), 3 * torch.randn(RANK, dim, generator=generator)
    tensors, settings = Predictor.pack(SPEC, DRAFT, down, torch.zeros(RANK), up, torch.randn(dim, generator=generator))
    return replace(pack, predictor=tensors, predictor_settings=settings)


@pytest.fixture(scope="module")
def run(own_pack: CodecPack, make_source) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Features]:
    """Keys (rotated), values, positions and features of TOKENS tokens."""
    generator = torch.Generator().manual_seed(6)
    features = Features(torch.randn(TOKENS, 2, DRAFT, generator=generator), torch.randn(TOKENS, 1, TARGET, generator=generator))
    serializer = KvSerializer(own_pack, ROTATION)
    rows = serializer.predictor.predict(*serializer.inputs(features, TOKENS)) + make_source(0).draw(TOKENS)
    positions = torch.arange(FIRST, FIRST + TOKENS)
    keys, values = serializer.split(rows, positions).permute(2, 1, 0, 3, 4)
    return keys, values, positions, features


def error_of(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_a_run_comes_back_at_its_positions(own_pack: CodecPack, run) -> None:
    keys, values, positions, features = run
    data = serialize(*run[:3], features, own_pack, quality="near-lossless", rotation=ROTATION)
    again = deserialize(data, features, own_pack, rotation=ROTATION)
    assert len(data) < 0.5 * 2 * (keys.numel() + values.numel())  # of bf16
    assert torch.equal(again[2], positions) and error_of(again[0], keys) < 0.1 and error_of(again[1], values) < 0.1
    coarse = serialize(*run[:3], features, own_pack, quality="tiny", rotation=ROTATION)
    assert len(coarse) < len(data)
    # the same tokens anywhere else are the same code: keys are turned back before they are coded
    moved = positions + 1000
    turned = torch.stack([ROTATION.rotate(ROTATION.unrotate(layer, positions), moved) for layer in keys])
    other = KvSerializer(own_pack, ROTATION)
    found = other.deserialize(other.serialize(turned, values, moved, features, "near-lossless"), features)
    assert error_of(found[0], turned) < 0.1 and error_of(found[1], again[1]) < 1e-3


def test_a_codec_gives_the_same_spans(own_pack: CodecPack, run) -> None:
    keys, values, positions, features = run
    serializer, codec = KvSerializer(own_pack, ROTATION), KvCodec(own_pack)
    rows = serializer.join(torch.stack([keys, values], 2).transpose(0, 1), positions)
    guess = serializer.predictor.predict(*serializer.inputs(features, TOKENS))
    sizes = [64, 64, 22]
    want = codec.encode_many(list(zip(rows.split(sizes), guess.split(sizes), strict=True)), "balanced")
    spans = serializer.encode(rows, features, sizes, "balanced")
    assert spans == want
    part = serializer.decode(spans[1:], features.part(64, TOKENS))
    torch.testing.assert_close(part, torch.cat(codec.decode_many(spans[1:], list(guess.split(sizes)[1:]))), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quality", ["near-lossless", "balanced"])
def test_rows_come_layer_by_layer_and_head_by_head(own_pack: CodecPack, run, quality: str) -> None:
    keys, values, positions, features = run
    serializer, layout = KvSerializer(own_pack, ROTATION), own_pack.layout
    sizes = [64, 64, 22]
    rows = serializer.join(torch.stack([keys, values], 2).transpose(0, 1), positions)
    spans = serializer.encode(rows, features, sizes, quality)
    want = serializer.decode(spans, features).view(TOKENS, layout.coded_layers, 2, layout.num_kv_heads, layout.head_dim)
    parts = [features.part(0, 100), features.part(100, TOKENS)]
    found = serializer.decode_layers(serializer.pages.start(spans), parts)
    assert found.tokens == TOKENS and found.num_layers == layout.coded_layers
    torch.testing.assert_close(torch.stack([found.layer(n) for n in range(found.num_layers)], 1), want, rtol=1e-4, atol=1e-4)
    last = found.num_layers - 1
    for first, end in ((0, 1), (1, layout.num_kv_heads)):
        torch.testing.assert_close(found.layer(last, first, end), want[:, last, :, first:end], rtol=1e-4, atol=1e-4)
    with pytest.raises(BadInput):
        serializer.decode_layers(serializer.pages.start(spans), parts[:1])


def test_a_promised_quality_is_planned(own_pack: CodecPack, run) -> None:
    keys, values, positions, features = run
    curve = DivergenceCurve((0.001, 0.1, 1.0), (0.0001, 0.01, 0.1))
    promised = own_pack.with_info({"divergence": curve.as_info()})
    assert promised.curve is not None
    fixed, planned = (KvSerializer(p, ROTATION).serialize(keys, values, positions, features, "tiny") for p in (own_pack, promised))
    assert len(fixed) != len(planned)
    found = KvSerializer(promised, ROTATION).deserialize(planned, features)
    assert error_of(found[1], values) < 0.5


@pytest.mark.parametrize("heads_first", [False, True], ids=["NHD", "HND"])
@pytest.mark.parametrize("pair", [0, 1])
def test_pages_of_every_order_hold_the_same(pair: int, heads_first: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    layers, pages, size, heads, width = 3, 6, 4, 2, 8
    shape = [pages, *((heads, size) if heads_first else (size, heads)), width]
    shape.insert(pair, 2)
    paged = PagedKv.joined([torch.zeros(shape) for _ in range(layers)], pair=pair, heads_first=heads_first)
    ours = PagedKv.of_pool(torch.zeros(layers, 2, pages, size, heads, width))
    kv, page_ids = torch.randn(9, layers - 1, 2, heads, width, generator=generator), [5, 0, 3]
    for own in (paged, ours):
        own.write(page_ids, 2, kv, first_layer=1)
        assert torch.equal(own.read(page_ids, 2, 11, first_layer=1), kv)
        assert not own.read(page_ids, 0, 12, 0)[:, 0].any() and not own.keys[1][[1, 2, 4]].any() and not own.values[2][5, :2].any()
    assert torch.equal(ours.keys[2], paged.keys[2]) and (paged.num_layers, paged.num_pages, paged.page_size) == (layers, pages, size)


def test_pages_refuse_what_does_not_fit() -> None:
    paged = PagedKv.of_pool(torch.zeros(2, 2, 4, 4, 1, 8))
    for call in (
        lambda: paged.read([0], 0, 5),
        lambda: paged.read([4], 0, 1),
        lambda: paged.write([0], 0, torch.zeros(1, 3, 2, 1, 8)),
        lambda: paged.write([0], 0, torch.zeros(1, 2, 2, 1, 4)),
        lambda: PagedKv.of_pool(torch.zeros(2, 4, 4, 1, 8)),
        lambda: PagedKv.joined([torch.zeros(3, 2, 4, 1, 8)], pair=0, heads_first=False),
        lambda: PagedKv([], []),
        lambda: PagedKv([torch.zeros(2, 4, 1, 8)], [torch.zeros(3, 4, 1, 8)]),
    ):
        with pytest.raises(BadInput):
            call()


def test_bad_input_is_named(own_pack: CodecPack, run) -> None:
    keys, values, positions, features = run
    serializer = KvSerializer(own_pack, ROTATION)
    for bad in (
        (keys[:2], values, positions, features),
        (keys[:, :0], values[:, :0], positions[:0], features.part(0, 0)),
        (keys, values, positions.flip(0), features),
        (keys, values, positions - 100, features),
        (keys, values, positions, features.part(1, TOKENS)),
        (keys, values, positions, Features(None, features.target_rows)),
        (keys, values, positions, Features(features.draft_rows, None)),
        (keys * float("nan"), values, positions, features),
    ):
        with pytest.raises(CodecError):
            serializer.serialize(*bad)
    with pytest.raises(UnknownQuality):
        serializer.serialize(*run, quality="best")
    data = serializer.serialize(*run)
    with pytest.raises(BadInput):
        serializer.deserialize(data, features.part(0, TOKENS - 1))
    with pytest.raises(TruncatedCode):
        serializer.deserialize(data[:-1], features)
    with pytest.raises(ForeignCode):
        serializer.deserialize(b"nothing of ours", features)
    with pytest.raises(PackMismatch):
        KvSerializer(own_pack.with_info({"other": 1}), ROTATION).deserialize(data, features)


def test_no_flipped_bit_is_decoded(own_pack: CodecPack, run) -> None:
    keys, values, positions, features = run
    serializer = KvSerializer(own_pack, ROTATION)
    data = serializer.serialize(keys[:, :20], values[:, :20], positions[:20], features.part(0, 20), "tiny")
    generator = torch.Generator().manual_seed(8)
    for at in torch.randint(8 * len(data), (60,), generator=generator).tolist():
        damaged = bytearray(data)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(CodecError):
            serializer.deserialize(bytes(damaged), features.part(0, 20))


def test_packed_pages_hold_the_same() -> None:
    generator = torch.Generator().manual_seed(9)
    layers, pages, size, heads, width = 2, 5, 4, 2, 8
    order = torch.randperm(size * width, generator=generator)
    memory = [torch.zeros(pages, heads, 2 * size, width) for _ in range(layers)]
    halves = [[layer.chunk(2, 2)[half] for layer in memory] for half in (0, 1)]
    packed = PackedKv(*halves, order, torch.arange(size * width))
    kv, page_ids = torch.randn(7, layers, 2, heads, width, generator=generator), [3, 0, 4]
    packed.write(page_ids, 2, kv)
    assert torch.equal(packed.read(page_ids, 2, 9), kv) and not packed.read(page_ids, 0, 2).any() and not memory[0][[1, 2]].any()
    assert torch.equal(packed.read(page_ids, 4, 9, first_layer=1), kv[2:, 1:])
    # token 0 of page 0 is token 4 of the sequence: its channel c lies where the order says
    assert torch.equal(memory[1][0, 1, :size].flatten()[order[:width]], kv[2, 1, 0, 1])
    assert torch.equal(memory[1][0, 1, size], kv[2, 1, 1, 1])  # values as they are
    # a whole page at once, and a layer at a time
    write, more = packed.writer(page_ids, 4, 10), torch.randn(6, layers, 2, heads, width, generator=generator)
    for n in range(layers):
        write(n, more[:, n])
    assert torch.equal(packed.read(page_ids, 2, 10), torch.cat([kv[:2], more]))
    with pytest.raises(BadInput):
        packed.writer(page_ids, 4, 13)
    with pytest.raises(BadInput):
        PackedKv(*halves, order.clamp_min(1), order)
    with pytest.raises(BadInput):
        packed.write(page_ids, 0, kv[:, :, :1])
