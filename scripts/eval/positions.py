"""How the bits of a long text, and the loss they leave, fall or rise with position."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from codec.spec import NUM_SINKS
from engine.errors import InvalidOption
from engine.kv.pool import KvSequence
from engine.model.decoder import forward_reserved
from engine.runtime.core import EngineCore
from engine.runtime.request import SequenceState
from eval.suspend import CHUNK_TOKENS, PREDICTION, Suspender, copied, open_with, step_name
from eval.text import Encode

NLL = "nll"
ALONE = "+alone"  # behind a quality: spans refer to nothing earlier in the session
_WINDOWS_PER_TEXT = 2
_PROBE_TOKENS, _FIRST_TOKENS = 256, 64
"""Behind each bin: as many as a quality's promise is a mean over, and those right behind, whose divergence is up to twice that."""


def position_edges(length: int) -> list[int]:
    """0, 256, 512, 1024, ... up to `length`, which ends the last bin."""
    edges = [0, 256]
    while edges[-1] * 2 < length:
        edges.append(edges[-1] * 2)
    return [edge for edge in edges if edge < length] + [length]


def position_bins(length: int, values: Iterable[tuple[int, int, float]]) -> list[dict[str, Any]]:
    """Sums of (position, count, amount) over bins of positions: [{"from", "to", "count", "amount"}]."""
    edges = position_edges(length)
    bins: list[dict[str, Any]] = [{"from": a, "to": b, "count": 0, "amount": 0.0} for a, b in pairwise(edges)]
    for position, count, amount in values:
        one = bins[bisect_right(edges, position) - 1]
        one["count"], one["amount"] = one["count"] + count, one["amount"] + amount
    return bins


def long_windows(texts: Iterable[str], context: int, count: int, encode: Encode) -> list[list[int]]:
    """The first `count` windows of `context` tokens, at most _WINDOWS_PER_TEXT from the beginning of each text. Raises InvalidOption without any."""
    found: list[list[int]] = []
    for text in texts:
        if len(found) < count and len(text) > context:  # a token is hardly ever less than a character
            ids = encode(text[: 8 * context * _WINDOWS_PER_TEXT])
            found += [ids[a : a + context] for a in range(0, min(len(ids), context * _WINDOWS_PER_TEXT) - context + 1, context)]
    if not found:
        raise InvalidOption(f"no text has {context} tokens", "give longer --text or --long texts, or a smaller --position-context")
    return found[:count]


