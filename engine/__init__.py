"""The decoder engine: models, paged KV, speculative decoding, sessions. `Engine` is the front door."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.runtime.sampling import SamplingParams

__all__ = ["Engine", "SamplingParams"]


def __getattr__(name: str) -> Any:
    # imported when asked for, once it is known that `kernels` is ours
    from engine.hub.environment import kernels_package_clash

    if clash := kernels_package_clash():
        raise ImportError(f"{clash[0]} ({clash[1]})")
    if name == "Engine":
        from engine.engine import Engine

        return Engine
    if name == "SamplingParams":
        from engine.runtime.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
