"""Face of a prompt's compiled attention (`attention`): tensors in, addresses to the compiled code.

Axes: T new tokens, N keys, H query heads, G KV heads, d head size.
"""

from __future__ import annotations

import functools
import math

import torch

from kernels.cpu_decode import compiled_available, compiled_loads

_MOST_THREADS = 2
"""The compiled code runs on one thread, 2.4 to 2.7 times as fast as the library's attention on one."""
_WIDTH = 64  # of `attention`, which asks for llvmlite


def attends_prompts(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `attend_prompt` takes such heads here and is the faster way: bf16, on a processor that multiplies pairs of bf16 and no matrices of them,
    for which the library has a way of its own."""
    if (
        device.type != "cpu"
        or dtype != torch.bfloat16
        or head_dim % _WIDTH
        or torch.get_num_threads() > _MOST_THREADS
        or torch.is_grad_enabled()
    ):
        return False
    return compiled_available() and _multiplies_pairs() and compiled_loads()


@functools.cache
def _multiplies_pairs() -> bool:
    from kernels.cpu_decode.machine_code import allows_tiles, has_flag

    return has_flag("avx512_bf16") and not allows_tiles()


def attend_prompt(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of a text's last tokens, as `kernels.paged_attention` has it. A row's bits do not depend on the rows beside it.

    Args:
        q: bf16 [T, H, d] rotated queries. k, v: bf16 [N, G, d] of all its tokens, the heads of a token in one piece.
        scale: factor of the scores, above 0.

    Returns:
        bf16 [T, H, d].

    Raises:
        ValueError: tensors of other shapes or dtypes, or that lie otherwise in memory.
    """
    (tokens, heads, d), (keys, groups, _) = q.shape, k.shape
    fits = k.shape == v.shape and k.shape[2] == d and heads % groups == 0 and d % _WIDTH == 0 and 1 <= tokens <= keys
    q = q if q.stride()[1:] == (d, 1) else q.contiguous()
    lies = all(t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.stride()[1:] == (d, 1) for t in (q, k, v))
    if not (fits and lies and scale > 0):
        raise ValueError(f"queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)} do not fit, or lie otherwise in memory")
    from kernels.cpu_decode.attention import BLOCK_KEYS, ROWS_TOGETHER
    from kernels.cpu_decode.machine_code import functions

    room = -(-keys // BLOCK_KEYS) * BLOCK_KEYS
    laid_out, sums = q.new_empty(2, room, d), torch.empty(ROWS_TOGETHER, d, dtype=torch.float32)
    out = q.new_empty(tokens, heads, d)
    functions()["prompt_attention"](
        q.data_ptr(), 2 * q.stride(0), k.data_ptr(), 2 * k.stride(0), v.data_ptr(), 2 * v.stride(0), tokens, keys, heads, groups, d,
        laid_out.data_ptr(), sums.data_ptr(), out.data_ptr(), scale / math.log(2),
    )  # fmt: skip
    return out


__all__ = ["attend_prompt", "attends_prompts"]
