"""Cases of bench_kernels: the codec on the device, from pool pages to words and back."""

from __future__ import annotations

from typing import Any

import torch

from bench.kernel_shapes import BF16, Cases, angles, models
from bench.kernel_timing import Case, relative_error
from kernels.rans import reference as rans_reference
from kernels.rans import triton as rans
from kernels.residual_decode import reference as decode_reference
from kernels.residual_decode import triton as decode
from kernels.rope import reference as rope_reference


def _product_candidates() -> dict[str, decode.ProductConfig]:
    tiles = ((128, 256, 64, 8, 8, 4), (128, 256, 64, 16, 8, 3), (128, 128, 64, 8, 4, 3), (128, 128, 64, 8, 8, 4), (256, 128, 64, 8, 8, 3))
    return {repr(config): config for config in (decode.ProductConfig(*tile) for tile in tiles)}


def _coded_shapes(tiny: bool) -> list[tuple[str, int, int, int]]:
    """(model, tokens, components, rank); 1,742 components is `balanced` of the qwen pair (results/calibrate-h100-qwen2.5-coder.json)."""
    return [("toy", 40, 24, 16)] if tiny else [("1.5B", 4096, 1742, 512), ("8B", 4096, 1742, 512)]


def residuals(device: torch.device, tiny: bool) -> Cases:
    for name, tokens, components, rank in _coded_shapes(tiny):
        model = models(tiny)[name]
        layers, heads, d = model["L"], model["G"], model["d"]
        dim, pages = layers * 2 * heads * d, tokens // 64 + 1
        small = decode.ProductConfig(32, 32, 16, 8, 4, 2) if tiny else None
        kv = torch.randn(layers, 2, pages, 64, heads, d, device=device, dtype=BF16)
        slots = torch.randperm(pages * 64, device=device)[:tokens]
        cos, sin = angles(tokens, d, device)
        mean = torch.randn(dim, device=device)
        shape = f"{name} T={tokens} D={dim} K={components} r={rank}"
        latents = torch.randn(tokens, rank, device=device, dtype=BF16)
        back = torch.randn(components + rank, dim, device=device, dtype=BF16) / components**0.5
        q = torch.randint(-20, 20, (components, tokens), device=device, dtype=torch.int16).t()
        step = torch.rand(tokens, device=device) + 0.5
        rest = (step, latents, back, mean)

        def decoded(config: Any, q: Any = q, rest: Any = rest, a: Any = (kv, slots, cos, sin), small: Any = small) -> torch.Tensor:
            decode.residual_decode_pages(q, *rest, *a, config=config or small)
            return a[0]

        def decode_error(config: Any = None, f: Any = decoded, q: Any = q, rest: Any = rest, a: Any = (kv, slots, cos, sin)) -> float:
            part, got = slice(0, min(512, len(q))), f(config).clone()
            want = torch.zeros_like(got)
            decode_reference.residual_decode_pages(
                q[part], rest[0][part], rest[1][part], *rest[2:], want, a[1][part], a[2][part], a[3][part]
            )
            return relative_error(got.flatten(2, 3)[:, :, a[1][part]], want.flatten(2, 3)[:, :, a[1][part]])

        def torch_decoded(q: Any = q, rest: Any = rest, a: Any = (kv, slots, cos, sin)) -> None:
            y = torch.cat([(q.float() * rest[0][:, None]).to(BF16), rest[1]], 1) @ rest[2] + rest[3].to(BF16)
            y = y.unflatten(1, (a[0].shape[0], 2, *a[0].shape[-2:]))
            flat = a[0].flatten(2, 3)
            flat[:, 0, a[1]] = rope_reference.apply_rope(y[:, :, 0], a[2], a[3]).transpose(0, 1)
            flat[:, 1, a[1]] = y[:, :, 1].transpose(0, 1)

        yield Case(
            "residual_decode_pages",
            shape,
            "bf16",
            decode.residual_decode_bounds(tokens, components + rank, dim, 2),
            decode_error,
            8e-3,
            lambda c, f=decoded: [lambda: f(c)],
            {} if tiny else _product_candidates(),
            decode_error,
            {"torch": [torch_decoded]},
            {"tokens/s": tokens},
            True,
        )


