"""The only place where logits become probabilities, for the draft's proposals and the target's verification alike.

Axes: n rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.errors import InvalidOption
from engine.inputs import is_finite, is_whole, plain_number, shown
from kernels.accept import LANE_DRAFT, sample_rows
from kernels.philox import philox_uniform

NUCLEUS_CANDIDATES = 1024  # largest logits tried first for top-p; a full sort of the vocabulary only when they do not hold the mass
MAX_DRAFT_LENGTH = 64


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued.

    max_new_tokens: at most this many tokens. temperature: 0 is greedy. top_k: keep the k most probable tokens, 0 keeps all (ties with
    the k-th stay). top_p: keep the smallest set of most probable tokens holding this mass, 1 keeps all. min_p: drop tokens less probable
    than min_p times the most probable one. The filters apply in this order, after the temperature. seed: of the counter-based random
    numbers; None takes a fresh one, and lets the automatic draft length look at the load of the whole batch (a given seed promises the
    same text in any batch). stop: strings that end the text (left out of it). stop_token_ids: tokens that end it (kept in the ids, not
    in the text). ignore_eos: go on after an end-of-sequence token. draft_length: tokens drafted a step, 0 for no speculation, "auto" for
    the length with the best expected tokens per second.

    Raises InvalidOption for a value outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    draft_length: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        self._make_plain()
        _require(
            is_whole(self.max_new_tokens) and 1 <= self.max_new_tokens < 2**63,
            "max_new_tokens",
            self.max_new_tokens,
            "give a whole number from 1 on",
        )
        _require(
            # beyond these float32 makes 0 or infinity of it
            is_finite(self.temperature) and (self.temperature == 0 or 1e-10 <= self.temperature <= 1e10),
            "temperature",
            self.temperature,
            "0 is greedy, 1 the model's own; give 0, or 1e-10 to 1e10",
        )
        _require(is_whole(self.top_k) and 0 <= self.top_k < 2**63, "top_k", self.top_k, "give a whole number, 0 for no limit")
        _require(is_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "give a number above 0 and up to 1, 1 for no limit")
        _require(is_finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "give a number from 0 to 1, 0 for no limit")
        _require(
            self.seed is None or (is_whole(self.seed) and 0 <= self.seed < 2**63),
            "seed",
            self.seed,
            "give a whole number from 0 to 2^63 - 1",
        )
        strings = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        _require(strings, "stop", self.stop, "give a tuple of non-empty strings")
        _require(
            isinstance(self.stop_token_ids, tuple) and all(is_whole(t) and 0 <= t < 2**63 for t in self.stop_token_ids),
            "stop_token_ids",
            self.stop_token_ids,
            "give a tuple of token ids",
        )
        automatic = isinstance(self.draft_length, str) and self.draft_length == "auto"
        fixed = is_whole(self.draft_length) and 0 <= int(self.draft_length if not automatic else 0) <= MAX_DRAFT_LENGTH
        _require(automatic or fixed, "draft_length", self.draft_length, f'give a whole number from 0 to {MAX_DRAFT_LENGTH}, or "auto"')

    def _make_plain(self) -> None:
        """Numbers of numpy and torch become Python's, lists tuples, and None nothing to stop at; what is neither stays, to be refused."""
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "draft_length"):
            object.__setattr__(self, name, plain_number(getattr(self, name)))
        for name in ("stop", "stop_token_ids"):
            given = getattr(self, name)
            given = given.tolist() if hasattr(given, "tolist") else given
            if given is None or isinstance(given, list):
                object.__setattr__(self, name, tuple(plain_number(item) for item in given or ()))

    @property
    def greedy(self) -> bool:
        """True when the most probable token is always taken."""
        return self.temperature == 0


def _require(valid: bool, name: str, value: object, remedy: str) -> None:
    if not valid:
        raise InvalidOption(f"{name} cannot be {shown(value)}", remedy)


def probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Each row's distribution after its request's temperature and filters.

    logits [n, V] any float type; params: one per row. Returns [n, V] float32, rows summing to 1; a greedy row is a point mass at its
    largest logit. Every row depends on itself alone, so it is the same in any batch. Filters are thresholds on the logits: nothing is
    sorted unless top_k or top_p asks for it, and then only the largest logits in almost all cases.
    """
    device = logits.device
    temperature = torch.tensor([p.temperature or 1.0 for p in params], dtype=torch.float32, device=device)
    scaled = logits.float()
    scaled = (scaled - scaled.amax(-1, keepdim=True)) / temperature[:, None]  # <= 0, so that no temperature can overflow
    cut = _cuts(scaled, params)
    if cut is not None:
        scaled.masked_fill_(scaled < cut[:, None], -math.inf)
    result = torch.softmax(scaled, -1)
    greedy = [i for i, p in enumerate(params) if p.greedy]
    if greedy:
        rows = torch.tensor(greedy, device=device)
        result[rows] = torch.zeros_like(result[rows]).scatter_(1, logits[rows].argmax(-1, keepdim=True), 1.0)
    return result


def _cuts(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor | None:
    """Smallest scaled logit each row keeps, [n] float32, or None when no row has a filter."""
    vocab, device = scaled.shape[-1], scaled.device
    limits = [p.top_k if 0 < p.top_k < vocab else 0 for p in params]
    filtered = [i for i, p in enumerate(params) if limits[i] or p.top_p < 1]
    if not filtered and all(p.min_p == 0 for p in params):
        return None
    cuts = torch.tensor([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], dtype=torch.float32, device=device)
    if not filtered:
        return cuts
    # Enough of the largest logits for every row's k, and for the nucleus of rows that have no k.
    count = min(vocab, max(limits[i] or NUCLEUS_CANDIDATES for i in filtered))
    rows = torch.tensor(filtered, device=device)
    chosen = scaled if len(filtered) == scaled.shape[0] else scaled[rows]
    largest = chosen.topk(count).values  # [m, count], descending
    floor = torch.full((len(filtered),), -math.inf, device=device)
    has_k = torch.tensor([limits[i] > 0 for i in filtered], device=device)
    kth = largest.gather(1, torch.tensor([[max(limits[i], 1) - 1] for i in filtered], device=device))[:, 0]
    floor = torch.where(has_k, kth, floor)
    nucleus = [j for j, i in enumerate(filtered) if params[i].top_p < 1]
    if nucleus:
        own = torch.tensor(nucleus, device=device)
        share = torch.tensor([params[filtered[j]].top_p for j in nucleus], dtype=torch.float64, device=device)
        floor[own] = torch.maximum(floor[own], _nucleus_cuts(chosen[own], largest[own], floor[own], share))
    cuts[rows] = torch.maximum(cuts[rows], floor)
    return cuts


def _nucleus_cuts(scaled: Tensor, largest: Tensor, floor: Tensor, share: Tensor) -> Tensor:
    """Smallest scaled logit in each row's smallest set of largest ones that holds the given share of what lies at or above the row's floor.

    scaled [m, V] and its largest [m, count] (descending), floor [m] float32, share [m] float64. Returns [m] float32.
    """
    wanted = share * scaled.exp().masked_fill_(scaled < floor[:, None], 0.0).sum(-1, dtype=torch.float64)
    cuts, reached = _mass_cuts(largest, floor, wanted)
    # Without a floor the candidates may hold too little (a flat distribution): then, and only then, the row is sorted.
    short = (~reached & (floor == -math.inf)).nonzero()[:, 0]
    if short.numel():
        cuts[short] = _mass_cuts(scaled[short].sort(-1, descending=True).values, floor[short], wanted[short])[0]
    return cuts


def _mass_cuts(values: Tensor, floor: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """First value of each descending row at which the summed weights reach `wanted`, and whether they do (else the row's last value)."""
    ends = values.exp().masked_fill_(values < floor[:, None], 0.0).double().cumsum(-1)
    last = (ends < wanted[:, None]).sum(-1).clamp_max(values.shape[-1] - 1)
    return values.gather(1, last[:, None])[:, 0], ends[:, -1] >= wanted


class BatchSampler:
    """Draws tokens for the requests of one step; implements `draft.protocols.DraftSampler`.

    Args:
        params: one per request.
        seeds: one per request, the key of its random numbers.
        vocab_size: V of the target; a draft's logits are cut or padded with -inf to it (families pad their vocabularies differently).
    """

    def __init__(self, params: Sequence[SamplingParams], seeds: Sequence[int], vocab_size: int) -> None:
        self.params, self.seeds, self.vocab_size = list(params), list(seeds), vocab_size

    def draw(
        self, logits: Tensor, rows: Sequence[int], positions: Sequence[int], lane: int = LANE_DRAFT, *, token_ids: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Draw one token per row of logits [n, V'] float32; rows: the request of each row; positions: the sequence index of each drawn
        token. token_ids [V'] int64, ascending: the ids the columns stand for, where they are but some of the vocabulary.

        Returns tokens [n] int64 and per row the distribution [V] float32 it came from, or None for a greedy request.
        """
        if token_ids is not None:
            # temperature and filters see the same finite logits in the same order as in a row of V with -inf elsewhere, for a part of the work
            tokens, found = self._draw(logits, rows, positions, lane)
            return token_ids[tokens], [None if q is None else q.new_zeros(self.vocab_size).index_copy_(0, token_ids, q) for q in found]
        if logits.shape[-1] != self.vocab_size:
            logits = torch.nn.functional.pad(logits, (0, self.vocab_size - logits.shape[-1]), value=-math.inf)
        return self._draw(logits, rows, positions, lane)

    def _draw(self, logits: Tensor, rows: Sequence[int], positions: Sequence[int], lane: int) -> tuple[Tensor, list[Tensor | None]]:
        """As `draw`, tokens and distributions in terms of the columns."""
        sampled = [i for i, r in enumerate(rows) if not self.params[r].greedy]
        if not sampled:
            return logits.argmax(-1), [None] * len(rows)
        whole = len(sampled) == len(rows)
        index = torch.tensor(sampled, device=logits.device)
        probs = probabilities(logits if whole else logits[index], [self.params[rows[i]] for i in sampled])
        seeds, places = self.counters([rows[i] for i in sampled], [positions[i] for i in sampled], logits.device)
        drawn = sample_rows(probs, philox_uniform(seeds, places, lane))
        distributions: list[Tensor | None] = [None] * len(rows)
        for i, row in zip(sampled, probs, strict=True):
            distributions[i] = row
        return (drawn if whole else logits.argmax(-1).index_copy(0, index, drawn)), distributions

    def counters(self, rows: Sequence[int], positions: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Seeds and positions of rows as int64 tensors, the arguments of `philox_uniform`."""
        return torch.tensor([self.seeds[r] for r in rows], device=device), torch.tensor(list(positions), device=device)
