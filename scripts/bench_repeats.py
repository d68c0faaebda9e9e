"""What repetition saves: a document read again and again in one session, coded with and without references to what was coded before.

Every reading stands behind other text. For each: bits an element by the distance from where the repetition begins, every byte of the spans counted, and
the divergence of the target's output on text behind the session, restored from the spans, from the output after the untouched cache.

    python scripts/bench_repeats.py --pair smollm2 --text FILE|DIR --documents 4 --document-tokens 512 --readings 3 --json-out repeats.json
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.document import command_line
from codec.spec import NUM_SINKS, QUALITIES, SPAN_TOKENS
from codec_compare import write_json
from engine.calibrate.corpus import library_texts
from engine.cli.command import quiet_libraries, versions
from engine.cli.options import Parser, report
from engine.cli.terminal import print_status
from engine.engine import Engine
from engine.errors import ForetoldError, InvalidOption
from engine.hub.pairs import PAIRS
from engine.model.decoder import forward_reserved
from engine.runtime.core import EngineCore
from engine.runtime.request import SequenceState
from engine.sessions.file import Span
from engine.sessions.kv_codec import SessionCodec, session_codec
from eval.text_tokens import read_files

BINS = (0, 16, 64, 256, 1 << 30)
_BETWEEN_TOKENS, _PROBE_TOKENS = 96, 128


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options, checked. Raises InvalidOption."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pair", default="smollm2", help=f"one of {', '.join(PAIRS)}")
    p.add_argument("--pack", type=Path, metavar="FILE", help="codec parameters of the pair (default: its own)")
    p.add_argument("--text", nargs="+", default=[], metavar="FILE|DIR", help="default: the interpreter's own library")
    p.add_argument("--documents", type=int, default=4, metavar="N")
    p.add_argument("--document-tokens", type=int, default=512, metavar="N")
    p.add_argument("--readings", type=int, default=3, metavar="N")
    p.add_argument("--qualities", default="near-lossless,balanced", metavar="Q,Q")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--json-out", type=Path, metavar="FILE")
    args = p.parse_args(argv)
    args.qualities = args.qualities.split(",")
    if unknown := [q for q in args.qualities if q not in QUALITIES]:
        raise InvalidOption(f"--qualities cannot be {unknown[0]!r}", f"choose from {', '.join(QUALITIES)}")
    if args.documents < 1 or args.readings < 2 or args.document_tokens < SPAN_TOKENS:
        raise InvalidOption("nothing would repeat", f"give at least 1 document of {SPAN_TOKENS} tokens and 2 readings")
    return args


def sessions_of(texts: Sequence[list[int]], tokens: int, readings: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Of each text: (ids with the document read so often, the first token of every reading, the text behind). Raises InvalidOption."""
    found = []
    for number, text in enumerate(texts):
        other = texts[(number + 1) % len(texts)] if len(texts) > 1 else text[::-1]
        document = text[:tokens]
        between = itertools.cycle(other[i : i + _BETWEEN_TOKENS] for i in range(tokens, len(other) - _BETWEEN_TOKENS, _BETWEEN_TOKENS))
        ids: list[int] = []
        starts = []
        for _ in range(readings):
            ids += next(between)
            starts.append(len(ids))
            ids += document
        found.append((ids, starts, text[tokens : tokens + _PROBE_TOKENS]))
    return found


@torch.inference_mode()
def log_probabilities(core: EngineCore, conversation: SequenceState, probe: list[int]) -> torch.Tensor:
    """float32 [n, V] of tokens after the conversation's cache; nothing moves."""
    ids = torch.tensor(probe, device=core.device)
    out = forward_reserved(core.target, ids, [conversation.sequence], [len(probe)])
    assert out.logits is not None
    return out.logits.float().log_softmax(-1)


@torch.inference_mode()
def measure(core: EngineCore, codec: SessionCodec, session: tuple[list[int], list[int], list[int]], quality: str) -> list[dict[str, Any]]:
    """A row with and one without references: bytes of each bin of each reading, and the divergence."""
    ids, starts, probe = session
    kept = core.open_sequence_state()
    rows = []
    try:
        kept.token_ids[:] = ids
        codec.run_target(kept, len(ids))
        truth = log_probabilities(core, kept, probe)
        for refers in (False, True):
            spans = codec.encode(kept, NUM_SINKS, len(ids), quality, earlier=[] if refers else None)
            restored = core.open_sequence_state()
            try:
                restored.token_ids[:] = ids
                codec.restore(restored, spans)
                found = log_probabilities(core, restored, probe)
            finally:
                core.close_sequence_state(restored)
            kl = float((truth.exp() * (truth - found)).sum(-1).mean())
            agree = float((truth.argmax(-1) == found.argmax(-1)).float().mean())
            row = {"quality": quality, "references": refers, "kl": kl, "top1_agreement": agree, "bytes": sum(len(s.data) for s in spans)}
            rows.append(row | {"tokens": len(ids), "readings": binned(spans, starts, len(ids))})
    finally:
        core.close_sequence_state(kept)
    return rows


