"""What `python -m engine.generate` does once its options are read."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from contextlib import nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from engine.cli.options import DEFAULT_PAIR, checked, given_prompt, given_sampling, read_input, read_prompt, report, sampling_params
from engine.cli.terminal import Ended, OutputLost, ending_signals, prepare_streams, print_status, stream_text, undisturbed
from engine.engine import Engine
from engine.errors import CacheNotWritable, ForetoldError
from engine.files import session_lock, write_atomically
from engine.hub.cache import CacheFolder
from engine.kv.formats import PLAIN
from engine.runtime.request import GenerationResult
from engine.sessions.session import Session
from engine.text.templates import start_worker


def run(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 for a named error, 130 when interrupted, 141 when nobody reads the output any more, 129 and 143 after SIGHUP and SIGTERM.

    Whatever ends the command, an answer that was begun is in the session's file (docs/command.md).
    """
    prepare_streams()
    try:
        args = checked(argv)
        if args.version:
            print_versions()
            return 0
        prompt = given_prompt(args) if args.chat else read_prompt(args)
        with nullcontext() if args.session is None else session_lock(args.session):
            return _run(args, prompt)
    except ForetoldError as error:
        return report(error)
    except KeyboardInterrupt:
        print_status("\ninterrupted")
        return 130
    except Ended as ended:
        return ended.status


def _run(args: argparse.Namespace, prompt: str | None) -> int:
    quiet_libraries()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if not args.raw:
        start_worker()  # beside the loading of the models
    engine = load(args, kv_cache_dtype=args.kv_cache_dtype, deterministic=args.deterministic)
    print_status(memory_line(engine))
    args.params = sampling_params(args, engine.core.sampling_defaults)
    if (taken := taken_settings(engine, args)) is not None:
        print_status(taken)
    with ending_signals(), open_session(engine, args) as session:
        if args.chat:
            repl(session, prompt, args)
            code_left(session, args)
            flush_store(session)
        else:
            assert prompt is not None
            one_turn(session, prompt, args)
    return 0


def load(args: argparse.Namespace, **options: Any) -> Engine:
    """The engine that --pair, or --target and --draft, name, on the --device and in the --dtype. Raises the errors of `Engine.from_pretrained`."""
    options |= {"device": args.device, "dtype": args.dtype}
    if getattr(args, "store", None) is not None:  # benchmarks have no such option
        options |= {"store": args.store, "store_bytes": args.store_bytes, "store_memory": args.store_memory, "log": print_status}
        options |= {name: value for name in ("namespace", "quality", "pack") if (value := getattr(args, name, None)) is not None}
    if (weights := getattr(args, "weights", None)) is not None:  # benchmarks have no such option
        options["weights"] = weights
    if (share := getattr(args, "gpu_memory_utilization", None)) is not None:
        options["gpu_memory_utilization"] = share
    if (devices := getattr(args, "devices", None)) is not None:
        options["devices"] = devices
    if args.target:
        return Engine.from_pretrained(args.target, args.draft or "none", **options)
    return Engine.from_pair(args.pair or DEFAULT_PAIR, draft=args.draft, **options)


def open_session(engine: Engine, args: argparse.Namespace) -> Session:
    """The session of the options: resumed when its file exists, new otherwise; one that is never suspended when there is no file."""
    if args.session is None:
        return engine.session(quality="tokens", log=print_status)
    exists = args.session.exists()
    session = engine.session(args.session if exists else None, quality=args.quality, pack=args.pack, log=print_status)
    if session.resumed is not None:
        r = session.resumed
        how = (
            f"draft {r.draft_s:.2f} s, decoding {r.decode_s:.2f} s" if r.restore == "decode" else "to be recomputed from their ids, exactly"
        )
        print_status(f"resumed {len(session.token_ids)} tokens from {args.session} in {r.total_s:.2f} s ({how}){because(r.reason)}")
    return session


