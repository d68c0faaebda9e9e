"""The command line of `python -m engine.generate`."""

from __future__ import annotations

import argparse
import os
import select
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from codec.container import FILE_MAGIC
from engine.cli.terminal import ReaderGone, print_status, signals_seen, stream_text
from engine.errors import BadSessionFile, Corrupted, EmptyPrompt, ForetoldError, InvalidOption
from engine.hub.pairs import PAIRS
from engine.inputs import open_regular, shown
from engine.kv.formats import KV_CACHE_DTYPES, PLAIN
from engine.model.device import QUANTIZED, WEIGHTS
from engine.runtime.sampling import SamplingParams
from engine.runtime.sampling_defaults import SamplingDefaults
from engine.sessions.session import DEFAULT_QUALITY, SESSION_QUALITIES
from engine.store.prefix_cache import DEFAULT_NAMESPACE
from engine.store.store import DEFAULT_LIMIT_BYTES, RunStore, byte_count
from engine.text.prompts import prompt_text

DEFAULT_PAIR = "smollm2"
MAX_PROMPT_BYTES = 64 << 20
PIPE_WAIT_S = 2.0


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are ours to report: one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        raise InvalidOption(message, "see --help")

    def print_help(self, file: Any = None) -> None:
        """The options, on standard output. Raises OutputLost, ReaderGone, where argparse says nothing of a full device."""
        if file is None:
            stream_text(self.format_help())
        else:
            super().print_help(file)


def parser() -> argparse.ArgumentParser:
    """All options; what they mean together is checked by `checked`."""
    p = Parser(
        prog="python -m engine.generate", description="Generate text with speculative decoding; keep the conversation as a coded residual."
    )
    p.add_argument("prompt", nargs="?", help="the prompt (or --prompt-file, or standard input)")
    p.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file that holds the prompt")
    p.add_argument("--version", action="store_true", help="print the versions that figures depend on, and leave")
    model_options(p)
    text = p.add_argument_group("text")
    text.add_argument("--raw", action="store_true", help="take the prompt as it is, without the chat template")
    text.add_argument("--chat", action="store_true", help="several turns, read from the terminal")
    text.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most so many; default 256")
    text.add_argument("--system", metavar="TEXT", help="the system message of a new conversation")
    text.add_argument("--prefill", metavar="TEXT", help="what every answer begins with: given to the model, not printed again")
    text.add_argument(
        "--temperature", type=float, help="0 is greedy; this and what follows default to the model's generation_config.json, else greedy"
    )
    text.add_argument("--top-k", type=int, metavar="K", help="sample from the K most probable tokens; 0: from all")
    text.add_argument("--top-p", type=float, metavar="P", help="sample from the fewest tokens that hold this probability; 1: from all")
    text.add_argument("--min-p", type=float, metavar="P", help="drop tokens less probable than P times the best; 0: none")
    text.add_argument("--repetition-penalty", type=float, metavar="R", help="divides the logits of tokens seen; 1: none")
    text.add_argument(
        "--frequency-penalty", type=float, default=0.0, metavar="F", help="off a logit for each time its token came; default 0"
    )
    text.add_argument("--presence-penalty", type=float, default=0.0, metavar="F", help="off a logit once its token came; default 0")
    text.add_argument("--seed", type=int, help="repeats a sampled text; default: another text every time")
    text.add_argument("--stop", action="append", default=[], metavar="STR", help="end the text before this string; may be repeated")
    text.add_argument("--draft-length", default="auto", metavar="N|auto", help="tokens drafted a step; 0: no speculation")
    text.add_argument(
        "--deterministic", action="store_true", help="shape-stable arithmetic: greedy text is the same with and without speculation"
    )
    kept = p.add_argument_group("session")
    kept.add_argument("--session", type=Path, metavar="FILE", help="resume from it if it exists, suspend into it at the end")
    store_options(kept, "text seen before, by whatever process, is not computed again: its KV is kept here, coded, behind the answer")
    kept.add_argument("--namespace", metavar="NAME", help=f"whose prefixes of the store are seen; default {DEFAULT_NAMESPACE}")
    kept.add_argument("--quality", help=f"{', '.join(SESSION_QUALITIES)}; default: the file's own, {DEFAULT_QUALITY} for a new one")
    kept.add_argument("--pack", type=Path, metavar="FILE", help="codec pack; default: the pair's own, fitted at first use")
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line instead of streaming the text")
    p.add_argument("--json-out", type=Path, metavar="FILE", help="write that object to a file")
    return p


def _named_folder(text: str) -> Path:
    """A folder's name; an empty one, as of a variable that is not set, would be the working folder's. Raises InvalidOption."""
    if not text:
        raise InvalidOption("--store is empty", "name a folder, or leave it out")
    return Path(text)


def store_options(p: argparse._ActionsContainer, what: str) -> None:
    """Options that name a store; `engine.cli.command.load` reads them."""
    p.add_argument("--store", type=_named_folder, metavar="DIR", help=what)
    p.add_argument("--store-bytes", metavar="N", help="what the store may take on disk; K, M, G and T are powers of 1,024; default 8G")
    p.add_argument(
        "--store-memory", metavar="N", help="of it, bytes of coded KV that stay in host memory, so that no file is read; default none"
    )


