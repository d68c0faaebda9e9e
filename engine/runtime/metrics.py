"""Counters of one request's speculation, and their JSON form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SpeculationMetrics:
    """What speculation did for one request; only what lies in the request's final text is counted.

    steps: target forwards after the prompt. new_tokens: tokens those gave. proposed, accepted: drafts. proposed_at[i], accepted_at[i]:
    steps that proposed an (i+1)-th draft, and that kept it. draft_s, verify_s: host seconds of the request's steps spent proposing and
    verifying (a batch's time counts for each of its requests; on a GPU launches return early, so the two shift, their sum does not).
    from_text, from_text_accepted: those of the drafts that the request's own text gave. from_seen, from_seen_accepted: that other texts of
    its namespace gave.
    """

    drafter: str = "none"
    steps: int = 0
    new_tokens: int = 0
    proposed: int = 0
    accepted: int = 0
    proposed_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    draft_s: float = 0.0
    verify_s: float = 0.0
    from_text: int = 0
    from_text_accepted: int = 0
    from_seen: int = 0
    from_seen_accepted: int = 0

    def observe(self, proposed: int, accepted: int, new_tokens: int, *, given: bool = False, seen: bool = False) -> None:
        """Count one step of a request. given: its drafts were what followed an earlier occurrence of its last tokens; seen: in another text."""
        self.steps += 1
        self.new_tokens += new_tokens
        if not proposed:
            return
        self.proposed += proposed
        self.accepted += accepted
        if given and seen:
            self.from_seen += proposed
            self.from_seen_accepted += accepted
        elif given:
            self.from_text += proposed
            self.from_text_accepted += accepted
        proposed_at, accepted_at = self.proposed_at, self.accepted_at
        missing = proposed - len(proposed_at)
        if missing > 0:
            proposed_at += [0] * missing
            accepted_at += [0] * missing
        for i in range(proposed):
            proposed_at[i] += 1
        for i in range(accepted):
            accepted_at[i] += 1

    @property
    def acceptance_rate(self) -> float:
        """Share of proposed drafts that were kept; 0 when none were proposed."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def tokens_per_step(self) -> float:
        """New tokens per target forward; 0 before the first."""
        return self.new_tokens / self.steps if self.steps else 0.0

    @property
    def accepted_by_position(self) -> list[float]:
        """For each draft position, the share of steps proposing it that kept it (so all before it were kept too)."""
        return [kept / tried for kept, tried in zip(self.accepted_at, self.proposed_at, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """The `speculation` object of the command line's JSON."""
        return {
            "drafter": self.drafter,
            "steps": self.steps,
            "proposed": self.proposed,
            "accepted": self.accepted,
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_step": self.tokens_per_step,
            "accepted_by_position": self.accepted_by_position,
            "draft_s": self.draft_s,
            "verify_s": self.verify_s,
            "proposed_from_text": self.from_text,
            "accepted_from_text": self.from_text_accepted,
            "proposed_from_seen": self.from_seen,
            "accepted_from_seen": self.from_seen_accepted,
        }
