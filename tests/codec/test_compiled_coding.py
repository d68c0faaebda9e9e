"""Compiled decoding against the plain coder: the same integers and components, bit for bit, the same refusals, and nothing written elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llvmlite")

from codec.choice import RateChoice
from codec.codec import KvCodec
from codec.coder import SpanCoder
from codec.errors import CorruptedCode
from codec.layouts import PackedKv
from codec.pack import CodecPack
from codec.pages import LayerRows, PageDecoder
from codec.quantize import quantise
from codec.rans import SpanStream, encode
from codec.rate import NUM_CLASSES, EntropyModel, class_scale
from kernels.cpu_decode import coded
from kernels.dispatch import VARIABLE

MODEL = EntropyModel.laplace()
CODER = SpanCoder(MODEL)
GUARD = 64


def guarded(made: list):
    """In place of `coded._new`: arrays of poison, between guards that must stay."""

    def new(shape, dtype):
        count, width = int(np.prod(shape)), np.dtype(dtype).itemsize
        memory = np.full(count * width + 2 * GUARD, 0x5A, np.uint8)
        made.append((memory, count * width))
        return memory[GUARD : GUARD + count * width].view(dtype).reshape(shape)

    return new


def untouched(made: list) -> bool:
    return all((memory[:GUARD] == 0x5A).all() and (memory[GUARD + size :] == 0x5A).all() for memory, size in made)


def drawn(seed: int, sizes, components: int):
    """Integers int32 [T, K] with escapes among them, classes [K], levels and gains [T]."""
    rng = np.random.default_rng(seed)
    base, tokens = rng.integers(0, NUM_CLASSES, components).astype(np.int32), sum(sizes)
    x = rng.laplace(size=(tokens, components)) * class_scale(base) / np.sqrt(2)
    q = (np.sign(x) * np.floor(np.abs(x) + 0.42)).astype(np.int32)
    q[rng.random(q.shape) < 0.02] += 4000
    levels = rng.integers(-8, 8, tokens) * (seed % 2)
    return torch.from_numpy(q), torch.from_numpy(base), torch.from_numpy(levels.astype(np.int32)), rng.integers(0, 16, tokens)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 19), min_size=1, max_size=4), st.integers(1, 30), st.integers(1, 8))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_streams_decode_to_the_same_integers(seed: int, sizes, components: int, per_lane: int) -> None:
    q, base, levels, gains = drawn(seed, sizes, components)
    made: list = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coded, "_new", guarded(made))
        patch.setenv(VARIABLE, "reference")
        streams = CODER.encode(q, base, levels, torch.from_numpy(gains.astype(np.uint8)), sizes, per_lane)
        wanted = CODER.decode(streams, base, levels, per_lane)
        assert not made, "the plain coder"
        patch.delenv(VARIABLE)
        again = CODER.encode(q, base, levels, torch.from_numpy(gains.astype(np.uint8)), sizes, per_lane)
        for own, plain in zip(again, streams, strict=True):
            assert own.num_tokens == plain.num_tokens and own.states.dtype == np.uint32 and own.words.dtype == np.uint16
            assert (own.states == plain.states).all() and own.words.tolist() == plain.words.tolist()
        assert untouched(made)
        found = CODER.decode(streams, base, levels, per_lane)
    assert made and untouched(made)
    assert found[0].dtype == torch.int16 and torch.equal(found[0].int(), wanted[0].int()) and torch.equal(found[1], wanted[1])


def test_a_damaged_stream_is_refused_and_reads_nothing_behind_its_words(monkeypatch) -> None:
    sizes, made = [7, 20, 13], []
    q, base, levels, gains = drawn(3, sizes, 25)
    streams = encode(CODER._numpy_tables, q.numpy(), (base[None] - 2 * levels[:, None]).clamp(0, NUM_CLASSES - 1).numpy(), gains, sizes, 4)
    monkeypatch.setattr(coded, "_new", guarded(made))
    rng, refused = np.random.default_rng(4), 0
    for trial in range(200):
        own = [SpanStream(s.num_tokens, s.states.copy(), s.words.copy()) for s in streams]
        hurt = own[trial % 3]
        if trial % 4 == 0:
            hurt.states[rng.integers(len(hurt.states))] ^= np.uint32(1 << rng.integers(32))
        elif trial % 4 == 1:
            hurt.words[rng.integers(len(hurt.words))] ^= np.uint16(1 << rng.integers(16))
        elif trial % 4 == 2:
            hurt.words = hurt.words[: rng.integers(len(hurt.words))]
        else:
            hurt.words = np.append(hurt.words, np.uint16(rng.integers(1 << 16)))
        with pytest.raises(CorruptedCode):
            CODER.decode(own, base, levels, 4)
        refused += 1
    assert refused == 200 and untouched(made)


@pytest.fixture
def spans(source, pack: CodecPack):
    """A codec, spans with escapes and step levels, and their codes."""
    codec = KvCodec(pack)
    rows = [source.draw(n) for n in (5, 9, 64)]
    rows[0][2] *= 300
    rows[1][7, ::5] = -2e3
    levels = [None, torch.arange(9) - 4, None]
    return codec, codec.encode_many([(r, torch.zeros_like(r)) for r in rows], 1.0, levels)


def test_components_are_the_same_bits(spans, monkeypatch) -> None:
    codec, coded_spans = spans
    made: list = []
    monkeypatch.setattr(coded, "_new", guarded(made))
    codes = codec.read(coded_spans)
    found = codec.entropy_decoded(codes)
    parts = [codec.components_of(found, first, last) for first, last in ((0, 3), (0, 1), (1, 3))]
    assert len(b"".join(found.escapes)) > 20, "no escapes"
    assert untouched(made) and len(made) == 3 + 3 * 3
    monkeypatch.setenv(VARIABLE, "reference")
    plain = codec.entropy_decoded(codes)
    wanted = codec.components_of(plain)
    assert len(made) == 12 and torch.equal(parts[0], wanted) and torch.equal(torch.cat(parts[1:]), wanted)


@pytest.mark.parametrize("escapes", [lambda data: data[:-1], lambda data: data + b"\1", lambda data: b"", lambda data: b"\xff" * 8 + b"\1"])
def test_escapes_that_do_not_fit_are_refused(spans, escapes, monkeypatch) -> None:
    codec, coded_spans = spans
    found = codec.entropy_decoded(codec.read(coded_spans))
    hurt = found._replace(escapes=[found.escapes[0], escapes(found.escapes[1]), found.escapes[2]])
    for name in ("", "reference"):
        monkeypatch.setenv(VARIABLE, name)
        with pytest.raises(CorruptedCode):
            codec.components_of(hurt._replace(q=hurt.q.clone()))


def layer_rows(heads: int, head_dim: int, with_rest: bool) -> tuple[LayerRows, tuple[torch.Tensor, torch.Tensor], torch.Generator]:
    """Two layers of 300 tokens that lie in several runs, and their angles."""
    generator = torch.Generator().manual_seed(heads)
    layout, depth, tokens = SimpleNamespace(num_kv_heads=heads, head_dim=head_dim, coded_layers=2), 64, 300
    dim = 2 * 2 * heads * head_dim

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    matrix = random(dim, depth).bfloat16().t()
    codec, predictor = SimpleNamespace(layout=layout, device=torch.device("cpu")), SimpleNamespace(mu=3 * random(dim))
    decoder = PageDecoder.__new__(PageDecoder)
    decoder.codec, decoder.predictor, decoder.dtype, decoder._matrix = codec, predictor, torch.bfloat16, matrix
    chunks = [
        (
            [((start, end), random(end - start, dim) if with_rest and start else None) for start, end in runs],
            random(count, depth).bfloat16(),
        )
        for runs, count in (([(0, 150), (290, 300)], 160), ([(150, 290)], 140))
    ]
    return LayerRows(decoder, tokens, chunks), (random(tokens, head_dim // 2), random(tokens, head_dim // 2)), generator


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 32), (3, 64), (2, 96)])
@pytest.mark.parametrize("with_rest", [False, True])
def test_layers_are_rotated_to_the_same_bits(heads: int, head_dim: int, with_rest: bool, monkeypatch) -> None:
    """Of chunks whose tokens lie in several runs, blocks and remainders; into places between others, which stay."""
    rows, angles, _ = layer_rows(heads, head_dim, with_rest)
    tokens = rows.tokens
    for n in (0, 1):
        made = []
        for name in ("", "reference"):
            monkeypatch.setenv(VARIABLE, name)
            whole = torch.full((tokens, 3, heads, head_dim), float("nan"), dtype=torch.bfloat16)
            rows.rotated(n, angles, whole[:, :2])
            assert bool(whole[:, 2].isnan().all())
            made.append(whole[:, :2].clone())
        assert torch.equal(*made)
        part = torch.empty(tokens, 2, 1, head_dim, dtype=torch.bfloat16)
        rows.rotated(n, angles, part, heads - 1, heads)
        assert torch.equal(part[:, :, 0], made[0][:, :, -1])
        wide = torch.empty(tokens, 2, heads, head_dim)
        rows.rotated(n, angles, wide)
        assert torch.equal(wide.bfloat16(), made[0])


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 32), (3, 64), (2, 96)])
@pytest.mark.parametrize("with_rest", [False, True])
def test_layers_go_into_pages_as_they_are_rotated(heads: int, head_dim: int, with_rest: bool) -> None:
    """As a layer at a time up to the rounding of a product of other rows and columns, in slots without any order; other slots stay."""
    rows, angles, generator = layer_rows(heads, head_dim, with_rest)
    kv = torch.full((3, 2, 7, 50, heads, head_dim), float("nan"), dtype=torch.bfloat16)
    slots = torch.randperm(350, generator=generator)[: rows.tokens]
    assert rows._decoder.writes_compiled(kv)
    rows.into_pages(angles, kv[1:], slots)
    taken = torch.zeros(350, dtype=torch.bool).index_fill_(0, slots, True)
    for n, layer in enumerate(kv[1:].flatten(2, 3)):
        wanted = torch.empty(rows.tokens, 2, heads, head_dim, dtype=torch.bfloat16)
        rows.rotated(n, angles, wanted)
        found = layer[:, slots].transpose(0, 1)
        assert float((found.float() - wanted.float()).norm()) < 0.004 * float(wanted.float().norm())
        assert bool(layer[:, ~taken].isnan().all())
    assert bool(kv[0].isnan().all())
    for wrong in (slots - slots.max() - 1, slots + 350, slots.int(), slots[1:]):
        with pytest.raises(ValueError, match="slots"):
            rows.into_pages(angles, kv[1:], wrong)


@pytest.mark.parametrize(("size", "heads", "width", "start", "end"), [(4, 2, 8, 2, 9), (16, 3, 64, 5, 48), (128, 1, 6, 0, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_pages_are_written_alike(size: int, heads: int, width: int, start: int, end: int, dtype, monkeypatch) -> None:
    """The same bits in all of the memory, what is not written included, from rows that lie apart."""
    generator, page_ids, made = torch.Generator().manual_seed(size), [3, 0, 4], []
    kv = torch.randn(end - start, 5, 2, heads, width, generator=generator).to(dtype)[:, 1:3]
    orders = [torch.randperm(size * width, generator=generator) for _ in (0, 1)]
    calls: list = []
    plain = coded.scatter
    monkeypatch.setattr(coded, "scatter", lambda *given: (calls.append(1), plain(*given)))
    for name in ("", "reference"):
        monkeypatch.setenv(VARIABLE, name)
        memory = [torch.full((5, heads, 2 * size, width), float("nan"), dtype=dtype) for _ in (0, 1)]
        packed = PackedKv(*([layer.chunk(2, 2)[half] for layer in memory] for half in (0, 1)), *orders)
        packed.write(page_ids, start, kv)
        assert torch.equal(packed.read(page_ids, start, end), kv.float())
        made.append(torch.stack(memory).view(torch.int16))
        assert len(calls) == 4, "compiled once, and not for the reference"
    assert torch.equal(*made)


def test_rows_that_do_not_fit_pages_are_refused() -> None:
    out, where, order = torch.zeros(2, 1, 4, 8, dtype=torch.bfloat16), np.zeros(3, np.int64), np.arange(32, dtype=np.int32)
    rows = torch.zeros(3, 1, 8, dtype=torch.bfloat16)
    coded.scatter(rows, where, where, order, out)
    for wrong in (
        (rows[:2], where, where, order, out),
        (rows, where, where, order[:31], out),
        (rows, where.astype(np.int32), where, order, out),
        (rows.float(), where, where, order, out.float()),
        (rows, where, where, order, out.transpose(2, 3).contiguous().transpose(2, 3)),
    ):
        with pytest.raises(ValueError):
            coded.scatter(*wrong)


def test_products_that_do_not_fit_are_refused() -> None:
    y, mu, angle = torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(64), torch.zeros(2, 16)
    out = torch.zeros(2, 2, 1, 32, dtype=torch.bfloat16)
    coded.rotated(y, mu, None, (angle, angle), out)
    for wrong in (
        (y.float(), mu, None, (angle, angle), out),
        (y, mu[:32], None, (angle, angle), out),
        (y, mu, torch.zeros(1, 64), (angle, angle), out),
        (y, mu, None, (angle[:1], angle), out),
        (y, mu, None, (angle, angle), out.transpose(1, 2).contiguous().transpose(1, 2)[:, :, :, ::2]),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            coded.rotated(*wrong)


def test_sizes_that_do_not_fit_are_refused() -> None:
    tables, own = CODER._span_tables, np.zeros((1, 3), np.int32)
    for states, sizes, classes in (
        (np.zeros(2, np.uint32), [4], own),
        (np.zeros(1, np.uint32), [0], own),
        (np.zeros(1, np.uint32), [4], own.repeat(2, 0)),
    ):
        with pytest.raises(ValueError):
            coded.rans_decode(tables, states, [np.zeros(1, np.uint16)], sizes, classes, 4)
    limits = coded.ComponentTables(np.zeros(1, np.int32), np.zeros((1, 4), np.float32))
    with pytest.raises(ValueError):
        coded.components(limits, np.zeros((2, 3), np.int16), own, np.zeros(1, np.uint8), np.ones(2, np.float32), 0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 40))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_choices_by_rate_are_the_plain_ones(seed: int, tokens: int, components: int) -> None:
    """Gains at both ends, escapes, tokens of zeros, numbers beyond every limit."""
    q, base, levels, _ = drawn(seed, [tokens], components)
    rng = np.random.default_rng(seed)
    x = q + torch.from_numpy(rng.uniform(-0.5, 0.5, q.shape) * (rng.random((tokens, 1)) < 0.8)).float()
    size = torch.from_numpy(2.0 ** rng.integers(-9, 9, (tokens, 1))).float()
    x, plain = x * size, RateChoice(MODEL)
    q = quantise(x)
    made: list = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coded, "_new", guarded(made))
        patch.setenv(VARIABLE, "reference")
        gains = plain.choose_gains(q, base, levels)
        wanted = plain.refine(x, q, base, levels, gains)
        assert not made, "the plain choices"
        patch.delenv(VARIABLE)
        assert torch.equal(plain.choose_gains(q, base, levels), gains)
        assert torch.equal(plain.refine(x, q, base, levels, gains), wanted)
        assert len(made) == 2 and untouched(made)


def test_compiled_choices_refuse_what_does_not_fit() -> None:
    q, base, levels, _ = drawn(3, [4], 5)
    tables, shifts, zeros = RateChoice(MODEL).price_tables, levels.numpy(), np.zeros((4, 16), np.int64)
    with pytest.raises(ValueError, match="costs of zeros"):
        coded.choose_gains(tables, q.numpy(), base.numpy(), shifts, zeros[:3], zeros, 4)
    with pytest.raises(ValueError, match="not those of the integers"):
        coded.refine(tables, q.numpy(), q.numpy(), base.numpy()[:3], shifts, np.zeros(4, np.uint8), 0.1)
