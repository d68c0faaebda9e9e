"""Tokens per second of plain and speculative decoding, ours and transformers' over the same weights, in one process.

Text first: before anything is timed each way continues the prompts greedily. Ours with speculation must be ours without, and ours without must be
transformers', token for token: with --deterministic or in float32 the first without exception; else texts may part at a near tie, checked by
transformers' own logits (throughput_check.py). On failure nothing is timed, no speed-up is printed, and the exit status is 1.

Then --repeats rounds, in which all ways take turns batch by batch. tokens_per_s: the tokens after the first over the seconds after the first, of all
prompts of a batch together, median over the rounds (`tokens_per_s_best`: the best). End tokens are ignored, so that counts are equal. ttft_s: until
all prompts of a batch have their first token (transformers: a call for one token). floor_fraction, plain rows: the time to read the weights once at
the bandwidth of reading a large buffer in the same run (`read_gb_per_s`), over the time of a step. draft_share, verify_share: of the seconds after the
first token, what our steps spent proposing and verifying; the rest is scheduling and text. peak_bytes beside announced_bytes: what the process held
at most (with transformers' models, where these ran), and what our engines say they hold.

    python scripts/bench_throughput.py --pair smollm2 --batches 1 --temperature 0,1 --json-out scripts/results/throughput-cpu-smollm2.json
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from bench.decode_profile import SHAPES, prompts_of, random_decoder, read_gb_per_s
from bench.document import command_line
from bench.throughput_check import compare
from bench.throughput_plot import plot
from bench.throughput_rows import add_ratios, row, table
from bench.throughput_runs import (
    KINDS,
    Contestant,
    Foretold,
    Sample,
    Transformers,
    copy_gb_per_s,
    in_batches,
    load_transformers,
    peak_bytes,
    prompt_ids,
)
from check_greedy import device_name
from codec_compare import write_json
from draft.policy import MAX_AUTO_LENGTH
from draft.source import DraftSource, NgramSource
from engine.cli.command import load, print_status, quiet_libraries, versions
from engine.cli.options import Parser, report
from engine.engine import Engine
from engine.errors import ForetoldError, InvalidOption
from engine.hub.pairs import PAIRS
from engine.model.device import device_named, dtype_named
from engine.runtime.sampling import SamplingParams

ENGINES, MODES = ("foretold", "transformers"), ("plain", "speculative", "ngram", "assisted")
_PAGE, _WARM_TOKENS = 64, 16


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--pair", help=f"one of {', '.join(PAIRS)}")
    which.add_argument("--target", metavar="DIR", help="folder or hub id of the target")
    which.add_argument("--shape", metavar="NAME[+NAME]", help=f"random weights, foretold alone: target and draft of {', '.join(SHAPES)}")
    p.add_argument("--draft", metavar="DIR|trunk|none", help="another draft than the pair's own; with --target none unless given")
    p.add_argument("--engines", default=",".join(ENGINES))
    p.add_argument(
        "--modes",
        default=",".join(MODES),
        help="plain: both engines; speculative, ngram (drafts from the text itself): ours; assisted: transformers' own speculation, which "
        "needs a draft that is a model and runs one prompt at a time",
    )
    p.add_argument("--batches", default="1", metavar="B,B")
    p.add_argument(
        "--prompts", type=int, metavar="N", help="so many of the prompts (default: all), in batches; the last is filled up from the first"
    )
    p.add_argument("--prompt-kind", default="chat", choices=list(KINDS), help="which of the built-in prompts")
    p.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt a line instead of the built-in ones")
    p.add_argument("--prompt-tokens", type=int, metavar="L", help="raw prompts cut or repeated to L tokens, without the chat template")
    p.add_argument("--new-tokens", type=int, default=128, metavar="N")
    p.add_argument("--temperature", default="0", metavar="T,T", help="0 is greedy")
    p.add_argument("--draft-length", default="auto", metavar="N|auto")
    p.add_argument("--repeats", type=int, default=3, metavar="N")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    p.add_argument("--deterministic", action="store_true", help="our shape-stable arithmetic")
    p.add_argument("--json-out", type=Path, metavar="FILE")
    p.add_argument("--plot", type=Path, metavar="FILE", help="a PNG of tokens a second by batch")
    args = p.parse_args(argv)
    args.command = command_line("bench_throughput.py", argv)
    for name, allowed in (("engines", ENGINES), ("modes", MODES)):
        given = list(dict.fromkeys(getattr(args, name).split(",")))
        if unknown := [x for x in given if x not in allowed]:
            raise InvalidOption(f"--{name} cannot be {unknown[0]!r}", f"choose from {', '.join(allowed)}")
        setattr(args, name, given)
    try:
        args.batches = [int(b) for b in args.batches.split(",")]
        args.temperatures = [float(t) for t in args.temperature.split(",")]
        args.draft_length = "auto" if args.draft_length == "auto" else int(args.draft_length)
    except ValueError as error:
        raise InvalidOption(f"not a number: {error}", "check --batches, --temperature and --draft-length") from None
    counts = [*args.batches, args.repeats, *(n for n in (args.prompts, args.prompt_tokens) if n is not None)]
    if min(counts) < 1 or args.new_tokens < 2:
        raise InvalidOption("batches, repeats, prompts and prompt tokens are at least 1, new tokens 2", "check the options")
    if args.draft_length == 0:
        raise InvalidOption("--draft-length 0 is plain decoding", "give 1 or more, auto, or --modes plain")
    for name, file in (("--json-out", args.json_out), ("--plot", args.plot)):
        if file and not file.absolute().parent.is_dir():
            raise InvalidOption(f"{name} cannot be written to {str(file)!r}", "name a file in a folder that exists")
    if args.shape and (unknown := [name for name in args.shape.split("+") if name not in SHAPES] or args.shape.split("+")[2:]):
        raise InvalidOption(f"--shape cannot be {args.shape!r}: {unknown[0]}", f"give one or two of {', '.join(SHAPES)}, joined by +")
    for temperature in args.temperatures:
        SamplingParams(temperature=temperature, draft_length=args.draft_length)
    return args


def contestants(loaded: Engine, ids: list[list[int]], args: argparse.Namespace) -> list[Contestant]:
    """Every way to decode that was asked for and that these models have. Raises InvalidOption when there is none."""
    core, target_dir = loaded.core, loaded.core.config.target_dir
    drafts = MAX_AUTO_LENGTH if args.draft_length == "auto" else args.draft_length
    room = max(args.batches) * (-(-(max(map(len, ids)) + args.new_tokens + drafts) // _PAGE) + 2) * _PAGE

    def ours(mode: str, source: DraftSource | None, length: int | Literal["auto"]) -> Foretold:
        engine = Engine(
            core.target,
            loaded.tokenizer,
            draft=source,
            pool_tokens=room,
            page_size=_PAGE,
            max_batch=max(args.batches),
            deterministic=args.deterministic,
            prefix_sharing=False,  # every turn computes its prompts
            target_dir=target_dir,
        )
        return Foretold(mode, engine, length)

    found: list[Contestant] = []
    if "foretold" in args.engines:
        if "plain" in args.modes:
            found.append(ours("plain", None, 0))
        if "speculative" in args.modes and core.source is not None:
            found.append(ours("speculative", core.source, args.draft_length))
        if "ngram" in args.modes:
            found.append(ours("ngram", NgramSource(), args.draft_length))
    if "transformers" in args.engines and not args.shape and {"plain", "assisted"} & set(args.modes):
        assert target_dir is not None
        model = load_transformers(target_dir, loaded.dtype, loaded.device)
        if "plain" in args.modes:
            found.append(Transformers("plain", model))
        if "assisted" in args.modes and core.draft_model is not None and core.source is not None and core.source.folder is not None:
            found.append(Transformers("assisted", model, load_transformers(core.source.folder, loaded.dtype, loaded.device)))
    if not found:
        raise InvalidOption(
            "there is nothing to measure", "check --engines and --modes; speculative needs a draft, assisted one that is a model"
        )
    return found


def taking_part(everyone: list[Contestant], batch: int) -> list[Contestant]:
    return [c for c in everyone if c.mode != "assisted" or batch == 1]  # transformers assists one prompt at a time


def check(everyone: list[Contestant], batches: list[list[list[int]]], args: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Greedy texts against each other, as the module says; also the warm-up."""
    texts = {(c.name, c.mode): [c.run(batch, args.new_tokens, 0.0, 0).texts for batch in batches] for c in everyone}
    judge = next((c for c in everyone if c.name == "transformers"), everyone[0])
    exact = args.deterministic or dtype == torch.float32
    pairs = [
        (("foretold", "speculative"), ("foretold", "plain"), exact),
        (("foretold", "ngram"), ("foretold", "plain"), exact),
        (("foretold", "plain"), ("transformers", "plain"), False),
        (("transformers", "assisted"), ("transformers", "plain"), False),
    ]
    found = []
    for one, other, strictly in pairs:
        if one in texts and other in texts:
            prompts, ours, theirs = ([t for batch in part for t in batch] for part in (batches, texts[one], texts[other]))
            result = compare(prompts, ours, theirs, judge, dtype, exact=strictly)
            found.append({"batch": len(batches[0]), "text": " ".join(one), "against": " ".join(other), "exact": strictly} | result)
            print_status(
                f"batch {len(batches[0])}: {' '.join(one)} is {' '.join(other)} for {result['equal_share']:.2%} of {result['tokens']} tokens, "
                f"{result['ties']} near ties (worst {result['worst']:.2f} of what rounding excuses), "
                f"{result['strays']} of {result['judged']} tokens after not the judge's best, "
                + ("passed" if result["passed"] else f"FAILED: {result['failures']}")
            )
    return found