def answer(session: Session, prompt: str, args: argparse.Namespace, *, stream: bool) -> GenerationResult:
    """One answer, in the session's file before anything else happens, be it broken off by whatever breaks it off; one that never began is not.

    stream: show its text as it comes, and a line break after it, before it is coded.
    """
    before = session.token_ids[:]
    started = saving = ended = False
    saved: str | None = None

    def piece(text: str) -> None:
        nonlocal started
        started = True
        if stream:
            stream_text(text)

    try:
        if args.raw:
            result = session.generate(prompt, args.params, piece)
        else:
            system = None if before else args.system
            result = session.chat(prompt, args.params, piece, system=system, prefill=args.prefill)
        if stream:  # the whole answer is shown before it is coded
            ended = True
            stream_text("\n")
        saving = True
        saved = save(session, args)
    except BaseException as error:
        refused = saving and isinstance(error, ForetoldError)  # by the disk: asking again does not help
        if not refused and started and session.token_ids != before:
            saved = save(session, args)
        if stream and not ended and (started or (args.chat and isinstance(error, KeyboardInterrupt))):
            with suppress(OutputLost):
                stream_text("\n")
        if saved is not None:
            print_status(saved)
        raise
    if saved is not None:
        print_status(saved)
    return result


def one_turn(session: Session, prompt: str, args: argparse.Namespace) -> None:
    """One prompt, one answer, then the figures."""
    result = answer(session, prompt, args, stream=not args.json)
    try:
        code_left(session, args)
        print_status(summary(result))
        flush_store(session)
    finally:  # the answer is there, whatever breaks that off
        if args.json_out:
            write_json(args.json_out, as_json(session, result))
        if args.json:
            stream_text(json.dumps(as_json(session, result)) + "\n")


def flush_store(session: Session) -> None:
    """Wait until the store, if there is one, has kept what was new, and say what it did."""
    store = session.core.prefix_store
    if store is None:
        return
    store.flush()
    r = store.report()
    restored = f"{r['hit_tokens']:,} tokens restored in {r['restore_s']:.2f} s" if r["hits"] else "nothing restored"
    print_status(
        f"[store {r['folder']}: {restored}; {r['kept_tokens']:,} kept, {r['kept_bytes']:,} bytes, in {r['keep_s']:.2f} s; "
        f"{r['bytes']:,} of {r['limit_bytes']:,} bytes in use]"
    )


def write_json(path: Path, document: dict[str, Any]) -> None:
    """The object as a file of one line; a pipe or a device is written to as it is. Raises CacheNotWritable."""
    text = json.dumps(document) + "\n"
    try:
        if path.exists() and not path.is_file():
            # a pipe that nobody reads is an error, and not waited for
            with open(
                path, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
            ) as device:
                device.write(text)
        else:
            write_atomically(path, text)
    except OSError as error:
        raise CacheNotWritable(f"{path} cannot be written: {error.strerror or error}", "choose another path") from error


def repl(session: Session, first: str | None, args: argparse.Namespace) -> None:
    """Several turns from the terminal (or piped lines, blank ones left out), until the input ends. Ctrl-C ends an answer, which stays as far as it
    went; at the prompt it leaves. Every answer is saved before the next message is read."""
    terminal = sys.stdin.isatty()
    if terminal:
        print_status("type a message; Ctrl-C ends an answer; an empty line, end of input or Ctrl-C leaves")
    try:
        while (message := first or next_message(terminal)) is not None:
            first = None
            try:
                print_status(summary(answer(session, message, args, stream=True)))
            except KeyboardInterrupt:
                if not terminal:
                    raise
                print_status("[interrupted]")
    except KeyboardInterrupt:
        if not terminal:
            raise
        print_status("")


def next_message(terminal: bool) -> str | None:
    """The next line of input that says something; None at the input's end, and for an empty line at a terminal."""
    while True:
        if terminal:
            with suppress(OSError, ValueError):
                print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = read_input(input).strip()
        except EOFError:
            if terminal:
                print_status("")
            return None
        if line:
            return line
        if terminal:
            return None


