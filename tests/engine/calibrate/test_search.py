"""A restore budget: what a predictor costs, which ones fit, and that the chosen one is fitted and stated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from codec.predictor.dense import DensePredictor, load_predictor
from codec.predictor.features import FeatureSpec
from engine.calibrate.pass_times import measure_pass_times
from engine.calibrate.recipe import CalibrationOptions, calibrate
from engine.calibrate.restore_cost import PassTimes, draft_layers_run, layer_flops, predictor_multiplies, restore_cost
from engine.calibrate.search import affordable, layer_bits, predictor_bytes_of, separate_feature_sets
from engine.errors import InvalidOption

QUICK = CalibrationOptions(held_out_tokens=400, tokens_per_batch=200, budget=8.0, weighting="attention", level_strength=0.0)


@pytest.fixture(scope="module")
def target(random_decoder):
    return random_decoder(0, vocab_size=300, num_hidden_layers=14)


@pytest.fixture(scope="module")
def draft(target, random_decoder):
    """The target's own first layers, so that looking deeper tells more."""
    made = random_decoder(0, vocab_size=300, num_hidden_layers=4)
    for name, tensor in made.hf_tensors().items():
        tensor.copy_(target.hf_tensors()[name])
    return made


@pytest.fixture(scope="module")
def docs() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 300, (48,), generator=generator).tolist() for _ in range(40)]


def test_operations_are_those_of_the_weights(target, draft):
    layer = target.layers[0]
    assert layer_flops(target.config) == 2 * sum(p.numel() for p in layer.parameters() if p.dim() > 1)
    one = layer_flops(draft.config)
    cost = restore_cost(target.config, FeatureSpec((1, 2), (0, 3)), 3, draft=draft.config, predictor_multiplies=1000, components=5)
    assert (cost.draft_flops, cost.target_flops, cost.predictor_flops) == (2 * one, 3 * one, 2000)
    assert cost.transform_flops == 2 * 5 * 11 * target.config.kv_width and cost.prefill_flops == 14 * one
    assert cost.restore_flops == 5 * one + 2000 + cost.transform_flops and cost.budget_share == (5 * one + 2000) / (14 * one)
    head = replace(target.config, num_layers=2)
    assert restore_cost(target.config, FeatureSpec((3,)), 3, head=head, predictor_multiplies=0).draft_flops == 0, "nobody looks at the head"
    assert restore_cost(target.config, FeatureSpec((3, 5)), 3, head=head, predictor_multiplies=0).draft_flops == 2 * one
    assert predictor_multiplies(30, 40, None) == 1200 and predictor_multiplies(30, 40, 5) == 350


def test_a_draft_runs_as_deep_as_is_looked_unless_nearly_all_of_it_is():
    assert [draft_layers_run(taps, 8) for taps in ((), (0,), (1, 4), (5,), (8,))] == [0, 0, 4, 8, 8]


def test_what_fits_a_budget(target, draft):
    everything = affordable(target.config, draft.config, 0, None, restore_budget=10.0, predictor_bytes=1e9)
    assert {one.features for one in everything} == set(separate_feature_sets(target.config, draft.config))
    assert all(one.rank is None for one in everything)
    tight = affordable(target.config, draft.config, 0, None, restore_budget=0.25, predictor_bytes=1e9)
    assert 0 < len(tight) < len(everything) and all(one.cost.budget_share <= 0.25 for one in tight)
    assert max(max(one.features.taps, default=0) for one in tight) < 4 and max(one.features.first_layer for one in tight) <= 2
    with pytest.raises(InvalidOption, match="the cheapest takes"):
        affordable(target.config, draft.config, 0, None, restore_budget=1e-4, predictor_bytes=1e9)
    with pytest.raises(InvalidOption, match="raise the pack's budget"):
        affordable(target.config, draft.config, 0, None, restore_budget=1.0, predictor_bytes=10)
    low = affordable(target.config, None, 4, None, restore_budget=1.0, predictor_bytes=predictor_bytes_of(40_000))
    assert {one.features.first_layer for one in low} == {4} and all(one.features.target_taps == (0,) for one in low)