def check_store(args: argparse.Namespace) -> None:
    """Refuse a folder that is no store, or cannot be one, before models are loaded. Raises InvalidOption, BadStore, CacheNotWritable, DiskFull."""
    for option in ("store_bytes", "store_memory", "namespace"):
        if args.store is None and getattr(args, option, None) is not None:
            raise InvalidOption(f"--{option.replace('_', '-')} only matters to a store", "add --store DIR")
    args.store_bytes = DEFAULT_LIMIT_BYTES if args.store_bytes is None else byte_count(args.store_bytes)
    args.store_memory = 0 if args.store_memory is None else byte_count(args.store_memory)
    if args.store is not None:
        RunStore(args.store, args.store_bytes).close()


def model_options(p: argparse.ArgumentParser) -> None:
    """Options that name models, and how they are held; `engine.cli.command.load` reads them."""
    models = p.add_argument_group("models")
    models.add_argument("--pair", help=f"{' or '.join(PAIRS)}; default {DEFAULT_PAIR}; fetched at first use")
    models.add_argument(
        "--target",
        metavar="DIR|FILE.gguf|HUB_ID",
        help="another model than a pair's: a folder, a GGUF file, or a name on the hub: owner/name, owner/name:file.gguf",
    )
    models.add_argument(
        "--draft",
        metavar="DIR|FILE.gguf|HUB_ID|trunk|ngram|none",
        help="a small model, named as a target, a folder made by scripts/train_draft.py, trunk (the trained "
        "draft that ships for the target, else the target's first layers), ngram (the text itself); default: the pair's own; none with --target",
    )
    models.add_argument("--device", default="auto", help="auto, cpu or cuda")
    models.add_argument(
        "--devices",
        metavar="D,D",
        help="spread the target's layers over these, cuda:0,cuda:1 say; default: over all GPUs where it is larger than one",
    )
    models.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    models.add_argument(
        "--weights",
        default=WEIGHTS[0],
        choices=WEIGHTS,
        help=f"{QUANTIZED}: those of a --target FILE.gguf stay in 4 or 8 bits in memory, on a CPU; auto: in the --dtype",
    )
    models.add_argument(
        "--kv-cache-dtype",
        dest="kv_cache_dtype",
        default=PLAIN,
        choices=KV_CACHE_DTYPES,
        help="format of the target's KV being attended; a draft model's stays bf16",
    )
    models.add_argument("--hot", dest="kv_cache_dtype", default=argparse.SUPPRESS, choices=KV_CACHE_DTYPES, help=argparse.SUPPRESS)
    models.add_argument(
        "--gpu-memory-utilization",
        type=float,
        metavar="SHARE",
        help="of the GPU's memory, all programs and the weights included; the KV pools get what is left of it; default 0.9",
    )
    models.add_argument("--threads", type=int, metavar="N", help="threads of the CPU's arithmetic; default: torch's own choice")


def check_models(args: argparse.Namespace) -> None:
    """Refuse what `model_options` cannot mean together, before anything is loaded. Raises InvalidOption."""
    if args.threads is not None and not 1 <= args.threads <= 1024:
        raise InvalidOption(f"--threads cannot be {args.threads}", "give a whole number from 1 to 1,024")
    for name in ("pair", "target", "draft"):
        if getattr(args, name) == "":
            raise InvalidOption(f"--{name} is empty", "name a model, or leave it out")
    if args.pair and args.target:
        raise InvalidOption("--pair and --target exclude each other", "give one of them")


