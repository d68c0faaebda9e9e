"""Cases of bench_kernels: what stands around the codec's products, features before them and choices by rate."""

from __future__ import annotations

from typing import Any

import torch

from bench.kernel_shapes import BF16, Cases
from bench.kernel_timing import Case, relative_error
from codec.choice import RateChoice
from codec.rate import NUM_CLASSES, EntropyModel
from kernels.choose_gains import reference as gains_reference
from kernels.choose_gains import triton as choose
from kernels.normed_linear import reference as normed_reference
from kernels.normed_linear import triton as normed
from kernels.quantised_sums import reference as sums_reference
from kernels.quantised_sums import triton as sums
from kernels.reconstruct import reference as reconstruct_reference
from kernels.reconstruct import triton as reconstruct

_CHECKED = 64  # tokens of an exact comparison
_STEP, _ROUNDING, _EPS = 1.0, 0.42, 1e-6


def features(device: torch.device, tiny: bool) -> Cases:
    """States of a 0.5B draft and of a 1.5B target to the rank of the qwen pair's predictor."""
    for tokens, states, size, rank in [(70, 2, 40, 24)] if tiny else [(8192, 9, 896, 1088), (8192, 2, 1536, 1088)]:
        rows = torch.randn(tokens, states, size, device=device, dtype=BF16)
        weight = normed_reference.split(torch.randn(states * size, rank, device=device) / (states * size) ** 0.5)
        whole = weight.high.float() + weight.low.float()

        def run(a: Any = (rows, weight)) -> torch.Tensor:
            return normed.normed_linear(*a, _EPS)

        def error(f: Any = run, a: Any = (rows, weight)) -> float:
            return relative_error(f()[:_CHECKED], normed_reference.normed_linear(a[0][:_CHECKED], a[1], _EPS))

        def plain(rows: Any = rows, whole: Any = whole) -> torch.Tensor:
            return torch.nn.functional.rms_norm(rows.float(), rows.shape[-1:], eps=_EPS).flatten(1) @ whole

        bounds, shape = normed.normed_linear_bounds(tokens, states, size, rank), f"T={tokens} {states}x{size} r={rank}"
        yield Case("normed_linear", shape, "bf16", bounds, error, 1e-4, lambda _, f=run: [f], baselines={"torch": [plain]}, matrix=True)


def choices(device: torch.device, tiny: bool) -> Cases:
    """Components of spans as `balanced` has them: most integers are 0."""
    choice, generator = RateChoice(EntropyModel.laplace(), device), torch.Generator(device=device).manual_seed(4)
    for tokens, components in [(70, 40)] if tiny else [(8192, 1742), (4096, 3021)]:
        classes = torch.randint(NUM_CLASSES // 4, NUM_CLASSES // 2, (components,), dtype=torch.int32, device=device, generator=generator)
        x = torch.randn(tokens, components, device=device, generator=generator) * 0.7
        q = (x.sign() * torch.floor(x.abs() + _ROUNDING)).to(torch.int32)
        shifts, steps = torch.zeros(tokens, dtype=torch.int32, device=device), torch.full((tokens,), _STEP, device=device)
        gains = torch.full((tokens,), 8, dtype=torch.uint8, device=device)
        narrow, shape = q.to(torch.int16).t().contiguous().t(), f"T={tokens} K={components}"
        out, places = torch.zeros(tokens, components, dtype=BF16, device=device), torch.arange(tokens, device=device)
        none = torch.zeros(0, dtype=torch.int64, device=device)
        ends, columns = torch.tensor([0, tokens], device=device), torch.arange(components, device=device)
        escapes = reconstruct_reference.Escapes(none, ends, torch.zeros_like(ends))

        def made(a: Any = (narrow, classes, shifts, gains, steps, choice.points, escapes, places, columns, out)) -> torch.Tensor:
            reconstruct.reconstruct(*a)
            return a[-1]

        def made_error(f: Any = made, a: Any = (narrow, classes, shifts, gains, steps, choice.points, escapes, places, columns)) -> float:
            want = torch.zeros(len(a[0]), len(a[-1]), dtype=BF16, device=a[0].device)
            reconstruct_reference.reconstruct(*a, want)
            return float((f() != want).sum())

        def chosen(a: Any = (q, classes, shifts, choice.prices)) -> torch.Tensor:
            return choose.choose_gains(*a)

        def chosen_error(f: Any = chosen, a: Any = (q, classes, shifts, choice.prices)) -> float:
            return float((f()[:_CHECKED] != gains_reference.choose_gains(a[0][:_CHECKED], a[1], a[2][:_CHECKED], a[3])).sum())

        kept, absolute = torch.full((tokens,), components, device=device), x.abs()

        def saved(a: Any = (absolute, steps, kept, _ROUNDING)) -> torch.Tensor:
            return sums.saved_energy(*a)

        def saved_error(f: Any = saved, a: Any = (absolute, steps, kept, _ROUNDING)) -> float:
            return relative_error(f(), sums_reference.saved_energy(*a))

        bounds = reconstruct.reconstruct_bounds(tokens, components, 2)
        yield Case("reconstruct", shape, "int16", bounds, made_error, 0.0, lambda _, f=made: [f])
        bounds = choose.choose_gains_bounds(tokens, components)
        yield Case("choose_gains", shape, "int32", bounds, chosen_error, 0.0, lambda _, f=chosen: [f])
        bounds = sums.quantised_sums_bounds(tokens, components)
        yield Case("saved_energy", shape, "float32", bounds, saved_error, 1e-5, lambda _, f=saved: [f])
