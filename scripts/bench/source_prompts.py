"""Long prompts for benchmarks that need a text anybody has: this project's sources."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

from engine.engine import Engine

SOURCES = Path(__file__).resolve().parents[2] / "engine" / "runtime"


def source_tokens(engine: Engine, lengths: list[int]) -> list[list[int]]:
    """Token ids of prompts of these lengths, which begin differently."""
    texts = [file.read_text(encoding="utf-8") for file in sorted(SOURCES.glob("*.py"))]
    ids = [token for text in texts if text for token in engine.encode(text[: engine.core.context])]
    if len(ids) < sum(lengths):
        raise SystemExit(f"the sources have {len(ids)} tokens, fewer than all lengths together")
    return [ids[end - length : end] for end, length in zip(accumulate(lengths), lengths, strict=True)]
