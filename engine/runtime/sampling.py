"""The only place where logits become probabilities, for the draft's proposals and the target's verification alike.

Axes: n rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.errors import InvalidOption
from engine.inputs import is_finite, is_whole, plain_number, shown
from engine.runtime.filters import cuts_of
from kernels.accept import COUNTER_DRAFT, sample_rows
from kernels.philox import philox_uniform
from kernels.race import race
from kernels.upload import upload

MAX_DRAFT_LENGTH = 64
MAX_PENALTY = 2.0  # of frequency and presence, as OpenAI bounds them
MAX_LOGPROBS = 128  # alternatives a token
MAX_BIAS = 100.0  # of a logit, likewise


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued.

    max_new_tokens: at most this many tokens. stop: strings that end the text (left out of it; None is none). stop_token_ids: tokens that end it
    (kept in the ids, not in the text). ignore_eos: go on after an end-of-sequence token. draft_length: tokens drafted a step, 0 for no
    speculation, "auto" for the length with the best expected tokens per second.

    What follows makes the distribution that is sampled, in this order.
    logit_bias: token id -> number added to its logit.
    repetition_penalty: of every token in prompt or new text, a positive logit is divided by it and a negative one multiplied (Keskar et al.,
    "CTRL", 2019; transformers' `repetition_penalty`); 1 is none.
    frequency_penalty, presence_penalty: taken off a token's logit for each time, and once if, it occurs in the new text (OpenAI's); 0 is none.
    temperature: logits are divided by it; 0 is greedy: the largest logit is taken, whatever follows.
    top_k: keep the k most probable tokens, 0 keeps all (ties with the k-th stay). top_p: keep the smallest set of most probable tokens holding
    this mass, 1 keeps all. min_p: drop tokens less probable than min_p times the most probable one.

    response_format: JSON text of a schema that the new text must fit, e.g. '{"type": "object"}'; "" is none. Tokens that do not fit get no
    probability, in the draft's proposals and the target's alike.
    logprobs: keep each new token's log probability and those of so many alternatives (0: its own alone); None keeps none.

    seed: None draws by rejection sampling (few drafts are lost) with fresh random numbers. A given seed names the same text every time: it is a
    function of model, prompt, parameters and seed, whatever drafts, draft length, batch or load (docs/guarantees.md says where arithmetic limits
    this); its drafts are accepted a little less often.

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
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    response_format: str = ""
    logprobs: int | None = None

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
        _require(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "give True or False")
        automatic = isinstance(self.draft_length, str) and self.draft_length == "auto"
        fixed = is_whole(self.draft_length) and 0 <= int(self.draft_length if not automatic else 0) <= MAX_DRAFT_LENGTH
        _require(automatic or fixed, "draft_length", self.draft_length, f'give a whole number from 0 to {MAX_DRAFT_LENGTH}, or "auto"')

        _require(
            is_finite(self.repetition_penalty) and 1e-10 <= self.repetition_penalty <= 1e10,
            "repetition_penalty",
            self.repetition_penalty,
            "give a number from 1e-10 to 1e10, 1 for none",
        )
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            remedy = f"give a number from -{MAX_PENALTY:g} to {MAX_PENALTY:g}, 0 for none"
            _require(is_finite(value) and abs(value) <= MAX_PENALTY, name, value, remedy)
        biases = self.logit_bias
        _require(
            isinstance(biases, dict)
            and all(is_whole(i) and 0 <= i < 2**63 and is_finite(bias) and abs(bias) <= MAX_BIAS for i, bias in biases.items()),
            "logit_bias",
            biases,
            f"give token ids with numbers from -{MAX_BIAS:g} to {MAX_BIAS:g}",
        )

        _require(isinstance(self.response_format, str), "response_format", self.response_format, "give the JSON text of a schema")
        kept = self.logprobs
        _require(
            kept is None or (is_whole(kept) and 0 <= kept <= MAX_LOGPROBS),
            "logprobs",
            kept,
            f"give a whole number from 0 to {MAX_LOGPROBS}, or None",
        )

    def _make_plain(self) -> None:
        """Numbers of numpy and torch become Python's, lists tuples, and None nothing to stop at; what is neither stays, to be refused."""
        for name in _NUMBERS:
            object.__setattr__(self, name, plain_number(getattr(self, name)))
        for name in ("stop", "stop_token_ids"):
            given = getattr(self, name)
            given = given.tolist() if hasattr(given, "tolist") else given
            if given is None or isinstance(given, list):
                object.__setattr__(self, name, tuple(plain_number(item) for item in given or ()))
        if type(self.ignore_eos).__name__ in ("bool", "bool_"):  # numpy's too
            object.__setattr__(self, "ignore_eos", bool(self.ignore_eos))
        if self.logit_bias is None or isinstance(self.logit_bias, Mapping):
            biases = {plain_number(i): plain_number(bias) for i, bias in (self.logit_bias or {}).items()}
            object.__setattr__(self, "logit_bias", biases)

    @property
    def greedy(self) -> bool:
        """True when the most probable token is always taken."""
        return self.temperature == 0

    @property
    def coupled(self) -> bool:
        """True when the target's token at a position does not depend on the drafts: greedy, or drawn by a race under a seed."""
        return self.greedy or self.seed is not None

    @property
    def filtered(self) -> bool:
        """True when less than the whole vocabulary is sampled from."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalised(self) -> bool:
        """True when logits are changed by the tokens before them, by a bias or by a format."""
        changed = self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0
        return changed or bool(self.logit_bias) or bool(self.response_format)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises InvalidOption where logit_bias names a token that a vocabulary of this size does not have."""
        wrong = next((i for i in self.logit_bias if i >= vocab_size), None)
        if wrong is not None:
            raise InvalidOption(f"logit_bias names token {wrong} of a vocabulary of {vocab_size}", "use the target's own tokenizer")


