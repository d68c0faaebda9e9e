"""Qualities by divergence: the curve, the distortion that is measured, and settings that hold it on text a pack was not made for."""

from __future__ import annotations

import math

import pytest
import torch

from codec import fidelity
from codec.codec import KvCodec, SpanSetting
from codec.divergence import DivergenceCurve
from codec.errors import BadInput, CorruptedCode, UnknownQuality
from codec.fidelity import Distortion, plan_spans
from codec.spans import curve_in
from codec.spec import QUALITIES, QUALITY_DIVERGENCE, divergence_of, step_of

# a distortion of 0.02 at `balanced`
CURVE = DivergenceCurve((0.01, 0.04), (0.005, 0.02))


def test_a_curve_is_straight_in_logarithms_and_goes_on() -> None:
    assert CURVE.divergence_of(0.02) == pytest.approx(0.01) and CURVE.distortion_of(0.01) == pytest.approx(0.02)
    assert CURVE.divergence_of(0.001) == pytest.approx(0.0005) and CURVE.divergence_of(4.0) == pytest.approx(2.0)
    assert CURVE.divergence_of(0.0) == 0.0
    steep = DivergenceCurve((1.0, 2.0), (1.0, 8.0))
    assert steep.divergence_of(0.5) == pytest.approx(0.25), "beyond what was measured a curve is no steeper than a square"
    for x in (0.3, 1.2, 5.0):
        assert steep.distortion_of(steep.divergence_of(x)) == pytest.approx(x)


def test_a_quality_may_be_a_promise(completed_pack, source) -> None:
    codec, rows = KvCodec(completed_pack), source.draw(32)
    for words, promise in ((("near-lossless", "kl0.005"), 0.005), (("kl0.001",), 0.001)):
        plans = [plan_spans(codec, CURVE, word, [(rows, torch.zeros_like(rows))], [None], [None]) for word in words]
        assert all(divergence_of(word) == promise for word in words) and all(plan.divergence == plans[0].divergence for plan in plans)
        assert 0 < plans[0].divergence[0] <= promise
    for word in ("kl", "kl0", "kl-1", "klinf", "klnan", "klx", "0.1", 0.5):
        assert divergence_of(word) is None
    with pytest.raises(UnknownQuality):
        step_of("kl0")


def test_what_rounding_adds_is_no_part_of_the_code() -> None:
    """In float32 the same distortion diverges by that much less; what is promised is promised of both together."""
    curve = DivergenceCurve((0.01, 0.04), (0.006, 0.021), 0.001)
    exact = curve.exact()
    assert exact.rounding == 0.0 and exact.divergence == pytest.approx(CURVE.divergence) and CURVE.exact() == CURVE
    for x in (0.002, 0.01, 0.03, 0.04):
        assert curve.divergence_of(x) == pytest.approx(exact.divergence_of(x) + 0.001)
        assert curve.distortion_of(curve.divergence_of(x)) == pytest.approx(x)
    assert curve_in(curve, torch.bfloat16) is curve and curve_in(curve, torch.float32) == exact and curve_in(None, torch.bfloat16) is None
    assert curve.divergence_of(0.0) == 0.001
    for promise in (0.0002, 0.001, 0.0012):  # rounding takes all of it, or nearly: the code takes a quarter beside
        assert exact.divergence_of(curve.distortion_of(promise)) == pytest.approx(promise / 4)
    assert DivergenceCurve.fitted([(0.1, 0.04), (0.2, 0.06), (0.3, 0.07)], 0.05) == DivergenceCurve((0.2, 0.3), (0.06, 0.07), 0.05)
    with pytest.raises(BadInput):
        DivergenceCurve((0.1, 0.2), (0.04, 0.06), 0.05)


