"""What a pack costs on other kinds of text, and how the bits of a long text fall or rise with position."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from codec.spec import NUM_SINKS
from engine.errors import InvalidOption
from engine.model.decoder import forward_reserved
from engine.runtime.core import EngineCore
from eval.codec_methods import ForetoldMethod, PairCodec
from eval.codec_quality import Quality
from eval.suspend import CHUNK_TOKENS, PREDICTION, Suspender, open_with, step_name
from eval.text_tokens import read_files, windows

NLL = "nll"
_WINDOWS_PER_TEXT = 2
Encode = Callable[[str], list[int]]


def named_paths(option: str, words: Sequence[str]) -> dict[str, str]:
    """{"logs": "path"} from an option's words of the form logs=path. Raises InvalidOption."""
    found = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not name or not equals or not path or "/" in name or name in found:
            raise InvalidOption(f"{option} {word}", "give NAME=PATH, every name once")
        found[name] = path
    return found


def domain_windows(path: str, context: int, num_tokens: int, encode: Encode) -> list[list[int]]:
    """Windows of `context` tokens from a folder's files, num_tokens in all at most. Raises InvalidOption when there is not one."""
    found = windows([encode(text) for text in read_files([path]).values()], context, num_tokens // context)
    if not found:
        raise InvalidOption(
            f"{path} has no file of {context} tokens", "give longer text, more --domain-tokens, or a smaller --domain-context"
        )
    return found


def measure_domain(
    pair: PairCodec, sequences: list[list[int]], methods: Sequence[str], done: Callable[[str, dict[str, Any]], None]
) -> None:
    """Bits per element, KL and top-1 agreement of each method (a quality's name) on windows, by the protocol of bench_codec; done(method, row)."""
    from bench_codec import measure

    on_gpu = pair.device.type == "cuda"
    quality = Quality(pair.target, len(sequences[0]), pair.device if on_gpu else "cpu")
    cases = quality.untouched(sequences)
    config = pair.target.config
    full_dim = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    for name in methods:
        step = step_name(name)
        method = ForetoldMethod(step if isinstance(step, str) else f"step{step!r}", pair, predict=True)
        row = measure(method, quality, cases, full_dim, len(cases) if on_gpu else 2)
        done(name, {key: value for key, value in row.items() if key not in ("method", "quality", "inputs")})
    pair.forget()


def domain_rows(parts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each domain, pack and method."""
    found = [(key.split("/"), part) for key, part in parts.items() if key.startswith("domain/")]
    return [{"task": "domain", "domain": words[1], "pack": words[3], "method": words[-1], **part} for words, part in found]


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
        raise InvalidOption(f"no text has {context} tokens", "give longer --text, or a smaller --position-context")
    return found[:count]


@torch.inference_mode()
def measure_positions(
    suspender: Suspender, token_ids: list[int], qualities: Sequence[str], done: Callable[[str, list[dict[str, Any]]], None]
) -> None:
    """For one text and each of `qualities` ("nll" among them, perhaps): done(quality, bins), where a bin's amount is the coded bytes of `count` tokens,
    or the target's NLL in nats of them.

    A span counts where its middle lies; the exact first tokens are not counted. Bytes are of the spans alone, without ids and headers of a file.
    """
    core, length = suspender.core, len(token_ids)
    if NLL in qualities:
        done(NLL, position_bins(length, ((n, 1, nll) for n, nll in enumerate(token_nll(core, token_ids), 1))))
    coded = [quality for quality in qualities if quality != NLL]
    conversation = open_with(core, [token_ids])[0] if coded else core.open_sequence_state()
    try:
        for quality in coded:
            spans = suspender.codec.encode(conversation, NUM_SINKS, length, step_name(quality))  # type: ignore[arg-type]
            done(quality, position_bins(length, (((s.start + s.end) // 2, s.end - s.start, len(s.data)) for s in spans)))
    finally:
        core.close_sequence_state(conversation)


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
    """One row for each bin of positions, over all texts: tokens coded, NLL per token in nats, bits per element by quality."""
    sums: dict[tuple[int, int], dict[str, list[float]]] = {}
    for key, part in parts.items():
        words = key.split("/")
        if words[0] == "position":
            for one in part["bins"]:
                total = sums.setdefault((one["from"], one["to"]), {}).setdefault(words[-1], [0, 0.0])
                total[0], total[1] = total[0] + one["count"], total[1] + one["amount"]
    rows = []
    for (a, b), by_quality in sorted(sums.items()):
        nll = by_quality.pop(NLL, [0, 0.0])
        rows.append(
            {
                "task": "position",
                "from": a,
                "to": b,
                "tokens": max((int(count) for count, _ in by_quality.values()), default=0),
                "nll": nll[1] / nll[0] if nll[0] else None,
                "bits_per_element": {q: 8 * size / (count * full_dim) for q, (count, size) in by_quality.items() if count},
            }
        )
    return rows


def plot_positions(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """A PNG of two panels over position: bits per element, and the same relative to the first bin, beside the text's own NLL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    at = [(row["from"] + row["to"]) / 2 for row in rows]
    for number, quality in enumerate(q for q in rows[0]["bits_per_element"] if q != PREDICTION):  # that one has no residual to draw
        bits = [row["bits_per_element"][quality] for row in rows]
        left.plot(at, bits, "o-", color=f"C{number}", label=quality)
        right.plot(at, [b / bits[0] for b in bits], "o-", color=f"C{number}", label=quality)
    right.plot(at, [row["nll"] / rows[0]["nll"] for row in rows], "s--", color="#777777", label="NLL of the text")
    left.set_yscale("log")
    left.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    left.set_ylabel("bits per KV element (bytes of the spans)")
    right.set_ylabel(f"relative to the first {rows[0]['to']} tokens")
    right.axhline(1.0, color="#bbbbbb", lw=0.8, zorder=0)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [f"{row['from']}-{row['to']}" for row in rows], rotation=30, ha="right", fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("position of the token in the text")
        axes.grid(True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
