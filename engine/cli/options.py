"""The command line of `python -m engine.generate`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NoReturn

from engine.errors import EmptyPrompt, ForetoldError, InvalidOption
from engine.hub.pairs import PAIRS
from engine.kv.formats import KV_CACHE_DTYPES, PLAIN
from engine.runtime.sampling import SamplingParams
from engine.sessions.session import DEFAULT_QUALITY, SESSION_QUALITIES
from engine.text.prompts import prompt_text

DEFAULT_PAIR = "smollm2"
MAX_PROMPT_BYTES = 64 << 20


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are ours to report: one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        raise InvalidOption(message, "see --help")


def parser() -> argparse.ArgumentParser:
    """All options; what they mean together is checked by `checked`."""
    p = Parser(
        prog="python -m engine.generate", description="Generate text with speculative decoding; keep the conversation as a coded residual."
    )
    p.add_argument("prompt", nargs="?", help="the prompt (or --prompt-file, or standard input)")
    p.add_argument("--prompt-file", type=Path, metavar="FILE")
    models = p.add_argument_group("models")
    models.add_argument("--pair", help=f"{' or '.join(PAIRS)}; default {DEFAULT_PAIR}; fetched at first use")
    models.add_argument("--target", metavar="DIR|HUB_ID")
    models.add_argument(
        "--draft",
        metavar="DIR|HUB_ID|trunk|none",
        help="a small model, a folder made by scripts/train_draft.py, trunk (the trained "
        "draft that ships for the target, else the target's first layers); default: the pair's own; none with --target",
    )
    models.add_argument("--device", default="auto", help="auto, cpu or cuda")
    models.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    models.add_argument(
        "--hot", default=PLAIN, choices=KV_CACHE_DTYPES, help="format of the target's KV being attended; a draft model's stays bf16"
    )
    text = p.add_argument_group("text")
    text.add_argument("--raw", action="store_true", help="take the prompt as it is, without the chat template")
    text.add_argument("--chat", action="store_true", help="several turns, read from the terminal")
    text.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    text.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    text.add_argument("--top-k", type=int, default=0, metavar="K")
    text.add_argument("--top-p", type=float, default=1.0, metavar="P")
    text.add_argument("--min-p", type=float, default=0.0, metavar="P")
    text.add_argument("--seed", type=int)
    text.add_argument("--stop", action="append", default=[], metavar="STR", help="end the text before this string; may be repeated")
    text.add_argument("--draft-length", default="auto", metavar="N|auto", help="tokens drafted a step; 0: no speculation")
    text.add_argument(
        "--deterministic", action="store_true", help="shape-stable arithmetic: greedy text is the same with and without speculation"
    )
    kept = p.add_argument_group("session")
    kept.add_argument("--session", type=Path, metavar="FILE", help="resume from it if it exists, suspend into it at the end")
    kept.add_argument("--quality", help=f"{', '.join(SESSION_QUALITIES)}; default: the file's own, {DEFAULT_QUALITY} for a new one")
    kept.add_argument("--pack", type=Path, metavar="FILE", help="codec pack; default: the pair's own, fitted at first use")
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line instead of streaming the text")
    p.add_argument("--json-out", type=Path, metavar="FILE", help="write that object to a file")
    return p


def checked(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check options before anything is loaded. Raises InvalidOption."""
    args = parser().parse_args(argv)
    if args.pair and args.target:
        raise InvalidOption("--pair and --target exclude each other", "give one of them")
    if args.prompt is not None and args.prompt_file is not None:
        raise InvalidOption("there are two prompts", "give either the prompt or --prompt-file")
    unfit = {"--raw": args.raw, "--json": args.json, "--json-out": args.json_out}
    if args.chat and any(unfit.values()):
        raise InvalidOption(f"--chat does not go with {next(name for name, value in unfit.items() if value)}", "leave one of them out")
    if args.quality is not None and args.quality not in SESSION_QUALITIES:
        raise InvalidOption(f"unknown quality {args.quality!r}", f"choose one of {', '.join(SESSION_QUALITIES)}")
    if args.session is None and (args.pack is not None or args.quality is not None):
        raise InvalidOption(f"{'--pack' if args.pack else '--quality'} only matters to a session", "add --session FILE")
    for name, file in (("--session", args.session), ("--json-out", args.json_out)):
        if file is None:
            continue
        folder = file.absolute().parent
        if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):  # not after minutes of work
            raise InvalidOption(f"{name} cannot be written to {str(file)!r}", "name a file in a folder that exists and may be written to")
    args.params = sampling_params(args)
    return args


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The options as sampling parameters. Raises InvalidOption."""
    length: int | Literal["auto"] = "auto"
    if args.draft_length != "auto":
        try:
            length = int(args.draft_length)
        except ValueError:
            raise InvalidOption(f"--draft-length cannot be {args.draft_length!r}", "give a whole number or auto") from None
    return SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        stop=tuple(args.stop),
        draft_length=length,
    )


def given_prompt(args: argparse.Namespace) -> str | None:
    """The prompt from the command line or a file, None when there is neither. Raises InvalidOption."""
    if args.prompt_file is None:
        return None if args.prompt is None else prompt_text(args.prompt, "the prompt")
    try:
        with args.prompt_file.open("rb") as file:  # a pipe as well, as shells pass what a command writes
            content = file.read(MAX_PROMPT_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InvalidOption(f"the prompt file {args.prompt_file} cannot be read: {error}", "give a UTF-8 text file") from error
    if len(content) > MAX_PROMPT_BYTES:
        raise InvalidOption(f"the prompt file {args.prompt_file} has more than {MAX_PROMPT_BYTES:,} bytes", "give a shorter text")
    return prompt_text(content, f"the prompt file {args.prompt_file} cannot be read: it")


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt from the command line, a file or standard input. Raises EmptyPrompt, InvalidOption."""
    text = given_prompt(args)
    if text is None:
        text = "" if sys.stdin.isatty() else read_input(sys.stdin.read)
    if not text.strip():
        raise EmptyPrompt("there is no prompt", "give it as an argument, with --prompt-file, or on standard input")
    return text


def read_input(read: Callable[[], str]) -> str:
    """What `read` takes from standard input. Raises InvalidOption when that is no text, and EOFError as `input` does."""
    try:
        return prompt_text(read(), "standard input")
    except UnicodeDecodeError as error:
        raise InvalidOption(f"standard input is not text: {error}", "give UTF-8") from error


def report(error: ForetoldError) -> int:
    """One line on standard error; the exit status of a user's mistake."""
    print(f"error: {error}", file=sys.stderr)
    return 2
