"""Calibration of tiny random pairs: what it gathers, that packs work, and that text and options are checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy import stats

from codec.codec import KvCodec
from codec.pack import CodecPack
from codec.predictor.dense import DensePredictor, load_predictor
from codec.predictor.features import FeatureSpec, join_features
from codec.spec import NUM_SINKS, QUALITIES
from engine.calibrate.complete import complete
from engine.calibrate.corpus import documents, library_texts, read_texts, text_files
from engine.calibrate.divergence import DocumentDivergence, curve_of, measure_divergence, student_quantile
from engine.calibrate.recipe import CalibrationOptions, calibrate, quick_pack
from engine.calibrate.stream import PairStream, QueryStatistics, block_covariances, rotate_heads
from engine.errors import InvalidOption
from engine.model.decoder import forward_reserved


@pytest.fixture(scope="module")
def target(random_decoder):
    return random_decoder(0, vocab_size=300)


@pytest.fixture(scope="module")
def draft(random_decoder):
    return random_decoder(1, vocab_size=300)


@pytest.fixture(scope="module")
def docs(target) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, target.config.vocab_size, (48,), generator=generator).tolist() for _ in range(40)]


def test_the_stream_returns_what_one_document_gives_alone(target, draft, docs) -> None:
    stream = PairStream(target, draft, FeatureSpec((1, 2), (0, 1)))
    together = stream.run(docs[:3])
    assert together.lengths == [48 - NUM_SINKS] * 3
    sequence = target.new_pool(2).new_sequence()
    forward_reserved(target, torch.tensor(docs[1]), [sequence], [48])
    truth = target.read_kv(sequence, NUM_SINKS, 48)
    rows = slice(48 - NUM_SINKS, 2 * (48 - NUM_SINKS))
    torch.testing.assert_close(together.y[rows], truth, atol=1e-4, rtol=1e-3)
    out = forward_reserved(draft, torch.tensor(docs[1]), [draft.new_pool(2).new_sequence()], [48], taps=(1, 2))
    own = forward_reserved(target, torch.tensor(docs[1]), [target.new_pool(2).new_sequence()], [48], taps=(0, 1))
    target_rows = torch.stack([own.taps[0], own.taps[1]], 1)[NUM_SINKS:]
    torch.testing.assert_close(target_rows[:, 0], target.embed(torch.tensor(docs[1]))[NUM_SINKS:])
    expected = join_features(torch.stack([out.taps[1], out.taps[2]], 1)[NUM_SINKS:], target_rows)
    torch.testing.assert_close(together.features[rows], expected, atol=1e-4, rtol=1e-3)


def test_query_statistics_and_weights(target, docs) -> None:
    stream, queries = PairStream(target, None, FeatureSpec(()), 0), QueryStatistics(stride=1)
    batch = stream.run(docs[:6], queries)
    layout = stream.layout
    weighting = queries.weighting(target, layout, block_covariances(batch.y, layout.head_dim))
    product = weighting.sensitivity_sqrt @ weighting.inverse
    torch.testing.assert_close(product, torch.eye(layout.head_dim).expand_as(product), atol=1e-2, rtol=1e-2)
    spread = weighting.whiten(batch.y - batch.y.mean(0)).pow(2).mean()
    torch.testing.assert_close(spread, torch.tensor(1.0), atol=1e-3, rtol=1e-3)
    # turning a query keeps its length: the moments' traces are the queries' mean squares, wherever the queries were turned to
    lengths: list[torch.Tensor] = []
    for document in docs[:6]:
        sequence = target.new_pool(2).new_sequence()

        def observe(layer: int, q: torch.Tensor, stream: torch.Tensor) -> None:
            if layer == 1:
                lengths.append(q[NUM_SINKS:].float().pow(2).sum(-1))

        forward_reserved(target, torch.tensor(document), [sequence], [48], observe=observe)
    trace = (queries.moments[1] / queries.counts[1]).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(trace, torch.cat(lengths).mean(0), rtol=1e-3, atol=1e-3)


def test_queries_are_turned_to_where_a_key_meets_them(target) -> None:
    """(R_i q) . (R_j k) is (R_(i-j) q) . k: the scores of rotated queries and keys, from queries turned by the distance alone."""
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, target.config.head_dim, generator=generator)
    cos, sin = target.rope.slice(0, 20)
    turn = lambda x, at: rotate_heads(x, cos[at : at + 1], sin[at : at + 1])  # noqa: E731
    torch.testing.assert_close((turn(q, 17) * turn(k, 5)).sum(), (turn(q, 12) * k).sum(), atol=1e-4, rtol=1e-4)


FULL_PACKS = [
    (1, {"rank": 24}),
    (0, {"rank": 24, "weighting": "attention"}),
    (0, {"rank": 24, "transform": "per_layer", "weighting": "unit"}),
    (1, {"predictor": "dense"}),
    (-1, {"predictor": "dense"}),
    (-1, {"rank": 24}),
    (0, {"predictor": "dense", "level_strength": 1.0}),
]


@pytest.mark.parametrize("recomputed,options", FULL_PACKS)
def test_full_pack(target, draft, docs, tmp_path: Path, recomputed: int, options: dict) -> None:
    lines: list[str] = []
    draft = None if recomputed == 1 else draft  # -1: a draft, and a layer of the target run again beside it
    recomputed = abs(recomputed)
    chosen = CalibrationOptions(held_out_tokens=400, tokens_per_batch=200, budget=8.0, **options)
    pack = calibrate(target, draft, docs, recomputed_layers=recomputed, options=chosen, fingerprints={"target": "t"}, log=lines.append)
    assert pack.predictor_settings["target_taps"] == ([0, 1] if draft and recomputed else [0])
    assert pack.layout.first_layer == recomputed and pack.info["tokens"] > 1000 and len(lines) > 3
    bits = [pack.info["ideal_bits_per_element"][q] for q in QUALITIES]
    assert bits == sorted(bits, reverse=True) and bits[-1] > 0
    pack.save(tmp_path / "p")
    pack = CodecPack.load(tmp_path / "p")
    predictor = load_predictor(pack.predictor, pack.predictor_settings)
    stream = PairStream(target, draft, predictor.spec, recomputed)
    batch = stream.run(docs[:2])
    prediction = predictor.predict_features(batch.features)
    assert (batch.y - prediction).pow(2).sum() < 0.8 * (batch.y - predictor.mu).pow(2).sum()
    assert isinstance(predictor, DensePredictor) == (options.get("predictor") == "dense")
    codec = KvCodec(pack)
    decoded = codec.decode(codec.encode(batch.y, prediction, "near-lossless"), prediction)
    error, residual = (codec.weighting.whiten(x - batch.y).pow(2).mean() for x in (decoded, prediction))
    # a better prediction leaves residuals nearer to the step, of which less can be coded away
    assert error < 0.6**2 / 6 and error < (0.4 if isinstance(predictor, DensePredictor) else 0.3) * residual


@pytest.mark.parametrize("recomputed", [0, 1])
def test_quick_pack(target, draft, byte_tokenizer, recomputed: int) -> None:
    lines: list[str] = []
    pack = quick_pack(
        target,
        None if recomputed else draft,
        byte_tokenizer(),
        recomputed_layers=recomputed,
        num_tokens=500,
        context=64,
        rank=16,
        log=lines.append,
    )
    assert "held-out R2 of keys" in lines[-1] and pack.kind == "per_layer"
    assert set(pack.fingerprints) == {"text"}


def test_texts(tmp_path: Path, byte_tokenizer) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("hello " * 200)
    (tmp_path / "sub" / "b.md").write_text("world " * 200)
    (tmp_path / "c.bin").write_bytes(bytes(range(256)) * 10)
    (tmp_path / ".hidden").write_text("secret")
    files = text_files([tmp_path])
    assert [f.name for f in files] == ["a.txt", "b.md"]
    assert list(read_texts(files, 1)) == list(read_texts(files, 1))
    docs, digest = documents(read_texts(files), byte_tokenizer(), 10_000, 100, per_text=2)
    assert [len(d) for d in docs] == [100] * 4 and digest == documents(read_texts(files), byte_tokenizer(), 10_000, 100, per_text=2)[1]
    for bad in (["/no/such/place"], [tmp_path / "c.bin"]):
        with pytest.raises(InvalidOption):
            text_files(bad)
    with pytest.raises(InvalidOption, match="too short"):
        documents(["ab"], byte_tokenizer(), 100, 50)
    first = next(iter(library_texts()))
    assert len(first) > 1000 and first == next(iter(library_texts()))


def test_options_are_checked(target, docs) -> None:
    with pytest.raises(InvalidOption):
        calibrate(target, None, docs, recomputed_layers=1, options=CalibrationOptions(weighting="none"))


def test_a_pack_states_what_distortion_does_to_its_target(target, draft, docs) -> None:
    """The curve rises, and what a setting is said to cause is what it causes on other documents."""
    options = CalibrationOptions(
        held_out_tokens=400, tokens_per_batch=200, budget=8.0, predictor="dense", weighting="attention", level_strength=0.0
    )
    pack = calibrate(target, draft, docs[:30], options=options, log=lambda _: None)
    assert pack.curve is not None and pack.info["fallback_components"] == pack.layout.dim
    bits = [pack.info["promised_bits_per_element"][q] for q in QUALITIES]
    assert bits == sorted(bits, reverse=True) and bits[-1] > 0
    stream = PairStream(target, draft, load_predictor(pack.predictor, pack.predictor_settings).spec)
    other = measure_divergence(stream, pack, [[document] for document in docs[30:]], 10_000)
    assert other is not None
    for distortion in (0.02, 0.05, 0.1):
        assert other.divergence_of(distortion) == pytest.approx(pack.curve.divergence_of(distortion), rel=0.5)
    assert measure_divergence(stream, pack, [[docs[0][:20]]], 100) is None, "too short to be cut"


POINTS = [(0.01, 0.02), (0.02, 0.04)]


def document_of(factor: float) -> DocumentDivergence:
    """One that diverges by so much times its distortion, twice over, beside rounding."""
    return DocumentDivergence([(x, 0.001 + y * factor) for x, y in POINTS], 0.001)


def test_a_curve_is_of_kinds_of_text_and_not_of_documents() -> None:
    """What a kind's documents scatter by is no spread of kinds, and tells how well their mean is known."""
    factors = torch.linspace(0.5, 1.5, 11)
    curve, scattered = (curve_of([[document_of(f - own), document_of(f + own)] for f in factors.tolist()]) for own in (0.0, 0.09))
    assert curve is not None and curve.rounding == pytest.approx(0.001) and curve.distortion == pytest.approx((0.01, 0.02))
    spread = (float((10 * factors.var() + 4 * 0.25**2) / 14) * (1 + 1 / 11)) ** 0.5
    wanted = 1 + stats.t.ppf(0.9, 14) * spread
    assert curve.divergence == pytest.approx((0.001 + 0.02 * wanted, 0.001 + 0.04 * wanted), rel=0.001)
    assert scattered is not None and scattered.divergence == pytest.approx(curve.divergence, rel=0.02)
    assert scattered.divergence < curve.divergence, "what documents scatter by is taken off the spread"
    one = curve_of([[document_of(1.0)], [DocumentDivergence([(2 * x, 0.001 + 2 * y) for x, y in POINTS], 0.001)]])
    two = curve_of([[document_of(1.0)], [document_of(1.0)]])
    assert one is not None and two is not None
    assert one.divergence_of(0.02) == pytest.approx(two.divergence_of(0.02), rel=0.001), "kinds are compared at the same distortion"
    assert curve_of([]) is None and curve_of([[DocumentDivergence([(0.0, 0.0)] * 2, 0.0)]]) is None


