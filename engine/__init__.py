"""The decoder engine: models, paged KV, speculative decoding, sessions. `Engine` is the front door."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.runtime.sampling import SamplingParams

__all__ = ["Engine", "SamplingParams"]


def __getattr__(name: str) -> Any:
    # imported when asked for: `engine.hub.environment` must be able to look for a clashing package before anything heavy is loaded
    if name == "Engine":
        from engine.engine import Engine

        return Engine
    if name == "SamplingParams":
        from engine.runtime.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
