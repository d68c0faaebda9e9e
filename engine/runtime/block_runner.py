"""Speculative decode steps on a GPU, each one CUDA graph: all passes of the draft with its draws, the verification, and what is accepted.

Lengths, last tokens and what else a step leaves for the next one stay on the device, so that the next step is launched before this one's tokens are
read: one read-back a step, hidden behind the next one. What is drawn and kept is what `engine.runtime.verify` draws and keeps: greedy requests and
those with a seed match drafts with the target's own tokens, the others go through `kernels.accept`.

Axes: B requests, padded to a bucket; k drafts each; E hidden size of the target; V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from draft.draft_head import MAX_PENDING_HIDDEN, DraftHead, DraftHeadState, Part
from draft.early_exit import EarlyExitDrafter
from draft.model import ModelDrafter
from draft.policy import CostModel, Curve, StepKind, StepPlan
from draft.protocols import CausalDecoder, Drafter, DraftState
from draft.state_drafter import StateDrafter, StateHeadState
from engine.runtime.device_sampling import Drawing, SamplingState
from engine.runtime.model_runner import (
    CAPTURED_LENGTHS,
    MAX_ROWS,
    PROMPT_LENGTHS,
    GraphedDecoder,
    Step,
    bucket,
    copy_out,
    page_bucket,
    places_of,
    read_out,
    same_objects,
)
from engine.runtime.page_tables import StepTables
from engine.runtime.request import Request
from engine.runtime.sampling import MAX_DRAFT_LENGTH, SamplingParams
from kernels.accept import COUNTER_DRAFT, COUNTER_SAMPLE, accept, sample_rows
from kernels.advance_block import BlockState, advance_block
from kernels.compile_ahead import built, compile_ahead, compiling_ahead
from kernels.decode_layer.plans import MOST_SKINNY
from kernels.philox import philox_uniform
from kernels.race import race
from kernels.upload import fill, upload

Source = Literal["model", "given"]

_MOST = 128  # requests of a step
_AHEAD_BATCH = (
    8  # most requests of speculative steps of which all lengths are captured beforehand; of larger ones, those up to _AHEAD_LENGTH
)
_AHEAD_LENGTH = 2
# requests of steps without drafts that keep the target's states for a draft head: drafts have paid in no larger batch, and copies take time; more of
# them where a step reads so many bytes of weights that the copies are below a hundredth of it, and drafts pay in larger batches
_MOST_KEEPING, _MOST_KEEPING_LARGE, _LARGE_BYTES = 16, 32, 1 << 30
_CAPTURE_SHARE = 0.02  # of the time since the last capture that the next one may take, where drafts are not asked for by a fixed length
_MOST_BEHIND = 4096  # tokens that drafts left behind may lack, over all requests, for a captured step to catch them up first


def common_lengths(batch: int) -> tuple[int, ...]:
    """k of the speculative steps of `batch` requests that are captured beforehand, as far as their rows fit."""
    return CAPTURED_LENGTHS if batch <= _AHEAD_BATCH else tuple(k for k in CAPTURED_LENGTHS if k <= _AHEAD_LENGTH)


@dataclass(frozen=True)
class BlockKey:
    """What a captured step does. batch: requests, a bucket. length: k. pages: of a page table. source: of the drafts: the drafter, or given tokens.
    drawing: how tokens are drawn; no request under a seed beside one that draws without. deterministic: batch-invariant."""

    batch: int
    length: int
    pages: int
    source: Source
    drawing: Drawing
    deterministic: bool


class StepState:
    """What captured steps read of each request and leave for the next one, in the order of the batch; rows of one int64 tensor [10, 128].

    length: committed tokens, the position of the last one, which no model has run. first: where the draft's first pass begins: at the position before
    it, or at it; of a draft head on the target's last states, at the first of the tokens whose rows are still to be run. skipped: tokens that such a
    head has no rows of. limit, draft_limit: positions for which there are pages. num_drafts: most drafts that may be kept. last, previous: tokens at
    length and length - 1. row, draft_row: of the page tables. sampling: parameters.
    hidden [128, E]: the target's state at the exit of the token at length - 1 (exits: where there is one). drafts [128, MAX_ROWS]: given ones.
    rows [128, K, E]: a draft head's on the target's last states, of the tokens from first to length.
    """

    NAMES = ("length", "first", "last", "previous", "skipped", "limit", "row", "num_drafts", "draft_limit", "draft_row")
    SENT = 5  # of these from the end on, which no step changes

    def __init__(self, hidden_size: int, dtype: torch.dtype, device: torch.device, *, exits: bool = False, num_rows: int = 0) -> None:
        self.integers = torch.zeros(len(self.NAMES), _MOST, dtype=torch.int64, device=device)
        self.sampling = SamplingState(_MOST, device)
        self.hidden = torch.zeros(_MOST if exits else 0, hidden_size, dtype=dtype, device=device)
        self.drafts = torch.zeros(_MOST, MAX_ROWS, dtype=torch.int64, device=device)
        self.rows = torch.zeros(_MOST, num_rows, hidden_size, dtype=dtype, device=device)

    def of(self, name: str, batch: int) -> Tensor:
        """One of the integers, of the first so many requests: a view."""
        return self.integers[self.NAMES.index(name), :batch]

    def send(self, values: Sequence[Sequence[int]], batch: int) -> None:
        """Set those that no step changes, in one copy: lists of `batch` integers each."""
        fill(self.integers[-self.SENT :, :batch], values)

    def move(self, columns: Tensor, length: int) -> None:
        """Have what lies beside the integers of the requests in these columns [B] int64 lie in the first B; rows of `length` + 1 tokens at most."""
        for part in (self.hidden, self.rows[:, : length + 1]):
            if part.numel():
                part[: len(columns)] = part.index_select(0, columns)


@dataclass
class Block:
    """A captured step and its buffers.

    drafts [k, B] int64, tokens [B, k + 1] int64: the last token and the drafts. out [B, k + 2] int64: tokens gained, and then these (0 gained: logits
    that are not finite). exits [k + 1, B, E]: the target's states at the exit (draft head), where its first layers leave them. kept [B, k + 1, 2E]: its
    fused last states, and the rows of the tokens after them (draft head on last states). probs [B, k, V]: what drafts were drawn from (no seed).
    first: passes of the target's first layers, one a draft and the last draft's own. passes: of the draft.
    """

    key: BlockKey
    drafts: Tensor
    tokens: Tensor
    out: Tensor
    target_tables: StepTables
    verify: Step
    draft_tables: StepTables | None = None
    first: list[Step] = field(default_factory=list)
    passes: list[Step] = field(default_factory=list)
    exits: Tensor | None = None
    kept: Tensor | None = None
    probs: Tensor | None = None
    graph: Any | None = None


@dataclass
class Flight:
    """A step that was launched. num_drafts: of each request. exits: copy of the block's exits or kept states, for the draft head. columns: where the
    requests are in `ready` and `exits`; None: in their order."""

    requests: list[Request]
    source: Source
    length: int
    plan: StepPlan
    num_drafts: list[int]
    ready: Any
    exits: Tensor | None
    columns: Sequence[int] | None = None

    def of(self, requests: list[Request], columns: Sequence[int]) -> Flight:
        """What is left of it when others have ended. columns: where these requests are in it."""
        plan, num_drafts = self.plan.of(columns), [self.num_drafts[c] for c in columns]
        return replace(self, requests=requests, plan=plan, num_drafts=num_drafts, columns=columns)


class _Asked(NamedTuple):
    """What the parameters of a step's requests ask for, which stays while the same ones are run.

    fixed: numbers of drafts that some ask for. capturable: whether a captured step can draw for all of them, with nothing looking at logits in between.
    """

    requests: list[Request]
    params: list[SamplingParams]
    seeds: list[int]
    drawing: Drawing
    fixed: frozenset[int]
    capturable: bool


class _Settled(NamedTuple):
    """Requests whose state the last step has left on the device: in which columns, and their lengths there (-1: void)."""

    requests: list[Request]
    columns: Sequence[int]
    lengths: list[int]


_NOTHING = _Settled([], [], [])


class Gain(NamedTuple):
    """What a request gains in a step: its accepted drafts, then one of the target's own (none: logits that are not finite). proposed: its drafts."""

    tokens: list[int]
    proposed: int


