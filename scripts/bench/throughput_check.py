"""Is the text right? Greedy texts of two ways to decode, compared token by token before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

TIE_FLOAT32 = 1e-3
"""Two logits closer than this may swap places between two orders of float32 summation."""
TIE_BF16_STEPS = 8.0
"""The same in bfloat16, in steps of the format at the row's largest logit. Layers round too: on smollm2 the logits of either engine lie 1.3 steps
(root mean square) from those in float32, so the gap of two logits differs by 2.5 between two programs; three times that."""
STRAY_SHARE = 0.05
"""Of the tokens judged, so many may be near ties and not the judge's best (besides one for each text that parts). Rounding makes 1 to 2% of them
so, transformers' own text under its own model included; a decoder that is a little wrong everywhere makes more."""


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
    step = torch.exp2(logits.abs().max(-1).values.log2().floor() - 7)  # bfloat16 has 7 bits behind the leading one
    return (best - chosen) / (TIE_BF16_STEPS * step)


def compare(
    prompts: Sequence[list[int]], texts: Sequence[list[int]], others: Sequence[list[int]], judge: Judge, dtype: torch.dtype, *, exact: bool
) -> dict[str, Any]:
    """Compare greedy texts [B][n] with the others' of the same prompts.

    exact: every token has to be the same. Else the texts may part at a near tie: both tokens there, and all that follow in `texts`, must be the
    judge's best given the tokens before them, up to rounding, and few of them may need that excuse.

    Returns tokens, equal_tokens (of all prompts, up to where the texts part), equal_share, ties, worst (the largest shortfall over what is excused,
    0 when all is equal), judged and strays (tokens judged, and those not the best), failures (prompt, position, both tokens, shortfall), passed.
    """
    equal, ties, worst, judged, strays = 0, 0, 0.0, 0, 0
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
        largest = max(float(own.max()), float(shortfalls(logits[:1], other[at : at + 1], dtype)[0]))
        worst, judged, strays = max(worst, largest), judged + len(own), strays + int((own > 0).sum())
        if largest <= 1:
            ties += 1
        else:
            failures.append(where | {"shortfall": largest, "worst_position": at + int(own.argmax())})
    if strays > ties + STRAY_SHARE * judged:
        failures.append({"strays": strays, "judged": judged})
    tokens = sum(map(len, texts))
    return {
        "tokens": tokens,
        "equal_tokens": equal,
        "equal_share": equal / max(1, tokens),
        "ties": ties,
        "judged": judged,
        "strays": strays,
        "worst": worst,
        "failures": failures,
        "passed": not failures,
    }
