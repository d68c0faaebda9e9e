"""Judged answers, and the rows of a table that they add up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.tasks import Question, copied_fraction, judge

DEPTH_BINS = 5
Parts = dict[str, dict[str, Any]]


def item(question: Question, answer: str, untouched: str) -> dict[str, Any]:
    """One judged answer."""
    return {
        "task": question.task,
        "depth": round(question.depth, 4),
        "right": judge(question, answer),
        "agrees": answer == untouched,
        "was_right": judge(question, untouched),
        "copied": round(copied_fraction(question, answer), 4),
        "answer": answer,
        "expected": question.expected,
    }


def rows_of(parts: Parts, full_dim: int) -> list[dict[str, Any]]:
    """One row for each (task, context, method), and where there are several contexts one over "all" of them: accuracy, agreement with the untouched
    cache's answers, accuracy by depth, bits per element.

    lost, gained: questions that only the untouched cache answered right, and that only this one did; their balance over the questions is the
    difference of the two accuracies, whose standard error is that of paired questions.

    Args:
        full_dim: KV elements a token.
    """
    groups: dict[tuple[str, int | str | None, str], list[dict[str, Any]]] = {}
    sizes: dict[tuple[str, int | str | None, str], list[tuple[int, int]]] = {}
    several = len({key.split("/")[1] for key in parts if key.startswith(("planted/", "long/"))}) > 1
    for key, part in parts.items():
        words = key.split("/")
        if words[0] not in ("planted", "long", "conversation"):
            continue
        own, method = (None if words[0] == "conversation" else int(words[1])), words[-1]
        for where in (own, "all") if several and own is not None else (own,):
            for one in part["items"]:
                groups.setdefault(("conversation" if own is None else one["task"], where, method), []).append(one)
            if part["stored_bytes"] is not None:
                for task in {"conversation"} if own is None else {one["task"] for one in part["items"]}:
                    sizes.setdefault((task, where, method), []).append((part["stored_bytes"], part["tokens"]))
    rows = []
    for (task, context, method), items in groups.items():
        asked = [i for i in items if i["right"] is not None]
        n, right = len(asked), sum(i["right"] for i in asked)
        stored, tokens = (sum(column) for column in zip(*sizes.get((task, context, method), [(0, 0)]), strict=True))
        lost = sum(i["was_right"] and not i["right"] for i in asked)
        gained = sum(i["right"] and not i["was_right"] for i in asked)
        row = {
            "task": task,
            "context": context,
            "method": method,
            "questions": n,
            "accuracy": right / n,
            "standard_error": (right / n * (1 - right / n) / n) ** 0.5,
            "lost": lost,
            "gained": gained,
            "difference_standard_error": ((lost + gained) - (gained - lost) ** 2 / n) ** 0.5 / n,
            "agreement": sum(i["agrees"] for i in asked) / n,
            "bits_per_element": 8 * stored / (tokens * full_dim) if tokens else None,
        }
        if task == "conversation":  # also the short replies of turns that tell a fact
            row["agreement_all_turns"] = sum(i["agrees"] for i in items) / len(items)
        if task in ("copy", "several"):
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
            bins.append(
                {
                    "from": n / DEPTH_BINS,
                    "to": (n + 1) / DEPTH_BINS,
                    "questions": len(inside),
                    "accuracy": sum(i["right"] for i in inside) / len(inside),
                }
            )
    return bins