class BlockDecoding:
    """Speculative steps, captured whole.

    Args:
        target: the model.
        drafter: a draft model or a draft head whose decoder is graphed; None where drafts come from requests' own text alone.
    """

    @torch.inference_mode(False)  # captures write the state outside of steps
    def __init__(self, target: GraphedDecoder, drafter: Drafter | None) -> None:
        self.target, self.drafter = target, drafter
        self.on_states = (
            drafter if isinstance(drafter, StateDrafter) else None
        )  # the drafter where its head goes on from the target's last states
        self.head = _head_of(drafter)
        decoder = self.head.decoder if self.head is not None else drafter.decoder if isinstance(drafter, ModelDrafter) else None
        self.draft = cast(GraphedDecoder | None, decoder)
        # the target's first layers that drafts are made with
        self.exit_layer = drafter.exit_layer if self.head is not None and self.on_states is None and drafter is not None else 0
        rows = 0 if self.on_states is None else MAX_DRAFT_LENGTH + 1
        self.state = StepState(target.config.hidden_size, target.dtype, target.device, exits=self.exit_layer > 0, num_rows=rows)
        # of a head on last states: the embeddings' part of the rows of its R tokens, and where each token [V] stands among these
        self._embedded: Tensor | None = None
        self._places: Tensor | None = None
        if self.on_states is not None:
            self._embedded, self._places = self._embed_drafts(self.on_states)
        self._most_keeping = _MOST_KEEPING if target.weight_bytes < _LARGE_BYTES else _MOST_KEEPING_LARGE
        self._blocks: dict[BlockKey, Block] = {}
        self._recent: tuple[BlockKey, int, Block] | None = (
            None  # of the last step: its key without the length, the plan's longest block, and the step
        )
        self._compiled: set[BlockKey] = set()  # those whose kernels are compiled
        self._memory: tuple[int, ...] = ()
        self._flight: Flight | None = None  # launched ahead
        self._current: Flight | None = None  # read, not committed
        self._settled = _NOTHING
        self._sent: list[list[int]] = []
        self._asked = _Asked([], [], [], Drawing(), frozenset(), True)
        self._captured_at, self._capture_s = -math.inf, 0.0  # when the last capture ended, and what it took

    @property
    def num_steps(self) -> int:
        """Steps that were captured, the draft's prompt passes among them."""
        return len(self._blocks) + (0 if self.draft is None else self.draft.num_steps)

    @staticmethod
    def supports(target: CausalDecoder, drafter: Drafter | None) -> bool:
        """Whether the source's steps can be captured whole: graphed models, and an early exit only under a draft head."""
        if not isinstance(target, GraphedDecoder):
            return False
        if isinstance(drafter, ModelDrafter):
            small = drafter.decoder.config.vocab_size <= target.config.vocab_size
            return small and isinstance(drafter.decoder, GraphedDecoder)
        head = _head_of(drafter)
        return drafter is None or (head is not None and isinstance(head.decoder, GraphedDecoder))

    def keeps_states(self, requests: Sequence[Request], drafts_after: int) -> StateDrafter | None:
        """The drafter whose head goes on from the target's last states, where these requests' steps without drafts keep them for it. drafts_after: such
        steps before automatic drafts may come: texts that end before are not drafted for."""
        if not self.step_taps(len(requests)):
            return None
        wanted = any(r.params.draft_length != 0 and (r.params.draft_length != "auto" or r.remaining > drafts_after) for r in requests)
        return self.on_states if wanted else None

    def step_taps(self, batch: int) -> tuple[int, ...]:
        """Layers whose states are kept by steps of so many requests of which any may draft."""
        return () if self.on_states is None or batch > self._most_keeping else self.on_states.join.state_layers

    # --- one step -------------------------------------------------------------------------------------------------------

    def under_way(self, requests: Sequence[Request]) -> bool:
        """Whether the next step of these was launched, be it with others that have ended since."""
        return self._flight is not None and self._columns(requests) is not None

    def step(
        self, requests: list[Request], planned: Callable[[], StepPlan], *, deterministic: bool = False, ahead: bool = True
    ) -> tuple[StepPlan, list[Gain] | None]:
        """One step of all requests: its plan, and what each gains; None where the plan is not for captured steps, and nothing was run.

        Pages for two steps are there. The caller appends the tokens, advances the target's sequences by those it keeps, and calls `commit`. planned:
        the policy's plan of the next step; asked before this step's tokens are known, too. A step is launched ahead where drafts are the drafter's.
        ahead: False where others join these in the next step, which would throw one away that was launched without them.
        """
        flight, columns = self._flight, None if self._flight is None else self._columns(requests)
        if flight is not None:
            self._flight, self._settled = None, _NOTHING  # the device is ahead of what the host knows
        if flight is None or columns is None:
            plan = planned()
            key = self._takes(requests, plan, deterministic)
            if key is None:
                return plan, None
            flight = self._launch(requests, plan, key)
        elif len(columns) < len(flight.requests):
            flight = flight.of(requests, columns)
        self._current, self._settled = flight, _NOTHING
        if ahead and flight.source == "model" and any(r.remaining > 1 for r in requests):
            following = planned()
            if any(following.lengths):
                key = self._takes(requests, following, deterministic, behind=flight)
                if key is not None:
                    if flight.columns is not None:
                        self._gather(flight.columns, flight.length)
                    self._flight = self._launch(requests, following, key, ahead=True)
        out = read_out(flight.ready)
        out = out if flight.columns is None else [out[c] for c in flight.columns]
        gains = [Gain(own[1 : 1 + own[0]], count) for own, count in zip(out, flight.num_drafts, strict=True)]
        columns = range(len(requests)) if flight.columns is None or self._flight is not None else flight.columns  # the latter gathered them
        self._settled = _Settled(requests, columns, [r.sequence.length + len(gain.tokens) for r, gain in zip(requests, gains, strict=True)])
        return flight.plan, gains

    def forget(self, request: Request) -> None:
        """A request's pages are given back: the step under way is none of its, whatever length it has once it runs again."""
        known, columns, lengths = self._settled
        if request in known:
            lengths = [-1 if own is request else length for own, length in zip(known, lengths, strict=True)]
            self._settled = _Settled(known, columns, lengths)

    def commit(self, kept: Sequence[int]) -> None:
        """Bring the draft's caches up to the kept[b] tokens that each request has taken of the last step's; the target's sequences have moved. Given
        drafts leave the drafter behind: it catches up when it is asked again."""
        flight, head, on_states = self._current, self.head, self.on_states
        assert flight is not None, "a step is committed once it was run"
        columns = flight.columns or range(len(flight.requests))
        run, length, exits = flight.source == "model", flight.length, flight.exits
        if not run and on_states is None:
            return
        waits = 0
        for b, request, count in zip(columns, flight.requests, kept, strict=True):
            conversation = request.conversation
            state = conversation.draft_state
            if state is None or not count:
                continue
            if on_states is not None:
                assert exits is not None
                token = None if run else conversation.token_ids[conversation.sequence.length - count]
                on_states.keep_block(cast(StateHeadState, state), exits, b, count, token)
                if not run:
                    waits = max(waits, cast(StateHeadState, state).num_pending_hidden)
            elif head is not None:
                assert exits is not None
                own = cast(DraftHeadState, state)
                own.ran(min(count, length))
                if count > length:  # the draft has not run the last of a whole block
                    own.append_hidden(Part(exits, (slice(length, count), b), count - length))
                waits = max(waits, cast(DraftHeadState, state).num_pending_hidden)
            elif self._follows(request):
                end = request.sequence.length - count + min(count, length)
                state.sequence.advance(max(0, end - state.sequence.length))
        if waits >= MAX_PENDING_HIDDEN:
            self._run_waiting([_state(r) for r in flight.requests], MAX_PENDING_HIDDEN)

    def _columns(self, requests: Sequence[Request]) -> Sequence[int] | None:
        """Where these are in the step under way; None where it is none of one of them, or began from another length."""
        known, _, lengths = self._settled
        columns = places_of(requests, known)
        if columns is None or [lengths[c] for c in columns] != [r.sequence.length for r in requests]:
            return None
        return columns

    def _kept(self, requests: Sequence[Request], source: Source, length: int) -> list[int]:
        """The columns in which the device has all that a step of `length` drafts needs of each request; -1: it has not, or something older."""
        known = {id(request): (column, at) for request, column, at in zip(*self._settled, strict=True)}
        found = []
        for request in requests:
            column, at = known.get(id(request), (-1, -1))
            found.append(column if at == request.sequence.length and (source == "given" or self._continues(request, length)) else -1)
        return found

    def _continues(self, request: Request, length: int) -> bool:
        """Whether the draft of a request of the last step goes on from what that step has left of it: nothing else has run it, and it lacks nothing
        that its first pass, of `length` + 1 rows on the target's last states, has no room for."""
        last, state = self._current, _state(request)
        if last is None or last.source != "model":
            return False
        if isinstance(state, StateHeadState):
            return last.exits is not None and state.waits_as(last.exits) and state.num_pending_hidden <= length
        return not self._follows(request) or self._lacks(request) <= self._slack

    def _gather(self, columns: Sequence[int], length: int) -> None:
        """Have the device's state of the requests in these columns lie in their order, when others have ended. length: drafts of the step before."""
        integers, count, index = self.state.integers, len(columns), upload(columns, self.target.device)
        integers[:, :count] = integers.index_select(1, index)
        integers[:, count:] = 0  # padding
        self.state.move(index, length)
        self._sent = []

    def _takes(self, requests: list[Request], plan: StepPlan, deterministic: bool, *, behind: Flight | None = None) -> BlockKey | None:
        """The captured step that is planned; None where it has no drafts, or cannot be captured. behind: one that is under way, which it follows."""
        drafting, given = any(plan.lengths), any(plan.given)
        if plan.block is not None or drafting == given:
            return None
        if self.drafter is not None and self.drafter.feature_taps:
            return None
        if not self._asks(requests).capturable:
            return None
        key = self._key(requests, "model" if drafting else "given", deterministic)
        key = self._with_length(key, max([*plan.lengths, *map(len, plan.given)]))
        if key.batch * (1 + max(key.length, int(drafting))) > (MOST_SKINNY if deterministic else MAX_ROWS):
            return None
        if (
            behind is not None
        ):  # what it follows has left no draft behind; its first pass must have room for the rows of all tokens kept there
            return key if self.on_states is None or key.length >= behind.length else None
        return key if not drafting or self._num_behind(requests) <= _MOST_BEHIND else None

    def _asks(self, requests: list[Request]) -> _Asked:
        """What these ask for."""
        if not same_objects(self._asked.requests, requests):
            params = [r.params for r in requests]
            capturable = not self._sees_logits(requests) and len(requests) <= _MOST
            capturable = capturable and len({p.coupled for p in params if not p.greedy}) <= 1
            drawing = Drawing.of(params, self.target.config.vocab_size)
            fixed = frozenset(int(p.draft_length) for p in params if p.draft_length != "auto")
            self._asked = _Asked(list(requests), params, [r.seed for r in requests], drawing, fixed, capturable)
        return self._asked

    @staticmethod
    def _sees_logits(requests: Sequence[Request]) -> bool:
        """Whether something between two steps needs the logits of a request: penalties, a format, or log probabilities."""
        return any(r.penalised or r.params.logprobs is not None for r in requests)

    def _num_behind(self, requests: Sequence[Request]) -> int:
        """Tokens that the drafts of all requests lack, and run before they draft."""
        if self.on_states is not None:
            return 0  # it goes on without them
        return sum([self._lacks(r) for r in requests if self._follows(r)])

    @property
    def _slack(self) -> int:
        """Tokens that a draft may lack: a separate one runs the last but one once more."""
        return 0 if self.head is not None else 1

    @staticmethod
    def _lacks(request: Request) -> int:
        """Committed tokens that its draft has not run and cannot run without the target."""
        return request.sequence.length - _state(request).num_cached

    def _follows(self, request: Request) -> bool:
        """Whether its draft goes along in steps with drafts of others: a separate draft has no pages for a request that asks for no drafts."""
        return self.head is not None or request.params.draft_length != 0

    def _catch_up(self, requests: Sequence[Request]) -> None:
        """Have the draft of every request know all tokens but the last two; a draft head that was left behind runs the target's first layers for them
        once more."""
        assert self.drafter is not None
        requests = [r for r in requests if self._follows(r)]
        behind = [r for r in requests if self._lacks(r) > self._slack]
        if behind:
            lacking = [r.token_ids[_state(r).num_cached : r.sequence.length] for r in behind]
            self.drafter.catch_up([_state(r) for r in behind], lacking)
        if self.head is not None:
            self._run_waiting([_state(r) for r in requests], 2)

    def _run_waiting(self, states: Sequence[DraftState], least: int) -> None:
        assert self.head is not None
        if self.on_states is not None:
            self.on_states.run_waiting(cast(Sequence[StateHeadState], states), least=least)
        else:
            self.head.run_pending(cast(Sequence[DraftHeadState], states), least=least)

    def _with_length(self, key: BlockKey, wanted: int) -> BlockKey:
        """k: of captured lengths and those that requests ask for, the least that holds the plan's; rather one that was captured before."""
        if self._recent is not None and self._recent[1] == wanted and self._recent[0] == key:
            return self._recent[2].key
        able = sorted(n for n in {*CAPTURED_LENGTHS, *self._asked.fixed} if n >= wanted) or [wanted]
        keys = [replace(key, length=n) for n in able]
        return next((own for own in keys if own in self._blocks), keys[0])

    def _key(self, requests: list[Request], source: Source, deterministic: bool) -> BlockKey:
        """Of a step of these requests, without its length."""
        pages = max([len(r.conversation.sequence.pages) for r in requests])
        if source == "model":
            pages = max(pages, *[len(_state(r).cache.pages) for r in requests])
        drawing = self._asks(requests).drawing
        return BlockKey(bucket(len(requests)), 0, page_bucket(pages, self.target.max_pages), source, drawing, deterministic)

    def ready(self, requests: Sequence[Request], deterministic: bool, kind: StepKind) -> tuple[int, ...]:
        """Lengths of blocks from the drafter ("model") or from the text that a captured step of these requests may have now: those that are captured,
        and the others if captures have taken no more than _CAPTURE_SHARE of the time."""
        if self._sees_logits(requests) or len(requests) > _MOST:
            return ()
        if kind == "model" and (self.draft is None or self._num_behind(requests) > _MOST_BEHIND):
            return ()
        most = MOST_SKINNY if deterministic else MAX_ROWS
        able = [k for k in CAPTURED_LENGTHS if bucket(len(requests)) * (1 + k) <= most]
        if not self.target.captures or _CAPTURE_SHARE * (time.perf_counter() - self._captured_at) >= self._capture_s:
            return tuple(able)
        self._drop_stale()
        key = self._key(list(requests), "model" if kind == "model" else "given", deterministic)
        return tuple(k for k in able if replace(key, length=k) in self._blocks)

    def _launch(self, requests: list[Request], plan: StepPlan, key: BlockKey, *, ahead: bool = False) -> Flight:
        """Launch a step behind what is on the device. ahead: behind a step that was not read back."""
        source, length, asked = key.source, key.length, self._asks(requests)
        self.state.sampling.set(asked.params, asked.seeds, self.target.config.vocab_size)
        columns = range(len(requests)) if ahead else self._kept(requests, source, length)
        self._settled = _NOTHING  # until the step is read: broken off from here on, the device may have moved on
        if source == "model" and -1 in columns:
            self._catch_up([r for r, column in zip(requests, columns, strict=True) if column < 0])
        num_drafts = list(plan.lengths) if source == "model" else [len(own) for own in plan.given]
        sent = self._to_send(requests, key.batch, source, length, num_drafts)
        if any([column != b for b, column in enumerate(columns)]):
            self._upload(requests, columns, key, sent)
        elif sent != self._sent:
            self.state.send(sent, key.batch)
        self._sent = sent
        block = self._block(key)
        wanted = max([*plan.lengths, *map(len, plan.given)])
        if self._recent is None or self._recent[2] is not block or self._recent[1] != wanted:
            self._recent = replace(key, length=0), wanted, block
        if source == "given":
            padded = [[*own, *[0] * (length - len(own))] for own in plan.given]
            fill(self.state.drafts[: len(requests), :length], padded)
        if block.graph is None:
            self._run(block)
        else:
            block.graph.replay()
        count = len(requests)
        exits = block.exits[:, :count].clone() if block.exits is not None else None if block.kept is None else block.kept[:count].clone()
        return Flight(requests, source, length, plan, num_drafts, copy_out(block.out[:count]), exits)

    def _upload(self, requests: Sequence[Request], columns: Sequence[int], key: BlockKey, sent: Sequence[Sequence[int]]) -> None:
        """Bring the device's state of the requests in no column (-1) up to the host's, and have that of the others lie in their order.

        The integers of all are the host's, and go there in one copy, `sent` with them; what the host does not have of the others is moved there.
        """
        state, drafted = self.state, key.source == "model"
        moving = [
            [r.sequence.length for r in requests],
            [self._first(r) if drafted else 0 for r in requests],
            [r.token_ids[-1] for r in requests],
            [r.token_ids[-2] for r in requests],
            [_num_skipped(r) if drafted else 0 for r in requests],
        ]
        padding = [0] * (key.batch - len(requests))
        numbers = [number for own in (*([*own, *padding] for own in moving), *sent) for number in own]
        order = [max(column, 0) for column in columns]
        new = [b for b, column in enumerate(columns) if column < 0 and drafted and self.head is not None]
        waiting = {b: rows for b in new if (rows := cast(DraftHeadState, _state(requests[b])).pending_hidden) is not None}
        each = 1 if self.on_states is None else state.rows.shape[1]
        places = [b * each for b in waiting]
        tokens: list[int] = []
        if self.on_states is not None:  # of each one's last token, behind what waits
            places += [b * each + (b in waiting) for b in new]
            tokens = [requests[b].token_ids[-1] for b in new]
        parts = numbers, order, tokens, places
        integers, into, ids, at = upload([n for part in parts for n in part], self.target.device).split(list(map(len, parts)))
        state.integers[:, : key.batch] = integers.view(len(StepState.NAMES), key.batch)
        if drafted and any([column not in (-1, b) for b, column in enumerate(columns)]):
            state.move(into, key.length)
        uploaded = list(waiting.values())
        if tokens:
            assert self.on_states is not None
            uploaded.append(self.on_states.next_rows([cast(StateHeadState, _state(requests[b])) for b in new], ids))
        if uploaded:
            kept = state.hidden if self.on_states is None else state.rows
            kept.view(-1, kept.shape[-1]).index_copy_(0, at, torch.cat(uploaded).to(kept.dtype))

    @staticmethod
    def _first(request: Request) -> int:
        """Where its draft's first pass begins: at the first token whose row waits, or behind what the draft has run."""
        state = _state(request)
        return state.num_cached - (state.num_pending_hidden if isinstance(state, DraftHeadState) else 0)

    def _to_send(self, requests: list[Request], batch: int, source: Source, length: int, num_drafts: list[int]) -> list[list[int]]:
        """What `StepState.send` tells the device: where there are pages, and how many drafts may be kept."""
        sequences, written = [r.sequence for r in requests], 2 * (length + 1)
        limits = [sequence.capacity for sequence in sequences]
        for sequence, limit in zip(sequences, limits, strict=True):
            at = sequence.length
            end = min(limit, at + written)
            if not sequence.holds(at, end):
                sequence.check_writable(at, end)  # says what is wrong
        values = [limits, self.target.tables.rows(sequences), num_drafts]
        if source == "model":
            assert self.draft is not None and self.drafter is not None
            caches, most = [_state(r).cache for r in requests], self.drafter.max_positions
            room = [cache.capacity if self._follows(r) else 0 for r, cache in zip(requests, caches, strict=True)]
            values += [room if max(room) <= most else [min(own, most) for own in room], self.draft.tables.rows(caches)]
        padding = [0] * (batch - len(requests))
        return [[*own, *padding] for own in values] + [[0] * batch] * (StepState.SENT - len(values))

    def capture_common(self, batch: int, drawing: Drawing, *, deterministic: bool = False, until_s: float = math.inf) -> None:
        """Capture the steps of `batch` requests over short contexts beforehand, with drafts of the drafter and with given ones, until `until_s` on
        `time.perf_counter`. Of many requests only short blocks: their buffers take gigabytes, for lengths that may never pay."""
        sources: list[Source] = ["given"] if self.draft is None else ["model", "given"]
        pages = page_bucket(1, self.target.max_pages)
        for length in common_lengths(batch):
            if batch * (1 + length) <= (MOST_SKINNY if deterministic else MAX_ROWS):
                for source in sources:
                    if time.perf_counter() < until_s:
                        self._block(BlockKey(batch, length, pages, source, drawing, deterministic))
        if self.draft is not None and not deterministic and time.perf_counter() < until_s:
            self.draft.capture_prompts(batch, logits=False, embed=self.head is None, until_s=until_s)
        if self.exit_layer and self.drafter is not None and not deterministic:
            # the first layers once more, for a draft head that was left behind: else its first trials in a text would capture them
            for length in PROMPT_LENGTHS:
                if batch * length <= MAX_ROWS and time.perf_counter() < until_s:
                    self.target.step(batch, length, 1, 0, self.exit_layer, self.drafter.target_taps, False)
        self._captured_at = -math.inf  # what is captured at the start takes nobody's time

    def capture_long_prompts(self, batch: int, *, until_s: float = math.inf) -> None:
        """The same for the drafter's passes of more than MAX_ROWS tokens of up to `batch` prompts."""
        if self.draft is not None:
            self.draft.capture_long_prompts(batch, logits=False, embed=self.head is None, until_s=until_s)
        if self.exit_layer and self.drafter is not None:
            self.target.capture_long_prompts(
                batch, layers=range(self.exit_layer), taps=self.drafter.target_taps, logits=False, until_s=until_s
            )

    # --- what steps cost ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def measure_costs(self, token_counts: Sequence[int], *, deterministic: bool = False) -> CostModel:
        """Seconds of the passes that captured steps are made of, each replayed alone over padding: host time is hidden behind them."""
        target, draft, exit_layer = self.target, self.draft, self.exit_layer
        layers, most = target.config.num_layers, MOST_SKINNY if deterministic else MAX_ROWS
        counts = [n for n in token_counts if n <= most]

        def curve(*makers: Callable[[int], tuple[GraphedDecoder, Step]]) -> Curve:
            points, least = [], 0.0
            for n in counts:
                steps = [make(n) for make in makers]
                for runner, step in steps:  # it may be under way for some request, or hold the page table row of another one
                    step.fill([], [], [], runner.pool.page_size)
                seconds = _replay_seconds([partial(runner.replay, step) for runner, step in steps], target.device)
                least = max(least, seconds)
                points.append((n, least))
            return tuple(points)

        def verify(n: int) -> tuple[GraphedDecoder, Step]:
            return target, target.step(1, n, 1, exit_layer, layers, (), True, embed=not exit_layer, deterministic=deterministic)

        def first_layers(n: int) -> tuple[GraphedDecoder, Step]:
            return target, target.step(n, 1, 1, 0, exit_layer, (), False, deterministic=deterministic)

        def drafting(n: int) -> tuple[GraphedDecoder, Step]:
            assert draft is not None
            return draft, draft.step(n, 1, 1, 0, draft.config.num_layers, (), True, embed=self.head is None, deterministic=deterministic)

        if target.captures:
            with compile_ahead():  # all of them, several at once
                for make in (verify,) if draft is None else (verify, first_layers, drafting) if exit_layer else (verify, drafting):
                    for n in counts:
                        make(n)
        if draft is None:
            return CostModel(((1, 0.0),), curve(verify))
        if not exit_layer:
            return CostModel(curve(drafting), curve(verify))
        return CostModel(curve(first_layers, drafting), curve(verify), True, curve(first_layers))

    # --- what is captured -----------------------------------------------------------------------------------------------

    def _block(self, key: BlockKey) -> Block:
        self._drop_stale()
        if self._recent is not None and self._recent[2].key is key:
            return self._recent[2]
        if key not in self._blocks:
            began = time.perf_counter()
            block = built(lambda: self._build(key), key in self._compiled, captures=self.target.captures)
            self._compiled.add(key)
            if compiling_ahead():
                return block
            self._blocks[key] = block
            self._captured_at = time.perf_counter()
            self._capture_s = self._captured_at - began
        return self._blocks[key]

    def _drop_stale(self) -> None:
        """Forget what was captured over pools that have moved."""
        memory = (self.target.memory_version, *(() if self.draft is None else (self.draft.memory_version,)))
        if memory != self._memory:
            self._blocks.clear()
            self._recent = None
            self._memory = memory

    @torch.inference_mode(False)
    @torch.no_grad()
    def _build(self, key: BlockKey) -> Block:
        target, draft, device = self.target, self.draft, self.target.device
        batch, length, most = key.batch, key.length, target.config.num_layers
        rows = length + 1

        drafts = torch.zeros(length, batch, dtype=torch.int64, device=device)
        tokens = torch.zeros(batch, rows, dtype=torch.int64, device=device)
        out = torch.zeros(batch, length + 2, dtype=torch.int64, device=device)
        target_tables = target.tables.new_step(batch, min(key.pages, target.max_pages))
        from_exit, exits = self.exit_layer > 0 and key.source == "model", None
        if from_exit:
            exits = torch.zeros(rows, batch, target.config.hidden_size, dtype=target.dtype, device=device)
        verify = target.part(
            batch,
            rows,
            range(self.exit_layer if from_exit else 0, most),
            tables=target_tables,
            token_ids=tokens.view(-1),
            embed=not from_exit,
            logits=not key.drawing.greedy,
            taps=() if self.on_states is None else tuple(layer for layer in self.on_states.join.state_layers if layer < most),
            deterministic=key.deterministic,
        )
        block = Block(key, drafts, tokens, out, target_tables, verify, exits=exits)
        if self.on_states is not None:
            block.kept = torch.zeros(batch, rows, 2 * target.config.hidden_size, dtype=target.dtype, device=device)
        first_rows = rows if self.on_states is not None else 2
        if key.source == "model":
            assert draft is not None
            block.draft_tables = draft.tables.new_step(batch, min(key.pages, draft.max_pages))
            for i in range(length):
                block.passes.append(
                    draft.part(
                        batch,
                        1 if i else first_rows,
                        range(draft.config.num_layers),
                        tables=block.draft_tables,
                        token_ids=drafts[i - 1] if i else None,
                        embed=self.head is None,
                        logits=not key.drawing.greedy,
                        deterministic=key.deterministic,
                    )
                )
            for i in range(rows if from_exit else 0):
                assert exits is not None
                first = target.part(
                    batch,
                    1,
                    range(self.exit_layer),
                    tables=target_tables,
                    token_ids=drafts[i - 1] if i else None,
                    deterministic=key.deterministic,
                )
                first.buffers.stream = exits[i]
                block.first.append(first)
            if key.drawing.inverse:
                block.probs = torch.zeros(batch, length, target.config.vocab_size, device=device)
        if self.target.captures:
            kept = self.state.integers.clone(), self.state.hidden.clone(), self.state.rows.clone()
            self.state.integers.zero_()  # every request is padding while it is captured: no page is written
            block.graph = target.capture(lambda: self._run(block))
            self.state.integers.copy_(kept[0])
            self.state.hidden.copy_(kept[1])
            self.state.rows.copy_(kept[2])
        return block

    def _run(self, block: Block) -> None:
        key, state, target, draft = block.key, self.state, self.target, self.draft
        batch, length = key.batch, key.length
        of = {name: state.of(name, batch) for name in StepState.NAMES}
        target.tables.look_up(of["row"], block.target_tables)
        if key.source == "model":
            assert draft is not None and block.draft_tables is not None
            draft.tables.look_up(of["draft_row"], block.draft_tables)
            if self.on_states is not None:
                self._draft_on_states(block, of)
            else:
                self._draft(block, of)
        else:
            block.drafts.copy_(state.drafts[:batch, :length].T)
        torch.stack([of["last"], *block.drafts], 1, out=block.tokens)
        verify = block.verify
        if block.exits is not None:
            verify.buffers.stream.view(batch, length + 1, -1).copy_(block.exits.transpose(0, 1))
        target.run_part(verify, of["length"], of["length"], of["limit"], 0, head=True)
        self._accept(block, of)

    def _draft(self, block: Block, of: dict[str, Tensor]) -> None:
        """The drafting passes, each on the one before it."""
        assert self.draft is not None
        batch, hidden = block.key.batch, block.exits
        for i, step in enumerate(block.passes):
            if hidden is not None:
                self._first_layers(block, of, i)
                stream = step.buffers.stream
                if i:
                    stream.copy_(hidden[i])
                else:
                    torch.stack([self.state.hidden[:batch], hidden[0]], 1, out=stream.view(batch, 2, -1))
            elif i == 0:
                ids = step.buffers.token_ids.view(batch, 2)
                ids[:, 0] = of["previous"]
                ids[:, 1] = of["last"]
                ids.clamp_max_(self.draft.config.vocab_size - 1)
            self.draft.run_part(step, of["length"], of["first"], of["draft_limit"], i if i else -1, head=True)
            self._draw(block, of, i, step)
        if hidden is not None:
            self._first_layers(block, of, len(block.passes))

    def _draft_on_states(self, block: Block, of: dict[str, Tensor]) -> None:
        """The drafting passes of a head on the target's last states: the rows of what the last step kept and of its last token, then a draft each."""
        assert self.draft is not None and self.on_states is not None
        batch, size = block.key.batch, self.state.rows.shape[-1]
        assert StepState.NAMES[:2] == ("length", "first")
        length, first = (self.state.integers[:2, :batch] - of["skipped"]).unbind()  # in the own layers' cache
        limit = torch.minimum(length + 1, of["draft_limit"])
        # of the last token's row; the length of padding moves on with every step, and may lie anywhere
        place = (length - first).clamp(0, len(block.passes))[:, None]
        for i, step in enumerate(block.passes):
            stream = step.buffers.stream
            if i == 0:
                stream.view(batch, -1, size).copy_(self.state.rows[:batch, : len(block.passes) + 1])
                self.draft.run_part(step, first, first, limit, 0, head=True)
                own = stream.view(batch, -1, size).gather(1, place[..., None].expand(batch, 1, size))[:, 0]
            else:
                assert self._embedded is not None and self._places is not None
                self.on_states.join.rows_of(own, self._embedded[self._places[block.drafts[i - 1]]], stream)
                self.draft.run_part(step, length, length, of["draft_limit"], i, head=True)
                own = stream
            self._draw(block, of, i, step, None if i else place)

    @torch.no_grad()
    def _embed_drafts(self, drafter: StateDrafter) -> tuple[Tensor, Tensor]:
        ids = drafter.states_head.token_ids
        embedded = torch.cat([drafter.join.embedded(drafter.embed(some)) for some in ids.split(4096)])
        places = torch.zeros(self.target.config.vocab_size, dtype=torch.int64, device=ids.device)
        places[ids] = torch.arange(len(ids), device=ids.device)
        return embedded, places

    def _first_layers(self, block: Block, of: dict[str, Tensor], number: int) -> None:
        """The target's first layers on the last token (0) or on a draft."""
        assert block.exits is not None
        step = block.first[number]
        if number == 0:
            step.buffers.token_ids.copy_(of["last"])
        self.target.run_part(step, of["length"], of["length"], of["limit"], number, head=False)

    def _draw(self, block: Block, of: dict[str, Tensor], number: int, step: Step, place: Tensor | None = None) -> None:
        """Draw a draft from the logits of each request's last row, or of row place[b] (int64 [B, 1])."""
        key, state, batch = block.key, self.state, block.key.batch
        into, ids = block.drafts[number], None if self.head is None else self.head.token_ids
        best = _row_of(step.buffers.next_tokens.view(batch, -1), place)  # -1 where logits are not finite: any token stands for it
        if key.drawing.greedy:
            if ids is None:
                torch.clamp(best, min=0, out=into)
            else:
                torch.take(ids, best, out=into)
            return
        best = best.clamp_min(0) if ids is None else ids.take(best)
        logits = step.buffers.logits
        assert logits is not None
        sampling, seeds = state.sampling, state.sampling.seed[:batch]
        probs = sampling.distributions(_row_of(logits.view(batch, -1, logits.shape[-1]), place), key.drawing, batch)
        if key.drawing.race:
            drawn = race(self._whole(probs, ids), seeds, of["length"] + (1 + number))
        else:
            assert block.probs is not None
            block.probs[:, number] = self._whole(probs, ids)
            drawn = sample_rows(probs, philox_uniform(seeds, of["length"] + (1 + number), COUNTER_DRAFT))
            drawn = drawn if ids is None else ids[drawn]
        into.copy_(torch.where(sampling.greedy[:batch], best, drawn))

    def _whole(self, probs: Tensor, ids: Tensor | None) -> Tensor:
        """Distributions [B, V'] of the draft's vocabulary over the target's, [B, V]."""
        size = self.target.config.vocab_size
        if ids is not None:
            return probs.new_zeros(len(probs), size).index_copy_(1, ids, probs)
        return probs if probs.shape[1] == size else torch.nn.functional.pad(probs, (0, size - probs.shape[1]))

    def _accept(self, block: Block, of: dict[str, Tensor]) -> None:
        """Keep drafts, draw the token after them, and move the state behind it."""
        key, state = block.key, self.state
        batch, length = key.batch, key.length
        drafts, best = block.tokens[:, 1:], block.verify.buffers.next_tokens.view(batch, length + 1)
        sampling, num_drafts = state.sampling, of["num_drafts"]
        own, probs, accepted = best, None, None
        if not key.drawing.greedy:
            greedy, logits = sampling.greedy[:batch], block.verify.buffers.logits
            assert logits is not None
            probs = sampling.distributions(logits, key.drawing, batch, length + 1)
            steps = torch.arange(length + 1, device=self.target.device)
            seeds, places = sampling.seed[:batch, None].expand(batch, length + 1), of["length"][:, None] + 1 + steps
            if key.drawing.race:
                own = race(probs, seeds.flatten(), places.flatten()).view(batch, length + 1)
            elif key.source == "given":
                own = sample_rows(probs, philox_uniform(seeds, places, COUNTER_SAMPLE).flatten()).view(batch, length + 1)
            own = torch.where(greedy[:, None], best, own)
            if key.drawing.inverse and key.source == "model":
                assert block.probs is not None
                found = accept(
                    probs,
                    block.probs.flatten(0, 1),
                    drafts.flatten(),
                    num_drafts,
                    sampling.seed[:batch],
                    of["length"] + 1,
                    length,
                    even=True,
                )
                accepted = greedy, found.num_accepted, found.next_token
        advance_block(
            block.tokens,
            own,
            best,
            num_drafts,
            BlockState(of["length"], of["first"], of["previous"], of["last"]),
            block.out,
            runs_kept=self.on_states is not None,  # on the target's states
            accepted=accepted,
            exits=block.exits,
            hidden=None if block.exits is None else state.hidden[:batch],
        )
        if self.on_states is not None:
            self._keep_states(block)

    def _keep_states(self, block: Block) -> None:
        """The rows of the tokens that a step has gained, from the target's states of those before them, for the next step and for the host."""
        assert self.on_states is not None and block.kept is not None
        batch, join, verify = block.key.batch, self.on_states.join, block.verify
        fused = join.fused([verify.taps.get(layer, verify.buffers.stream) for layer in join.state_layers])
        rows = join.rows(fused, self.on_states.embed(block.out[:, 1:].flatten().clamp_min(0)))
        torch.cat([fused, rows], -1, out=block.kept.view(len(rows), -1))
        self.state.rows[:batch, : block.key.length + 1] = rows.view(batch, block.key.length + 1, -1)


