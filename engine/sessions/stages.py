"""Seconds of a restore and of coding: of the stages, without waiting for the device between them, and by the number of tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


class StageClock:
    """Marks ends of stages; a stage may be marked more than once.

    On a GPU marks are events on the current stream: they cost nothing, and a stage's seconds are those between two marks on that stream. waits: wait
    for the device at every mark instead, so that nothing overlaps and each stage shows what it takes alone.
    """

    def __init__(self, device: torch.device, *, waits: bool = False) -> None:
        self.device, self.waits = device, waits
        self._marks: list[tuple[str, float, torch.cuda.Event | None]] = []
        self.mark("")

    def mark(self, stage: str) -> None:
        """The stage ends here, and the next one begins."""
        event = None
        if self.device.type == "cuda":
            if self.waits:
                torch.cuda.synchronize(self.device)
            else:
                event = torch.cuda.Event(enable_timing=True)
                event.record(torch.cuda.current_stream(self.device))
        self._marks.append((stage, time.perf_counter(), event))

    def seconds(self) -> dict[str, float]:
        """Of every stage; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {}
        for (_, began, first), (stage, ended, last) in zip(self._marks, self._marks[1:], strict=False):
            took = ended - began if first is None or last is None else first.elapsed_time(last) / 1000
            found[stage] = found.get(stage, 0.0) + took
        return found


EXPECTED_RESUMES = 2
"""How often a session that is written is expected to be taken up: an assumption, not a measurement. What coding takes has to come in by then."""


@dataclass(frozen=True)
class Rates:
    """Seconds of restoring, of recomputing and of coding n tokens: *_s + n * *_token_s + n * n / 2 * *_pair_s, the last for a token and one before it
    that it attends to (none are coded). lend_token_s: of decoding a token of another text that restored ones refer to."""

    restore_s: float
    restore_token_s: float
    recompute_s: float
    recompute_token_s: float
    code_s: float = 0.0
    code_token_s: float = 0.0
    lend_token_s: float = 0.0
    restore_pair_s: float = 0.0
    recompute_pair_s: float = 0.0

    def restoring(self, tokens: int, lent: int = 0) -> float:
        """Seconds to restore so many tokens from coded spans that refer to so many of other texts."""
        return self.restore_s + tokens * (self.restore_token_s + tokens / 2 * self.restore_pair_s) + lent * self.lend_token_s

    def recomputing(self, tokens: int) -> float:
        """Seconds of the target's own pass over them."""
        return self.recompute_s + tokens * (self.recompute_token_s + tokens / 2 * self.recompute_pair_s)

    def saved_token_s(self, tokens: int) -> float:
        """Seconds a token of a text of so many that restoring saves, what it costs to begin left out; never less than 0."""
        each = self.recompute_token_s - self.restore_token_s
        return max(0.0, each + tokens / 2 * (self.recompute_pair_s - self.restore_pair_s))

    def pays(self, tokens: int, lent: int = 0) -> bool:
        """Whether restoring them is faster than recomputing them."""
        return self.restoring(tokens, lent) < self.recomputing(tokens)

    def lending_pays(self, tokens: int, lent: int) -> bool:
        """Whether decoding so many tokens of other texts costs less than restoring `tokens` saves over recomputing them."""
        return lent * self.lend_token_s < tokens * (self.recompute_token_s - self.restore_token_s)

    def coding(self, tokens: int) -> float:
        """Seconds to code so many tokens."""
        return self.code_s + tokens * self.code_token_s if tokens else 0.0

    def coding_pays(self, new: int, tokens: int) -> bool:
        """Whether coding `new` of a session's tokens, and restoring all of them EXPECTED_RESUMES times, is faster than recomputing them as often."""
        return self.coding(new) + EXPECTED_RESUMES * self.restoring(tokens) < EXPECTED_RESUMES * self.recomputing(tokens)

    def coding_reason(self, new: int, tokens: int) -> str:
        """That comparison in one clause."""
        what = f"{new} tokens take about {self.coding(new):.3f} s to code and all {tokens} {self.restoring(tokens):.3f} s to restore here"
        return f"{what}, {self.recomputing(tokens):.3f} s to recompute; counted for {EXPECTED_RESUMES} resumes"

    def reason(self, tokens: int) -> str:
        """The comparison in one clause."""
        return (
            f"{tokens} tokens take about {self.restoring(tokens):.3f} s to restore here and {self.recomputing(tokens):.3f} s to recompute"
        )
