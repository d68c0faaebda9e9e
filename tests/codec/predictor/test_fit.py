"""Closed-form fits against brute force on small problems."""

from __future__ import annotations

import pytest
import torch

from codec.errors import PredictorError
from codec.predictor.fit import RidgeMoments, explained, fit_dual


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def problem(tokens: int, features: int = 30, dim: int = 50, noise: float = 0.5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = 0.3 * torch.randn(features, features, generator=generator)
    truth = torch.exp(-torch.arange(features) / 8.0)[:, None] * torch.randn(features, dim, generator=generator)
    f = torch.randn(tokens, features, generator=generator) @ mixing + 1
    return f, f @ truth + noise * torch.randn(tokens, dim, generator=generator) + 3


def streamed(f: torch.Tensor, y: torch.Tensor, sizes: int = 170):
    moments = RidgeMoments(f.shape[1], y.shape[1], blocks=3)
    for a, b in zip(f.split(sizes), y.split(sizes), strict=True):
        moments.add(a, b)
    return moments.finish()


def test_streamed_moments_are_the_moments() -> None:
    f, y = problem(1000)
    m = streamed(f, y)
    torch.testing.assert_close(m.mu, y.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(m.yy, torch.cov(y.T, correction=0), atol=1e-3, rtol=1e-3)
    z = (f - f.mean(0)) / m.f_scale
    torch.testing.assert_close(m.ff, z.T @ z / 1000, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(m.fy, z.T @ (y - y.mean(0)) / 1000, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("features,dim", [(30, 50), (60, 24)])
def test_full_rank_fit_is_least_squares(features: int, dim: int) -> None:
    f, y = problem(2000, features, dim)
    m = streamed(f, y)
    fit = m.fit(1e-7, min(features, dim), same, same)
    design = torch.cat([f, torch.ones(2000, 1)], 1).double()
    expected = (design @ torch.linalg.lstsq(design, y.double()).solution).float()
    torch.testing.assert_close(fit(f), expected, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(m.residual_covariance(fit), torch.cov((y - fit(f)).T, correction=0), atol=2e-3, rtol=1e-2)


def test_rank_is_spent_where_the_weight_is() -> None:
    f, y = problem(2000)
    m = streamed(f, y)
    weights = torch.ones(50)
    weights[:5] = 100.0
    plain, weighted = m.fit(1e-4, 3, same, same), m.fit(1e-4, 3, lambda x: x * weights, lambda x: x / weights)
    errors = [(y - fit(f)).pow(2)[:, :5].mean() for fit in (plain, weighted)]
    assert errors[1] < 0.6 * errors[0] and len(weighted.up) == 3


def test_ridge_is_chosen_by_held_out_error() -> None:
    f, y = problem(120, features=100, dim=60, noise=3.0)
    test_f, test_y = problem(1500, features=100, dim=60, noise=3.0)
    m = streamed(f, y, 60)
    chosen = m.choose_ridge(test_f, test_y, (1e-4, 1e-1, 10.0), stride=2)
    scores = {c: float(explained(test_y, m.fit(c, 60, same, same)(test_f), m.mu).mean()) for c in (1e-4, 1e-1, 10.0)}
    assert chosen == max(scores, key=lambda c: scores[c])


def test_dual_cross_validation_equals_refitting() -> None:
    f, y = problem(60, features=80, dim=30)
    documents = [25, 20, 15]
    result = fit_dual(f, y, documents, 60, same, same, candidates=(0.05,))
    # leave the first document out by hand, with the means and scales of all tokens, as the closed form does
    z, target = (f - f.mean(0)) / f.std(0, correction=0), y - y.mean(0)
    level = float((z @ z.T).diagonal().mean())
    kept = slice(25, 60)
    kernel = z[kept] @ z[kept].T + 0.05 * level * torch.eye(35)
    expected = z[:25] @ z[kept].T @ torch.linalg.solve(kernel, target[kept]) + y.mean(0)
    torch.testing.assert_close(result.cross_validated[:25], expected, atol=5e-3, rtol=5e-3)


def test_dual_and_primal_agree() -> None:
    f, y = problem(400)
    dual = fit_dual(f, y, [200, 200], 30, same, same, candidates=(1e-2,)).fit
    # the dual's ridge is relative to 30 features' squares, the primal's to one feature's mean over 400 tokens
    primal = streamed(f, y, 400).fit(1e-2 * 30 / 400, 30, same, same)
    torch.testing.assert_close(dual(f), primal(f), atol=5e-3, rtol=5e-3)


def test_cross_validated_error_is_honest() -> None:
    f, y = problem(90, features=200, dim=40, noise=2.0)
    fresh_f, fresh_y = problem(2000, features=200, dim=40, noise=2.0)
    result = fit_dual(f, y, [30, 30, 30], 40, same, same)
    claimed = float(explained(y, result.cross_validated, result.fit.mu).mean())
    assert claimed < float(explained(y, result.fit(f), result.fit.mu).mean()) - 0.1
    assert claimed < float(explained(fresh_y, result.fit(fresh_f), result.fit.mu).mean()) + 0.15


def test_refusals() -> None:
    f, y = problem(20)
    with pytest.raises(PredictorError):
        RidgeMoments(30, 50).finish()
    with pytest.raises(PredictorError):
        RidgeMoments(30, 50).add(f, y[:5])
    with pytest.raises(PredictorError):
        fit_dual(f, y, [20], 5, same, same)
