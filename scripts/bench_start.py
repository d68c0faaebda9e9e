"""From the command to the first token: wall and CPU seconds of every stage of a start, each run in a process of its own.

The stages are those of `python -m engine.generate` for one prompt; "whole command" is that command itself, until its first byte of text. Before
anything is printed, the text must equal the one of the plain path: transformers' config and tokenizer, weights that are loaded whole and packed
afterwards, and no remembered costs.

The caches are warmed by a run that is not counted. On a machine with other work, look at CPU seconds alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STAGES = ("python", "torch", "imports", "config and draft choice", "tokenizer", "weights", "draft", "engine", "prompt", "first token")


def stages(pair: str, prompt: str, new_tokens: int) -> dict[str, Any]:
    """One start, stage by stage: {"stages": {name: [wall_s, cpu_s]}, "text"}; wall seconds count from the time in START_UNIX_S."""
    marks = [("python", time.time(), time.process_time())]

    def mark(name: str) -> None:
        marks.append((name, time.time(), time.process_time()))

    from engine.hub.environment import without_collection

    with without_collection():
        import torch  # noqa: F401

        mark("torch")
        import engine.cli.command
    from engine.engine import Engine
    from engine.hub.cache import CacheFolder
    from engine.hub.resolve import resolve_pair
    from engine.loading import choose_draft
    from engine.model.config import DecoderConfig, read_config
    from engine.model.decoder import Decoder
    from engine.model.device import device_named, dtype_named
    from engine.runtime.sampling import SamplingParams
    from engine.text.templates import start_worker
    from engine.text.tokenizer import load_tokenizer

    mark("imports")
    start_worker()
    paths = resolve_pair(pair)
    choice = choose_draft(paths.draft, DecoderConfig.from_hf(read_config(paths.target_dir)))
    mark("config and draft choice")
    tokenizer = load_tokenizer(paths.target_dir, CacheFolder("tokenizers"))
    mark("tokenizer")
    target = Decoder.from_pretrained(paths.target_dir, dtype=dtype_named("auto"), device=device_named("auto"))
    mark("weights")
    draft = choice.load(target)
    mark("draft")
    engine = Engine(target, tokenizer, draft=draft, target_dir=paths.target_dir, pair=pair)
    mark("engine")
    messages = [{"role": "user", "content": prompt}]
    engine.encode(messages)
    mark("prompt")
    events = engine.stream(messages, SamplingParams(max_new_tokens=new_tokens))
    next(events)
    mark("first token")
    for _ in events:
        pass
    # without drafts, whose automatic number changes the order of sums, and so bf16 greedy texts at ties
    [result] = engine.generate([messages], SamplingParams(max_new_tokens=new_tokens, draft_length=0))
    began, cpu, found = float(os.environ["START_UNIX_S"]), 0.0, {}
    for name, at, used in marks:
        found[name] = [at - began, used - cpu]
        began, cpu = at, used
    return {"stages": found, "text": result.text}


def plain_text(pair: str, prompt: str, new_tokens: int) -> str:
    """The text by the path without any of the shortcuts."""
    from transformers import AutoConfig, AutoTokenizer

    from engine.engine import Engine
    from engine.hub.resolve import resolve_pair
    from engine.loading import choose_draft
    from engine.model.config import DecoderConfig
    from engine.model.decoder import Decoder
    from engine.model.device import device_named, dtype_named
    from engine.model.weights import load_tensors, open_checkpoint
    from engine.runtime.sampling import SamplingParams

    paths = resolve_pair(pair)
    folder = paths.target_dir
    config, stored = open_checkpoint(folder)
    theirs = DecoderConfig.from_hf(AutoConfig.from_pretrained(str(folder)))
    assert {**vars(config), "eos_token_ids": None} == {**vars(theirs), "eos_token_ids": None}, "config.json is read in two ways"
    target = Decoder._materialise(config, dtype_named("auto"), device_named("auto"))
    load_tensors(stored, target.hf_tensors())
    target.pack()
    engine = Engine(target, AutoTokenizer.from_pretrained(str(folder)), draft=choose_draft(paths.draft, config).load(target))
    ids = engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False)
    [result] = engine.generate([ids], SamplingParams(max_new_tokens=new_tokens, draft_length=0))
    return result.text


def _environment() -> dict[str, str]:
    """This process's, but that bytecode is kept: an installed package has its own, and compiling ours takes a third of a second."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def child(kind: str, args: argparse.Namespace) -> Any:
    """What this script prints as a child process of this kind."""
    command = [
        sys.executable,
        __file__,
        "--child",
        kind,
        "--pair",
        args.pair,
        "--new-tokens",
        str(args.new_tokens),
        "--prompt",
        args.prompt,
    ]
    ran = subprocess.run(command, stdout=subprocess.PIPE, env=_environment() | {"START_UNIX_S": repr(time.time())}, check=True)
    return json.loads(ran.stdout.decode().splitlines()[-1])