def test_points_below_the_rounding_of_earlier_packs_are_passed_over() -> None:
    stated = {"distortion": [0.1, 0.2, 0.3], "divergence": [0.04, 0.06, 0.07], "rounding": 0.05}
    assert DivergenceCurve.from_info({"divergence": stated}) == DivergenceCurve((0.2, 0.3), (0.06, 0.07), 0.05)
    none = DivergenceCurve.from_info({"divergence": stated | {"rounding": 0.065}})
    assert none == DivergenceCurve((0.1, 0.2, 0.3), (0.04, 0.06, 0.07))


def test_points_that_do_not_rise_are_left_out() -> None:
    curve = DivergenceCurve.fitted([(0.2, 0.1), (0.1, 0.05), (0.3, 0.09), (0.0, 0.0), (0.4, 0.2)])
    assert curve == DivergenceCurve((0.1, 0.2, 0.4), (0.05, 0.1, 0.2))
    for points in ([], [(0.1, 0.1)], [(0.1, 0.2), (0.2, 0.1)]):
        with pytest.raises(BadInput):
            DivergenceCurve.fitted(points)


@pytest.mark.parametrize(
    "stated", [5, {}, {"distortion": [1, 2]}, {"distortion": [1, 2], "divergence": [2, 1]}, {"distortion": [1], "divergence": [1]}, [],
               {"distortion": [1, math.nan], "divergence": [1, 2]}, {"distortion": [1, 10**400], "divergence": [1, 2]},
               {"distortion": [1, 2], "divergence": [1, 2], "rounding": -1}, {"distortion": [1, 2], "divergence": [1, 2], "rounding": "0"}]
)  # fmt: skip
def test_a_pack_states_its_curve_or_is_refused(stated) -> None:
    assert DivergenceCurve.from_info({"divergence": CURVE.as_info()}) == CURVE and DivergenceCurve.from_info({}) is None
    assert CURVE.rounding is None, "what was not measured is not said to be 0"
    with pytest.raises(CorruptedCode):
        DivergenceCurve.from_info({"divergence": stated})


def measured(codec: KvCodec, pairs, levels, importance, step: float, fallback: bool) -> torch.Tensor:
    distortion = Distortion(codec, pairs, levels, importance)
    ones = torch.ones_like(distortion.sizes)
    count = codec.num_components(step, fallback=fallback)
    return distortion.measure(ones * step, (0 * ones).to(torch.int32), ones * count, fallback)


@pytest.mark.parametrize("fallback", [False, True])
def test_distortion_is_that_of_what_is_decoded(completed_pack, source, fallback: bool) -> None:
    """Without the choice by rate, which moves some integers, the measured distortion is the decoded rows' weighted error."""
    codec = KvCodec(completed_pack, rate_weight=0)
    codec.choice.reconstruct = lambda q, classes: q.float()  # type: ignore[method-assign]
    rows = source.draw(60)
    pairs = [(part, torch.zeros_like(part)) for part in rows.split((40, 20))]
    levels = [torch.randint(-3, 4, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 20)]
    factors = [torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in (40, 20)]
    decoded = codec.requantised(pairs, [SpanSetting(0.5, fallback)] * 2, levels)
    errors = [codec.weighting.whiten(d - t).pow(2).mean(1) for d, (t, _) in zip(decoded, pairs, strict=True)]
    expected = torch.stack([(e * f).mean() for e, f in zip(errors, factors, strict=True)])
    torch.testing.assert_close(measured(codec, pairs, levels, factors, 0.5, fallback), expected, rtol=0.02, atol=1e-4)


