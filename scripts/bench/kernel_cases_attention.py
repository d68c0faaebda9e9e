"""Cases of bench_kernels: attention over bfloat16 pages and over the quantised formats, against torch on contiguous copies of the same data."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bench.kernel_shapes import BF16, Cases, models
from bench.kernel_timing import Call, Case, relative_error
from kernels.paged_attention import triton as paged
from kernels.quantized_kv import attention as quantized_attention
from kernels.quantized_kv import reference as quantized_reference
from kernels.quantized_kv import triton as quantized_write
from kernels.rope import reference as rope_reference


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: int, scale: float) -> torch.Tensor:
    """Causal attention in float32, one request at a time: q [B * n, H, d], k and v [B, C, G, d]."""
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    for b in range(k.shape[0]):
        queries = q[b * n : (b + 1) * n].float().unflatten(1, (k.shape[2], -1))  # [n, G, H/G, d]
        scores = torch.einsum("nghd,cgd->ghnc", queries, k[b].float()) * scale
        key, row = torch.arange(k.shape[1], device=q.device), torch.arange(n, device=q.device)
        scores.masked_fill_(key[None] > k.shape[1] - n + row[:, None], float("-inf"))
        mixed = torch.einsum("ghnc,cgd->nghd", torch.softmax(scores, -1), v[b].float())
        out[b * n : (b + 1) * n] = mixed.flatten(1, 2)
    return out


def _attention_shapes(tiny: bool) -> list[tuple[str, int, int, int]]:
    """(model, batch, context, queries a request)."""
    if tiny:
        return [("toy", 2, 100, 2)]
    return [("1.5B", 8, 32_768, 5), ("8B", 8, 32_768, 5), ("1.5B", 8, 32_768, 1), ("1.5B", 1, 32_768, 5)]


def _paged_pool(model: dict[str, int], batch: int, context: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool [2, P, S, G, d] with shuffled pages and its table [B, pages] int32."""
    pages = -(-context // 64)
    pool = torch.randn(2, batch * pages, 64, model["G"], model["d"], device=device, dtype=BF16)
    return pool, torch.randperm(batch * pages, device=device).to(torch.int32).view(batch, pages)


def _contiguous(pages: torch.Tensor, table: torch.Tensor, context: int) -> torch.Tensor:
    return pages[table.long()].flatten(1, 2)[:, :context]  # [B, C, G, d]


def _candidates(*shapes: tuple[int, ...]) -> dict[str, Any]:
    """By name: keys a step, warps, stages, splits (0: chosen), rows (0: chosen)."""
    return {repr(config): config for config in (paged.AttentionConfig(*shape) for shape in shapes)}


PAGED_CANDIDATES = _candidates((64, 4, 4), (64, 4, 2), (64, 4, 3, 0, 64), (32, 4, 4), (128, 8, 2, 0, 64), (64, 4, 3, 33))
QUANTIZED_CANDIDATES = _candidates((64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 4, 3, 0, 64), (32, 4, 3))


def attentions(device: torch.device, tiny: bool) -> Cases:
    for index, (name, batch, context, n) in enumerate(_attention_shapes(tiny)):
        model = models(tiny)[name]
        heads, groups, d = model["H"], model["G"], model["d"]
        pool, table = _paged_pool(model, batch, context, device)
        q = torch.randn(batch * n, heads, d, device=device, dtype=BF16)
        lens = torch.full((batch,), n, dtype=torch.int32, device=device)
        contexts = torch.full((batch,), context, dtype=torch.int32, device=device)
        scale = d**-0.5
        k, v = (_contiguous(x, table, context) for x in pool)

        def attend(
            config: Any, a: tuple[Any, ...] = (q, pool[0], pool[1], table, lens, contexts, scale), n: int = n, **options: Any
        ) -> torch.Tensor:
            return paged.paged_attention(*a, max_query_len=n, config=config, **options)

        bounds = paged.paged_attention_bounds([n] * batch, [context] * batch, heads, groups, d, 4 * d, 2)
        want = _dense(q, k, v, n, scale)
        # The block's heads packed as rows against each KV head, without the small causal corner: the same reads and products.
        rows = q.view(batch, n, groups, -1, d).permute(0, 2, 1, 3, 4).flatten(2, 3).contiguous()
        kt, vt = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        grouped = q.view(batch, n, heads, d).transpose(1, 2).contiguous()
        baselines: dict[str, list[Call]] = {
            "torch sdpa, heads packed": [lambda a=(rows, kt, vt), s=scale: F.scaled_dot_product_attention(*a, scale=s)],
            "torch sdpa, enable_gqa": [lambda a=(grouped, kt, vt), s=scale: F.scaled_dot_product_attention(*a, scale=s, enable_gqa=True)],
        }
        if device.type == "cuda":
            from torch.nn.attention import SDPBackend, sdpa_kernel

            def forced(backend: Any, a: tuple[Any, ...] = (rows, kt, vt), s: float = scale) -> torch.Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(*a, scale=s)

            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
                baselines[f"torch {backend.name.lower()}, heads packed"] = [lambda b=backend, f=forced: f(b)]
        shape = f"{name} B={batch} n={n} C={context} H={heads} G={groups}"

        def paged_error(config: Any = None, want: torch.Tensor = want, f: Any = attend) -> float:
            return relative_error(f(config).float(), want)

        # Candidates are compared where the goals are set; elsewhere the defaults are timed.
        yield Case(
            "paged_attention",
            shape,
            "bf16",
            bounds,
            paged_error,
            8e-3,
            lambda c, f=attend: [lambda: f(c)],
            PAGED_CANDIDATES if index < 2 else {},
            paged_error,
            baselines,
            matrix=True,
        )
        yield Case(
            "paged_attention det",
            shape,
            "bf16",
            bounds,
            lambda w=want, f=attend: relative_error(f(None, deterministic=True).float(), w),
            8e-3,
            lambda c, f=attend: [lambda: f(c, deterministic=True)],
            matrix=True,
        )
        del kt, vt, rows, grouped, baselines, want, paged_error
        position = torch.arange(context + 128, device=device)[:, None] * 1e6 ** (-torch.arange(d // 2, device=device) * 2 / d)
        cos, sin = position.cos(), position.sin()
        for label, bits in quantized_reference.FORMATS.items():
            for with_mean in (True, False) if bits == 4 else (True,):
                if index and bits < 4:
                    continue
                k_mean = torch.randn(groups, d, device=device) if with_mean else None
                means = quantized_reference.ChannelMeans(k_mean, torch.randn(groups, d, device=device))
                pages = quantized_reference.new_pages(bits, pool.shape[1], 64, groups, d, device)
                for b in range(batch):
                    slots = (table[b].long()[:, None] * 64 + torch.arange(64, device=device)).flatten()[:context]
                    rows_k = k[b].float() + (0 if k_mean is None else k_mean)
                    quantized_write.quantized_kv_write(
                        rows_k.to(BF16), (v[b].float() + means.v_mean).to(BF16), cos[:context], sin[:context], slots, means, pages
                    )

                fixed = (q, pages, means, cos, sin, table)

                def kv_format(config: Any, fixed: Any = fixed, rest: Any = (lens, contexts, scale), n: int = n) -> torch.Tensor:
                    return quantized_attention.quantized_paged_attention(*fixed, *rest, max_query_len=n, config=config)

                def error(
                    config: Any = None, kv_format: Any = kv_format, fixed: Any = fixed, rest: Any = ([n] * batch, [context] * batch, scale)
                ) -> float:
                    return relative_error(kv_format(config).float(), _quantised_dense(*fixed, *rest).float())

                bounds = paged.paged_attention_bounds(
                    [n] * batch, [context] * batch, heads, groups, d, quantized_attention.quantized_row_bytes(d, bits), 2
                )
                yield Case(
                    f"quantized_attention {label}",
                    shape + (" mean" if with_mean else " no mean"),
                    label,
                    bounds,
                    error,
                    1.5e-2,
                    lambda c, f=kv_format: [lambda: f(c)],
                    QUANTIZED_CANDIDATES if index < 2 and bits == 4 else {},
                    error,
                    {"paged_attention bf16, ours": [lambda f=attend: f(None)]},
                    matrix=True,
                )
                del pages, fixed, kv_format, error


def _quantised_dense(
    q: Any, pages: Any, means: Any, cos: Any, sin: Any, table: Any, lens: list[int], contexts: list[int], scale: float
) -> torch.Tensor:
    """Attention over decoded rows in float32, without pages."""
    d, n, context = q.shape[-1], lens[0], contexts[0]
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    for b in range(len(lens)):
        k, v = (
            quantized_reference.dequantise(c[table[b].long()], s[table[b].long()], pages.bits, d).transpose(1, 2).flatten(0, 1)[:context]
            for c, s in ((pages.k_codes, pages.k_scale), (pages.v_codes, pages.v_scale))
        )
        if means.k_mean is not None:
            k = k + rope_reference.apply_rope(means.k_mean.expand(context, -1, -1), cos[:context], sin[:context])
        out[b * n : (b + 1) * n] = _dense(q[b * n : (b + 1) * n], k[None], (v + means.v_mean)[None], n, scale)
    return out