_NUMBERS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "draft_length"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty", "logprobs"),
)


def _require(valid: bool, name: str, value: object, remedy: str) -> None:
    if not valid:
        raise InvalidOption(f"{name} cannot be {shown(value)}", remedy)


class Constraint(Protocol):
    """Which tokens may follow in one text; `engine.text.constraint.JsonConstraint`."""

    def append(self, token_ids: Sequence[int]) -> None: ...  # tokens that joined the text for good

    def allowed(self, drafts: Sequence[int], vocab_size: int) -> Any | None: ...  # [vocab_size] bool after these drafts; None: any


class TokenHistory:
    """What penalties and a format need of one request's tokens, counted once each.

    Args:
        params: the request's.
        vocab_size: V of the target.
        prompt_tokens: how many of the tokens are the prompt's.
        device: of the logits.
        constraint: which tokens may follow, where the new text has a format.

    seen [V] bool: tokens in prompt or new text. counts [V] float32: times each is in the new text. bias [V] float32: of logits; None without any.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        prompt_tokens: int,
        device: torch.device,
        constraint: Constraint | None = None,
    ) -> None:
        self.params, self.prompt_tokens, self.length = params, prompt_tokens, 0
        self.constraint = constraint
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        self.bias: Tensor | None = None
        if params.logit_bias:
            ids = upload(list(params.logit_bias), device)
            values = upload(list(params.logit_bias.values()), device, torch.float32)
            self.bias = torch.zeros(vocab_size, dtype=torch.float32, device=device).index_add_(0, ids, values)

    def follow(self, token_ids: Sequence[int]) -> TokenHistory:
        """Count the tokens that joined since the last call; token_ids: all of the request's, prompt first."""
        for start, new_text in ((self.length, False), (max(self.length, self.prompt_tokens), True)):
            new = upload(token_ids[start:], self.seen.device)
            if new_text:
                self.counts.index_add_(0, new, torch.ones_like(new, dtype=torch.float32))
            else:
                self.seen[new] = True
        if self.constraint is not None:
            self.constraint.append(token_ids[max(self.length, self.prompt_tokens) :])
        self.length = len(token_ids)
        return self

    def penalise(self, logits: Tensor, drafts: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Logits [V'] of the token after `drafts` [k] int64, which follow the counted ones, with bias and penalties, float32.

        token_ids [V']: what the columns stand for, where they are but some of the vocabulary.
        """
        p, logits = self.params, logits.float()

        def columns(values: Tensor) -> Tensor:
            return values if token_ids is None else values[token_ids]

        if self.bias is not None:
            logits = logits + columns(self.bias)
        if p.repetition_penalty != 1:
            seen = columns(self.seen.index_fill(0, drafts, True))
            logits = torch.where(seen, torch.where(logits < 0, logits * p.repetition_penalty, logits / p.repetition_penalty), logits)
        if p.frequency_penalty != 0 or p.presence_penalty != 0:
            counts = columns(self.counts.index_add(0, drafts, torch.ones_like(drafts, dtype=torch.float32)))
            logits = logits - p.frequency_penalty * counts - p.presence_penalty * (counts > 0)
        if self.constraint is not None:
            allowed = self.constraint.allowed(drafts.tolist(), len(self.seen))
            if allowed is not None:
                mask = columns(torch.from_numpy(allowed).to(logits.device))
                # a draft's vocabulary may hold none of them: what it then proposes is rejected
                logits = torch.where(mask | ~mask.any(), logits, -math.inf)
        return logits


def probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Each row's distribution after its request's temperature and filters.

    logits [n, V] any float type; params: one per row. Returns [n, V] float32, rows summing to 1; a greedy row is a point mass at its
    largest logit. Every row depends on itself alone, so it is the same in any batch. Filters are thresholds on the logits: nothing is
    sorted unless top_k or top_p asks for it, and then only the largest logits in almost all cases.
    """
    device = logits.device
    temperature = upload([p.temperature or 1.0 for p in params], device, torch.float32)
    scaled = tempered(logits, temperature)
    cut = cuts_of(scaled, params)
    if cut is not None:
        scaled.masked_fill_(scaled < cut[:, None], -math.inf)
    result = torch.softmax(scaled, -1)
    greedy = [i for i, p in enumerate(params) if p.greedy]
    if greedy:
        rows = upload(greedy, device)
        result[rows] = torch.zeros_like(result[rows]).scatter_(1, logits[rows].argmax(-1, keepdim=True), 1.0)
    return result


def tempered(logits: Tensor, temperature: Tensor) -> Tensor:
    """Logits [n, V] over temperatures [n] float32 above 0, the largest of each row 0, float32: no temperature can make them overflow.

    Their softmax is the distribution of a request that has a temperature alone.
    """
    scaled = logits.float()
    return (scaled - scaled.amax(-1, keepdim=True)) / temperature[:, None]


class BatchSampler:
    """Draws tokens for the requests of one step; implements `draft.protocols.DraftSampler`.

    A request with a seed draws by an exponential race (`kernels.race`), the same noise for a draft and for the target at its position; the
    others by inverting the cumulative sum, with random numbers of their own for drafts.

    Args:
        params: one per request.
        seeds: one per request, the key of its random numbers.
        vocab_size: V of the target; a draft's logits are cut or padded with -inf to it (families pad their vocabularies differently).
        histories: one per request, that has counted all its tokens; None where it is not penalised. Empty: no request is.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        vocab_size: int,
        histories: Sequence[TokenHistory | None] = (),
    ) -> None:
        self.params, self.seeds, self.vocab_size = list(params), list(seeds), vocab_size
        self._histories = list(histories) or [None] * len(self.params)
        for own, history in zip(self.params, self._histories, strict=True):
            assert (history is None) == (not own.penalised), "penalties need a history, and nothing else has one"
        self._drafts: list[dict[int, Tensor]] = [{} for _ in self.params]  # of penalised requests: position -> draft [1]

    def draw(
        self,
        logits: Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
        counter: int = COUNTER_DRAFT,
        *,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Draw one token per row of logits [n, V'] float32; rows: the request of each row; positions: the sequence index of each drawn
        token, which follows the request's tokens and what was drawn here after them. token_ids [V'] int64, ascending: the ids the columns
        stand for, where they are but some of the vocabulary.

        Returns tokens [n] int64 and per row the distribution [V] float32 it came from, or None for a greedy request.
        """
        before: list[Tensor | Sequence[int]] = []
        for r, position in zip(rows, positions, strict=True):
            history = self._histories[r]
            before.append([] if history is None else [self._drafts[r][at] for at in range(history.length, position)])  # type: ignore[misc]
        tokens, distributions = self.draw_after(logits, rows, positions, before, counter, token_ids=token_ids)
        for i, (r, position) in enumerate(zip(rows, positions, strict=True)):
            if self._histories[r] is not None:
                self._drafts[r][position] = tokens[i : i + 1]
        return tokens, distributions

    def takes_likeliest(self, rows: Sequence[int]) -> bool:
        """Whether these requests are greedy and nothing changes their logits."""
        return all(self.params[r].greedy and self._histories[r] is None for r in rows)

    def draw_after(
        self,
        logits: Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
        before: Sequence[Any],
        counter: int,
        *,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """As `draw`; before: per row the drafts between the request's tokens and the drawn one, ids or tensors [1] of one."""
        width = logits.shape[-1]
        if token_ids is None and width != self.vocab_size:
            logits = torch.nn.functional.pad(logits, (0, self.vocab_size - width), value=-math.inf)
        logits = self.penalise(logits, rows, before, token_ids=token_ids)
        sampled = [i for i, r in enumerate(rows) if not self.params[r].greedy]
        distributions: list[Tensor | None] = [None] * len(rows)
        if len(sampled) < len(rows):
            tokens = greatest(logits)
            tokens = tokens if token_ids is None else token_ids[tokens]
        if not sampled:
            return tokens, distributions
        whole = len(sampled) == len(rows)
        # temperature and filters see the same finite logits in the same order as in a row of V with -inf elsewhere, for a part of the work
        probs = probabilities(logits if whole else logits[_index(sampled, logits)], [self.params[rows[i]] for i in sampled])
        full = probs if token_ids is None else probs.new_zeros(len(sampled), self.vocab_size).index_copy_(1, token_ids, probs)
        drawn = self._draw(probs, full, [rows[i] for i in sampled], [positions[i] for i in sampled], counter, token_ids)
        for i, row in zip(sampled, full, strict=True):
            distributions[i] = row
        return (drawn if whole else tokens.index_copy(0, _index(sampled, logits), drawn)), distributions

    def _draw(
        self, probs: Tensor, full: Tensor, rows: Sequence[int], positions: Sequence[int], counter: int, token_ids: Tensor | None
    ) -> Tensor:
        """One token [n] int64 per row of probs [n, V'] and full [n, V], the same distributions."""
        seeds, places = self.counters(rows, positions, probs.device)
        raced = [i for i, r in enumerate(rows) if self.params[r].coupled]
        if len(raced) == len(rows):
            return race(full, seeds, places)
        drawn = sample_rows(probs, philox_uniform(seeds, places, counter))
        drawn = drawn if token_ids is None else token_ids[drawn]
        if raced:
            own = _index(raced, probs)
            drawn = drawn.index_copy(0, own, race(full[own], seeds[own], places[own]))
        return drawn

    def penalise(self, logits: Tensor, rows: Sequence[int], before: Sequence[Any], *, token_ids: Tensor | None = None) -> Tensor:
        """Logits [n, V'] with the biases and penalties of the rows' requests, each row after its drafts `before`; `logits` itself where no request has
        any. The draft's proposals and the target's verification both come through here."""
        penalised = [i for i, r in enumerate(rows) if self._histories[r] is not None]
        if not penalised:
            return logits
        logits = logits.float().clone()
        for i in penalised:
            history, own = self._histories[rows[i]], before[i]
            assert history is not None
            drafts = torch.cat(list(own)) if len(own) and isinstance(own[0], Tensor) else upload(list(own), logits.device)
            logits[i] = history.penalise(logits[i], drafts, token_ids)
        return logits

    def counters(self, rows: Sequence[int], positions: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Seeds and positions of rows as int64 tensors, the arguments of `philox_uniform` and `race`."""
        return upload([self.seeds[r] for r in rows], device), upload(list(positions), device)


def greatest(logits: Tensor) -> Tensor:
    """The first column of the largest number of each row of logits [n, V], or of the first NaN: int64 [n]."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))  # with vector instructions: 4 us a row of 49,152, PyTorch's 90
    return logits.argmax(-1)


def finite_rows(logits: Tensor) -> Tensor:
    """Which rows of logits [n, V] hold finite numbers alone, [n] bool."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32 and torch.get_num_threads() > 1:
        # by one thread: PyTorch's others would wait for more work on their processors, for as long as the step that follows takes
        with np.errstate(all="ignore"):
            return torch.from_numpy(np.isfinite(logits.numpy().sum(-1)))
    return logits.sum(-1, dtype=torch.float32).isfinite()


def _index(values: Sequence[int], like: Tensor) -> Tensor:
    return upload(list(values), like.device)