def test_a_budget_of_time_leaves_slow_drafts_out(target, draft, docs, monkeypatch):
    """Where a draft's layers take ten times their arithmetic, what was affordable with them no longer is; the target's own first layers are."""
    even, slow = PassTimes(64, 1e-12, 1e-12, 1e-12), PassTimes(64, 1e-12, 1e-12, 1e-11)

    def sets(times):
        found = affordable(target.config, draft.config, 0, None, restore_budget=0.25, predictor_bytes=1e9, times=times)
        return {(one.features.name, one.rank) for one in found}

    everything = affordable(target.config, draft.config, 0, None, restore_budget=0.25, predictor_bytes=1e9)
    assert sets(even) == {(one.features.name, one.rank) for one in everything}
    assert sets(slow) < sets(even) and "target 0" in {name for name, _ in sets(slow)}
    monkeypatch.setattr("engine.calibrate.recipe.measure_pass_times", lambda *_: slow)
    pack = calibrate(target, draft, docs, options=replace(QUICK, restore_budget=0.25, restore_by_time=True), log=lambda _: None)
    assert {row["features"] for row in pack.info["search"]} == {name for name, _ in sets(slow)} and pack.info["pass_times"][
        "draft_s"
    ] == 1e-11


def test_passes_are_timed(target, draft):
    times = measure_pass_times(target, draft, 40)
    assert times.tokens == 40 and min(times.prefill_s, times.target_s, times.draft_s) > 0
    assert measure_pass_times(target, None, 40).draft_s is None


def test_more_of_the_budget_buys_fewer_bits(target, draft, docs):
    chosen, bits = [], []
    for budget in (0.12, 0.6):
        pack = calibrate(target, draft, docs, options=replace(QUICK, restore_budget=budget), log=lambda _: None)
        assert pack.info["restore"]["share_of_prefill"] > 0
        restore = pack.info["restore"]
        assert restore["restore_flops"] - restore["transform_flops"] <= budget * restore["prefill_flops"]
        rows = pack.info["search"]
        best = min(rows, key=lambda row: row["bits_per_element"])
        predictor = load_predictor(pack.predictor, pack.predictor_settings)
        assert isinstance(predictor, DensePredictor) == (best["rank"] is None)
        assert pack.layout.first_layer == predictor.spec.recomputed_layers
        chosen.append(best["features"])
        bits.append(pack.info["ideal_bits_per_element"]["balanced"])
    assert chosen[0] != chosen[1] and bits[1] < bits[0]


def test_a_wide_matrix_chooses_as_a_set_fitted_alone_would_cost(target, docs):
    """An early exit's sets: bits of the rows are those of the residuals, and what is chosen has the fewest."""
    pack = calibrate(target, None, docs, recomputed_layers=4, options=replace(QUICK, restore_budget=0.9), log=lambda _: None)
    assert pack.layout.first_layer == 4 and len(pack.info["search"]) >= 2
    assert {row["features"] for row in pack.info["search"]} == {f"states {taps} + target 0, 4 layers recomputed" for taps in ("2,4", "4")}


def test_bits_of_layers():
    """White noise as wide as the step costs each layer the same; what never leaves zero costs nothing."""
    z = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    both = layer_bits(z, 4, 1.0)
    assert both == pytest.approx(layer_bits(z[:, :4], 4, 1.0) + layer_bits(z[:, 4:], 4, 1.0)) and 8 < both < 20
    assert layer_bits(z, 4, 20.0) == 0.0


@pytest.mark.parametrize("options", [{"restore_budget": 0.0}, {"restore_budget": 0.3, "rank": 8}, {"restore_budget": 0.3, "taps": (1,)}])
def test_budgets_are_checked(target, draft, docs, options):
    with pytest.raises(InvalidOption, match="restore budget"):
        calibrate(target, draft, docs, options=replace(QUICK, **options), log=lambda _: None)