def measure(
    everyone: list[Contestant], batches: list[list[list[int]]], temperature: float, args: argparse.Namespace
) -> list[list[list[Sample]]]:
    """[contestant][round][batch]; the contestants take turns, and another one begins each round."""
    samples: list[list[list[Sample]]] = [[[] for _ in range(args.repeats)] for _ in everyone]
    for who in everyone if temperature else ():
        who.run(batches[0], min(_WARM_TOKENS, args.new_tokens), temperature, 0)  # sampling has kernels of its own to compile
    for turn in range(args.repeats):
        for number, batch in enumerate(batches):
            for i in range(len(everyone)):
                at = (i + turn) % len(everyone)
                samples[at][turn].append(everyone[at].run(batch, args.new_tokens, temperature, turn * len(batches) + number))
        print_status(f"batch {len(batches[0])}, temperature {temperature:g}: round {turn + 1} of {args.repeats}")
    return samples


def random_engine(args: argparse.Namespace) -> Engine:
    """An engine over random weights of the named shapes, without a tokenizer."""
    device = device_named(args.device)
    dtype = (
        torch.bfloat16 if args.dtype == "auto" and device.type == "cuda" else dtype_named("float32" if args.dtype == "auto" else args.dtype)
    )
    target, *draft = (random_decoder(name, device, dtype, seed) for seed, name in enumerate(args.shape.split("+")))
    return Engine(target, draft=draft[0] if draft else None, pool_tokens=64)


