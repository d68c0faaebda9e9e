"""Does a session that was stored and resumed go on with the same words as one that never was? Greedy, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engine.engine import Engine
from engine.runtime.request import SequenceState
from eval.suspend import Suspender, ask, ask_aside, open_with, run_draft

UNTOUCHED, RECOMPUTED = "untouched", "recomputed"
ANSWER_TOKENS = 48
"""Of the answer that a session holds when it is stored."""

_BATCH = 8


def continue_sessions(
    engine: Engine,
    suspender: Suspender,
    groups: dict[str, list[list[int]]],
    qualities: Sequence[str],
    new_tokens: int,
    done: Callable[[str, dict[str, Any]], None],
) -> None:
    """Each prompt is answered greedily by ANSWER_TOKENS tokens and stored; then it goes on by new_tokens: never suspended, resumed from a file of each
    quality, and "recomputed" (the same tokens run through the target one session at a time, whose rounding is a floor). Prompts whose answer is over
    by then are left out.

    done(group, part): {"prompts", "new_tokens", "methods": {method: {"equal": [tokens before the texts part], "bytes", "tokens"}}}.
    """
    for name, prompts in groups.items():
        part: dict[str, Any] = {"prompts": len(prompts), "new_tokens": new_tokens, "methods": {}}
        for at in range(0, len(prompts), _BATCH):
            _continue(engine, suspender, prompts[at : at + _BATCH], qualities, new_tokens, part["methods"])
        done(name, part)


def _continue(
    engine: Engine,
    suspender: Suspender,
    prompts: Sequence[list[int]],
    qualities: Sequence[str],
    new_tokens: int,
    methods: dict[str, dict[str, Any]],
) -> None:
    core = engine.core
    sessions = open_with(core, [ids[:-1] for ids in prompts])
    opened: list[SequenceState] = list(sessions)
    nothing: list[list[int]] = [[] for _ in prompts]
    try:
        for session, ids in zip(sessions, prompts, strict=True):
            session.token_ids[:] = ids
        ask(core, sessions, nothing, [ANSWER_TOKENS] * len(prompts))
        sessions = [session for session in sessions if session.token_ids[-1] not in core.eos_token_ids]
        if not sessions:
            return
        run_draft(core, sessions)
        nothing = [[] for _ in sessions]
        limits = [new_tokens] * len(sessions)
        truth = ask_aside(core, sessions, nothing, limits)
        for method in (UNTOUCHED, RECOMPUTED, *qualities):
            stored = tokens = 0
            if method == UNTOUCHED:
                found = ask_aside(core, sessions, nothing, limits)
            else:
                again = []
                for session in sessions:
                    if method == RECOMPUTED:
                        [one] = open_with(core, [session.token_ids[:-1]])
                        one.token_ids[:] = session.token_ids
                    else:
                        one, _, num_bytes = suspender.through_file(session, method)
                        stored, tokens = stored + num_bytes, tokens + session.sequence.length
                    again.append(one)
                    opened.append(one)
                found = ask(core, again, nothing, limits)
                for one in again:
                    core.close_sequence_state(one)
                    opened.remove(one)
            own = methods.setdefault(method, {"equal": [], "bytes": 0, "tokens": 0})
            own["equal"] += [equal_tokens(a, b, new_tokens) for a, b in zip(found, truth, strict=True)]
            own["bytes"], own["tokens"] = own["bytes"] + stored, own["tokens"] + tokens
    finally:
        for one in opened:
            core.close_sequence_state(one)


def equal_tokens(text: Sequence[int], other: Sequence[int], limit: int) -> int:
    """Tokens before two texts part; `limit` where they never do (both may have ended earlier)."""
    if list(text) == list(other):
        return limit
    return next((n for n, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def continuation_rows(parts: dict[str, dict[str, Any]], full_dim: int) -> list[dict[str, Any]]:
    """One row for each group of prompts and method, and for all of them: share that went on alike, mean tokens before parting, bits per element."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    limits: dict[str, int] = {}
    for key, part in parts.items():
        words = key.split("/")
        if words[0] == "continuation":
            for method, own in part["methods"].items():
                limits[method] = part["new_tokens"]
                for group in (words[1], "all"):
                    found.setdefault((group, method), []).append(own)
    rows = []
    for (group, method), several in sorted(found.items()):
        equal = [n for own in several for n in own["equal"]]
        stored, tokens = (sum(own[name] for own in several) for name in ("bytes", "tokens"))
        rows.append(
            {
                "task": "continuation",
                "group": group,
                "method": method,
                "prompts": len(equal),
                "new_tokens": limits[method],
                "equal_share": sum(n == limits[method] for n in equal) / len(equal),
                "mean_equal_tokens": sum(equal) / len(equal),
                "bits_per_element": 8 * stored / (tokens * full_dim) if tokens else None,
            }
        )
    return rows
