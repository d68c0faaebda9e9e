"""Is the text right? Greedy texts of two ways to decode, compared token by token before anything is timed."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

TIE_FLOAT32 = 1e-3
"""Two logits closer than this may swap places between two orders of float32 summation."""
TIE_BF16_STEPS = 4.0
"""The same in bfloat16, in steps of the format at the row's largest logit: 2 for the rounding of two logits in two programs, 2 for the layers'."""


class Judge(Protocol):
    def logits(self, prompt: list[int], text: list[int]) -> torch.Tensor:
        """[len(text), V] float32: the model's opinion of each token of a text."""
        ...


def shortfalls(logits: torch.Tensor, text: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """How far each token lies below the row's best, over what rounding in `dtype` excuses: [n]; at most 1 is a near tie."""
    best = logits.max(-1).values
    chosen = logits.gather(-1, torch.tensor(text, device=logits.device)[:, None])[:, 0]
    if dtype == torch.float32:
        return (best - chosen) / TIE_FLOAT32
    step = torch.exp2(logits.abs().max(-1).values.log2().floor() - 7)   # bfloat16 has 7 bits behind the leading one
    return (best - chosen) / (TIE_BF16_STEPS * step)


def compare(
    prompts: Sequence[list[int]], texts: Sequence[list[int]], others: Sequence[list[int]], judge: Judge, dtype: torch.dtype, *, exact: bool
) -> dict[str, Any]:
    """Compare greedy texts [B][n] with the others' of the same prompts.

    exact: every token has to be the same. Else the texts may part at a near tie: both tokens there, and all that follow in `texts`, must be the
    judge's best given the tokens before them, up to rounding.

    Returns tokens, equal_tokens (of all prompts, up to where the texts part), equal_share, ties, worst (the largest shortfall over what is excused,
    0 when all is equal), failures (prompt, position, both tokens, shortfall), passed.
    """
    equal, ties, worst = 0, 0, 0.0
    failures: list[dict[str, Any]] = []
    for number, (prompt, text, other) in enumerate(zip(prompts, texts, others, strict=True)):
        if text == other:
            equal += len(text)
            continue
        at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
        equal += at
        where: dict[str, Any] = {"prompt": number, "position": at}
        if len(text) != len(other):
            failures.append(where | {"lengths": [len(text), len(other)]})
            continue
        where |= {"token": text[at], "other": other[at]}
        if exact:
            failures.append(where)
            continue
        logits = judge.logits(prompt, text)[at:]
        own = shortfalls(logits, text[at:], dtype)
        largest = max(float(own.max()), float(shortfalls(logits[:1], other[at:at + 1], dtype)[0]))
        worst, ties = max(worst, largest), ties + 1
        if not largest <= 1:
            failures.append(where | {"shortfall": largest, "worst_position": at + int(own.argmax())})
    tokens = sum(map(len, texts))
    return {"tokens": tokens, "equal_tokens": equal, "equal_share": equal / max(1, tokens), "ties": ties - sum("shortfall" in f for f in failures),
            "worst": worst, "failures": failures, "passed": not failures}
