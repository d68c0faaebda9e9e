"""Runs the planted questions and the conversations of eval_tasks over an untouched cache and over coded ones; adds up the rows."""
from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.chat import next_turn
from engine.engine import Engine
from engine.errors import InvalidOption
from engine.request import Conversation
from engine.session_file import Span
from scripts.eval_suspend import Suspender, ask, open_with, roll_back
from scripts.eval_tasks import (
    ACKNOWLEDGEMENT,
    INTRODUCTION,
    Question,
    Sample,
    copied_fraction,
    judge,
    make_conversation,
    make_sample,
)

UNTOUCHED = "untouched"
DEPTH_BINS = 5
TEMPLATE_TOKENS = 256  # the chat template, a question and its answer
Parts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What is run. qualities: coded rows besides the untouched one. texts: filler. batch: samples answered together."""

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

    def batches(self) -> Iterator[range]:
        """Sample numbers, `batch` at a time."""
        for start in range(0, self.samples, self.batch):
            yield range(start, start + self.batch)


class Runner:
    """Adds to `parts` whatever of a plan is not there yet, one entry for each (run, samples, method); `save` is called after each."""

    def __init__(self, engine: Engine, suspender: Suspender, plan: Plan, parts: Parts, save: Callable[[], None], log: Callable[[str], None]):
        self.engine, self._suspender, self.plan, self.parts = engine, suspender, plan, parts
        self._save, self._log = save, log

    def count(self, lines: list[str]) -> list[int]:
        """Tokens of each line."""
        return [len(ids) for ids in self.engine.tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]]  # type: ignore[misc]

    # --- facts planted in a text ----------------------------------------------------------------------------------------

    def planted(self, context: int) -> None:
        """Retrieval, copying and arithmetic over texts of about `context` tokens: all questions of a text are asked of the same restored cache,
        each right behind the text. Raises InvalidOption for a context that the model or the facts do not fit."""
        if context > self.engine.context:
            raise InvalidOption(f"a context of {context} tokens, the model has {self.engine.context}", "give shorter --contexts")
        for batch in self.plan.batches():
            keys = {method: f"planted/{context}/{batch.start}-{batch.stop}/{method}" for method in (UNTOUCHED, *self.plan.qualities)}
            if all(key in self.parts for key in keys.values()):
                continue
            samples = [self.sample(context, number) for number in batch]
            conversations = [open_with(self.engine, self.context_ids(s)) for s in samples]
            try:
                answers = self._ask_all(conversations, samples)
                self._record(keys[UNTOUCHED], samples, answers, answers, conversations, None)
                for quality in self.plan.qualities:
                    if keys[quality] not in self.parts:
                        self._coded(keys[quality], quality, samples, conversations, answers)
            finally:
                self._close(conversations)

    def sample(self, context: int, number: int) -> Sample:
        """Sample `number` of a context length: a function of the seed and the two."""
        rng = random.Random(f"{self.plan.seed}/{context}/{number}")
        return make_sample(rng, self.plan.texts, context - TEMPLATE_TOKENS, self.count,
                           facts=self.plan.facts, identifiers=self.plan.identifiers, sums=self.plan.sums)

    def context_ids(self, sample: Sample) -> list[int]:
        """Token ids of the user's turn with the text and of the assistant's reply: everything before the suspension."""
        ids = self.engine.encode([{"role": "user", "content": INTRODUCTION + sample.document}])
        return ids + self.engine.tokenizer(ACKNOWLEDGEMENT, add_special_tokens=False)["input_ids"]  # type: ignore[misc]

    def _coded(self, key: str, quality: str, samples: list[Sample], originals: list[Conversation], untouched: list[list[str]]) -> None:
        files = [self._suspender.suspend(c, quality) for c in originals]
        restored: list[Conversation] = []
        try:
            for data in files:
                restored.append(self._suspender.resume(data)[0])
            self._record(key, samples, self._ask_all(restored, samples), untouched, originals, sum(map(len, files)))
        finally:
            self._close(restored)

    def _ask_all(self, conversations: list[Conversation], samples: list[Sample]) -> list[list[str]]:
        """Answers [sample][question]; every question starts from the conversations as they are, and leaves them so."""
        lengths = [len(c.token_ids) for c in conversations]
        answers: list[list[str]] = [[] for _ in samples]
        for n, example in enumerate(samples[0].questions):
            questions = [next_turn(self.engine.tokenizer, s.questions[n].text, c.token_ids) for s, c in zip(samples, conversations, strict=True)]
            tokens = ask(self.engine, conversations, questions, example.max_new_tokens)
            for b, conversation in enumerate(conversations):
                answers[b].append(self._text(tokens[b]))
                roll_back(conversation, lengths[b])
        return answers

    def _record(self, key: str, samples: list[Sample], answers: list[list[str]], untouched: list[list[str]],
                conversations: list[Conversation], stored_bytes: int | None) -> None:
        items = [item(q, answer, same) for s, own, theirs in zip(samples, answers, untouched, strict=True)
                 for q, answer, same in zip(s.questions, own, theirs, strict=True)]
        self.parts[key] = {"items": items, "stored_bytes": stored_bytes, "tokens": sum(c.sequence.length for c in conversations)}
        self._save()
        right = sum(i["right"] for i in items)
        self._log(f"{key}: {right} of {len(items)} right")

    # --- conversations of many turns ------------------------------------------------------------------------------------

    def conversations(self) -> None:
        """Every method's own conversations, greedy; a coded one is suspended and resumed before every turn but the first."""
        count = self.plan.conversations
        untouched = f"conversation/{count}/{UNTOUCHED}"
        plans = [make_conversation(random.Random(f"{self.plan.seed}/conversation/{n}"), self.plan.texts, self.plan.turns,
                                   self.plan.turn_tokens, self.count) for n in range(count)]
        for method in (UNTOUCHED, *self.plan.qualities):
            key = f"conversation/{count}/{method}"
            if key in self.parts:
                continue
            conversations = [self.engine.open_conversation() for _ in plans]
            spans: list[list[Span]] = [[] for _ in plans]
            items: list[dict[str, Any]] = []
            stored = tokens = resumes = 0
            try:
                for turn in range(self.plan.turns):
                    if turn and method != UNTOUCHED:
                        files = [self._suspender.suspend(c, method, s) for c, s in zip(conversations, spans, strict=True)]
                        stored, tokens = sum(map(len, files)), sum(c.sequence.length for c in conversations)
                        self._close(conversations)
                        conversations.clear()
                        for b, data in enumerate(files):
                            conversation, spans[b] = self._suspender.resume(data)
                            conversations.append(conversation)
                        resumes += count
                    items += self._turn(turn, conversations, [plan[turn] for plan in plans], self.parts.get(untouched))
            finally:
                self._close(conversations)
            self.parts[key] = {"items": items, "resumes": resumes, "stored_bytes": stored if resumes else None, "tokens": tokens}
            self._save()
            asked = [i for i in items if i["right"] is not None]
            self._log(f"{key}: {sum(i['right'] for i in asked)} of {len(asked)} right, {resumes} resumes")

    def _turn(self, turn: int, conversations: list[Conversation], turns: list[Any], untouched: dict[str, Any] | None) -> list[dict[str, Any]]:
        questions = [next_turn(self.engine.tokenizer, t.message, c.token_ids) if c.token_ids else
                     self.engine.encode([{"role": "user", "content": t.message}]) for t, c in zip(turns, conversations, strict=True)]
        answers = [self._text(ids) for ids in ask(self.engine, conversations, questions, Question("conversation", "", "", 0.0).max_new_tokens)]
        items = []
        for b, (t, answer) in enumerate(zip(turns, answers, strict=True)):
            theirs = answer if untouched is None else untouched["items"][turn * len(turns) + b]["answer"]
            if t.question is None:
                items.append({"task": "told", "turn": turn, "answer": answer, "right": None, "agrees": answer == theirs})
            else:
                items.append(item(t.question, answer, theirs) | {"turn": turn})
        return items

    def _text(self, ids: list[int]) -> str:
        return self.engine.tokenizer.decode(ids, skip_special_tokens=True).strip()  # type: ignore[union-attr]

    def _close(self, conversations: Sequence[Conversation]) -> None:
        for conversation in conversations:
            self.engine.close_conversation(conversation)