def _tables(device: torch.device) -> tuple[rans_reference.RansTables, torch.Tensor]:
    """Laplace tables of 105 scale classes, eight an octave from 2^-4 on, and the classes' scales."""
    scales = torch.exp2(torch.arange(105, dtype=torch.float64) / 8 - 4)
    freqs, limits = [], []
    for scale in scales.tolist():
        limit = min(max(int(6 * scale) + 2, 2), 2047)
        edge = torch.exp(-(torch.arange(1, limit + 2, dtype=torch.float64) - 0.42) / (scale / 2**0.5))
        side = 0.5 * (edge[:-1] - edge[1:])
        p = torch.cat([side.flip(0), 1 - edge[:1], side, edge[-1:]])
        freq = (p * (rans_reference.TOTAL - len(p))).long() + 1
        freq[freq.argmax()] += rans_reference.TOTAL - int(freq.sum())
        freqs.append(freq)
        limits.append(limit)
    gains = torch.full((16,), rans_reference.TOTAL // 16)
    return rans_reference.build_tables(torch.cat(freqs), torch.tensor(limits), gains).to(device), scales.float().to(device)


def entropy_coders(device: torch.device, tiny: bool) -> Cases:
    tables, scales = _tables(device)
    # `balanced` and `near-lossless` of the qwen pair with the lanes that codec/codec.py gives them, rank 512 for the prediction
    problems = [(70, 12, 4, 24)] if tiny else [(16_384, 1742, 4, 512), (4096, 1742, 4, 512), (16_384, 2843, 2, 0)]
    for tokens, components, per_lane, rank in problems:
        # Standard deviations from 8 steps down to a quarter of one, falling so that a symbol takes 1.2 bits, as it does for that pair.
        octave = 5 - 5 * torch.linspace(0, 1, components, device=device) ** 0.3
        classes = ((octave - 2 + 4) * 8).round().to(torch.int32)
        uniform = torch.rand(components, tokens, device=device) - 0.5
        x = -torch.sign(uniform) * torch.log1p(-2 * uniform.abs().clamp_max(0.499999)) * (scales[classes.long()] / 2**0.5)[:, None]
        q = (torch.sign(x) * torch.floor(x.abs() + 0.42)).clamp(-30_000, 30_000).to(torch.int16).t()
        del uniform, x
        gains = torch.randint(6, 11, (tokens,), device=device).to(torch.uint8)
        starts = torch.arange(0, tokens + 64, 64, device=device).clamp_max(tokens)

        def encoded(a: Any = (tables, q, classes, gains, starts, per_lane)) -> rans_reference.RansStreams:
            return rans.rans_encode(*a)

        coded = encoded()
        words = int(coded.word_starts[-1])
        dense = rans_reference.RansStreams(coded.states, coded.words[:words].clone(), coded.word_starts)
        limits = (tables.info & 4095).long()[rans_reference.entry_classes(classes, None, gains, 105)]
        want = torch.where(q.abs() > limits, limits + 1, q.long()).to(torch.int16)
        del limits, coded

        def decoded(a: Any = (tables, dense, classes, starts, per_lane), n: int = tokens) -> rans_reference.RansDecoded:
            return rans.rans_decode(*a, num_tokens=n)

        def check(f: Any = decoded, want: torch.Tensor = want, gains: torch.Tensor = gains) -> float:
            got = f()
            return float((got.q != want).sum() + (got.gains != gains).sum() + (~got.intact).sum())

        def twin(a: Any = (tables, q, classes, gains, starts, per_lane), dense: Any = dense) -> float:
            rows, cut = min(64, len(a[1])), torch.tensor([0, min(64, len(a[1]))], device=a[1].device)
            small = rans_reference.rans_encode(a[0], a[1][:rows], a[2], a[3][:rows], cut, a[5])
            lanes = len(small.states)
            return float((small.words != dense.words[: len(small.words)]).sum() + (small.states != dense.states[:lanes]).sum())

        shape = f"T={tokens} K={components} lane={per_lane} {16 * words / tokens / components:.2f} b/symbol"
        bounds, count = rans.rans_bounds(tokens, components, words), {"symbols/s": tokens * (components + 1.0), "tokens/s": tokens}
        yield Case("rans_encode", shape, "int16", bounds, twin, 0.0, lambda _, f=encoded: [f], units=count)
        yield Case("rans_decode", shape, "int16", bounds, check, 0.0, lambda _, f=decoded: [f], units=count)
        if rank:
            model = models(tiny)["toy" if tiny else "1.5B"]
            layers, heads, d = model["L"], model["G"], model["d"]
            dim, pages = layers * 2 * heads * d, tokens // 64 + 1
            kv = torch.zeros(layers, 2, pages, 64, heads, d, device=device, dtype=BF16)
            pages_of = (kv, torch.randperm(pages * 64, device=device)[:tokens], *angles(tokens, d, device))
            rest = (
                torch.ones(tokens, device=device),
                torch.randn(tokens, rank, device=device, dtype=BF16),
                torch.randn(components + rank, dim, device=device, dtype=BF16) / 50,
                torch.zeros(dim, device=device),
            )
            small = decode.ProductConfig(32, 32, 16, 8, 4, 2) if tiny else None

            def whole(f: Any = decoded, rest: Any = rest, a: Any = pages_of, small: Any = small) -> None:
                decode.residual_decode_pages(f().q, *rest, *a, config=small)

            def page_error(f: Any = whole, exact: Any = check, rest: Any = rest, a: Any = pages_of, want: torch.Tensor = want) -> float:
                if exact():
                    return float("inf")
                f()
                few, expected = slice(0, 64), torch.zeros_like(a[0])
                tokenwise = (rest[0][few], rest[1][few], *rest[2:])
                decode_reference.residual_decode_pages(want[few], *tokenwise, expected, *(x[few] for x in a[1:]))
                return relative_error(*(x.flatten(2, 3)[:, :, a[1][few]] for x in (a[0], expected)))

            moved = 2 * words + tokens * dim * 2 + (components + rank) * dim * 2
            yield Case(
                "page_run (rans+product)",
                shape,
                "bf16",
                (moved, 2 * tokens * (components + rank) * dim),
                page_error,
                8e-3,
                lambda _, f=whole: [f],
                units={"tokens/s": tokens},
                matrix=True,
            )
