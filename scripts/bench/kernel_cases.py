"""Cases of bench_kernels: norm, gate, rotation, cache writes and acceptance.

Every function takes (device, tiny) and yields cases one at a time, so that one case's tensors are gone before the next one's are made.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.kernel_shapes import BF16, Cases, angles, copies, models, row_counts
from bench.kernel_timing import Call, Case, relative_error
from kernels.accept import reference as accept_reference
from kernels.accept import triton as accept
from kernels.kv_write import reference as kv_write_reference
from kernels.kv_write import triton as kv_write
from kernels.quantized_kv import reference as quantized_reference
from kernels.quantized_kv import triton as quantized_write
from kernels.rms_norm import reference as rms_norm_reference
from kernels.rms_norm import triton as rms_norm
from kernels.rope import reference as rope_reference
from kernels.rope import triton as rope
from kernels.silu_mul import reference as silu_reference
from kernels.silu_mul import triton as silu


def rms_norms(device: torch.device, tiny: bool) -> Cases:
    for name, model in models(tiny).items():
        for n in row_counts(tiny):
            weight = torch.rand(model["E"], device=device, dtype=BF16)
            data = copies(lambda n=n, e=model["E"]: torch.randn(2, n, e, device=device, dtype=BF16), 8 * n * model["E"], device)

            def calls(function: Any, data: list[Any] = data, weight: torch.Tensor = weight) -> list[Call]:
                return [lambda x=x: function(x[0], weight, 1e-6, x[1]) for x in data]

            def check(data: list[Any] = data, weight: torch.Tensor = weight) -> float:
                arguments = (data[0][0], weight, 1e-6, data[0][1])
                ours, theirs = rms_norm.rms_norm(*arguments), rms_norm_reference.rms_norm(*arguments)
                return max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))

            yield Case(
                "rms_norm+residual",
                f"{name} N={n} E={model['E']}",
                "bf16",
                rms_norm.rms_norm_bounds(n, model["E"], 2, True),
                check,
                8e-3,
                lambda _, calls=calls: calls(rms_norm.rms_norm),
                baselines={"torch": calls(rms_norm_reference.rms_norm)},
            )


def silu_muls(device: torch.device, tiny: bool) -> Cases:
    for name, model in models(tiny).items():
        for n in row_counts(tiny):
            data = copies(lambda n=n, i=model["I"]: torch.randn(n, 2 * i, device=device, dtype=BF16), 6 * n * model["I"], device)
            yield Case(
                "silu_mul",
                f"{name} N={n} I={model['I']}",
                "bf16",
                silu.silu_mul_bounds(n, model["I"], 2),
                lambda data=data: relative_error(silu.silu_mul(data[0]), silu_reference.silu_mul(data[0].clone())),
                8e-3,
                lambda block, data=data: [lambda x=x: silu.silu_mul(x, block=block or 1024) for x in data],
                {"block 512": 512, "block 2048": 2048},
                lambda block, data=data: relative_error(silu.silu_mul(data[0], block=block), silu_reference.silu_mul(data[0].clone())),
                {"torch": [lambda x=x: silu_reference.silu_mul(x) for x in data]},
            )


def ropes(device: torch.device, tiny: bool) -> Cases:
    for name, model in models(tiny).items():
        for n in row_counts(tiny):
            cos, sin = angles(n, model["d"], device)
            make = lambda n=n, m=model: torch.randn(n, m["H"], m["d"], device=device, dtype=BF16)  # noqa: E731
            data = copies(make, 4 * n * model["H"] * model["d"], device)
            yield Case(
                "rope",
                f"{name} N={n} H={model['H']}",
                "bf16",
                rope.rope_bounds(data[0].numel(), n, model["d"] // 2, 2),
                lambda d=data, c=cos, s=sin: relative_error(rope.apply_rope(d[0], c, s), rope_reference.apply_rope(d[0], c, s)),
                0.0,
                lambda _, d=data, c=cos, s=sin: [lambda x=x: rope.apply_rope(x, c, s) for x in d],
                baselines={"torch": [lambda x=x, c=cos, s=sin: rope_reference.apply_rope(x, c, s) for x in data]},
            )


def kv_writes(device: torch.device, tiny: bool) -> Cases:
    """Plain pages, and the quantised formats on the same rows."""
    for name, model in models(tiny).items():
        heads, d = model["G"], model["d"]
        for n in row_counts(tiny):
            pages, size = max(8, 2 * n // 64), 64
            cos, sin = angles(n, d, device)
            kv = torch.randn(2, n, heads, d, device=device, dtype=BF16)
            slots = torch.randperm(pages * size, device=device)[:n]
            pool = torch.zeros(2, pages, size, heads, d, device=device, dtype=BF16)

            rows = (kv[0], kv[1], cos, sin, slots)

            def plain(function: Any, pool: torch.Tensor = pool, a: tuple[Any, ...] = rows) -> torch.Tensor:
                function(*a, pool[0], pool[1])
                return pool.clone()

            yield Case(
                "kv_write",
                f"{name} N={n} G={heads}",
                "bf16",
                kv_write.kv_write_bounds(n, heads, d, 2),
                lambda p=plain: relative_error(p(kv_write.kv_write), p(kv_write_reference.kv_write)),
                0.0,
                lambda _, a=rows, p=pool: [lambda: kv_write.kv_write(*a, p[0], p[1])],
                baselines={"torch": [lambda a=rows, p=pool: kv_write_reference.kv_write(*a, p[0], p[1])]},
            )
            for label, bits in quantized_reference.FORMATS.items():
                means = quantized_reference.ChannelMeans(torch.randn(heads, d, device=device), torch.randn(heads, d, device=device))
                ours, theirs = (quantized_reference.new_pages(bits, pages, size, heads, d, device) for _ in range(2))

                quantized_rows = (*rows, means)

                def differing(a: Any = quantized_rows, ours: Any = ours, theirs: Any = theirs) -> float:
                    quantized_write.quantized_kv_write(*a, ours)
                    quantized_reference.quantized_kv_write(*a, theirs)
                    return max(float((x != y).float().mean()) for x, y in ((ours.k_codes, theirs.k_codes), (ours.v_codes, theirs.v_codes)))

                bounds = quantized_write.quantized_kv_write_bounds(n, heads, d, bits, 2)
                yield Case(
                    f"quantized_kv_write {label}",
                    f"{name} N={n} G={heads}",
                    label,
                    bounds,
                    differing,
                    4e-3,
                    lambda _, a=quantized_rows, p=ours: [lambda: quantized_write.quantized_kv_write(*a, p)],
                    baselines={"torch": [lambda a=quantized_rows, p=theirs: quantized_reference.quantized_kv_write(*a, p)]},
                )


def accepts(device: torch.device, tiny: bool) -> Cases:
    for name, model in models(tiny).items():
        for batch, drafts in ((2, 2),) if tiny else ((1, 5), (8, 5), (32, 4)):
            vocab, total = model["V"], batch * drafts
            p, q = (torch.softmax(torch.randn(rows, vocab, device=device) * 2, -1) for rows in (total + batch, total))
            tokens = torch.multinomial(q, 1)[:, 0]
            count = torch.full((batch,), drafts, device=device)
            arguments = (p, q, tokens, count, torch.arange(batch, device=device), torch.arange(batch, device=device) * 100, drafts)

            def check(config: dict[str, int] | None = None, a: tuple[Any, ...] = arguments) -> float:
                wrong = 0.0
                for seed in range(20):
                    b = (*a[:4], a[4] + 1000 * seed, *a[5:])
                    ours, theirs = accept.accept(*b, **(config or {})), accept_reference.accept(*b)
                    wrong += float((ours.num_accepted != theirs.num_accepted).sum() + (ours.next_token != theirs.next_token).sum())
                return wrong

            yield Case(
                "accept",
                f"{name} B={batch} K={drafts} V={vocab}",
                "f32",
                accept.accept_bounds(batch, total, vocab),
                check,
                0.0,
                lambda c, a=arguments: [lambda: accept.accept(*a, **(c or {}))],
                {f"tile {t}, {w} warps": {"tile": t, "num_warps": w} for t, w in ((4, 8), (8, 16), (16, 16), (4, 4))},
                check,
                {"torch": [lambda a=arguments: accept_reference.accept(*a)]},
            )
