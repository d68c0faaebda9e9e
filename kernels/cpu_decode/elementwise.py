"""Face of a prompt's compiled norms and rotation (`prefill`): tensors in, addresses to the compiled code.

Axes: N rows, E columns.
"""

from __future__ import annotations

import torch

from kernels.cpu_decode import compiled_available, compiled_loads

_LANES = 16  # of `emit`, which asks for llvmlite
_MOST_THREADS = 4
"""The compiled code runs on one thread, four to ten times as fast as a library's operations on one."""


def suits(x: torch.Tensor, *others: torch.Tensor, columns: int) -> bool:
    """Whether the compiled code takes these: bf16 x without gradients, on a CPU with few threads, and columns of whole vectors."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or columns % _LANES or not x.numel() or torch.get_num_threads() > _MOST_THREADS:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others)):
        return False
    return compiled_available() and compiled_loads()


def norm_rows(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`kernels.rms_norm.rms_norm`; None where that is for plain PyTorch."""
    width = x.shape[-1]
    given = (weight,) if residual is None else (weight, residual)
    if not suits(x, *given, columns=width) or any(t.dtype != x.dtype or not t.is_contiguous() for t in (x, *given)):
        return None
    if weight.shape != (width,) or (residual is not None and residual.shape != x.shape):
        return None
    from kernels.cpu_decode.machine_code import functions

    out, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    added = 0 if residual is None else residual.data_ptr()
    functions()["norm_rows"](
        x.data_ptr(), added, weight.data_ptr(), x.numel() // width, width, eps, out.data_ptr(), total.data_ptr()
    )  # fmt: skip
    return out, total


def turn_rows(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor | None:
    """`kernels.rope.apply_rope`; None where that is for plain PyTorch."""
    if x.ndim != 3 or not suits(x, cos, sin, columns=x.shape[2] // 2) or x.shape[2] % 2:
        return None
    rows, heads, d = x.shape
    angles = all(t.shape == (rows, d // 2) and t.dtype == torch.float32 and t.is_contiguous() for t in (cos, sin))
    if not angles or x.stride(2) != 1 or x.stride(1) != d:
        return None
    from kernels.cpu_decode.machine_code import functions

    out = x.new_empty(x.shape)
    functions()["turn_rows"](x.data_ptr(), 2 * x.stride(0), rows, heads, d, cos.data_ptr(), sin.data_ptr(), out.data_ptr())
    return out


__all__ = ["norm_rows", "turn_rows"]