def item(question: Question, answer: str, untouched: str) -> dict[str, Any]:
    """One judged answer."""
    return {"task": question.task, "depth": round(question.depth, 4), "right": judge(question, answer), "agrees": answer == untouched,
            "was_right": judge(question, untouched), "copied": round(copied_fraction(question, answer), 4),
            "answer": answer, "expected": question.expected}


def rows_of(parts: Parts, full_dim: int) -> list[dict[str, Any]]:
    """One row for each (task, context, method): accuracy, agreement with the untouched cache's answers, accuracy by depth, bits per element.

    lost, gained: questions that only the untouched cache answered right, and that only this one did; their balance over the questions is the
    difference of the two accuracies, whose standard error is that of paired questions.

    Args:
        full_dim: KV elements a token.
    """
    groups: dict[tuple[str, int | None, str], list[dict[str, Any]]] = {}
    sizes: dict[tuple[int | None, str], list[tuple[int, int]]] = {}
    for key, part in parts.items():
        words = key.split("/")
        if words[0] not in ("planted", "conversation"):
            continue
        context, method = (int(words[1]) if words[0] == "planted" else None), words[-1]
        for one in part["items"]:
            groups.setdefault(("conversation" if context is None else one["task"], context, method), []).append(one)
        if part["stored_bytes"] is not None:
            sizes.setdefault((context, method), []).append((part["stored_bytes"], part["tokens"]))
    rows = []
    for (task, context, method), items in groups.items():
        asked = [i for i in items if i["right"] is not None]
        n, right = len(asked), sum(i["right"] for i in asked)
        stored, tokens = (sum(column) for column in zip(*sizes.get((context, method), [(0, 0)]), strict=True))
        lost = sum(i["was_right"] and not i["right"] for i in asked)
        gained = sum(i["right"] and not i["was_right"] for i in asked)
        row = {"task": task, "context": context, "method": method, "questions": n, "accuracy": right / n,
               "standard_error": (right / n * (1 - right / n) / n) ** 0.5, "lost": lost, "gained": gained,
               "difference_standard_error": ((lost + gained) - (gained - lost) ** 2 / n) ** 0.5 / n,
               "agreement": sum(i["agrees"] for i in asked) / n, "bits_per_element": 8 * stored / (tokens * full_dim) if tokens else None}
        if task == "conversation":  # also the short replies of turns that tell a fact
            row["agreement_all_turns"] = sum(i["agrees"] for i in items) / len(items)
        if task == "copy":
            row["copied_fraction"] = sum(i["copied"] for i in asked) / n
        if task in ("retrieval", "copy", "arithmetic"):
            row["by_depth"] = by_depth(asked)
        rows.append(row)
    return rows


def by_depth(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy in DEPTH_BINS equal bins of depth; empty bins are left out."""
    bins = []
    for n in range(DEPTH_BINS):
        inside = [i for i in items if min(int(i["depth"] * DEPTH_BINS), DEPTH_BINS - 1) == n]
        if inside:
            bins.append({"from": n / DEPTH_BINS, "to": (n + 1) / DEPTH_BINS, "questions": len(inside),
                         "accuracy": sum(i["right"] for i in inside) / len(inside)})
    return bins
