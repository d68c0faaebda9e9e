"""What a draft's logits should change by while it is distilled from its target's; `reference.py` says what it means."""

from __future__ import annotations

from torch import Tensor

from kernels.dispatch import use_triton
from kernels.distil_gradient import reference
from kernels.distil_gradient.reference import DistilRows

__all__ = ["DistilRows", "distil_gradient"]


def distil_gradient(draft: Tensor, target: Tensor, log_sum: Tensor, mix: float, weight: Tensor | None = None) -> DistilRows:
    """`reference.distil_gradient` (arguments and result there), through Triton where it applies."""
    if use_triton(draft, target):
        from kernels.distil_gradient.triton import distil_gradient as launch

        return launch(draft, target, log_sum, mix, weight)
    return reference.distil_gradient(draft, target, log_sum, mix, weight)
