"""Shared by the kernels' tests: interpreter mode without a GPU, poisoned outputs, and the comparator.

The same tests run interpreted on a CPU (small shapes) and compiled on a GPU (larger ones).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bench.interpreter import compute_like_hardware
from kernels.dispatch import triton_importable
from tests.kernels.cases import covering

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

SENTINEL = 77
_FOLDER = Path(__file__).parent


if os.environ.get("TRITON_INTERPRET") == "1" and triton_importable():
    compute_like_hardware()


def pytest_configure(config: pytest.Config) -> None:
    if not HAS_GPU:
        torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU every case compiles a variant of its own: of each test here those run that meet every value of every parameter (FORETOLD_GPU_CASES=all:
    all of them). The interpreter runs the full matrix."""
    if not HAS_GPU or os.environ.get("FORETOLD_GPU_CASES") == "all":
        return
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.path.is_relative_to(_FOLDER) and hasattr(item, "callspec"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {item for cases in tests.values() for item in covering(cases)}
    dropped = [item for cases in tests.values() for item in cases if item not in kept]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        out = set(dropped)
        items[:] = [item for item in items if item not in out]


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel():
        tensor.fill_(float("nan") if tensor.is_floating_point() else SENTINEL)
    return tensor


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and torch.empty_like return NaN (integers: 77), so that an output nobody wrote is noticed."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: _poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: _poison(empty_like(*args, **kwargs)))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def assert_close():
    """Comparator: relative root-mean-square error of `got` against `want` at most `bound`, shapes and dtypes equal, nothing NaN."""

    def check(got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        got, want = got.double(), want.double()
        assert torch.isfinite(got).all(), "an element was never written, or is not finite"
        error = (got - want).norm() / want.norm().clamp_min(1e-30)
        assert error <= bound, f"relative RMS error {error:.2e} above {bound:.2e}"

    return check
