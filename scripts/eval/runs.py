"""Runs the planted questions and the conversations of eval_tasks over an untouched cache and over coded ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.engine import Engine
from engine.errors import InvalidOption
from engine.runtime.request import SequenceState
from engine.sessions.file import Span
from engine.text.chat import next_turn
from eval.fitted_baselines import FittedBaselines
from eval.long_tasks import LONG_INTRODUCTION, make_long_sample
from eval.rows import Parts, item
from eval.suspend import Suspender, ask, ask_aside, copied, open_with, run_draft
from eval.tasks import (
    ACKNOWLEDGEMENT,
    INTRODUCTION,
    MAX_NEW_TOKENS,
    Sample,
    Turn,
    make_conversation,
    make_sample,
)

UNTOUCHED = "untouched"
PLANTED, LONG = "planted", "long"
TEMPLATE_TOKENS = 256  # the chat template, a question and its answer


@dataclass(frozen=True)
class Plan:
    """What is run. qualities: coded rows besides the untouched one. texts: filler. batch: samples answered together. baselines: baselines, of the
    planted texts."""

    qualities: tuple[str, ...]
    texts: Sequence[str]
    samples: int  # whole batches
    batch: int
    seed: int
    facts: int = 8
    identifiers: int = 1
    sums: int = 2
    conversations: int = 8
    turns: int = 20
    turn_tokens: int = 100
    long_questions: int = 2  # of each of the long tasks
    baselines: tuple[str, ...] = ()

    def batches(self) -> Iterator[range]:
        """Sample numbers, `batch` at a time."""
        for start in range(0, self.samples, self.batch):
            yield range(start, start + self.batch)


class Runner:
    """Adds to `parts` whatever of a plan is not there yet, one entry for each (run, samples, method); `save` is called after each."""

    def __init__(
        self,
        engine: Engine,
        suspender: Suspender,
        plan: Plan,
        parts: Parts,
        save: Callable[[], None],
        log: Callable[[str], None],
        baselines: FittedBaselines | None = None,
    ):
        self.engine, self._suspender, self.plan, self.parts, self._baselines = engine, suspender, plan, parts, baselines
        self._save, self._log = save, log

    def count(self, lines: list[str]) -> list[int]:
        """Tokens of each line."""
        return [len(ids) for ids in self.engine.tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]]  # type: ignore[misc]

    # --- facts planted in a text ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def planted(self, context: int, kind: str = PLANTED) -> None:
        """Retrieval, copying and arithmetic (or the long tasks, `kind` LONG) over texts of about `context` tokens: all questions of a text are asked of
        the same restored cache, each right behind the text. Raises InvalidOption for a context that the model or the facts do not fit."""
        if context > self.engine.context:
            raise InvalidOption(f"a context of {context} tokens, the model has {self.engine.context}", "give shorter --contexts")
        for batch in self.plan.batches():
            every = (UNTOUCHED, *self.plan.qualities, *self.plan.baselines)
            keys = {method: f"{kind}/{context}/{batch.start}-{batch.stop}/{method}" for method in every}
            if all(key in self.parts for key in keys.values()):
                continue
            samples = [self.sample(context, number, kind) for number in batch]
            introduction = LONG_INTRODUCTION if kind == LONG else INTRODUCTION
            conversations = open_with(self.engine.core, [self.context_ids(s, introduction) for s in samples])
            try:
                answers = self._ask_all(conversations, samples)
                self._record(keys[UNTOUCHED], samples, answers, answers, conversations, None)
                for quality in self.plan.qualities:
                    if keys[quality] not in self.parts:
                        self._coded(keys[quality], quality, samples, conversations, answers)
                for name in self.plan.baselines:
                    if keys[name] not in self.parts:
                        self._coded_by_baseline(keys[name], name, samples, conversations, answers)
            finally:
                self._close(conversations)

    def sample(self, context: int, number: int, kind: str = PLANTED) -> Sample:
        """Sample `number` of a context length and kind: a function of the seed and these."""
        if kind == LONG:
            rng = random.Random(f"{self.plan.seed}/{LONG}/{context}/{number}")
            return make_long_sample(rng, self.plan.texts, context - TEMPLATE_TOKENS, self.count, each=self.plan.long_questions)
        rng = random.Random(f"{self.plan.seed}/{context}/{number}")
        return make_sample(
            rng,
            self.plan.texts,
            context - TEMPLATE_TOKENS,
            self.count,
            facts=self.plan.facts,
            identifiers=self.plan.identifiers,
            sums=self.plan.sums,
        )

    def context_ids(self, sample: Sample, introduction: str = INTRODUCTION) -> list[int]:
        """Token ids of the user's turn with the text and of the assistant's reply: everything before the suspension."""
        ids = self.engine.encode([{"role": "user", "content": introduction + sample.document}])
        return ids + self.engine.tokenizer(ACKNOWLEDGEMENT, add_special_tokens=False)["input_ids"]  # type: ignore[misc]

    def _coded(self, key: str, quality: str, samples: list[Sample], originals: list[SequenceState], untouched: list[list[str]]) -> None:
        """The first text goes through a file; the others are coded and decoded in place, in copies of their caches."""
        first, _, stored = self._suspender.through_file(originals[0], quality)
        restored, copies = [first], []
        try:
            for original in originals[1:]:
                copy = SequenceState(list(original.token_ids), copied(original.sequence, shared=False), original.draft_state)
                copies.append(copy)
                stored += self._suspender.file_bytes(copy, quality, self._suspender.in_place(copy, quality))
            self._record(key, samples, self._ask_all([*restored, *copies], samples), untouched, originals, stored)
        finally:
            self._close(restored)
            for copy in copies:
                copy.sequence.free()

    def _coded_by_baseline(
        self, key: str, name: str, samples: list[Sample], originals: list[SequenceState], untouched: list[list[str]]
    ) -> None:
        """All texts are coded and decoded in place by a baseline, in copies of their caches."""
        assert self._baselines is not None, "a plan with baselines comes with them"
        copies = [SequenceState(list(c.token_ids), copied(c.sequence, shared=False), c.draft_state) for c in originals]
        try:
            stored = self._baselines.in_place(name, [copy.sequence for copy in copies])
            self._record(key, samples, self._ask_all(copies, samples), untouched, originals, stored)
        finally:
            for copy in copies:
                copy.sequence.free()

    def _ask_all(self, conversations: list[SequenceState], samples: list[Sample]) -> list[list[str]]:
        """Answers [sample][question]; every question starts from the conversations as they are, and leaves them so. All are answered together."""
        pairs = [(c, q) for c, s in zip(conversations, samples, strict=True) for q in s.questions]
        questions = [next_turn(self.engine.tokenizer, q.text, c.token_ids) for c, q in pairs]
        tokens = iter(ask_aside(self.engine.core, [c for c, _ in pairs], questions, [q.max_new_tokens for _, q in pairs]))
        return [[self._text(next(tokens)) for _ in s.questions] for s in samples]

    def _record(
        self,
        key: str,
        samples: list[Sample],
        answers: list[list[str]],
        untouched: list[list[str]],
        conversations: list[SequenceState],
        stored_bytes: int | None,
    ) -> None:
        items = [
            item(q, answer, same)
            for s, own, theirs in zip(samples, answers, untouched, strict=True)
            for q, answer, same in zip(s.questions, own, theirs, strict=True)
        ]
        self.parts[key] = {"items": items, "stored_bytes": stored_bytes, "tokens": sum(c.sequence.length for c in conversations)}
        self._save()
        right = sum(i["right"] for i in items)
        self._log(f"{key}: {right} of {len(items)} right")

    # --- conversations of many turns ------------------------------------------------------------------------------------

    @torch.inference_mode()
    def conversations(self) -> None:
        """Every method's own conversations, greedy; a coded one is suspended and resumed before every turn but the first."""
        count = self.plan.conversations
        plans = [
            make_conversation(
                random.Random(f"{self.plan.seed}/conversation/{n}"), self.plan.texts, self.plan.turns, self.plan.turn_tokens, self.count
            )
            for n in range(count)
        ]
        untouched = f"conversation/{count}/{UNTOUCHED}"
        for methods in ((UNTOUCHED,), self.plan.qualities):
            missing = [m for m in methods if f"conversation/{count}/{m}" not in self.parts]
            if missing:
                self._talk(missing, plans, self.parts.get(untouched))

    def _talk(self, methods: Sequence[str], plans: list[list[Turn]], untouched: dict[str, Any] | None) -> None:
        """The conversations of several methods side by side, each with its own cache. The first one goes through a file between all turns and the
        other methods' first ones before the last turn; the others are coded and decoded in place."""
        count = len(plans)
        owners = [(method, n) for method in methods for n in range(count)]
        conversations = [self.engine.core.open_sequence_state() for _ in owners]
        spans: list[list[Span]] = [[] for _ in owners]
        items: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        sizes = [0] * len(owners)
        lengths = [0] * len(owners)
        try:
            for turn in range(self.plan.turns):
                last = turn == self.plan.turns - 1
                if turn:
                    run_draft(self.engine.core, conversations)
                for b, (method, n) in enumerate(owners):
                    if not turn or method == UNTOUCHED:
                        continue
                    old, lengths[b] = conversations[b], conversations[b].sequence.length
                    if b and (n or not last):
                        spans[b] = self._suspender.in_place(old, method, spans[b])
                        sizes[b] = self._suspender.file_bytes(old, method, spans[b]) if last else 0
                    else:
                        conversations[b], spans[b], sizes[b] = self._suspender.through_file(old, method, spans[b])
                        self._close([old])
                answers = self._turn(conversations, [plans[n][turn] for _, n in owners])
                for (method, n), answer in zip(owners, answers, strict=True):
                    theirs = answer if untouched is None else untouched["items"][turn * count + n]["answer"]
                    question = plans[n][turn].question
                    told = {"task": "told", "answer": answer, "right": None, "agrees": answer == theirs}
                    items[method].append((told if question is None else item(question, answer, theirs)) | {"turn": turn})
        finally:
            self._close(conversations)
        for method in methods:
            own = [b for b, (name, _) in enumerate(owners) if name == method]
            coded = method != UNTOUCHED and self.plan.turns > 1
            self.parts[f"conversation/{count}/{method}"] = {
                "items": items[method],
                "resumes": count * (self.plan.turns - 1) if coded else 0,
                "stored_bytes": sum(sizes[b] for b in own) if coded else None,
                "tokens": sum(lengths[b] for b in own),
            }
            asked = [i for i in items[method] if i["right"] is not None]
            self._log(f"conversation/{count}/{method}: {sum(i['right'] for i in asked)} of {len(asked)} right")
        self._save()

    def _turn(self, conversations: list[SequenceState], turns: list[Turn]) -> list[str]:
        """What is answered to each user's message."""
        questions = [
            next_turn(self.engine.tokenizer, t.message, c.token_ids)
            if c.token_ids
            else self.engine.encode([{"role": "user", "content": t.message}])
            for t, c in zip(turns, conversations, strict=True)
        ]
        limit = MAX_NEW_TOKENS["conversation"]
        return [self._text(ids) for ids in ask(self.engine.core, conversations, questions, [limit] * len(questions))]

    def _text(self, ids: list[int]) -> str:
        return self.engine.tokenizer.decode(ids, skip_special_tokens=True).strip()  # type: ignore[union-attr]

    def _close(self, conversations: Sequence[SequenceState]) -> None:
        for conversation in conversations:
            self.engine.core.close_sequence_state(conversation)