def _head_of(drafter: Drafter | None) -> DraftHead | None:
    """The draft head that a drafter drafts with, if any."""
    if isinstance(drafter, StateDrafter):
        return drafter.states_head
    return drafter.draft_head if isinstance(drafter, EarlyExitDrafter) else None


def _row_of(rows: Tensor, place: Tensor | None) -> Tensor:
    """Of rows [B, n, ...] each request's last one, or that at place [B, 1]."""
    if place is None:
        return rows[:, -1]
    index = place if rows.dim() == 2 else place[..., None].expand(len(rows), 1, rows.shape[-1])
    return rows.gather(1, index)[:, 0]


def _replay_seconds(runs: Sequence[Callable[[], None]], device: torch.device, count: int = 10) -> float:
    """Seconds that the runs take one after another, the mean of `count`."""

    def turn(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            for run in runs:
                run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    turn(2)
    return turn(count) / count


def _num_skipped(request: Request) -> int:
    """Tokens that a draft head on the target's last states has no rows of."""
    state = _state(request)
    return state.num_skipped if isinstance(state, StateHeadState) else 0


def _state(request: Request) -> DraftState:
    state = request.conversation.draft_state
    assert state is not None, "a request under a drafter has a draft state"
    return state


def block_decoding(target: CausalDecoder, drafter: Drafter | None) -> BlockDecoding | None:
    """Steps captured whole, where target and drafter have them."""
    if not isinstance(target, GraphedDecoder) or not BlockDecoding.supports(target, drafter):
        return None
    return BlockDecoding(target, drafter)