def test_fewer_kinds_promise_less() -> None:
    """Of one kind the spread is that of other texts; kinds that agree are believed the more the more there are."""
    bounds = [curve_of([[document_of(1.0)] * 3] * count) for count in (1, 2, 8, 40)]
    found = [curve.divergence_of(0.01) for curve in bounds if curve is not None]
    assert found == sorted(found, reverse=True) and found[0] == pytest.approx(
        0.001 + 0.02 * (1 + stats.t.ppf(0.9, 4) * 0.25 * 2**0.5), rel=0.01
    )
    assert 0.021 < found[-1] < 0.0235


@pytest.mark.parametrize("count", [4, 8])
def test_nine_of_ten_other_kinds_stay_below_the_curve(count) -> None:
    """Kinds that scatter by a quarter, their documents by .4: the sample's own quantile is passed by more of them."""
    generator = torch.Generator().manual_seed(count)
    draws = 1000
    kinds = 1 + 0.25 * torch.randn(draws, count + 1, generator=generator)
    measured = (kinds[:, :count, None] * (1 + 0.4 * torch.randn(draws, count, 5, generator=generator))).clamp_min(0.01).tolist()
    curves = [curve_of([[document_of(factor) for factor in own] for own in given]) for given in measured]
    bounds = torch.tensor([(curve.divergence_of(0.01) - 0.001) / 0.02 for curve in curves if curve is not None])
    share = float((kinds[:, count] < bounds).float().mean())
    assert len(bounds) == draws and 0.87 < share < 0.94
    quantile = torch.tensor(measured).mean(-1).quantile(0.9, dim=1)
    assert float((kinds[:, count] < quantile).float().mean()) < share - 0.02


