"""Replays of a trace: through the trie with one tier of stored pages, and through a cache of whole sequences."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from bench.traces import Trace
from engine.errors import InvalidOption
from engine.kv.tiers import RestoreTimes, TierManager
from engine.kv.trie import TOKEN_BYTES, Tier, Trie

# Medians of 3 on one H100: prefill of both models by the engine, and the parts of a resume that any implementation needs (the draft's pass
# and decoding). Beyond 16,384 tokens both go on with their last slope, which understates prefill.
MEASURED: dict[str, Any] = {
    "source": "one H100, qwen2.5-coder, quality balanced",
    "recompute": [[1024, 0.030], [4096, 0.197], [16384, 0.851]],
    "restore": {"host": [[1024, 0.073], [4096, 0.181], [16384, 0.967]]},
}


HISTORY_SHARE = 0.02
SAFE_TOKENS = 1024
"""Of every text's end, what t-lru lets go first: an 8B model computes them in 25 ms on one H200."""
CODED_RATIO = 10.0
"""From this ratio on a restore is the codec's; below it stored KV is copied to the device, in a time that goes with its bytes."""


def times_at(table: Mapping[str, Any], ratio: float) -> RestoreTimes:
    """Restore times of KV stored `ratio` times smaller: from a table of `RestoreTimes.from_json`, or from what `bench_resume.py` wrote, which has
    seconds to resume from a coded file (reading it included) and to copy the uncompressed KV from host memory to the device.

    Raises:
        InvalidOption: the table has another form.
    """
    if "rows" not in table:
        return RestoreTimes.from_json(table)
    try:
        rows = sorted(table["rows"], key=lambda row: row["tokens"])
        recompute = [(row["tokens"], row["recompute_s"]) for row in rows]
        coded = [(row["tokens"], row["resume_s"] if ratio >= CODED_RATIO else row["host_copy_s"] / ratio) for row in rows]
        source = f"{table['device']}: {table['command']}"
    except (KeyError, TypeError) as error:
        raise InvalidOption(f"the rows of the restore times are not usable: {error!r}", "give a file of bench_resume.py") from error
    return RestoreTimes.from_json({"source": source, "recompute": recompute, "restore": {"host": coded}})


class _Figures:
    """What every replay reports.

    restore_s, recompute_s: restoring and computing the hit tokens. saved_s: computing less restoring, of requests where restoring is the faster; the
    others are computed. bytes_written: of stored KV that was new.
    """

    def __init__(self, times: RestoreTimes) -> None:
        self.times, self.requests, self.prompt_tokens, self.hit_tokens = times, 0, 0, 0
        self.restore_s = self.recompute_s = self.saved_s = self.bytes_written = 0.0

    def add(self, prompt_tokens: int, found: int) -> None:
        restore_s, recompute_s = self.times.restore_s(Tier.HOST, 0, found), self.times.recompute.first(found)
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.hit_tokens += found
        self.restore_s += restore_s
        self.recompute_s += recompute_s
        self.saved_s += max(0.0, recompute_s - restore_s)

    def row(self) -> dict[str, Any]:
        rate = self.hit_tokens / max(1, self.prompt_tokens)
        names = ("requests", "prompt_tokens", "hit_tokens", "restore_s", "recompute_s", "saved_s", "bytes_written")
        return {name: getattr(self, name) for name in names} | {"hit_rate": rate}


def replay(
    trace: Trace, policy: str | None, capacity_bytes: int, bytes_per_token: int, ratio: float, times: RestoreTimes, half_life_s: float
) -> dict[str, Any]:
    """One policy at one capacity; policy None is an infinite cache.

    A block id stands for a page: the trie runs with one symbol a page, `block_tokens` tokens each in bytes. Prompts alone are stored, as
    the traces name no blocks for answers until they come back in a prompt. Policies rank by the prefill seconds that a hit saves; restore
    seconds are reported apart, so that a table in which restoring does not pay leaves something to study. s3-fifo, arc and value remember
    the token ids of as many tokens as fit, and pay for them from the capacity. `value-counts` is value without the probabilities that a trace may have.
    """
    prior = policy != "value-counts"
    policy = policy if prior else "value"
    page_bytes = max(1, round(bytes_per_token / ratio * trace.block_tokens))
    token_bytes = trace.block_tokens * TOKEN_BYTES
    tokens_budget = 0
    if policy in ("s3-fifo", "arc"):
        tokens_budget = capacity_bytes * token_bytes // (page_bytes + token_bytes)
    elif policy == "value":
        tokens_budget = int(capacity_bytes * HISTORY_SHARE)
    budget = 2**62 if policy is None else capacity_bytes - tokens_budget
    budgets = {Tier.HOST: budget} if policy is None or not tokens_budget else {Tier.HOST: budget, Tier.TOKENS: tokens_budget}
    trie = Trie(1, half_life_s=half_life_s, page_bytes=[0, page_bytes, 0, token_bytes])
    # positions in the trie are in symbols, the table in tokens
    per_symbol = RestoreTimes.from_json({"recompute": _in_blocks(times.recompute, trace.block_tokens)})
    own = {"safe_pages": SAFE_TOKENS // trace.block_tokens} if policy == "t-lru" else {}
    manager = TierManager(trie, budgets, per_symbol, policy or "lru", skip_unprofitable=False, **own)
    figures = _Figures(times)
    for request in trace:
        match = manager.match(request.blocks, request.namespace)
        found = min(match.num_restorable_pages * trace.block_tokens, request.num_tokens)
        figures.add(request.num_tokens, found)
        held = trie.bytes_in[Tier.HOST]
        kind = "tool" if request.num_system_blocks else "user"
        system = request.blocks[: request.num_system_blocks]
        if match.num_pages < len(system):
            # the system prompt becomes a node of its own kind
            manager.insert(system, namespace=request.namespace, kind="system", after=match).release()
        log2_p = request.log2_p if prior else None
        whole = manager.insert(request.blocks, namespace=request.namespace, kind=kind, log2_p=log2_p, after=match)
        match.release()
        figures.bytes_written += trie.bytes_in[Tier.HOST] - held
        manager.finish(whole, request.arrival_s)
        if policy is not None:
            manager.rebalance()
    return figures.row()


def _in_blocks(curve: Any, block_tokens: int) -> list[tuple[float, float]]:
    return [(tokens / block_tokens, seconds) for tokens, seconds in zip(curve.tokens[1:], curve.total_s[1:], strict=True)]


def replay_sessions(trace: Trace, capacity_bytes: int, bytes_per_token: int, ratio: float, times: RestoreTimes) -> dict[str, Any]:
    """LRU over whole sequences: a session's last prompt is kept or dropped in one piece (a single request is its own session)."""
    kept: OrderedDict[int, tuple[np.ndarray, int]] = OrderedDict()
    held = 0.0
    figures = _Figures(times)
    for request in trace:
        before = kept.pop(request.session, None)
        found = 0
        if before is not None:
            held -= before[1] * bytes_per_token / ratio
            length = min(len(before[0]), len(request.blocks))
            differs = before[0][:length] != request.blocks[:length]
            common = int(differs.argmax()) if differs.any() else length
            found = min(common * trace.block_tokens, request.num_tokens)
        kept[request.session] = (request.blocks, request.num_tokens)
        held += request.num_tokens * bytes_per_token / ratio
        figures.bytes_written += (request.num_tokens - found) * bytes_per_token / ratio
        while held > capacity_bytes:
            _, (_, num_tokens) = kept.popitem(last=False)
            held -= num_tokens * bytes_per_token / ratio
        figures.add(request.num_tokens, found)
    return figures.row()