def test_each_span_gets_the_coarsest_setting_that_keeps_the_promise(completed_pack, source) -> None:
    codec, generator = KvCodec(completed_pack), torch.Generator().manual_seed(2)
    own = source.draw(64)
    foreign = torch.randn(64, own.shape[1], generator=generator) * own.std()  # along no direction in particular
    pairs = [(x, torch.zeros_like(x)) for x in (own, foreign, 0.01 * own)]
    sizes, promised, none = {}, {}, [None] * 3
    for quality in QUALITIES:
        plan = plan_spans(codec, CURVE, quality, pairs, none, none)
        want = QUALITY_DIVERGENCE[quality]
        assert all(d <= want for d in plan.divergence) and plan.divergence[1] > 0.2 * want
        assert not plan.settings[2].fallback and plan.settings[1].fallback
        spans = codec.encode_many(pairs, plan.settings, plan.levels)
        decoded = codec.decode_many(spans, [z for _, z in pairs])
        error = [float(codec.weighting.whiten(d - t).pow(2).mean()) for d, (t, _) in zip(decoded, pairs, strict=True)]
        assert max(map(CURVE.divergence_of, error)) < 1.4 * want, "the choice by rate adds to what was measured"
        sizes[quality], promised[quality] = [len(span) for span in spans], plan.divergence
    for finer, coarser in zip(list(QUALITIES)[:-1], list(QUALITIES)[1:], strict=True):
        assert all(a >= b for a, b in zip(sizes[finer], sizes[coarser], strict=True)) and sum(sizes[finer]) > sum(sizes[coarser])
    assert sizes["balanced"][1] > 2 * sizes["balanced"][0], "foreign text costs bits"


def test_a_plan_is_the_same_where_the_host_looks_at_nothing_in_between(completed_pack, source, monkeypatch) -> None:
    """As on a GPU, where a look waits: steps of the search that a host would leave out change nothing."""
    codec, own, made = KvCodec(completed_pack), source.draw(100), fidelity._Ladder.__init__
    foreign = torch.randn(100, own.shape[1], generator=torch.Generator().manual_seed(4)) * own.std()
    pairs = [(part, torch.zeros_like(part)) for part in torch.cat([own, foreign, 3 * own, 0.01 * own]).split(40)]
    importance = [torch.rand(len(rows), generator=torch.Generator().manual_seed(n)) + 0.5 for n, (rows, _) in enumerate(pairs)]
    none = [None] * len(pairs)
    looking = {quality: plan_spans(codec, CURVE, quality, pairs, none, importance) for quality in QUALITIES}

    def waits_for_nothing(self: fidelity._Ladder, codec: KvCodec) -> None:
        made(self, codec)
        assert self._waits
        self._waits = False

    monkeypatch.setattr(fidelity._Ladder, "__init__", waits_for_nothing)
    for quality, wanted in looking.items():
        plan = plan_spans(codec, CURVE, quality, pairs, none, importance)
        assert plan.settings == wanted.settings and plan.divergence == wanted.divergence
        assert all(torch.equal(a, b) for a, b in zip(plan.levels, wanted.levels, strict=True))
    assert {setting.fallback for plan in looking.values() for setting in plan.settings} == {False, True}


def test_tokens_that_matter_more_make_a_span_finer(completed_pack, source) -> None:
    codec = KvCodec(completed_pack)
    rows = source.draw(32)
    pairs = [(rows, torch.zeros_like(rows))] * 2
    levels = [torch.full((32,), -2), torch.full((32,), -2)]
    plan = plan_spans(codec, CURVE, "compact", pairs, levels, [None, torch.full((32,), 8.0)])
    steps = [s.step * 2 ** (float(v[0]) / 4) for s, v in zip(plan.settings, plan.levels, strict=True)]
    assert steps[1] < 0.6 * steps[0]
    alone = plan_spans(codec, CURVE, "compact", pairs[:1], levels[:1], [None])
    assert alone.settings == plan.settings[:1] and torch.equal(alone.levels[0], plan.levels[0])
    assert alone.divergence == pytest.approx(plan.divergence[:1])


def test_a_pack_without_a_fallback_basis_does_what_it_can(codec: KvCodec, source) -> None:
    rows = source.draw(16)
    foreign = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)) * 50
    plan = plan_spans(codec, CURVE, "near-lossless", [(foreign, torch.zeros_like(foreign))], [None], [None])
    assert not plan.settings[0].fallback and plan.divergence[0] > QUALITY_DIVERGENCE["near-lossless"], "and says so"
    with pytest.raises(UnknownQuality):
        plan_spans(codec, CURVE, "best", [(rows, rows)], [None], [None])