def binned(spans: Sequence[Span], starts: Sequence[int], end: int) -> list[list[tuple[int, float]]]:
    """Of each reading and bin of distances: tokens, and bytes of the spans' shares that lie in them."""
    ends = [*(start - _BETWEEN_TOKENS for start in starts[1:]), end]
    table = []
    for start, last in zip(starts, ends, strict=True):
        bins = []
        for low, high in itertools.pairwise(BINS):
            a, b = start + low, min(start + high, last)
            shares = [(max(0, min(b, s.end) - max(a, s.start)), len(s.data) / (s.end - s.start)) for s in spans]
            bins.append((sum(n for n, _ in shares), sum(n * each for n, each in shares)))
        table.append(bins)
    return table


def summed(rows: Sequence[dict[str, Any]], full_dim: int) -> dict[str, Any]:
    """The mean of the same row over all sessions."""
    readings = []
    for parts in zip(*(row["readings"] for row in rows), strict=True):
        bins = [(sum(n for n, _ in own), sum(size for _, size in own)) for own in zip(*parts, strict=True)]
        tokens, size = sum(n for n, _ in bins), sum(size for _, size in bins)
        by_distance = [round(8 * own / (n * full_dim), 5) if n else None for n, own in bins]
        readings.append({"bits_per_element": 8 * size / (tokens * full_dim), "bits_by_distance": by_distance})
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in ("kl", "top1_agreement")}
    bits = 8 * sum(row["bytes"] for row in rows) / (full_dim * sum(row["tokens"] for row in rows))
    return {"quality": rows[0]["quality"], "references": rows[0]["references"]} | mean | {"bits_per_element": bits, "readings": readings}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for a user's mistake."""
    try:
        args = parse(argv)
        quiet_libraries()
        engine = Engine.from_pair(args.pair, device=args.device, dtype=args.dtype)
        needed = args.document_tokens + max(_PROBE_TOKENS, 2 * _BETWEEN_TOKENS)
        if args.readings * (args.document_tokens + _BETWEEN_TOKENS) + _PROBE_TOKENS > engine.context:
            raise InvalidOption("the readings are more than the model's context", "give fewer --readings or --document-tokens")
        texts = []
        for text in read_files(args.text).values() if args.text else library_texts():
            ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[misc]
            texts += [ids] if len(ids) >= needed else []
            if len(texts) == args.documents:
                break
        if not texts:
            raise InvalidOption(f"no text of {needed} tokens", "give longer files, or fewer --document-tokens")
        core = engine.core
        codec = session_codec(core, args.pack, print_status)
        config = core.target.config
        full_dim = 2 * config.num_layers * config.kv_width
        rows = []
        for quality in args.qualities:
            found = [measure(core, codec, session, quality) for session in sessions_of(texts, args.document_tokens, args.readings)]
            for own in zip(*found, strict=True):
                rows.append(summed(own, full_dim))
                print_status(str(rows[-1]))
    except ForetoldError as error:
        return report(error)
    document = {
        "pair": args.pair,
        "device": torch.cuda.get_device_name(core.device) if core.device.type == "cuda" else "cpu",
        "command": command_line("bench_repeats.py", argv),
        "versions": versions(),
        "documents": len(texts),
        "document_tokens": args.document_tokens,
        "bins": list(BINS[:-1]),
        "rows": rows,
    }
    print(f"{'quality':14}{'refers':>7}{'KL':>9}{'top-1':>8}{'bits':>8}   bits an element of every reading")
    for r in rows:
        each = "  ".join(f"{own['bits_per_element']:.4f}" for own in r["readings"])
        print(f"{r['quality']:14}{r['references']!s:>7}{r['kl']:9.4f}{r['top1_agreement']:8.3f}{r['bits_per_element']:8.4f}   {each}")
    if args.json_out:
        write_json(args.json_out, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
