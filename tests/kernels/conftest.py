"""Shared by the kernels' tests: interpreter mode without a GPU, poisoned outputs, and the comparator.

The same tests run interpreted on a CPU (small shapes) and compiled on a GPU (larger ones).
"""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

SENTINEL = 77


def _compute_like_hardware() -> None:
    """Mend two gaps of Triton's interpreter.

    float32 is rounded to bfloat16 to nearest even (the interpreter cuts the low bits off), and a product of bfloat16 tiles multiplies their
    values (the interpreter multiplies their bit patterns). Products are summed in float64, so that a row's result does not depend on its
    place in the tile, as it does not on a GPU.
    """
    try:
        import numpy as np
        from triton.runtime import interpreter
    except ImportError:
        return
    convert = interpreter._convert_float

    def rounded(source, source_type, target_type, rounding_mode):
        if source_type.name == "fp32" and target_type.name == "bf16":
            bits = np.frombuffer(np.asarray(source).tobytes(), dtype=np.uint32)
            nearest = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            not_a_number = (bits & 0x7FFFFFFF) > 0x7F800000
            return np.where(not_a_number, np.uint16(0x7FC0), nearest).reshape(np.asarray(source).shape)
        return convert(source, source_type, target_type, rounding_mode)

    def values(handle):
        if handle.dtype.scalar.name != "bf16":
            return handle.data.astype(np.float64)
        return (np.asarray(handle.data).view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if not a.dtype.scalar.is_floating():
            return multiply(self, a, b, d, input_precision, max_num_imprecise_acc)
        product = np.matmul(values(a), values(b)) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = create_dot


if os.environ.get("TRITON_INTERPRET") == "1":
    _compute_like_hardware()


def pytest_configure(config: pytest.Config) -> None:
    if not HAS_GPU:
        torch.set_num_threads(1)


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
