"""A stored session against recomputing it: seconds of every stage, bytes, and time to the first token over links.

First a restored KV is compared with that of the plain twin (numpy's entropy decoder, float32 products on the CPU); if it differs nothing is timed and
the exit status is 1. recompute_s: the target's pass over the tokens in passes as long as its memory allows, with a draft head's layers. resume_s: from
the file on disk to caches that can go on; the draft's too, unless the predictor looks at its first layers alone, or on a CPU at nothing of a draft
head: draft_catch_up_s is then what its cache takes when drafts are first asked for, and speed_up_with_draft counts that as part of the resume.
host_copy_s: a raw cache from the host's memory (pinned, on a GPU). The stages are timed one by one, the device waited for between them, so they
overlap less than in resume_s:
read_s the file, check_s the spans' checksums, ids_s the token ids, rans_s copy and entropy decoder, draft_prefill_s the draft (and the target over the
first four tokens), target_layers_s the target's first layers, predict_s the product into pages. fixed_s: what a resume costs beside the passes and the
decoder, read_s (opening and ids, too) and check_s; fixed_reach_s: 5 ms and 1 GB/s. links_s: comparing the links that bind the spans, which a resume
does in a thread beside its passes. suspend_s: coding and writing all tokens at once; append_s: coding the last append_tokens, some 200, of a session
that was coded up to there.

    python scripts/bench_resume.py --pair smollm2 --tokens 512,2048 --json-out resume.json --plot resume.png
    python scripts/bench_resume.py --shapes llama-8b+0.5b --tokens 1024,8192,32768 --device cuda

--kvtc POINT adds our KVTC baseline, fitted on other text, to rows and links: kvtc_bytes, kvtc_encode_s and kvtc_decode_s, from bytes to pages.

Random weights (--shapes) tell nothing about loss; --pair takes the interpreter's own library as text.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from baselines import select_baselines
from bench.document import command_line
from bench.resume_links import LINKS, crossovers, link_rows, plot, ways_of
from bench.resume_runs import ResumeBench
from bench.resume_shapes import SHAPES, build
from codec.spec import QUALITIES
from codec_compare import write_json
from engine.calibrate.corpus import library_texts
from engine.cli.command import print_status, quiet_libraries, versions
from engine.cli.options import Parser, report
from engine.engine import Engine
from engine.errors import ForetoldError, InvalidOption
from engine.hub.pairs import PAIRS
from engine.model.device import device_named, dtype_named
from engine.sessions.codec_params import find_pack
from eval.fitted_baselines import FittedBaselines

_KVTC_TOKENS, _KVTC_CONTEXT = 65_536, 1024
_SHOWN = (
    "recompute_s",
    "resume_s",
    "speed_up",
    "draft_catch_up_s",
    "speed_up_with_draft",
    "read_s",
    "check_s",
    "rans_s",
    "draft_prefill_s",
    "target_layers_s",
    "predict_s",
    "fixed_s",
    "suspend_s",
    "append_s",
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options, checked. Raises InvalidOption."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--pair", help=f"one of {', '.join(PAIRS)}")
    which.add_argument("--shapes", help=f"random weights of one of {', '.join(SHAPES)}")
    p.add_argument("--pack", type=Path, metavar="FILE", help="codec parameters of the pair (default: its own)")
    p.add_argument("--tokens", default="1024,4096,16384", metavar="N,N")
    p.add_argument("--qualities", default="balanced", metavar="Q,Q")
    p.add_argument("--taps", type=int, metavar="N", help="of --shapes: layers of the draft that the predictor looks at")
    p.add_argument("--recomputed-layers", type=int, metavar="N", help="of --shapes: first layers of the target that are recomputed")
    p.add_argument(
        "--draft-layers", type=int, metavar="N", help="of --shapes: first layers of the draft that these are taken from (default: all)"
    )
    p.add_argument("--rerun-layers", type=int, dest="recomputed_layers", default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # earlier name
    p.add_argument("--kvtc", metavar="POINT", help="also our KVTC baseline at this point, such as kvtc-0.5bit")
    p.add_argument("--repeats", type=int, default=3, metavar="N")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--json-out", type=Path, metavar="FILE")
    p.add_argument("--plot", type=Path, metavar="FILE")
    args = p.parse_args(argv)
    try:
        args.tokens = sorted({int(n) for n in args.tokens.split(",")})
    except ValueError as error:
        raise InvalidOption(f"not a number: {error}", "check --tokens") from None
    args.qualities = args.qualities.split(",")
    if unknown := [q for q in args.qualities if q not in QUALITIES]:
        raise InvalidOption(f"--qualities cannot be {unknown[0]!r}", f"choose from {', '.join(QUALITIES)}")
    if min(args.tokens) < 64 or args.repeats < 1:
        raise InvalidOption("at least 64 tokens and one repeat", "check --tokens and --repeats")
    if args.shapes and args.shapes not in SHAPES:
        raise InvalidOption(f"unknown shapes {args.shapes!r}", f"choose one of {', '.join(SHAPES)}")
    if args.pair and any(value is not None for value in (args.taps, args.recomputed_layers, args.draft_layers)):
        raise InvalidOption("--taps, --draft-layers and --recomputed-layers are a calibrated pack's own", "give them with --shapes")
    if args.taps is not None and args.taps < 1:
        raise InvalidOption(f"--taps {args.taps}", "give at least 1")
    if args.kvtc and (not args.kvtc.startswith("kvtc-") or len(select_baselines([args.kvtc])) != 1):
        raise InvalidOption(f"--kvtc {args.kvtc}", "give one point, such as kvtc-0.5bit")
    for file in (args.json_out, args.plot):
        if file and not file.absolute().parent.is_dir():
            raise InvalidOption(f"{str(file)!r} cannot be written", "name a file in a folder that exists")
    return args


def opened(args: argparse.Namespace) -> tuple[ResumeBench, list[int], list[list[int]], str, str]:
    """The bench, tokens to keep, windows of other tokens to fit a baseline on (with --kvtc), and the names of target and draft."""
    most = max(args.tokens)
    if args.shapes:
        device, dtype = device_named(args.device), dtype_named(args.dtype)
        changes = {"taps": args.taps, "recomputed_layers": args.recomputed_layers, "draft_layers": args.draft_layers}
        engine, pack = build(args.shapes, device, dtype, 3 * most + 4096, **{k: v for k, v in changes.items() if v is not None})
        target, _, draft = args.shapes.partition("+")
        wanted = most + (_KVTC_TOKENS if args.kvtc else 0)
        ids = torch.randint(engine.core.target.config.vocab_size, (wanted,), generator=torch.Generator().manual_seed(5)).tolist()
        return ResumeBench(engine.core, pack), ids[:most], windows_of(ids[most:]), target, draft or "draft"
    engine = Engine.from_pair(args.pair, device=args.device, dtype=args.dtype)
    if most >= engine.context:
        raise InvalidOption(f"{most} tokens are more than the model's context of {engine.context}", "give fewer --tokens")
    ids, wanted = [], most + (_KVTC_TOKENS if args.kvtc else 0)
    for text in library_texts():
        ids += engine.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= wanted:
            break
    bench = ResumeBench(engine.core, find_pack(engine.core, args.pack, print_status))
    return bench, ids[:most], windows_of(ids[most:wanted]), args.pair, engine.drafter_name


def windows_of(ids: list[int]) -> list[list[int]]:
    """Whole windows of _KVTC_CONTEXT tokens."""
    return [ids[a : a + _KVTC_CONTEXT] for a in range(0, len(ids) - _KVTC_CONTEXT + 1, _KVTC_CONTEXT)]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when a restored KV is not the twin's, 2 for a user's mistake."""
    try:
        args = parse(argv)
        quiet_libraries()
        bench, ids, windows, target, draft = opened(args)
        device = torch.cuda.get_device_name(bench.core.device) if bench.core.device.type == "cuda" else "cpu"
        print_status(f"{target}, {draft} on {device}: the codec was ready after {bench.setup_s:.2f} s")
        try:
            errors = {quality: bench.check(ids, quality) for quality in args.qualities}
        except AssertionError as error:
            print_status(f"error: {error}")
            return 1
        rows: list[dict[str, Any]] = []
        kvtc: dict[int, dict[str, Any]] = {}
        if args.kvtc:
            baselines = FittedBaselines(bench.core, windows)
            kvtc = {tokens: bench.run_baseline(baselines.baseline(args.kvtc), ids[:tokens], args.repeats) for tokens in args.tokens}
        for tokens, quality in itertools.product(args.tokens, args.qualities):
            row = {"target": target, "draft": draft} | bench.run(ids[:tokens], quality, args.repeats) | kvtc.get(tokens, {})
            rows.append(row | {"twin_error": errors[quality]})
            print_status(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
        step_s = bench.step_s(args.repeats)
    except ForetoldError as error:
        return report(error)  # type: ignore[arg-type]
    links = link_rows(rows, LINKS, step_s)
    crossed = crossovers(links)
    print(table(rows, links, crossed))
    document = {
        "device": device,
        "command": command_line("bench_resume.py", argv),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "setup_s": bench.setup_s,
        "restore": bench.codec.pack.info.get("restore"),
        "step_s": step_s,
        "rows": rows,
        "links": links,
        "crossovers": crossed,
    }
    if args.json_out:
        write_json(args.json_out, document)
    if args.plot:
        plot(links, f"{target} with {draft} on {device}", str(args.plot))
    return 0


def table(rows: list[dict[str, Any]], links: list[dict[str, Any]], crossed: list[dict[str, Any]]) -> str:
    """What was measured, as text."""
    lines = [f"{'tokens':>7} {'quality':14}" + "".join(f"{name.removesuffix('_s'):>14}" for name in _SHOWN) + f"{'bytes':>13}{'bits':>7}"]
    for r in rows:
        figures = "".join(f"{r[name]:14.4f}" for name in _SHOWN)
        lines.append(f"{r['tokens']:7} {r['quality']:14}{figures}{r['stored_bytes']:13,}{r['bits_per_element']:7.3f}")
    ways = ways_of(links)
    lines += ["", f"seconds to the first token: {'link':12}{'tokens':>8}" + "".join(f"{way:>12}" for way in ways)]
    lines += [f"{'':28}{r['link']:12}{r['tokens']:8}" + "".join(f"{r[way]:12.4f}" for way in ways) for r in links]
    lines += ["", "ours is faster from so many tokens on: " + f"{'link':12}" + "".join(f"{way:>12}" for way in ways[:-1])]
    lines += [f"{'':39}{r['link']:12}" + "".join(f"{'never' if r[way] is None else r[way]:>12}" for way in ways[:-1]) for r in crossed]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