def announced(everyone: Sequence[Contestant]) -> int:
    """Bytes that our engines say they hold: weights once, every engine's pools, and on a GPU its captured steps and workspace."""
    memories = [c.engine.memory() for c in everyone if isinstance(c, Foretold)]
    weights = max((m["target_bytes"] + m["draft_bytes"] for m in memories), default=0)
    plans = [plan for c in everyone if isinstance(c, Foretold) for plan in c.engine.core.memory_plans]
    beside = [plan.workspace_bytes + plan.captured_bytes for plan in plans]  # of a GPU
    return weights + sum(m["pool_bytes"] for m in memories) + sum(beside)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark; the file, if one is wanted, is written after each batch size and temperature."""
    loaded = random_engine(args) if args.shape else load(args, pool_tokens=_PAGE)  # each contestant has pools of its own
    ids = (
        prompts_of(args.prompts or max(args.batches), args.prompt_tokens or 128, loaded.core.target.config.vocab_size)
        if args.shape
        else prompt_ids(loaded, args)
    )
    device, dtype = loaded.device, loaded.dtype
    config, weights = loaded.core.target.config, loaded.core.target.weight_bytes
    embedding = loaded.core.target.embed_tokens.weight
    read = weights - (0 if config.tie_word_embeddings else embedding.nbytes)  # of embeddings of its own a step reads single rows
    document: dict[str, Any] = {
        "pair": args.pair or args.shape or Path(args.target).name,
        "prompt_kind": "random" if args.shape else "file" if args.prompt_file else args.prompt_kind,
        "device": device_name(loaded),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "drafter": loaded.drafter_name,
        "deterministic": args.deterministic,
        "prompts": len(ids),
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "read_bytes": read,
        "command": args.command,
        "versions": versions(),
    }
    everyone = contestants(loaded, ids, args)
    del loaded  # its pools; the models live on
    document["copy_gb_per_s"] = copy_gb_per_s(device, 1 << (30 if device.type == "cuda" else 28))
    document["read_gb_per_s"] = read_gb_per_s(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the tests' buffers are no part of an engine
    document |= {"checks": [], "passed": True, "rows": []}
    floor_s = read / (document["read_gb_per_s"] * 1e9)
    document["announced_bytes"] = announced(everyone)

    def keep() -> None:
        if args.json_out:
            write_json(args.json_out, document)

    for size in args.batches:
        batches, here = in_batches(ids, size), taking_part(everyone, size)
        if not here:
            print_status(f"batch {size}: transformers assists one prompt at a time, left out")
            continue
        document["checks"] += check(here, batches, args, dtype)
        if not all(c["passed"] for c in document["checks"]):
            document["passed"] = False
            keep()
            return document
        for temperature in args.temperatures:
            rounds = measure(here, batches, temperature, args)
            document["rows"] += [row(who, own, batches, temperature, floor_s) for who, own in zip(here, rounds, strict=True)]
            add_ratios(document["rows"])
            document["peak_bytes"] = peak_bytes(device)
            keep()
    costs = next((c.engine.core.cost_model for c in everyone if isinstance(c, Foretold) and c.engine.core.cost_model), None)
    document["cost_model"] = dataclasses.asdict(costs) if costs else None
    keep()
    return document


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse(argv)
        quiet_libraries()
        document = run(args)
    except ForetoldError as error:
        return report(error)
    about = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    print(
        f"{document['pair']}, {document['device']} ({document['threads']} threads), {document['dtype']}, drafter {document['drafter']}; "
        f"copy {document['copy_gb_per_s']:.1f} GB/s; {about}\n{document['command']}"
    )
    if not document["passed"]:
        print("error: the texts differ, nothing was timed (see the check above)", file=sys.stderr)
        return 1
    print(table(document["rows"]))
    print(f"memory: {document['peak_bytes'] / 2**30:.2f} GiB at most, {document['announced_bytes'] / 2**30:.2f} GiB announced")
    if args.plot:
        plot(document, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