def whole_command(args: argparse.Namespace) -> tuple[float, float]:
    """Seconds from the command to its first byte of text, and CPU seconds of the process and its worker until its end."""
    command = [sys.executable, "-m", "engine.generate", args.prompt, "--pair", args.pair, "--max-new-tokens", "1"]
    before, began = os.times(), time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environment()) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        first_s = time.perf_counter() - began
        process.stdout.read()
    if not first or process.returncode:
        raise SystemExit(f"the command ended with status {process.returncode}")
    after = os.times()
    return first_s, after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Print the table, and write it where --json-out says."""
    parser = argparse.ArgumentParser(description="Time a start, stage by stage.")
    parser.add_argument("--pair", default="smollm2")
    parser.add_argument("--prompt", default="Name three colours.")
    parser.add_argument("--new-tokens", type=int, default=16, help="of the texts that are compared")
    parser.add_argument("--runs", type=int, default=5, help="starts of each kind; medians are printed")
    parser.add_argument("--json-out", type=Path)
    parser.add_argument("--child", choices=("stages", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.runs < 1 or args.new_tokens < 1:
        parser.error("--runs and --new-tokens need a positive number")
    if args.child:
        kind = stages if args.child == "stages" else plain_text
        print(json.dumps(kind(args.pair, args.prompt, args.new_tokens)))
        return
    wanted = child("plain", args)
    child("stages", args)  # warms the caches
    found = [child("stages", args) for _ in range(args.runs)]
    for run in found:
        assert run["text"] == wanted, f"the texts differ: {run['text']!r} and {wanted!r}"
    commands = [whole_command(args) for _ in range(args.runs)]
    rows = [
        {"stage": name, "wall_s": statistics.median(r["stages"][name][0] for r in found)}
        | {"cpu_s": statistics.median(r["stages"][name][1] for r in found)}
        for name in STAGES
    ]
    rows.append({"stage": "sum of the stages", "wall_s": sum(r["wall_s"] for r in rows), "cpu_s": sum(r["cpu_s"] for r in rows)})
    wall, cpu = (statistics.median(values) for values in zip(*commands, strict=True))
    rows.append({"stage": "whole command", "wall_s": wall, "cpu_s": cpu})
    print(f"the text equals the plain path's: {wanted!r}")
    print(f"{'stage':<24} {'wall s':>8} {'CPU s':>8}   median of {args.runs}")
    for row in rows:
        print(f"{row['stage']:<24} {row['wall_s']:8.3f} {row['cpu_s']:8.3f}")
    if args.json_out:
        from bench.document import command_line  # it imports torch, which is a stage of its own

        document = {
            "pair": args.pair,
            "runs": args.runs,
            "cores": os.cpu_count(),
            "command": command_line("bench_start.py", None),
            "rows": rows,
        }
        args.json_out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
