"""Baselines to be beaten, one small interface: make_baseline(name, layout), fit, encode to bytes, decode from bytes (base.py says what all
share)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from baselines.aqua import Aqua
from baselines.base import Baseline
from baselines.cachegen import LEVELS, CacheGen
from baselines.calibration import Calibration, CalibrationAccumulator
from baselines.errors import NotFitted, TooLittleCalibration, UnknownBaseline
from baselines.fp8 import Fp8
from baselines.kivi import Kivi
from baselines.kvtc import Kvtc
from baselines.lossless import Bf16Zstd
from baselines.turboquant import TurboQuant
from codec.spec import KvLayout

__all__ = [
    "BASELINES",
    "Baseline",
    "Calibration",
    "CalibrationAccumulator",
    "NotFitted",
    "TooLittleCalibration",
    "UnknownBaseline",
    "make_baseline",
    "select_baselines",
]

KVTC_BUDGETS = (0.125, 0.25, 0.5, 1.0, 2.0, 3.0)


def _registry() -> dict[str, Callable[[KvLayout], Baseline]]:
    baselines: dict[str, Callable[[KvLayout], Baseline]] = {"bf16+zstd": Bf16Zstd, "fp8": Fp8}
    for bits in (4, 2):
        baselines[f"kivi-{bits}bit"] = partial(Kivi, bits=bits)
        baselines[f"kivi-nowindow-{bits}bit"] = partial(Kivi, bits=bits, window=0)
    for bits in (4, 3, 2, 1):
        baselines[f"turboquant-{bits}bit"] = partial(TurboQuant, bits=bits)
        baselines[f"turboquant-mean-{bits}bit"] = partial(TurboQuant, bits=bits, remove_mean=True)
    for budget in reversed(KVTC_BUDGETS):
        baselines[f"kvtc-{budget:g}bit"] = partial(Kvtc, budget_bits=budget)
    for quality in LEVELS:
        baselines[f"cachegen-{quality}"] = partial(CacheGen, quality=quality)
        baselines[f"cachegen-anchors-{quality}"] = partial(CacheGen, quality=quality, anchors=True)
    for bits in (3, 2, 1):
        baselines[f"aqua-kv-{bits}bit"] = partial(Aqua, bits=bits)
    return baselines


BASELINES = _registry()
"""Every baseline by full name, mildest of each family first."""


def make_baseline(name: str, layout: KvLayout) -> Baseline:
    """A new, unfitted baseline; UnknownBaseline lists the names."""
    if name not in BASELINES:
        raise UnknownBaseline(f"unknown baseline {name!r}", f"choose from {', '.join(BASELINES)}")
    return BASELINES[name](layout)


def select_baselines(words: list[str]) -> list[str]:
    """Full names for a list of full names or families (kvtc, turboquant-mean, ...): a family stands for all its points."""
    chosen: list[str] = []
    for word in words:
        family = [name for name in BASELINES if name == word or name.rsplit("-", 1)[0] == word]
        if not family:
            families = sorted({name.rsplit("-", 1)[0] for name in BASELINES})
            raise UnknownBaseline(f"unknown method {word!r}", f"choose from {', '.join([*families, *BASELINES])}")
        chosen += [name for name in family if name not in chosen]
    return chosen