def checked(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check options before anything is loaded. Raises InvalidOption."""
    args = parser().parse_args(argv)
    if args.version:
        return args
    check_models(args)
    if args.raw and (args.system is not None or args.prefill is not None):
        raise InvalidOption(f"--raw does not go with {'--prefill' if args.system is None else '--system'}", "write it into the prompt")
    if args.prompt is not None and args.prompt_file is not None:
        raise InvalidOption("there are two prompts", "give either the prompt or --prompt-file")
    unfit = {"--raw": args.raw, "--json": args.json, "--json-out": args.json_out}
    if args.chat and any(unfit.values()):
        raise InvalidOption(f"--chat does not go with {next(name for name, value in unfit.items() if value)}", "leave one of them out")
    if args.quality is not None and args.quality not in SESSION_QUALITIES:
        raise InvalidOption(f"unknown quality {args.quality!r}", f"choose one of {', '.join(SESSION_QUALITIES)}")
    if args.session is None and args.store is None and (args.pack is not None or args.quality is not None):
        raise InvalidOption(
            f"{'--pack' if args.pack else '--quality'} only matters to a session or a store", "add --session FILE or --store DIR"
        )
    for name, file in (("--session", args.session), ("--json-out", args.json_out)):
        if file is None:
            continue
        if not _writable(file):  # not after minutes of work
            raise InvalidOption(
                f"{name} cannot be written to {shown(str(file), 200)}", "name a file in a folder that exists and may be written to"
            )
    if args.session is not None and args.json_out is not None and os.path.realpath(args.session) == os.path.realpath(args.json_out):
        raise InvalidOption("--session and --json-out name one file", "give each its own")
    if args.session is not None and args.session.exists():
        _check_head(args.session)
    args.params = sampling_params(args)
    check_store(args)
    return args


def _writable(file: Path) -> bool:
    """Whether a file may be written there: no folder, no name that the system refuses, in a folder that takes files."""
    try:
        target = Path(os.path.realpath(file))
        # what is still a link leads in a circle
        return (
            not target.is_dir()
            and not target.is_symlink()
            and (target.exists() or target.parent.is_dir())
            and os.access(target.parent, os.W_OK)
        )
    except (OSError, ValueError):
        return False


def _check_head(file: Path) -> None:
    """Refuse what cannot be a session by its kind and first bytes, before models are loaded. Raises BadSessionFile."""
    with open_regular(file, BadSessionFile, "name a session file, or a new one") as opened:
        head = opened.read(len(FILE_MAGIC))
    if head != FILE_MAGIC[: len(head)] or not head:
        raise Corrupted(f"session file {shown(str(file), 200)}: this is not a Foretold file", "check the path")


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a model's generation_config.json has defaults of; None where not given."""
    return {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}


def sampling_params(args: argparse.Namespace, defaults: SamplingDefaults | None = None) -> SamplingParams:
    """The options as sampling parameters, over a model's defaults. Raises InvalidOption."""
    length: int | Literal["auto"] = "auto"
    if args.draft_length != "auto":
        try:
            length = int(args.draft_length)
        except ValueError:
            raise InvalidOption(f"--draft-length cannot be {args.draft_length!r}", "give a whole number or auto") from None
    options = dict(
        max_new_tokens=args.max_new_tokens,
        frequency_penalty=args.frequency_penalty,
        presence_penalty=args.presence_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
        draft_length=length,
    )
    return (defaults or SamplingDefaults()).params(given_sampling(args) | options)


def given_prompt(args: argparse.Namespace) -> str | None:
    """The prompt from the command line or a file, None when there is neither. Raises InvalidOption."""
    if args.prompt_file is None:
        return None if args.prompt is None else prompt_text(args.prompt, "the prompt")
    try:
        with open(args.prompt_file, "rb", opener=_open_written) as file:  # a pipe as well, as shells pass what a command writes
            content = file.read(MAX_PROMPT_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InvalidOption(f"the prompt file {args.prompt_file} cannot be read: {error}", "give a UTF-8 text file") from error
    if len(content) > MAX_PROMPT_BYTES:
        raise InvalidOption(f"the prompt file {args.prompt_file} has more than {MAX_PROMPT_BYTES:,} bytes", "give a shorter text")
    return prompt_text(content, f"the prompt file {args.prompt_file} cannot be read: it")


def _open_written(path: str, flags: int) -> int:
    """`os.open` of a file, or of a pipe that somebody writes to within PIPE_WAIT_S: opening one that nobody does would last for ever."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN)
        if not waiting.poll(1000 * PIPE_WAIT_S):  # a writer that is there, or was, is an event
            os.close(descriptor)
            raise OSError(f"it is a pipe that nobody has written to for {PIPE_WAIT_S:.0f} s")
    os.set_blocking(descriptor, True)
    return descriptor


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt from the command line, a file or standard input. Raises EmptyPrompt, InvalidOption."""
    text = given_prompt(args)
    if text is None:
        text = "" if sys.stdin.isatty() else read_input(sys.stdin.read)
    elif (piped := read_beside()).strip():
        text = f"{text}\n\n{piped}"
    if not (text if args.raw else text.strip()):
        raise EmptyPrompt("there is no prompt", "give it as an argument, with --prompt-file, or on standard input")
    return text


def read_beside() -> str:
    """What a pipe or a file on standard input adds to a prompt that was given. A pipe that says nothing for PIPE_WAIT_S is left alone, as it may be
    one that nobody writes to. Raises InvalidOption."""
    try:
        number = sys.stdin.fileno()
        mode = os.fstat(number).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
            return ""
        if not select.select([number], [], [], PIPE_WAIT_S)[0]:
            print_status(f"[standard input is a pipe that has said nothing for {PIPE_WAIT_S:.0f} s: it is not read]")
            return ""
    except (OSError, ValueError):  # no file behind it
        return ""
    return read_input(sys.stdin.read)


def read_input(read: Callable[[], str]) -> str:
    """What `read` takes from standard input. Raises InvalidOption when that is no text, and EOFError as `input` does."""
    try:
        with signals_seen():
            return prompt_text(read(), "standard input")
    except UnicodeDecodeError as error:
        raise InvalidOption(f"standard input is not text: {error}", "give UTF-8") from error


def report(error: ForetoldError) -> int:
    """One line on standard error and the exit status of a user's mistake; no line for a reader that has left."""
    if isinstance(error, ReaderGone):
        return error.status
    print_status(f"error: {error}")
    return 2
