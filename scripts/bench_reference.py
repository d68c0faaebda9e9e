"""What the same text under another system prompt is worth as a prediction: bits of its KV with and without, by the distance from where the texts part.

    python scripts/bench_reference.py --pair smollm2 [--text FILE...] [--tokens 1024] [--steps 0.6,1,1.4,2] [--json-out FILE]

A document is computed twice, after one system prompt and after another. The second one's keys and values are coded in spans of 64 tokens against the
draft's prediction alone, and against that prediction plus what the first one's decoded code left over of its own (which the reader of a reference has).
Both at the same quantiser steps; the loss is the mean divergence (KL, nats) of the 128 next tokens' distributions from the true ones, with the coded
values in place from 256 tokens behind the parting on. `bits_ratio` compares the bits of these tokens at equal loss, by interpolation in logarithms.

Prints one JSON object: `{"device", "versions", "pair", "command", "bits_ratio", "rows": [{"text", "method", "step", "distance", "bits_per_element",
"kl"}]}`; kl stands in the rows of the last distance.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.document import print_document
from codec.quantize import levels_of
from codec.spec import SPAN_TOKENS
from engine.engine import Engine
from engine.runtime.request import SequenceState
from engine.runtime.sampling import SamplingParams
from engine.sessions.kv_codec import SessionCodec, session_codec

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = (
    "You are a careful reviewer. Read the document below and answer questions about it.\n\n",
    "Today is Monday. You are the assistant of a small company that builds measuring instruments, and you help its engineers with whatever they "
    "bring: code, manuals, letters, figures. Say so when you do not know something. Keep to the facts that are in front of you, and quote the "
    "lines you rely on.\n\nHere is what they sent today:\n\n",
)
PARTED = (0, 64, 256)  # distances from the parting at which groups of spans begin
FOLLOWING = 128


class Text:
    """A document's KV after a system prompt: what coding it takes. rows, prediction: float32 [T, D]; levels: of each token's step."""

    def __init__(self, engine: Engine, codec: SessionCodec, prompt: list[int], document: list[int]) -> None:
        self.start, self.end = len(prompt), len(prompt) + len(document) - FOLLOWING
        self.core, self.codec = engine.core, codec
        self.conversation: SequenceState = self.core.open_sequence_state()
        self.core.run(self.conversation, [*prompt, *document], SamplingParams(max_new_tokens=1, draft_length=0, ignore_eos=True))
        features = codec.features(self.conversation, self.start, self.end)
        self.rows = self._read()
        self.prediction = codec.predictor.predict(*features).float()
        octaves = codec.predictor.log2_step(*features)
        self.levels = None if octaves is None else levels_of(octaves)

    def _read(self) -> torch.Tensor:
        target, layer = self.core.target, self.codec.first_layer
        return target.read_kv(self.conversation.sequence, self.start, self.end, first_layer=layer).float()

    def coded(self, prediction: torch.Tensor, step: float) -> tuple[list[int], torch.Tensor]:
        """Bytes of each span, and the decoded rows."""
        parts = list(zip(self.rows.split(SPAN_TOKENS), prediction.split(SPAN_TOKENS), strict=True))
        levels = [None] * len(parts) if self.levels is None else list(self.levels.split(SPAN_TOKENS))
        spans = self.codec.codec.encode_many(parts, step, levels)
        return [len(span) for span in spans], torch.cat(self.codec.codec.decode_many(spans, [part for _, part in parts]))

    def log_probabilities(self) -> torch.Tensor:
        """float32 [FOLLOWING, V]: of the tokens behind the coded ones, from the KV as it lies in the pages."""
        ids = torch.tensor(self.conversation.token_ids[self.end : self.end + FOLLOWING])
        sequences = [self.conversation.sequence]
        out = self.core.target.forward(ids, sequences, [len(ids)], starts=[self.end], logits="all")
        return out.logits.float().log_softmax(-1)

    def divergence(self, rows: torch.Tensor, truth: torch.Tensor) -> float:
        """Mean KL of the following tokens' distributions with decoded rows in place of the last distance's."""
        target, at = self.core.target, self.start + PARTED[-1]
        sequence, layer = self.conversation.sequence, self.codec.first_layer
        target.write_kv(sequence, at, rows[PARTED[-1] :].to(self.core.dtype), first_layer=layer)
        found = self.log_probabilities()
        target.write_kv(sequence, at, self.rows[PARTED[-1] :].to(self.core.dtype), first_layer=layer)
        return float((truth.exp() * (truth - found)).sum(-1).mean())


def measure(engine: Engine, codec: SessionCodec, name: str, document: list[int], steps: list[float]) -> list[dict[str, Any]]:
    """The rows of one document."""
    first, second = (Text(engine, codec, engine.encode(prompt), document) for prompt in PROMPTS)
    truth, rows = second.log_probabilities(), []
    width = second.rows.shape[1]
    for step in steps:
        _, decoded = first.coded(first.prediction, step)
        for method, prediction in (("draft", second.prediction), ("reference", second.prediction + decoded - first.prediction)):
            sizes, found = second.coded(prediction, step)
            kl = second.divergence(found, truth)
            for distance, last in zip(PARTED, (*PARTED[1:], len(second.rows)), strict=True):
                own = sizes[distance // SPAN_TOKENS : last // SPAN_TOKENS]
                bits = 8 * sum(own) / (SPAN_TOKENS * len(own) * width)
                row = {"text": name, "method": method, "step": step, "distance": distance, "bits_per_element": bits}
                rows.append(row | ({"kl": kl} if distance == PARTED[-1] else {}))
                print(f"{name:<24} {method:<10} step {step:<4} from {distance:>4}: {bits:.4f} bits, KL {kl:.5f}", file=sys.stderr)
    return rows


def bits_ratio(rows: list[dict[str, Any]]) -> float | None:
    """Bits without a reference over bits with one, at equal KL: mean over the texts and over the losses that both methods reach. None where none is."""
    found = []
    for name in dict.fromkeys(row["text"] for row in rows):
        curves = {}
        for method in ("draft", "reference"):
            points = sorted(
                (row["kl"], row["bits_per_element"]) for row in rows if row.get("kl") and (row["text"], row["method"]) == (name, method)
            )
            curves[method] = np.log(np.array(points).T)
        low, high = (pick(curve[0][end] for curve in curves.values()) for pick, end in ((max, 0), (min, -1)))
        if low < high:
            at = np.linspace(low, high, 9)
            found.append(np.exp(np.interp(at, *curves["draft"]) - np.interp(at, *curves["reference"])).mean())
    return float(np.mean(found)) if found else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the same text under another system prompt as a prediction of its KV.")
    parser.add_argument("--pair", default="smollm2")
    parser.add_argument("--text", type=Path, nargs="*", help="documents; default: three of this project's files")
    parser.add_argument("--tokens", type=int, default=1024, help="of a document that are coded; a multiple of 64, more than 256")
    parser.add_argument("--steps", default="0.6,1,1.4,2", help="quantiser steps, separated by commas")
    parser.add_argument("--json-out", type=Path)
    args = parser.parse_args(argv)
    if args.tokens % SPAN_TOKENS or args.tokens <= PARTED[-1]:
        parser.error(f"--tokens {args.tokens} is no multiple of {SPAN_TOKENS} above {PARTED[-1]}")
    files = args.text or [ROOT / name for name in ("docs/store.md", "docs/guarantees.md", "engine/runtime/scheduler.py")]
    engine = Engine.from_pair(args.pair, device="cpu")
    codec = session_codec(engine.core, log=lambda line: print(line, file=sys.stderr))
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for file in files:
            document = engine.encode(file.read_text(encoding="utf-8"))[: args.tokens + FOLLOWING]
            if len(document) < args.tokens + FOLLOWING:
                parser.error(f"{file.name} has {len(document)} tokens, --tokens {args.tokens} needs {args.tokens + FOLLOWING}")
            rows += measure(engine, codec, file.name, document, [float(step) for step in args.steps.split(",")])
    names = f" --text {' '.join(file.name for file in args.text)}" if args.text else ""
    found = {
        "device": f"cpu {platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "pair": args.pair,
        "command": f"python scripts/bench_reference.py --pair {args.pair} --tokens {args.tokens} --steps {args.steps}{names}",
        "bits_ratio": bits_ratio(rows),
        "rows": rows,
    }
    print_document(found, args.json_out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
