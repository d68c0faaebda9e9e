"""Features that a prediction of the target's KV is made from: hidden states of the draft, and of the target's own first layers.

Axes: n tokens, E hidden size of the model that drafts, E_t hidden size of the target, F features, r rank of the predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codec.errors import PredictorError

EPS = 1e-6  # of a mean square


@dataclass(frozen=True)
class FeatureSpec:
    """Which features: layers after which the residual stream is taken (0 = embeddings), of the model that drafts (taps) and of the target.

    Target taps above 0 mean that the target's first layers are run again wherever a prediction is needed, which makes their own KV exact.
    """

    taps: tuple[int, ...]
    target_taps: tuple[int, ...] = (0,)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> FeatureSpec:
        """From a pack's settings. Raises KeyError when they are another program's."""
        return cls(tuple(int(i) for i in settings["taps"]), tuple(int(i) for i in settings["target_taps"]))

    def as_settings(self) -> dict[str, Any]:
        """Inverse of `from_settings`."""
        return {"taps": list(self.taps), "target_taps": list(self.target_taps)}

    @property
    def recomputed_layers(self) -> int:
        """First layers of the target that have to run for these features."""
        return max(self.target_taps, default=0)

    def num_features(self, draft_size: int, target_size: int) -> int:
        """F."""
        return len(self.taps) * draft_size + len(self.target_taps) * target_size


def rms_normalise(x: Tensor) -> Tensor:
    """x [*, E] divided by its root mean square over the last axis, float32. A residual stream grows layer by layer; its direction is what predicts."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def join_features(rows: Tensor | None, target_rows: Tensor | None) -> Tensor:
    """float32 [n, F] from hidden states of the draft, rows [n, taps, E], and of the target, [n, target taps, E_t]; either may be missing."""
    parts = [rms_normalise(x).flatten(1) for x in (rows, target_rows) if x is not None]
    if not parts:
        raise PredictorError("no features at all", "choose taps of the draft, or of the target, or both")
    return torch.cat(parts, -1)


class FeatureBuffer:
    """One request's features, a row per committed token, kept until the tokens' KV has been coded.

    Args:
        reduce: applied to appended hidden states [n, taps, E] -> [n, r] (`Predictor.reduce`), so that only the r numbers a prediction
            needs are kept; None keeps the hidden states themselves.
        dtype: of the stored rows.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor] | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        self._reduce, self._dtype = reduce, dtype
        self._rows: Tensor | None = None
        self._first = 0  # token of row 0
        self._length = 0
        self._holes: list[tuple[int, int]] = []

    @property
    def length(self) -> int:
        """Tokens accounted for, with or without features."""
        return self._length

    def append(self, rows: Tensor) -> None:
        """Features of the next tokens: hidden states rows [n, taps, E]."""
        if not len(rows):
            return
        rows = (self._reduce(rows) if self._reduce else rows).to(self._dtype)
        at = self._length - self._first
        self._reserve(at + len(rows), rows)
        assert self._rows is not None
        self._rows[at : at + len(rows)] = rows
        self._length += len(rows)

    def skip(self, count: int) -> None:
        """The next `count` tokens have no features here (their KV was restored or shared): `take` says so."""
        if count > 0:
            self._holes.append((self._length, self._length + count))
            self._length += count

    def truncate(self, length: int) -> None:
        """Forget everything from token `length` on."""
        if not 0 <= length <= self._length:
            raise PredictorError(f"cannot cut {self._length} feature rows to {length}", "truncate to a length reached before")
        self._length = length
        self._first = min(self._first, length)
        self._holes = [(a, min(b, length)) for a, b in self._holes if a < length]

    def forget(self, before: int) -> None:
        """Give back the rows of tokens before `before`, whose KV has been coded; `take` has nothing for them from now on."""
        if not self._first < before <= self._length:
            return
        if self._rows is not None:
            self._rows = self._rows[before - self._first : self._length - self._first].clone()
        self._first = before
        self._holes = [(0, before), *((max(a, before), b) for a, b in self._holes if b > before)]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored rows."""
        return 0 if self._rows is None else self._rows.numel() * self._rows.element_size()

    def take(self, start: int, end: int) -> Tensor | None:
        """Rows of tokens [start, end), [n, taps, E] or [n, r] in the stored dtype, or None when any of them has no features."""
        if not 0 <= start < end <= self._length or self._rows is None or any(a < end and start < b for a, b in self._holes):
            return None
        return self._rows[start - self._first : end - self._first]

    @torch.inference_mode(False)  # outlives the step that asked for it, and is written outside of steps too
    def _reserve(self, length: int, like: Tensor) -> None:
        if self._rows is not None and len(self._rows) >= length:
            return
        grown = torch.zeros(
            max(length, 64, 2 * (0 if self._rows is None else len(self._rows))), *like.shape[1:], dtype=self._dtype, device=like.device
        )
        if self._rows is not None:
            grown[: len(self._rows)] = self._rows
        self._rows = grown