@torch.inference_mode()
def measure_positions(
    suspender: Suspender, token_ids: list[int], qualities: Sequence[str], done: Callable[[str, list[dict[str, Any]]], None]
) -> None:
    """For one text and each of `qualities` ("nll" among them, perhaps): done(quality, bins), where a bin's amount is the coded bytes of `count` tokens,
    or the target's NLL in nats of them.

    A span counts where its middle lies; the exact first tokens are not counted. Bytes are of the spans alone, without ids and headers of a file. The
    last _PROBE_TOKENS tokens are not coded: "kl" and "agreement" of a bin are the mean divergence (nats) and the share of equal most probable tokens
    over so many tokens behind the bin, "kl_first" the divergence over the first _FIRST_TOKENS of them, with all before them restored. `QUALITY+alone`
    codes every span without reference to earlier ones.
    """
    core, length = suspender.core, len(token_ids) - _PROBE_TOKENS
    if NLL in qualities:
        done(NLL, position_bins(length, ((n, 1, nll) for n, nll in enumerate(token_nll(core, token_ids[:length]), 1))))
    coded = [quality for quality in qualities if quality != NLL]
    if not coded:
        return
    conversation = open_with(core, [token_ids[:length]])[0]
    edges = position_edges(length)[1:]
    try:
        truth = [probe(core, conversation.sequence, edge, token_ids) for edge in edges]
        for quality in coded:
            alone = quality.endswith(ALONE)
            step = step_name(quality.removesuffix(ALONE))
            spans = suspender.codec.encode(conversation, NUM_SINKS, length, step, earlier=None if alone else [])
            bins = position_bins(length, (((s.start + s.end) // 2, s.end - s.start, len(s.data)) for s in spans))
            restored = SequenceState(list(token_ids[:length]), copied(conversation.sequence, shared=False), conversation.draft_state)
            try:
                suspender.codec.decode(restored, spans)
                for one, edge, log_p in zip(bins, edges, truth, strict=True):
                    log_q = probe(core, restored.sequence, edge, token_ids)
                    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
                    one["kl"], one["kl_first"] = float(divergence.mean()), float(divergence[:_FIRST_TOKENS].mean())
                    one["agreement"] = float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean())
            finally:
                restored.sequence.free()
            done(quality, bins)
    finally:
        core.close_sequence_state(conversation)


@torch.inference_mode()
def probe(core: EngineCore, sequence: KvSequence, position: int, token_ids: list[int]) -> torch.Tensor:
    """float32 [_PROBE_TOKENS, V]: log-probabilities after each of the tokens from `position` on, given the cache of those before; nothing moves."""
    fork = sequence.fork(position)
    try:
        ids = torch.tensor(token_ids[position : position + _PROBE_TOKENS], device=core.device)
        logits = forward_reserved(core.target, ids, [fork], [len(ids)]).logits
        assert logits is not None
        return logits.float().log_softmax(-1)
    finally:
        fork.free()


@torch.inference_mode()
def token_nll(core: EngineCore, token_ids: list[int]) -> list[float]:
    """The target's negative log-probability of tokens 1, 2, ... in nats."""
    ids = torch.tensor(token_ids, device=core.device)
    sequence = core.pool.new_sequence()
    values: list[float] = []
    try:
        for start in range(0, len(ids) - 1, CHUNK_TOKENS):
            piece = ids[start : min(start + CHUNK_TOKENS, len(ids) - 1)]
            logits = forward_reserved(core.target, piece, [sequence], [len(piece)]).logits
            sequence.advance(len(piece))
            assert logits is not None
            values += torch.nn.functional.cross_entropy(logits.float(), ids[start + 1 : start + 1 + len(piece)], reduction="none").tolist()
    finally:
        sequence.free()
    return values


def position_rows(parts: dict[str, dict[str, Any]], full_dim: int) -> list[dict[str, Any]]:
    """One row for each kind of text and bin of positions, over all its texts: tokens coded, NLL per token in nats; bits per element, divergence and
    agreement behind the bin by method."""
    sums: dict[tuple[str, int, int], dict[str, list[dict[str, Any]]]] = {}
    for key, part in parts.items():
        words = key.split("/")
        if words[0] == "position":
            for one in part["bins"]:
                sums.setdefault((words[1], one["from"], one["to"]), {}).setdefault(words[-1], []).append(one)
    rows = []
    for (kind, a, b), by_method in sorted(sums.items()):
        nll = by_method.pop(NLL, [])
        counts = {method: sum(one["count"] for one in bins) for method, bins in by_method.items()}
        rows.append(
            {
                "task": "position",
                "kind": kind,
                "from": a,
                "to": b,
                "tokens": max(counts.values(), default=0),
                "nll": sum(one["amount"] for one in nll) / sum(one["count"] for one in nll) if nll else None,
                "bits_per_element": {
                    m: 8 * sum(one["amount"] for one in bins) / (counts[m] * full_dim) for m, bins in by_method.items() if counts[m]
                },
                **{
                    name: {m: sum(one[name] for one in bins) / len(bins) for m, bins in by_method.items()}
                    for name in ("kl", "kl_first", "agreement")
                },
            }
        )
    return rows


def plot_positions(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """A PNG over position, a row of panels for each kind of text: bits per element, the same relative to the first bin, divergence behind each bin."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure, axes = plt.subplots(len(kinds), 3, figsize=(16, 4.4 * len(kinds)), squeeze=False)
    for kind, (bits_axes, ratio_axes, loss_axes) in zip(kinds, axes, strict=True):
        own = [row for row in rows if row["kind"] == kind]
        at = [(row["from"] + row["to"]) / 2 for row in own]
        shown = [m for m in own[0]["bits_per_element"] if not m.startswith(PREDICTION)]  # that one has no residual to draw
        colors = {m.removesuffix(ALONE): f"C{n}" for n, m in enumerate(m for m in shown if not m.endswith(ALONE))}
        for method in shown:
            style = {"color": colors.get(method.removesuffix(ALONE), "#999999"), "label": method.replace(ALONE, ", no references")}
            line = "o:" if method.endswith(ALONE) else "o-"
            bits = [row["bits_per_element"][method] for row in own]
            bits_axes.plot(at, bits, line, **style)
            ratio_axes.plot(at, [b / bits[0] for b in bits], line, **style)
            loss_axes.plot(at, [max(row["kl"][method], 1e-6) for row in own], line, **style)
        if own[0]["nll"]:
            nll = ratio_axes.plot(at, [row["nll"] / own[0]["nll"] for row in own], "s--", color="#777777", label="NLL of the text")
            ratio_axes.legend(handles=nll, frameon=False, fontsize=8)
        ratio_axes.axhline(1.0, color="#bbbbbb", lw=0.8, zorder=0)
        for panel, label in (
            (bits_axes, f"{kind}: bits per KV element (spans)"),
            (ratio_axes, f"relative to the first {own[0]['to']} tokens"),
            (loss_axes, f"KL over {_PROBE_TOKENS} tokens behind, nats"),
        ):
            panel.set_ylabel(label)
            panel.set_xscale("log", base=2)
            panel.set_xticks(at, [f"{row['from']}-{row['to']}" for row in own], rotation=30, ha="right", fontsize=8)
            panel.minorticks_off()
            panel.set_xlabel("position of the token in the text")
            panel.grid(True, alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        for panel in (bits_axes, loss_axes):
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            panel.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        loss_axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
