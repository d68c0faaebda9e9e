"""Greedy text with speculation against transformers' own, from the same weights in float32, token by token.

    python scripts/check_greedy.py --pair qwen2.5-coder --json-out scripts/results/greedy-cpu-qwen2.5-coder.json
    python scripts/check_greedy.py --pair qwen2.5-coder --device cuda --against scripts/results/greedy-cpu-qwen2.5-coder.json

Exit status 1 when a text differs other than at a tie. A tie is named: the position, both tokens, and the gap of their logits.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.document import command_line
from engine.cli.command import print_status, quiet_libraries, versions
from engine.cli.options import report
from engine.engine import Engine
from engine.errors import ForetoldError
from engine.hub.pairs import PAIRS
from engine.runtime.sampling import SamplingParams

PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "Explain in two sentences what a hash table is.",
    "What does `git rebase -i` do?",
    "Write a SQL query that counts the orders of each customer.",
    "Name three differences between TCP and UDP.",
)
TIE = 1e-3
"""Two logits closer than this may swap places between two orders of float32 summation."""


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pair", default="qwen2.5-coder", choices=list(PAIRS))
    p.add_argument("--device", default="auto")
    p.add_argument("--max-new-tokens", type=int, default=48)
    p.add_argument("--draft-length", type=int, default=4)
    p.add_argument("--against", type=Path, metavar="FILE", help="also compare with the tokens of an earlier run, on another device say")
    p.add_argument("--json-out", type=Path, metavar="FILE")
    args = p.parse_args(argv)
    quiet_libraries()
    try:
        engine = Engine.from_pair(args.pair, device=args.device, dtype="float32")
    except ForetoldError as error:
        return report(error)
    earlier = json.loads(args.against.read_text())["rows"] if args.against else None
    rows, failed = [], 0
    ours = [run(engine, prompt, args) for prompt in PROMPTS]
    about = {"pair": args.pair, "device": device_name(engine), "dtype": "float32", "memory": engine.memory(), "versions": versions()}
    about["peak_device_bytes"] = torch.cuda.max_memory_allocated() if engine.device.type == "cuda" else None
    folder, device, ends = engine.core.config.target_dir, engine.device, sorted(engine.core.eos_token_ids)
    del engine  # three float32 models at once would not fit a small machine
    reference = Reference(folder, device, ends)
    for number, (prompt, (ids, row)) in enumerate(zip(PROMPTS, ours, strict=True)):
        expected, seconds = reference.generate(ids, args.max_new_tokens)
        row["transformers_tokens_per_s"] = round(len(expected) / seconds, 2)
        comparisons = {"transformers": expected} | ({str(args.against): earlier[number]["token_ids"]} if earlier else {})
        row["difference"] = {name: reference.difference(ids, row["token_ids"], other) for name, other in comparisons.items()}
        rows.append(row)
        for name, found in row["difference"].items():
            tie = found is None or found["gap"] < TIE
            failed += not tie
            verdict = "identical" if found is None else f"{'tie' if tie else 'DIFFERENT'} at new token {found['position']}: {found}"
            print_status(f"{prompt[:40]!r} against {name}: {row['new_tokens']} tokens, {verdict}")
    total = about | {
        "command": command_line("check_greedy.py", argv),
        "new_tokens": sum(r["new_tokens"] for r in rows),
        "failed": failed,
        "rows": rows,
    }
    if args.json_out:
        args.json_out.write_text(json.dumps(total, indent=1) + "\n")
    print(json.dumps({k: v for k, v in total.items() if k != "rows"}))
    return 1 if failed else 0


def run(engine: Engine, prompt: str, args: argparse.Namespace) -> tuple[list[int], dict[str, Any]]:
    """Prompt ids and our row."""
    ids = engine.encode([{"role": "user", "content": prompt}])
    result = engine.generate([ids], SamplingParams(max_new_tokens=args.max_new_tokens, draft_length=args.draft_length))[0]
    row = {
        "prompt": prompt,
        "token_ids": result.token_ids,
        "text": result.text,
        "new_tokens": result.new_tokens,
        "tokens_per_s": round(result.tokens_per_s, 2),
        "acceptance_rate": round(result.speculation.acceptance_rate, 4),
        "tokens_per_step": round(result.speculation.tokens_per_step, 3),
    }
    return ids, row


class Reference:
    """transformers' model of the engine's target, from the same folder."""

    def __init__(self, folder: Path | None, device: torch.device, ends: list[int]) -> None:
        from transformers import AutoModelForCausalLM

        self.device, self.ends = device, ends
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()

    @torch.inference_mode()
    def generate(self, ids: list[int], count: int) -> tuple[list[int], float]:
        """New tokens, greedy, and the seconds they took."""
        tensor = torch.tensor([ids], device=self.device)
        began = time.perf_counter()
        out = self.model.generate(
            tensor,
            attention_mask=torch.ones_like(tensor),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=self.ends,
            pad_token_id=self.ends[0],
            repetition_penalty=1.0,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        return out[0, len(ids) :].tolist(), time.perf_counter() - began

    @torch.inference_mode()
    def difference(self, ids: list[int], ours: list[int], other: list[int]) -> dict[str, Any] | None:
        """None when equal; else where they part, and how far apart the model's logits of the two tokens are."""
        if ours == other:
            return None
        at = next((i for i, (a, b) in enumerate(zip(ours, other, strict=False)) if a != b), min(len(ours), len(other)))
        if at == min(len(ours), len(other)):
            return {"position": at, "gap": float("inf"), "what": f"lengths {len(ours)} and {len(other)}"}
        logits = self.model(torch.tensor([ids + ours[:at]], device=self.device)).logits[0, -1].float()
        return {"position": at, "ours": ours[at], "other": other[at], "gap": float((logits[ours[at]] - logits[other[at]]).abs())}


def device_name(engine: Engine) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu"


if __name__ == "__main__":
    sys.exit(main())