def save(session: Session, args: argparse.Namespace) -> str | None:
    """Suspend into the session's file, if there is one, with the codec parameters that are known; signals wait meanwhile. Returns what is to be said of
    it."""
    if args.session is None or not session.token_ids:
        return None
    with undisturbed():
        r = session.suspend(args.session, fit=False)
    ratio = r.raw_bytes / r.stored_bytes if r.stored_bytes else 0.0
    return (
        f"suspended {r.tokens} tokens to {args.session}: {r.stored_bytes:,} bytes, {ratio:.0f} times less than {r.raw_bytes:,} in bf16 "
        f"({r.bits_per_element:.3f} bits an element, {r.quality}, {r.seconds:.2f} s){because(r.reason)}"
        + ("" if r.reachable else f"; the model's own rounding loses KL {r.rounding_kl:.4f}, more than {r.quality} promises")
    )


def code_left(session: Session, args: argparse.Namespace) -> None:
    """Where the session's file holds ids alone, as no codec parameters are known yet: fit them, a minute that says what it does, and write the file
    again. Whatever breaks it off leaves the file as it is, and so does a cache folder that would not keep them for the next command."""
    if not session.unfitted:
        return
    if not CacheFolder("packs").keeps():
        print_status("the session stays as ids: codec parameters could not be kept for its next resume (set FORETOLD_HOME, or give --pack)")
        return
    session.fit_codec()
    if (saved := save(session, args)) is not None:
        print_status(saved)


def taken_settings(engine: Engine, args: argparse.Namespace) -> str | None:
    """What is taken of the model's generation_config.json, as no option says otherwise; None where nothing is."""
    taken = engine.core.sampling_defaults.values(given_sampling(args))
    greedy = "; --temperature 0 is greedy" if "temperature" in taken else ""
    return f"[generation_config.json: {', '.join(f'{name} {value:g}' for name, value in taken.items())}{greedy}]" if taken else None


def because(reason: str | None) -> str:
    """Why a session is restored as it is, to be put behind what was done."""
    return "" if reason is None else f"; {reason}"


def as_json(session: Session, result: GenerationResult) -> dict[str, Any]:
    """The object of docs/json.md: the result with the session's KV figures and what the run ran on."""
    core = session.core
    codec = core.session_codec
    return (
        result.as_dict()
        | {
            "kv": {**session.kv_figures, "reused_from": "coded" if result.restored_tokens else "hot" if result.reused_tokens else None},
            "memory": {**core.memory(), "pack_bytes": codec.pack.nbytes if codec else 0},
            "pair": core.config.pair or str(core.config.target_dir),
            "device": str(core.device),
            "dtype": str(core.dtype).removeprefix("torch."),
            "hot": core.config.kv_cache_dtype,
            "versions": versions(),
        }
        | ({} if core.prefix_store is None else {"store": core.prefix_store.report()})
    )


def print_versions() -> None:
    """What --version prints. Raises OutputLost, ReaderGone."""
    stream_text(", ".join(f"{name} {number}" for name, number in versions().items()) + "\n")


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
    kv_format = "" if config.kv_cache_dtype == PLAIN else f", {config.kv_cache_dtype}"
    shared_out = "".join(f"; GPU memory {plan}" for plan in engine.core.memory_plans)
    device_map = engine.core.target.device_map
    where = engine.device if device_map is None else device_map
    return (
        f"[{config.pair or config.target_dir}, {where}, {str(engine.dtype).removeprefix('torch.')}: target {m['target_bytes']:.0f} MiB, "
        f"draft {m['draft_bytes']:.0f} MiB ({engine.drafter_name}), KV pools {m['pool_bytes']:.0f} MiB{kv_format}{shared_out}]"
    )


def quiet_libraries() -> None:
    """Progress bars and advice of libraries would run into the streamed text. The libraries read these when they are imported, if they are."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
