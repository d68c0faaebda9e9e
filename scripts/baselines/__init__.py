"""Peers to be beaten, one small interface: make_peer(name, layout), fit, encode to bytes, decode from bytes (base.py says what all
share)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from baselines.aqua import Aqua
from baselines.base import Peer
from baselines.cachegen import LEVELS, CacheGen
from baselines.calibration import Calibration, CalibrationAccumulator
from baselines.errors import NotFitted, TooLittleCalibration, UnknownPeer
from baselines.fp8 import Fp8
from baselines.kivi import Kivi
from baselines.kvtc import Kvtc
from baselines.lossless import Bf16Zstd
from baselines.turboquant import TurboQuant
from codec.spec import KvLayout

__all__ = [
    "PEERS",
    "Calibration",
    "CalibrationAccumulator",
    "NotFitted",
    "Peer",
    "TooLittleCalibration",
    "UnknownPeer",
    "make_peer",
    "select_peers",
]

KVTC_BUDGETS = (0.125, 0.25, 0.5, 1.0, 2.0, 3.0)


def _registry() -> dict[str, Callable[[KvLayout], Peer]]:
    peers: dict[str, Callable[[KvLayout], Peer]] = {"bf16+zstd": Bf16Zstd, "fp8": Fp8}
    for bits in (4, 2):
        peers[f"kivi-{bits}bit"] = partial(Kivi, bits=bits)
        peers[f"kivi-nowindow-{bits}bit"] = partial(Kivi, bits=bits, window=0)
    for bits in (4, 3, 2, 1):
        peers[f"turboquant-{bits}bit"] = partial(TurboQuant, bits=bits)
        peers[f"turboquant-mean-{bits}bit"] = partial(TurboQuant, bits=bits, remove_mean=True)
    for budget in reversed(KVTC_BUDGETS):
        peers[f"kvtc-{budget:g}bit"] = partial(Kvtc, budget_bits=budget)
    for quality in LEVELS:
        peers[f"cachegen-{quality}"] = partial(CacheGen, quality=quality)
        peers[f"cachegen-anchors-{quality}"] = partial(CacheGen, quality=quality, anchors=True)
    for bits in (3, 2, 1):
        peers[f"aqua-kv-{bits}bit"] = partial(Aqua, bits=bits)
    return peers


PEERS = _registry()
"""Every peer by full name, mildest of each family first."""


def make_peer(name: str, layout: KvLayout) -> Peer:
    """A new, unfitted peer; UnknownPeer lists the names."""
    if name not in PEERS:
        raise UnknownPeer(f"unknown peer {name!r}", f"choose from {', '.join(PEERS)}")
    return PEERS[name](layout)


def select_peers(words: list[str]) -> list[str]:
    """Full names for a list of full names or families (kvtc, turboquant-mean, ...): a family stands for all its points."""
    chosen: list[str] = []
    for word in words:
        family = [name for name in PEERS if name == word or name.rsplit("-", 1)[0] == word]
        if not family:
            families = sorted({name.rsplit("-", 1)[0] for name in PEERS})
            raise UnknownPeer(f"unknown method {word!r}", f"choose from {', '.join([*families, *PEERS])}")
        chosen += [name for name in family if name not in chosen]
    return chosen