@pytest.mark.parametrize("freedom", [4, 5, 7, 11, 19, 100])
def test_students_quantile(freedom) -> None:
    assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.9, freedom), rel=0.001)


def test_a_pack_without_a_fallback_basis_is_completed(target, draft, docs, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("engine.calibrate.recipe.FALLBACK_SHARE", 0.0)
    options = CalibrationOptions(held_out_tokens=400, tokens_per_batch=200, budget=8.0, rank=16, weighting="attention", level_strength=0.0)
    pack = calibrate(target, draft, docs[:20], options=options, log=lambda _: None)
    assert pack.transform.fallback is None and pack.version == 2
    made = complete(target, draft, pack, docs[20:30], curve_kinds=[docs[30:35], docs[35:]], curve_tokens=400, log=lambda _: None)
    assert made.version == 3 and made.curve is not None and made.digest != pack.digest and pack.transform.fallback is None
    assert all(torch.equal(made.predictor[name], tensor) for name, tensor in pack.predictor.items())
    assert torch.equal(made.transform.basis, pack.transform.basis) and torch.equal(made.stored["table.freqs"], pack.stored["table.freqs"])
    assert made.info["fallback_components"] == made.transform.num_components - made.transform.num_rows == pack.layout.dim
    again = complete(target, draft, made, docs[20:30], curve_kinds=[[d] for d in docs[:10]], curve_tokens=400, log=lambda _: None)
    assert again.curve not in (None, made.curve) and again.digest == made.digest, "files that were coded before stay readable"
    again.save(tmp_path / "pack")
    loaded = CodecPack.load(tmp_path / "pack")
    assert loaded.curve == again.curve and loaded.later == again.later and loaded.digest == made.digest
    with pytest.raises(InvalidOption, match="no divergence curve"):
        complete(target, draft, pack, docs[:4], curve_kinds=[[docs[0][:20]]], log=lambda _: None)
