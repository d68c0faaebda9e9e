"""What the same text under another system prompt costs in a store, with references to the first one and without, by the distance from the parting.

    python scripts/bench_reference.py --pair smollm2 [--text FILE...] [--tokens 1024] [--steps 0.6,1,1.4,2] [--json-out FILE]

A document is computed twice, after one system prompt and after another, and both texts are kept in a store as an engine keeps them: in runs of pages,
the second one's spans once alone ("draft") and once referring to the first one's where that is shorter ("reference"). Then the second text is looked up
and restored, from both stores. The loss is the mean divergence (KL, nats) of the 128 next tokens' distributions behind the restored text from those
behind the computed one. `bits_ratio` compares the bits of tokens 256 and more behind the parting at equal loss, by interpolation in logarithms.

Prints one JSON object: `{"device", "versions", "pair", "command", "bits_ratio", "rows": [{"text", "method", "step", "distance", "bits_per_element",
"kl", "restore_s", "lent_tokens"}]}`; the last three stand in the rows of the last distance. restore_s: CPU seconds of lookup and restore.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.document import command_line, measured_on, print_document
from codec.spec import NUM_SINKS
from engine.engine import Engine
from engine.runtime.request import SequenceState
from engine.runtime.sampling import SamplingParams
from engine.sessions.file import Span
from engine.sessions.kv_codec import SessionCodec, session_codec
from engine.store.borrowing import Loans, resolved
from engine.store.runs import PAGE_TOKENS, root_key, span_bounds
from engine.store.store import RunStore

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = (
    "You are a careful reviewer. Read the document below and answer questions about it.\n\n",
    "Today is Monday. You are the assistant of a small company that builds measuring instruments, and you help its engineers with whatever they "
    "bring: code, manuals, letters, figures. Say so when you do not know something. Keep to the facts that are in front of you, and quote the "
    "lines you rely on.\n\nHere is what they sent today:\n\n",
)
PARTED = (0, 64, 256)  # distances from the parting at which groups of spans begin
FOLLOWING = 128
IDENTITY = {"namespace": "benchmark"}


class Text:
    """A document's KV after a system prompt, in an engine's pages. end: of the tokens that are kept, a whole number of pages."""

    def __init__(self, engine: Engine, codec: SessionCodec, prompt: list[int], document: list[int]) -> None:
        self.core, self.codec, self.start = engine.core, codec, len(prompt)
        self.ids = [*prompt, *document]
        self.end = (len(self.ids) - FOLLOWING) // PAGE_TOKENS * PAGE_TOKENS
        self.conversation: SequenceState = self.core.open_sequence_state()
        self.core.run(self.conversation, self.ids, SamplingParams(max_new_tokens=1, draft_length=0, ignore_eos=True))

    def keep(self, store: RunStore, step: float, *, refer: bool) -> list[int]:
        """Code and keep the text; returns the bytes of each page's span."""
        ids, root = self.ids[: self.end], root_key(IDENTITY)
        loans = Loans(self.codec.codec, store, root, ids, lambda tokens, lent: True) if refer else None
        spans = [bytes(s.data) for s in self.codec.encode(self.conversation, NUM_SINKS, self.end, step, sources=loans)]
        report = store.insert(IDENTITY, ids, spans, 0, 0.0, None if loans is None else loans.borrowed())
        assert report.whole and report.tokens == self.end
        return [len(span) for span in spans]

    def restored(self, store: RunStore) -> tuple[torch.Tensor, float, int]:
        """float32 [FOLLOWING, V], CPU seconds, and tokens decoded of other texts: log probabilities behind the text as the store gives it back."""
        conversation, began = self.core.open_sequence_state(), time.process_time()
        try:
            conversation.token_ids[:] = self.ids
            found = store.lookup(root_key(IDENTITY), self.ids[: self.end], referring=True)
            assert found.num_tokens == self.end
            lent = resolved(self.codec.codec, found).lent
            spans = [Span(*span_bounds(page), data) for page, data in enumerate(found.spans)]
            self.codec.restore(conversation, spans, lent=lent)
            took = time.process_time() - began
            return self.log_probabilities(conversation), took, 0 if lent is None else lent.num_lent_tokens
        finally:
            self.core.close_sequence_state(conversation)

    def log_probabilities(self, conversation: SequenceState) -> torch.Tensor:
        """float32 [FOLLOWING, V]: of the tokens behind the kept ones."""
        sequence = conversation.sequence
        sequence.ensure(self.end + FOLLOWING, self.end)
        ids = torch.tensor(self.ids[self.end : self.end + FOLLOWING])
        out = self.core.target.forward(ids, [sequence], [len(ids)], starts=[self.end], logits="all")
        return out.logits.float().log_softmax(-1)


def measure(engine: Engine, codec: SessionCodec, name: str, document: list[int], steps: list[float]) -> list[dict[str, Any]]:
    """The rows of one document."""
    first, second = (Text(engine, codec, engine.encode(prompt), document) for prompt in PROMPTS)
    truth, rows = second.log_probabilities(second.conversation), []
    width = codec.pack.layout.dim
    for step, method in product(steps, ("draft", "reference")):
        with tempfile.TemporaryDirectory() as folder:
            store = RunStore(folder)
            first.keep(store, step, refer=False)
            sizes = second.keep(store, step, refer=method == "reference")
            second.restored(store)  # makes matrices and tables that the timed one has
            found, restore_s, lent_tokens = second.restored(store)
            store.close()
        kl = float((truth.exp() * (truth - found)).sum(-1).mean())
        for distance, last in zip(PARTED, (*PARTED[1:], second.end), strict=True):
            pages = [page for page in range(len(sizes)) if distance <= page * PAGE_TOKENS - second.start < last]
            bits = 8 * sum(sizes[page] for page in pages) / (PAGE_TOKENS * len(pages) * width)
            row = {"text": name, "method": method, "step": step, "distance": distance, "bits_per_element": bits}
            whole = {"kl": kl, "restore_s": restore_s, "lent_tokens": lent_tokens}
            rows.append(row | (whole if distance == PARTED[-1] else {}))
            print(
                f"{name:<24} {method:<10} step {step:<4} from {distance:>4}: {bits:.4f} bits, KL {kl:.5f}, {restore_s:.2f} s",
                file=sys.stderr,
            )
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
    if args.tokens % PAGE_TOKENS or args.tokens <= PARTED[-1]:
        parser.error(f"--tokens {args.tokens} is no multiple of {PAGE_TOKENS} above {PARTED[-1]}")
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
    found = {
        **measured_on(engine.device),
        "pair": args.pair,
        "command": command_line("bench_reference.py", argv),
        "bits_ratio": bits_ratio(rows),
        "rows": rows,
    }
    print_document(found, args.json_out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
