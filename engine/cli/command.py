"""What `python -m engine.generate` does once its options are read."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from engine.cli.options import DEFAULT_PAIR, checked, given_prompt, read_input, read_prompt, report
from engine.engine import Engine
from engine.errors import CacheNotWritable, ForetoldError
from engine.kv.formats import PLAIN
from engine.runtime.request import GenerationResult
from engine.sessions.session import Session


def run(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 for a user's mistake, 130 when interrupted, 141 when nobody reads the output any more."""
    try:
        args = checked(argv)
        prompt = given_prompt(args) if args.chat else read_prompt(args)
        quiet_libraries()
        engine = load(args, hot=args.hot, deterministic=args.deterministic)
        say(memory_line(engine))
        with open_session(engine, args) as session:
            if args.chat:
                talk(session, prompt, args)
            else:
                assert prompt is not None
                one_turn(session, prompt, args)
        return 0
    except ForetoldError as error:
        return report(error)
    except KeyboardInterrupt:
        say("\ninterrupted")
        return 130
    except BrokenPipeError:
        # or the interpreter would try to flush once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def load(args: argparse.Namespace, **options: Any) -> Engine:
    """The engine that --pair, or --target and --draft, name, on the --device and in the --dtype. Raises the errors of `Engine.from_pretrained`."""
    options |= {"device": args.device, "dtype": args.dtype}
    if args.target:
        return Engine.from_pretrained(args.target, args.draft or "none", **options)
    return Engine.from_pair(args.pair or DEFAULT_PAIR, draft=args.draft, **options)


def open_session(engine: Engine, args: argparse.Namespace) -> Session:
    """The session of the options: resumed when its file exists, new otherwise; one that is never suspended when there is no file."""
    if args.session is None:
        return engine.session(quality="tokens", log=say)
    exists = args.session.exists()
    session = engine.session(args.session if exists else None, quality=args.quality, pack=args.pack, log=say)
    if session.resumed is not None:
        r = session.resumed
        how = (
            f"draft {r.draft_s:.2f} s, decoding {r.decode_s:.2f} s" if r.restore == "decode" else "to be recomputed from their ids, exactly"
        )
        say(f"resumed {len(session.token_ids)} tokens from {args.session} in {r.total_s:.2f} s ({how}){because(r.reason)}")
    return session


def one_turn(session: Session, prompt: str, args: argparse.Namespace) -> None:
    """One prompt, one answer, then the figures."""
    on_text = None if args.json else show
    result = session.generate(prompt, args.params, on_text) if args.raw else session.chat(prompt, args.params, on_text)
    if not args.json:
        print(flush=True)
    keep(session, args)
    say(summary(result))
    if args.json_out:
        try:
            args.json_out.write_text(json.dumps(as_json(session, result)) + "\n", encoding="utf-8")
        except OSError as error:
            raise CacheNotWritable(f"{args.json_out} cannot be written: {error.strerror or error}", "choose another path") from error
    if args.json:
        print(json.dumps(as_json(session, result)), flush=True)


def talk(session: Session, first: str | None, args: argparse.Namespace) -> None:
    """Several turns from the terminal (or piped lines), until the input ends. Ctrl-C ends an answer, which stays as far as it went; at the prompt it
    leaves. Whatever ends the conversation, it is kept."""
    terminal = sys.stdin.isatty()
    if terminal:
        say("type a message; Ctrl-C ends an answer; an empty line, end of input or Ctrl-C leaves")
    try:
        while message := first or next_message(terminal):
            first = None
            try:
                result = session.chat(message, args.params, show)
                print(flush=True)
                say(summary(result))
            except KeyboardInterrupt:
                if not terminal:
                    raise
                print(flush=True)
                say("[interrupted]")
    except KeyboardInterrupt:
        if not terminal:
            raise
        say("")
    except ForetoldError:
        keep(session, args)
        raise
    keep(session, args)


def next_message(terminal: bool) -> str:
    """The next line of input, empty at its end."""
    if terminal:
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        return read_input(input).strip()
    except EOFError:
        if terminal:
            say("")
        return ""


def keep(session: Session, args: argparse.Namespace) -> None:
    """Suspend into the session's file, if there is one."""
    if args.session is None or not session.token_ids:
        return
    r = session.suspend(args.session)
    ratio = r.raw_bytes / r.stored_bytes if r.stored_bytes else 0.0
    say(
        f"suspended {r.tokens} tokens to {args.session}: {r.stored_bytes:,} bytes, {ratio:.0f} times less than {r.raw_bytes:,} in bf16 "
        f"({r.bits_per_element:.3f} bits an element, {r.quality}, {r.seconds:.2f} s){because(r.reason)}"
    )


def because(reason: str | None) -> str:
    """Why a session is restored as it is, to be put behind what was done."""
    return "" if reason is None else f"; {reason}"


def as_json(session: Session, result: GenerationResult) -> dict[str, Any]:
    """The object of CONTRACTS: the result with the session's KV figures and what the run ran on."""
    core = session.core
    codec = core.session_codec
    return result.as_dict() | {
        "kv": session.kv_figures,
        "memory": {**core.memory(), "pack_bytes": codec.pack.nbytes if codec else 0},
        "pair": core.config.pair or str(core.config.target_dir),
        "device": str(core.device),
        "dtype": str(core.dtype).removeprefix("torch."),
        "hot": core.config.kv_cache_dtype,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions that a figure depends on."""
    found = {"python": platform.python_version()}
    for name in ("foretold", "torch", "transformers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def summary(result: GenerationResult) -> str:
    """One line of figures."""
    s = result.speculation
    drafts = (
        f", {s.drafter}: {s.acceptance_rate:.0%} of {s.proposed} drafts accepted, {s.tokens_per_step:.2f} tokens a step"
        if s.proposed
        else ""
    )
    return (
        f"[{result.new_tokens} tokens at {result.tokens_per_s:.1f} tokens/s, first after {result.ttft_s:.2f} s; prompt {result.prompt_tokens} tokens, "
        f"{result.reused_tokens} reused{drafts}; {result.finish_reason}]"
    )


def memory_line(engine: Engine) -> str:
    """What the models and pools take, said before the first token."""
    m = {name: size / 2**20 for name, size in engine.memory().items()}
    config = engine.core.config
    hot = "" if config.kv_cache_dtype == PLAIN else f", {config.kv_cache_dtype}"
    return (
        f"[{config.pair or config.target_dir}, {engine.device}, {str(engine.dtype).removeprefix('torch.')}: target {m['target_bytes']:.0f} MiB, "
        f"draft {m['draft_bytes']:.0f} MiB ({engine.drafter_name}), KV pools {m['pool_bytes']:.0f} MiB{hot}]"
    )


def quiet_libraries() -> None:
    """Progress bars and advice of libraries would run into the streamed text."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def show(text: str) -> None:
    """A piece of the answer, at once."""
    print(text, end="", flush=True)


def say(text: str) -> None:
    """Anything but the answer."""
    print(text, file=sys.stderr, flush=True)
