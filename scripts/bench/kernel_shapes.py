"""Model shapes and inputs that the benchmark cases share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.kernel_timing import Case

BF16 = torch.bfloat16
MODELS: dict[str, dict[str, int]] = {
    "1.5B": {"E": 1536, "I": 8960, "H": 12, "G": 2, "d": 128, "L": 28, "V": 151_936},
    "8B": {"E": 4096, "I": 14_336, "H": 32, "G": 8, "d": 128, "L": 32, "V": 128_256},
}
Cases = Iterator[Case]


def copies(make: Callable[[], Any], bytes_each: int, device: torch.device) -> list[Any]:
    """Enough copies of an input that a round over them does not fit in the cache."""
    if device.type != "cuda":
        return [make()]
    return [make() for _ in range(max(1, min(8, 1 + 160_000_000 // max(bytes_each, 1))))]


def row_counts(tiny: bool) -> tuple[int, ...]:
    return (3,) if tiny else (40, 4096)


def models(tiny: bool) -> dict[str, dict[str, int]]:
    return {"toy": {"E": 64, "I": 96, "H": 4, "G": 2, "d": 32, "L": 2, "V": 3000}} if tiny else MODELS


def angles(n: int, d: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(n, d // 2, device=device) * 100
    return angle.cos(), angle.sin()
