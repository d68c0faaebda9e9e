"""Makes a codec pack for a pair from any text: predictor, weights, transform and entropy tables in one streaming pass.

    python scripts/calibrate.py --pair smollm2 --text FILE_OR_FOLDER... --tokens 50000 --out smollm2.pack

Without --text the interpreter's own library is used. A pack codes best what it was calibrated on, so mix what will be stored. `--mix` gives every
source of --text its share of the tokens; a mix for general use is half code and documentation, the rest other kinds in equal parts
(scripts/eval/domain_texts.py makes such folders, and keeps test text apart):

    python scripts/eval/domain_texts.py --debian TEXTS --apart 0.25 --out D
    python scripts/calibrate.py --pair smollm2 --text CODE_AND_DOCS D/train/{prose,german,french,japanese,logs,json} --mix 6,1,1,1,1,1,1
        --out smollm2.pack

Documents of `--context` tokens say nothing of a draft that has read much more: `--long-text` adds longer ones (files of many tokens), whose tokens
count beside those of --text.

Progress goes to standard error, figures to standard output (`--json`: as one JSON object).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from bench.document import command_line
from codec.errors import CodecError
from codec.pack import CodecPack
from engine.calibrate.complete import complete
from engine.calibrate.corpus import documents, library_texts, read_texts, text_files
from engine.calibrate.recipe import CURVE_TOKENS, CalibrationOptions, bf16_bytes, calibrate, default_recomputed_layers, quick_pack
from engine.calibrate.restore_cost import DEFAULT_BUDGET
from engine.cli.command import versions
from engine.cli.options import Parser
from engine.errors import ForetoldError, InvalidOption
from engine.hub.fingerprint import fingerprint, model_fingerprint
from engine.hub.pairs import PAIRS, SELF_DRAFT
from engine.hub.resolve import resolve_model, resolve_pair
from engine.loading import choose_draft
from engine.model.config import read_config
from engine.model.decoder import Decoder, DecoderConfig
from engine.text.tokenizer import check_vocabularies, load_tokenizer, tokenizer_fingerprint
from text_mix import mixed_documents, shares_of


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=sorted(PAIRS), help="a known pair")
    parser.add_argument("--target", help="folder or hub id, instead of --pair")
    parser.add_argument(
        "--draft",
        help="folder or hub id, folder of a draft head, or 'trunk' (the draft head that ships for the target, else the "
        "first layers); default: the pair's own, trunk for --target",
    )
    parser.add_argument(
        "--recomputed-layers",
        type=int,
        help="the target's first layers that a resume recomputes and that are not coded: those up to an early exit "
        "(default: what the engine uses), or beside a separate draft (default: a seventh; 0: none)",
    )
    parser.add_argument(
        "--trunk-layers", type=int, dest="recomputed_layers", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )  # earlier name
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE|DIR", help="calibration text (default: the interpreter's library)")
    parser.add_argument("--mix", metavar="equal|N,N,...", help="share of each source of --text in the tokens (default: files as they come)")
    parser.add_argument(
        "--curve-text",
        nargs="+",
        metavar="FILE|DIR",
        help="texts of other kinds, of each as much, on which the divergence curve is measured (default: held-out documents of --text); code diverges "
        "more than prose at the same distortion",
    )
    parser.add_argument(
        "--curve-tokens",
        type=int,
        metavar="N",
        help=f"of --curve-text in all (default: {CURVE_TOKENS:,}; with --complete --tokens)",
    )
    parser.add_argument("--tokens", type=int, default=50_000, help="tokens to calibrate on")
    parser.add_argument("--context", type=int, default=1024, help="tokens a document")
    parser.add_argument("--long-text", nargs="+", default=[], metavar="FILE|DIR", help="texts of longer documents to calibrate on as well")
    parser.add_argument("--long-context", type=int, default=8192, help="tokens of a document of --long-text")
    parser.add_argument("--long-tokens", type=int, help="tokens of these (default: a quarter of --tokens)")
    parser.add_argument("--rank", type=int, help="rank of the predictor (default: from the size budget)")
    parser.add_argument(
        "--taps", help="draft layers used as features, such as 4,8,12 (default: all of a draft, every second of an early exit)"
    )
    parser.add_argument("--predictor", choices=("auto", "dense", "low_rank"), default="auto", help="all directions in 4 bits, or few in 8")
    parser.add_argument("--weighting", choices=("auto", "blend", "fisher", "attention", "unit"), default="auto")
    parser.add_argument(
        "--fisher-tokens", type=int, help="cached tokens whose gradients are taken (default: 65,536 on a GPU, fewer on a CPU)"
    )
    parser.add_argument(
        "--level-strength",
        type=float,
        default=CalibrationOptions.level_strength,
        help="how far a token's step follows its predicted sensitivity, 0 to 1",
    )
    parser.add_argument("--transform", choices=("global", "per_layer"), default="global")
    parser.add_argument(
        "--restore-budget",
        type=float,
        metavar="SHARE",
        help="features and form of the predictor with the fewest bits among those whose passes and product take at most this share of the arithmetic "
        f"of the target's prefill (default: {DEFAULT_BUDGET}, unless --taps, --rank, --predictor or --recomputed-layers say which)",
    )
    parser.add_argument(
        "--restore-time",
        type=float,
        metavar="SHARE",
        help="the same of the seconds that the prefill of 8,192 tokens takes here: on a GPU the layers of a small draft take far more of these than "
        "of the arithmetic",
    )
    parser.add_argument(
        "--complete",
        metavar="PACK",
        help="fit nothing anew: give this pack of the pair a fallback basis where it has none (from --tokens of --text) and a divergence curve (from "
        "--curve-text)",
    )
    parser.add_argument("--show", metavar="PACK", help="make none: print the figures of one, its restore's arithmetic among them")
    parser.add_argument("--budget", type=float, default=CalibrationOptions.budget, help="largest pack as a fraction of the target's bytes")
    parser.add_argument("--quick", action="store_true", help="the pack that is made on first use: a few thousand tokens, two minutes")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--seed", type=int, default=0, help="order of the text")
    parser.add_argument("--out", help="file to write")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    parser.add_argument("--json-out", metavar="FILE", help="also write them to a file")
    return parser.parse_args(argv)


def restore_budget_of(args: argparse.Namespace) -> float | None:
    """As given; the default where nothing else says which predictor."""
    if args.restore_time is not None:
        if args.restore_budget is not None:
            raise InvalidOption("a restore is bounded in time and in arithmetic", "give --restore-time or --restore-budget")
        return float(args.restore_time)
    said = args.taps is not None or args.rank is not None or args.predictor != "auto" or args.recomputed_layers is not None
    return DEFAULT_BUDGET if args.restore_budget is None and not said else args.restore_budget


def long_documents(args: argparse.Namespace, tokenizer: Any) -> tuple[list[list[int]], str]:
    """Documents of --long-text, each at least half of --long-context long, and a digest of them. Raises InvalidOption."""
    wanted = args.tokens // 4 if args.long_tokens is None else args.long_tokens
    if wanted < 1 or args.long_context <= args.context:
        raise InvalidOption(
            f"{wanted} tokens in long documents of {args.long_context}",
            f"give some, in documents of more than the {args.context} of --context",
        )
    docs, digest = documents(read_texts(text_files(args.long_text), args.seed), tokenizer, wanted, args.long_context, per_text=2)
    docs = [document for document in docs if len(document) >= args.long_context // 2]
    if not docs:
        raise InvalidOption(f"--long-text has no file of {args.long_context // 2} tokens", "give longer texts, or a smaller --long-context")
    return docs, digest


def curve_documents(args: argparse.Namespace, tokenizer: Any, num_tokens: int) -> list[list[list[int]]]:
    """About num_tokens in documents of --curve-text, those of each source apart: what a kind of text does to the curve does not depend on how many
    files it has. Raises InvalidOption."""
    wanted = -(-num_tokens // len(args.curve_text))
    return [
        documents(read_texts(text_files([source]), args.seed), tokenizer, wanted, args.context, per_text=1)[0] for source in args.curve_text
    ]


def shown(path: str) -> dict:
    """Figures of a pack. Raises InvalidOption when it cannot be read."""
    try:
        pack = CodecPack.load(path)
    except (CodecError, FileNotFoundError) as error:
        raise InvalidOption(f"{path} is no codec pack that can be read: {error}", "check the path") from error
    known = {"pack": path, "pack_bytes": os.path.getsize(path), "digest": pack.digest, "layout": pack.layout.as_dict()}
    return known | {"predictor_settings": pack.predictor_settings} | pack.figures


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> dict:
    """Calibrates and saves; returns the figures. Raises ForetoldError on bad input."""
    if args.show is not None:
        return shown(args.show)
    if args.out is None:
        raise InvalidOption("--out is missing", "name the file to write, or a pack to --show")
    if (args.pair is None) == (args.target is None):
        raise InvalidOption("either --pair or --target is needed, and not both", f"for example --pair {min(PAIRS)}")
    shares = shares_of(args.mix, args.text) if args.mix is not None else []
    if args.curve_tokens is not None and (args.curve_tokens < 1 or not args.curve_text):
        raise InvalidOption(f"--curve-tokens {args.curve_tokens} of no --curve-text", "give texts, and a whole number above 0")
    if args.tokens < 256 or args.context < 32:
        raise InvalidOption(f"{args.tokens} tokens in documents of {args.context}", "use at least 256 tokens, and 32 a document")
    if args.pair:
        paths = resolve_pair(args.pair)
        target_dir, source = paths.target_dir, args.draft or paths.draft
    else:
        target_dir, source = resolve_model(args.target), args.draft or SELF_DRAFT
    if source == "none":
        raise InvalidOption("a pack needs a source of features", f"give a draft, or {SELF_DRAFT}")
    choice = choose_draft(source, DecoderConfig.from_hf(read_config(target_dir)), args.recomputed_layers if source == SELF_DRAFT else None)
    draft_dir = choice.model
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    dtype = {"auto": torch.bfloat16 if device == "cuda" else torch.float32, "bfloat16": torch.bfloat16, "float32": torch.float32}[
        args.dtype
    ]
    tokenizer = load_tokenizer(target_dir)
    if draft_dir is not None:
        check_vocabularies(tokenizer, load_tokenizer(draft_dir))
    started = time.monotonic()
    target = Decoder.from_pretrained(target_dir, dtype=dtype, device=device)
    num_layers, loaded = target.config.num_layers, choice.load(target)
    assert loaded is not None, "there is a source of features"
    draft, recomputed = loaded.model, loaded.exit_layer
    if loaded.head_layers is not None and args.recomputed_layers not in (None, recomputed):
        raise InvalidOption(f"--recomputed-layers {args.recomputed_layers} with a draft head for {recomputed}", "leave it out")
    bounded = args.restore_budget is not None or args.restore_time is not None
    if draft is not None and bounded and args.recomputed_layers is not None:
        raise InvalidOption("a restore budget chooses how many layers are recomputed", "leave --recomputed-layers or --restore-budget out")
    if draft is not None:
        recomputed = default_recomputed_layers(num_layers) if args.recomputed_layers is None else args.recomputed_layers
    if not (0 if draft else 1) <= recomputed < num_layers:
        raise InvalidOption(f"--recomputed-layers {recomputed} for a target of {num_layers} layers", "choose fewer than it has")
    prints = {
        "target": fingerprint(target_dir),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "draft": loaded.fingerprint(model_fingerprint),
    }
    parts: dict[str, Any] = {"recomputed_layers": recomputed, "head_layers": loaded.head_layers}
    if args.quick and (bounded or args.curve_text or args.long_text):
        raise InvalidOption(
            "a quick pack has text, features and a curve of its own",
            "leave --quick, or --restore-budget, --restore-time, --curve-text and --long-text out",
        )
    if args.complete is not None:
        fits = args.mix or args.long_text or bounded or args.taps or args.rank or args.predictor != "auto"
        if args.quick or fits:
            raise InvalidOption("--complete fits no predictor", "give it --text, --curve-text, --tokens and --context alone")
        try:
            given = CodecPack.load(args.complete)
            given.check(prints)
        except (CodecError, FileNotFoundError) as error:
            raise InvalidOption(f"{args.complete} cannot be completed: {error}", "give a pack of this pair") from error
        texts = read_texts(text_files(args.text), args.seed) if args.text else library_texts(args.seed)
        docs, _ = documents(texts, tokenizer, args.tokens, args.context, per_text=1)
        curve_tokens = args.curve_tokens or args.tokens
        curve_kinds = curve_documents(args, tokenizer, curve_tokens) if args.curve_text else None
        pack = complete(
            target, draft, given, docs, head_layers=loaded.head_layers, curve_kinds=curve_kinds, curve_tokens=curve_tokens, log=log
        )
    elif args.quick:
        pack = quick_pack(target, draft, tokenizer, **parts, fingerprints=prints, log=log)
    else:
        options = CalibrationOptions(
            taps=None if args.taps is None else tuple(int(i) for i in args.taps.split(",")),
            rank=args.rank,
            weighting=args.weighting,
            predictor=args.predictor,
            level_strength=args.level_strength,
            transform=args.transform,
            context=args.context,
            budget=args.budget,
            restore_budget=restore_budget_of(args),
            restore_by_time=args.restore_time is not None,
            tokens_per_batch=16_384 if device == "cuda" else 4096,
            fisher_tokens=args.fisher_tokens or (CalibrationOptions.fisher_tokens if device == "cuda" else max(4096, args.tokens // 6)),
        )
        num_tokens = args.tokens + options.held_out_tokens
        if shares:
            docs, digest = mixed_documents(args.text, shares, tokenizer, num_tokens, args.context, args.seed, log)
        else:
            texts = read_texts(text_files(args.text), args.seed) if args.text else library_texts(args.seed)
            docs, digest = documents(texts, tokenizer, num_tokens, args.context)
        if args.long_text:  # behind the others: what is held out, and whose gradients are taken, stays theirs
            more, other = long_documents(args, tokenizer)
            log(f"text: {len(more)} long documents give {sum(map(len, more)):,} tokens")
            docs, digest = docs + more, sha256((digest + other).encode()).hexdigest()
        curve_tokens = args.curve_tokens or CURVE_TOKENS
        curve_kinds = curve_documents(args, tokenizer, curve_tokens) if args.curve_text else None
        pack = calibrate(
            target,
            draft,
            docs,
            curve_kinds=curve_kinds,
            curve_tokens=curve_tokens,
            **parts,
            options=options,
            fingerprints=prints | {"text": digest},
            log=log,
        )
    pack.save(args.out)
    CodecPack.load(args.out).check(prints)
    return {
        "pair": args.pair,
        "target": str(target_dir.name),
        "device": device,
        "pack_bytes": os.path.getsize(args.out),
        "target_bytes": bf16_bytes(target),
        "seconds": round(time.monotonic() - started, 1),
        "digest": pack.digest,
        **pack.figures,
    }


def described(figures: dict, path: str) -> str:
    """A pack's figures as text; what its calibration did not state is left out."""
    lines = [f"{path}: {figures['pack_bytes'] / 1e6:.1f} MB"]
    if "target_bytes" in figures:
        lines[0] += (
            f" ({figures['pack_bytes'] / figures['target_bytes']:.1%} of the target), {figures['tokens']:,} tokens, {figures['seconds']} s"
        )
    if "r2_k" in figures:
        lines.append(f"held-out R2: keys {figures['r2_k']:.3f}, values {figures['r2_v']:.3f} ({figures['predictor']} predictor)")
    if restore := figures.get("restore"):
        parts = ", ".join(f"{name} {restore[name + '_flops'] / 1e6:.1f}" for name in ("draft", "target", "predictor", "transform"))
        lines.append(
            f"restore: {restore['restore_flops'] / 1e6:.1f} MFLOP a token ({parts}), {restore['share_of_prefill']:.0%} of the target's prefill "
            f"({restore['prefill_flops'] / 1e6:.1f} MFLOP), attention left out"
        )
    for quality, bits in figures.get("ideal_bits_per_element", {}).items():
        lines.append(
            f"{quality:14s} {bits:.4f} ideal bits per element ({16 / bits:.0f}x), {figures['components_by_quality'][quality]} components"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = arguments(argv)
        figures = run(args) | {"command": command_line("calibrate.py", argv), "versions": versions()}
    except ForetoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json_out:
        Path(args.json_out).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(figures))
        return 0
    print(described(figures, args.show or args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
