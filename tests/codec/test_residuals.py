"""Components that are computed once, samples of tokens that speak for a span, and products in bfloat16."""

from __future__ import annotations

import pytest
import torch

from codec import fidelity
from codec.codec import KvCodec
from codec.divergence import DivergenceCurve
from codec.errors import BadInput
from codec.residuals import SAMPLED_EVERY
from codec.transform import Transform

SIZES = (40, 20, 33)


def counted(codec: KvCodec, truth: torch.Tensor):
    """Residuals of rows that are predicted to be zero, and the spans of every read."""
    ends, reads = [0, *torch.tensor(SIZES).cumsum(0).tolist()], []

    def read(first: int, last: int):
        reads.append((first, last))
        rows = truth[ends[first] : ends[last]]
        return rows, torch.zeros_like(rows)

    return codec.residuals_read(SIZES, read), reads


def test_components_are_computed_once(completed_pack, source) -> None:
    codec, rows = KvCodec(completed_pack), source.draw(sum(SIZES))
    residuals, reads = counted(codec, rows)
    count, every = codec.transform.num_rows, codec.transform.num_components
    parts = rows.split(SIZES)
    for numbers, wanted in (([0, 1], count), ([1], 3), ([0, 1], 1), ([2], 2)):
        expected = torch.cat([codec.components(parts[n], torch.zeros_like(parts[n]), wanted) for n in numbers])
        torch.testing.assert_close(residuals.components(numbers, wanted), expected, rtol=1e-4, atol=1e-5)
    assert reads == [(0, 1), (1, 2), (2, 3)], "fewer than are known cost nothing"
    whole = torch.cat([codec.components(part, torch.zeros_like(part), every) for part in parts])
    sampled = torch.cat([part[::SAMPLED_EVERY] for part in whole.split(SIZES)])
    torch.testing.assert_close(residuals.sampled_components([0, 1, 2]), sampled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(residuals.energy([0, 1, 2]), codec.weighting.whiten(rows).square().sum(1))
    assert len(reads) == 4, "the third span was known in part only"
    torch.testing.assert_close(residuals.components([1], every), whole.split(SIZES)[1], rtol=1e-4, atol=1e-4)
    residuals.keep(1, 5)
    assert residuals.components([1], 5).shape == (20, 5) and len(reads) == 5
    assert residuals.components([1], every).shape == (20, every) and len(reads) == 6


def test_spans_that_are_read_together_give_the_same_components(completed_pack, source) -> None:
    rows = source.draw(sum(SIZES))
    alone, wide = KvCodec(completed_pack), KvCodec(completed_pack)
    wide._joined = True  # as on a GPU
    joined, reads = counted(wide, rows)
    count = alone.transform.num_components
    apart = counted(alone, rows)[0].components([0, 1, 2], count)
    joined.components([1], 4)
    torch.testing.assert_close(joined.components([0, 1, 2], count), apart, rtol=1e-4, atol=1e-4)
    assert reads == [(1, 2), (0, 3)]


def test_spans_behind_are_read_along_in_bfloat16(completed_pack, source, monkeypatch) -> None:
    """Up to so many tokens, where they are asked for their components along the rows and not known yet."""
    monkeypatch.setattr("codec.codec._JOINED_TOKENS", 60)
    codec, rows = KvCodec(completed_pack, projection_dtype=torch.bfloat16), source.draw(sum(SIZES))
    residuals, reads = counted(codec, rows)
    count, every = codec.transform.num_rows, codec.transform.num_components
    found = residuals.components([0], count)
    torch.testing.assert_close(found, codec.components(rows[:40], torch.zeros_like(rows[:40]), count), rtol=1e-2, atol=1e-3)
    assert reads == [(0, 2)]
    assert residuals.components([1, 2], count).shape == (53, count) and reads == [(0, 2), (2, 3)], "93 tokens are more than 60"
    assert residuals.components([1], every).shape == (20, every) and reads[2:] == [(1, 2)], "what few spans need is read for them alone"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(completed_pack, source, bad: float) -> None:
    rows = source.draw(sum(SIZES))
    rows[50, 7] = bad
    for dtype in (torch.float32, torch.bfloat16):
        residuals, _ = counted(KvCodec(completed_pack, projection_dtype=dtype), rows)
        if dtype == torch.float32:  # in bfloat16 the spans are read together
            assert residuals.components([0], 3).shape == (40, 3)
        with pytest.raises(BadInput, match="NaN or infinity"):
            residuals.components([1], 3)
    with pytest.raises(BadInput, match="do not fit"):
        KvCodec(completed_pack).residuals([(rows, rows[:, 1:])])


def test_products_in_bfloat16_lose_little_and_cost_no_bits(completed_pack, source) -> None:
    exact, rounded = KvCodec(completed_pack), KvCodec(completed_pack, projection_dtype=torch.bfloat16)
    rows = source.draw(128)
    pairs = [(part, torch.zeros_like(part)) for part in rows.split(64)]
    for count in (exact.transform.num_rows, exact.transform.num_components):
        want, found = (codec.residuals(pairs).components([0, 1], count) for codec in (exact, rounded))
        assert float((want - found).norm() / want.norm()) < 5e-3
    first, second = (codec.encode_many(pairs, "balanced") for codec in (exact, rounded))
    assert sum(map(len, second)) == pytest.approx(sum(map(len, first)), rel=0.01)
    zeros = [zero for _, zero in pairs]
    errors = [float((torch.cat(exact.decode_many(spans, zeros)) - rows).norm()) for spans in (first, second)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_a_sample_asks_for_the_fallback_basis_as_all_tokens_would(completed_pack, source, monkeypatch) -> None:
    """Spans of the source, of foreign text, and of mixtures: the plan is the one that measures every span in the fallback basis."""
    codec, generator = KvCodec(completed_pack), torch.Generator().manual_seed(4)
    along = codec.transform.project(codec.weighting.whiten(source.draw(8 * 64)), codec.transform.num_rows)
    own = codec.weighting.unwhiten(codec.transform.expand(along, codec.layout.dim))  # nothing of it is left over
    foreign = torch.randn(own.shape, generator=generator) * own.std()
    pairs = [
        (a + share * b, torch.zeros_like(a))
        for a, b, share in zip(own.split(64), foreign.split(64), (0, 0, 0.02, 0.05, 0.1, 0.3, 1, 3), strict=True)
    ]
    curve, none = DivergenceCurve((0.01, 0.04), (0.005, 0.02)), [None] * len(pairs)
    plan = fidelity.plan_spans(codec, curve, "balanced", pairs, none, none)
    monkeypatch.setattr(fidelity, "_asking_for_fallback", lambda *_: list(range(len(pairs))))
    thorough = fidelity.plan_spans(codec, curve, "balanced", pairs, none, none)
    assert 0 < sum(setting.fallback for setting in plan.settings) < len(pairs)
    assert plan.settings == thorough.settings and all(map(torch.equal, plan.levels, thorough.levels))
    codec._joined = True  # as on a GPU, which measures all spans at once
    monkeypatch.undo()
    monkeypatch.setitem(fidelity._MEASURED_TOKENS, "cpu", 4096)
    together = fidelity.plan_spans(codec, curve, "balanced", pairs, none, none)
    assert together.settings == plan.settings and together.divergence == pytest.approx(plan.divergence, rel=1e-3)


@pytest.mark.parametrize("kind", ["global", "per_layer"])
def test_whole_rows_are_what_unit_vectors_expand_to(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    basis, layer = torch.randn(6, 12 if kind == "global" else 4, generator=generator), torch.tensor([2, 0, 1, 1, 0, 2])
    transform = Transform(kind, basis, None if kind == "global" else layer, torch.ones(6))
    assert torch.equal(transform.whole_rows(1, 5, 12), transform.expand(torch.eye(6), 12)[1:5])
