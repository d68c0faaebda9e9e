"""Trains a draft head for a target: the target's first layers, a few trained ones and a head over the tokens it uses most.

    python scripts/train_draft.py --pair smollm2 --out draft/pretrained/smollm2-135m --minutes 25 --device cuda
    python scripts/train_draft.py --target DIR --out DIR --search "4,1,16384,tied 6,2,16384,own" --search-seconds 60

The data are conversations that the target writes with itself, half of them begun with a message of --prompts where these are given; with --data they
are kept in a folder and found there again. --minutes is for sampling and training together. A run stopped early (--pause-after, or a signal) goes on
with --resume from its --checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from engine.calibrate.corpus import text_files
from engine.errors import ForetoldError, InvalidOption
from engine.files import write_atomically
from engine.hub.pairs import PAIRS
from engine.hub.resolve import resolve_model, resolve_target
from engine.inputs import shown
from engine.model.decoder import Decoder
from engine.text.chat_opening import chat_opening
from engine.text.tokenizer import load_tokenizer
from engine.train.data import TrainingSets, add_text, choose_rows, draw_sets, read_messages, release
from engine.train.model_card import model_card
from engine.train.self_generated import SelfGenerationOptions
from engine.train.trainer import TrainOptions
from engine.train.training import Architecture, DraftHeadTraining, parse_exit, teacher_of

PAIR_LICENCES = {"smollm2": "Apache-2.0", "qwen2.5-coder": "Apache-2.0"}
SAMPLE_SHARE = 0.25  # of --minutes, where --sample-minutes is auto


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=sorted(PAIRS), help="a known pair's target")
    parser.add_argument("--target", help="model folder or hub id, instead of --pair")
    parser.add_argument("--out", required=True, help="folder of the draft head")
    parser.add_argument(
        "--exit-layer",
        default="6",
        help="first layers of the target that draft (default 6); last: none does, the draft layers go on from its last states (10+20+last: from "
        "those of several layers)",
    )
    parser.add_argument("--draft-layers", type=int, default=2, help="trained layers behind them (default 2)")
    parser.add_argument("--trunk-layers", dest="exit_layer", default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # earlier name
    parser.add_argument("--own-layers", type=int, dest="draft_layers", default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # earlier name
    parser.add_argument("--vocab", type=int, default=16_384, help="tokens of the reduced vocabulary (default 16384)")
    parser.add_argument("--head", choices=("own", "tied"), default="own", help="a trained head, or the target's rows")
    parser.add_argument("--bits", type=int, choices=(8, 16), default=8, help="of the stored matrices (default 8)")
    end = parser.add_argument_group("length")
    end.add_argument("--minutes", type=float, default=25.0, help="sampling and training together (default 25)")
    end.add_argument(
        "--sample-minutes", default="auto", help=f"of these, for sampling (auto: {SAMPLE_SHARE:.0%}%, nothing with found data)"
    )
    end.add_argument("--sample-tokens", type=int, help="draw this many tokens instead: reproducible")
    end.add_argument("--steps", type=int, help="train this many steps instead of by the clock: reproducible")
    end.add_argument("--pause-after", type=float, metavar="MINUTES", help="stop this call then, to be resumed")
    data = parser.add_argument_group("data")
    data.add_argument("--data", help="folder to keep what was drawn, and to find it in")
    data.add_argument("--text", nargs="+", help="files or folders of text to mix in")
    data.add_argument("--prompts", metavar="FILE", help="users' messages, one a line, for the target to answer; some are held out")
    data.add_argument("--other-prompts", metavar="FILE", help="messages of kinds that are never trained on: only measured")
    data.add_argument(
        "--prompt-share", type=float, default=SelfGenerationOptions.given_share, help="conversations that begin with one (default 0.5)"
    )
    data.add_argument(
        "--temperatures", default="0.6,1", metavar="LOW,HIGH", help="of the conversations, drawn evenly from these (default 0.6,1)"
    )
    data.add_argument("--text-share", type=float, default=0.2, help="their share of the tokens at most (default 0.2)")
    data.add_argument("--context", type=int, default=512, help="tokens of the longest conversation (default 512)")
    data.add_argument("--rows", type=int, help="conversations drawn at a time (default: what the memory allows)")
    data.add_argument("--held-out", type=int, help="held-out conversations of each kind, about (default 384 on a GPU, 8 on a CPU)")
    training = parser.add_argument_group("training")
    training.add_argument("--batch-tokens", type=int, default=TrainOptions.batch_tokens)
    training.add_argument("--optimizer", choices=("adamw", "muon"), default=TrainOptions.optimizer)
    training.add_argument("--learning-rate", type=float, default=TrainOptions.learning_rate)
    training.add_argument(
        "--mix",
        default=f"{TrainOptions.mix_from},{TrainOptions.mix_to}",
        metavar="FROM,TO",
        help="part of the training over which the loss goes from divergence to total variation (default 0.4,0.6)",
    )
    training.add_argument(
        "--unroll", type=int, default=TrainOptions.unroll, help="places of a block that are trained, with --exit-layer last (default 3)"
    )
    training.add_argument("--chunk", type=int, default=TrainOptions.chunk, help="positions whose logits are held at a time")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--start", metavar="DIR", help="a draft head of the same shape to begin with")
    training.add_argument("--checkpoint", help="file to save the state to, each minute and at the end")
    training.add_argument("--resume", action="store_true", help="go on from the checkpoint, if it is there")
    training.add_argument("--search", help='architectures to compare instead, as "m,n,vocab,head m,n,vocab,head"')
    training.add_argument("--search-seconds", type=float, default=60.0, help="training time of each (default 60)")
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--report-every", type=int, default=50, help="steps between lines of progress (default 50)")
    parser.add_argument("--licence", help="the target's licence, for the model card (known for --pair)")
    parser.add_argument("--json-out", metavar="FILE", help="write the figures and the learning curve")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the learning curve (needs matplotlib)")
    return parser.parse_args()


def log(line: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {line}", file=sys.stderr, flush=True)


STARTED = time.monotonic()


def command_of(args: argparse.Namespace) -> str:
    """The command without what only this machine knows: its folders and files."""
    left_out = {
        "out",
        "data",
        "json_out",
        "plot",
        "checkpoint",
        "resume",
        "pause_after",
        "device",
        "report_every",
        "licence",
        "text",
        "prompts",
        "other_prompts",
        "start",
    }
    defaults = vars(arguments_defaults())
    parts = []
    for name, value in vars(args).items():
        if name in left_out or value is None or value == defaults.get(name):
            continue
        parts.append(f"--{name.replace('_', '-')} {Path(value).name if name == 'target' else value}")
    return " ".join(
        [
            "python scripts/train_draft.py",
            *parts,
            "--out DIR",
            *(["--text DIR"] if args.text else []),
            *(["--prompts FILE"] if args.prompts else []),
            *(["--other-prompts FILE"] if args.other_prompts else []),
            *(["--start DIR"] if args.start else []),
        ]
    )


def arguments_defaults() -> argparse.Namespace:
    argv, sys.argv = sys.argv, [sys.argv[0], "--out", "DIR"]
    try:
        return arguments()
    finally:
        sys.argv = argv


def two_numbers(option: str, text: str, most: float) -> tuple[float, float]:
    """ "0.6,1" -> (0.6, 1.0). Raises InvalidOption for anything but two numbers from 0 to `most`, the lower one first."""
    try:
        low, high = (float(part) for part in text.split(","))
        fits = 0 <= low <= high <= most
    except ValueError:
        fits = False
    if not fits:
        raise InvalidOption(f"{option} cannot be {shown(text, 100)}", f"give two numbers from 0 to {most:g}, the lower one first: 0.6,1")
    return low, high


def prepare(args: argparse.Namespace, decoder: Decoder, tokenizer: Any) -> tuple[TrainingSets, tuple[int, ...]]:
    """The training and held-out sets, found or drawn, and the tokens every reduced vocabulary holds."""
    on_gpu = decoder.device.type == "cuda"
    if args.text:
        text_files(args.text)  # refused now, not after minutes of drawing
    chat = chat_opening(tokenizer, decoder.config.eos_token_ids)
    sets = TrainingSets.load(Path(args.data)) if args.data else None
    if args.data and sets is None:  # not after minutes of drawing
        try:
            Path(args.data).mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise InvalidOption(f"--data cannot be a folder at {shown(args.data, 200)}: {error}", "name a folder, or a new one") from error
    if sets is None:
        seconds = None
        if args.sample_tokens is None:
            seconds = 60 * (args.minutes * SAMPLE_SHARE if args.sample_minutes == "auto" else float(args.sample_minutes))
        held_out = args.held_out or (384 if on_gpu else 8)
        rows = args.rows or choose_rows(decoder, args.context)
        options = SelfGenerationOptions(
            rows, args.context, two_numbers("--temperatures", args.temperatures, 10.0), given_share=args.prompt_share, seed=args.seed
        )
        given, other = (read_messages(path, tokenizer) if path else () for path in (args.prompts, args.other_prompts))
        with torch.no_grad():
            sets = draw_sets(
                decoder, chat, options, given=given, other=other, held_out=held_out, tokens=args.sample_tokens, seconds=seconds, log=log
            )
        if args.data:
            sets.save(Path(args.data))
    else:
        log(f"found {len(sets.train):,} conversations in {args.data}")
    release(decoder.device)
    if args.text:
        sets = add_text(sets, args.text, tokenizer, args.text_share, args.context, args.seed)
    return sets, tuple(token for token in chat.special if token < decoder.config.vocab_size)


def train_options(args: argparse.Namespace, seconds: float | None) -> TrainOptions:
    mix_from, mix_to = two_numbers("--mix", args.mix, 1.0)
    if args.unroll < 1:
        raise InvalidOption(f"--unroll cannot be {args.unroll}", "give 1 or more")
    return TrainOptions(
        0,  # the architecture's, see DraftHeadTraining
        args.draft_layers,
        args.head,
        unroll=args.unroll,
        steps=args.steps,
        seconds=None if args.steps else seconds,
        batch_tokens=args.batch_tokens,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        mix_from=mix_from,
        mix_to=mix_to,
        chunk=args.chunk,
        seed=args.seed,
    )


def write_json(args: argparse.Namespace, document: dict[str, Any]) -> None:
    if args.json_out:
        write_atomically(args.json_out, json.dumps(document, indent=1) + "\n")


def search(args: argparse.Namespace, decoder: Decoder, sets: TrainingSets, special: tuple[int, ...], name: str) -> dict[str, Any]:
    """Short trainings over architectures on the same data."""
    document: dict[str, Any] = {"target": name, "command": command_of(args), "search": []}
    teacher = teacher_of(decoder)
    for text in args.search.split():
        training = DraftHeadTraining(
            decoder, teacher, sets, special, Architecture.parse(text, decoder.config.num_layers), train_options(args, args.search_seconds)
        )
        training.run(lambda line, text=text: log(f"{text}: {line}"), report_every=args.report_every)  # type: ignore[misc]
        row = training.figures() | {"curve": training.curve}
        document["search"].append(row)
        log(
            f"{text}: cost {row['draft_step_cost']:.3f}, acceptance {row['temperature_1']['acceptance']:.4f}, tokens a step "
            f"{row['temperature_1']['tokens_per_step']:.3f}, greedy {row['greedy']['tokens_per_step']:.3f}"
        )
        write_json(args, document)
        del training
        release(decoder.device)
    return document


def train(args: argparse.Namespace, decoder: Decoder, sets: TrainingSets, special: tuple[int, ...], name: str) -> dict[str, Any] | None:
    """One training; None when it was paused."""
    exit_layer, state_layers = parse_exit(args.exit_layer, decoder.config.num_layers)
    architecture = Architecture(exit_layer, args.draft_layers, args.vocab, args.head, state_layers)
    seconds = 60 * args.minutes - float(sets.train.facts.get("seconds", 0.0))
    if seconds <= 0 and not args.steps:
        raise InvalidOption(f"sampling took all of the {args.minutes:g} minutes", "give more --minutes")
    training = DraftHeadTraining(decoder, teacher_of(decoder), sets, special, architecture, train_options(args, seconds))
    checkpoint = Path(args.checkpoint) if args.checkpoint else None
    start = None
    if args.start:
        start = training.start_from(args.start)
        log(f"at the start: {json.dumps(start)}")
    pause = None if args.pause_after is None else 60 * args.pause_after - (time.monotonic() - STARTED)
    done = training.run(log, checkpoint=checkpoint, resume=args.resume, pause_after=pause, report_every=args.report_every)
    document: dict[str, Any] = {"target": name, "command": command_of(args), "done": done, "curve": training.curve}
    if start is not None:
        document["start"] = start
    if not done:
        write_json(args, document)
        return None
    figures = training.save(Path(args.out), name, args.bits, training.figures())
    document |= figures
    write_json(args, document)
    licence = args.licence or PAIR_LICENCES.get(args.pair or "", "see the target's own licence")
    Path(args.out, "README.md").write_text(model_card(name, licence, document["command"], document), encoding="utf-8")
    return document


def run(args: argparse.Namespace) -> int:
    if (args.pair is None) == (args.target is None):
        raise InvalidOption("either --pair or --target is needed, and not both", f"for example --pair {min(PAIRS)}")
    if args.pause_after is not None and not args.checkpoint:
        raise InvalidOption("a paused training needs a checkpoint", "name a file with --checkpoint")
    if args.search and (args.checkpoint or args.resume or args.pause_after is not None):
        raise InvalidOption("a search keeps no checkpoint", "leave out --checkpoint, --resume and --pause-after")
    parse_exit(args.exit_layer, 0)
    two_numbers("--mix", args.mix, 1.0)  # not after minutes of drawing
    if args.plot:
        import matplotlib  # noqa: F401 (missing: known now, not after the training)
    folder = resolve_target(args.pair) if args.pair else resolve_model(args.target)
    name = PAIRS[args.pair].target.name if args.pair else folder.name
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    chosen = {"auto": torch.bfloat16 if device.startswith("cuda") else torch.float32, "bfloat16": torch.bfloat16, "float32": torch.float32}
    decoder = Decoder.from_pretrained(folder, dtype=chosen[args.dtype], device=device)
    log(f"loaded {name} on {device}")
    sets, special = prepare(args, decoder, load_tokenizer(folder))
    document = (search if args.search else train)(args, decoder, sets, special, name)
    if document is None:
        log("paused; the same command with --resume goes on")
        return 0
    if args.plot:
        from train.plot import plot

        plot(document, args.plot)
    if not args.search:
        for group in document["stored"]:
            for weights, figures in ((f"{args.bits} bits", document["stored"][group]), ("as trained", document[group])):
                print(f"{group:19s} {weights:10s} {json.dumps(figures)}")
        size, cost = document["adapter_bytes"] / 2**20, document["draft_step_cost"]
        print(f"{args.out}: {size:.1f} MiB, a draft step reads {cost:.1%} of a target step's weights")
    return 0


def main() -> int:
    try:
        return run(arguments())
    except ForetoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
