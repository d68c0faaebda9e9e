"""What perplexity hides: does a session answer the same after it was suspended as a coded residual and resumed?

Every method is asked the same questions by greedy decoding, after the text was coded and decoded from its bytes alone: in place, and one text and one
conversation of each run by way of a session file on disk. `untouched` keeps its cache, `prediction` stores token ids and no residual. Tasks (--tasks,
default all that have their input):
    planted       retrieval, copying and arithmetic planted in 2K to 8K tokens of text (eval/tasks.py), suspended before the question
    conversation  20 turns, suspended and resumed at every turn: accuracy, and agreement with the conversation that never was
    domains       bits per element, KL and top-1 agreement on folders of text, by the protocol of bench_codec (--domains NAME=DIR ...); `recomputed`
                  is what the target's own rounding does
    position      bits per element, and the divergence behind, against position in long texts, with the text's own NLL (--plot draws it): of --text, or
                  of each kind of --long NAME=DIR; --alone adds every quality without references inside a session
    long          only when named: several needles, chains of variables, most frequent entries, calls completed across files (eval/long_tasks.py)
    continuation  only when named: how many sessions go on greedily as if they had never been stored, of the built-in chat and code prompts and of
                  questions about the texts of --domains
--baselines codes the texts of planted and long by baselines, too (scripts/baselines, fitted on --baseline-text).

    python scripts/eval_sessions.py --pair qwen2.5-coder --pack qwen.pack --samples 32 --contexts 2048,4096,8192
        --domains prose=D/prose german=D/german logs=D/logs --json-out sessions.json --plot position.png

Rows are written as they are finished; the same command goes on where it was broken off, and --samples may be raised. Filler and long texts come
from --text (default: the interpreter's own library, which the default packs are calibrated on: give other text to be strict).

Texts of several kinds, without a network besides a package mirror: Debian packages hold them, scripts/eval/domain_texts.py makes folders of them.
    apt-get download bible-kjv bible-kjv-text debian-handbook fortunes-de debian-reference-de debian-reference-fr debian-reference-ja
    for f in *.deb; do dpkg -x "$f" texts; done
    python scripts/eval/domain_texts.py --debian texts --out D      # D/prose german french japanese logs json code
Logs come from a seeded generator, JSON and code from the interpreter: without --debian these three are made, on any machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from baselines import select_baselines
from bench.document import command_line
from bench.throughput_runs import KINDS
from codec.pack import CodecPack
from codec.spec import QUALITIES
from engine.calibrate.corpus import library_texts
from engine.cli.options import Parser
from engine.engine import Engine
from engine.errors import ForetoldError, InvalidOption
from engine.files import write_atomically
from engine.hub.pairs import PAIRS
from eval.codec_methods import RECOMPUTED, PairCodec
from eval.continuation import continuation_rows, continue_sessions
from eval.fitted_baselines import FittedBaselines
from eval.positions import ALONE, NLL, long_windows, measure_positions, plot_positions, position_rows
from eval.rows import Parts, rows_of
from eval.runs import LONG, Plan, Runner
from eval.suspend import PREDICTION, Suspender, step_name
from eval.tasks import VERSION
from eval.text import domain_rows, domain_windows, measure_domain, named_paths
from eval.text_tokens import digest, read_files, windows
from eval_report import print_report

TASKS = ("planted", "conversation", "domains", "position", "long", "continuation")
_NAMED_ONLY = ("long", "continuation")
_LIBRARY_TEXTS = 300
_CONTINUATION_CONTEXT = 768
_ROOM = 4096  # of pages that forks copy
_BASELINE_CONTEXT, _BASELINE_TOKENS = 1024, 131_072
_started = time.monotonic()


def log(message: str) -> None:
    print(f"[{time.monotonic() - _started:5.0f} s] {message}", file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--pair", help=f"one of {', '.join(PAIRS)}")
    which.add_argument("--target", help="folder or hub id of the target")
    parser.add_argument("--draft", help="folder or hub id of the draft, trunk, or none (default: the pair's own, trunk for --target)")
    parser.add_argument("--pack", help="codec pack (default: the pair's cached one, fitted at first use)")
    parser.add_argument("--tasks", help=f"comma-separated: {','.join(TASKS)}; default all, domains only with --domains")
    parser.add_argument(
        "--qualities",
        default=f"{','.join(QUALITIES)},{PREDICTION}",
        help="comma-separated qualities, klX (a promise of X nats), stepX, or prediction",
    )
    parser.add_argument("--samples", type=int, default=16, help="texts for each context; whole batches")
    parser.add_argument("--batch", type=int, help="texts answered together (default: 16 on a GPU, 4 on a CPU, at most --samples)")
    parser.add_argument("--contexts", default="2048,4096,8192", help="tokens of a text, with question and answer")
    parser.add_argument("--facts", type=int, default=8, help="retrieval questions a text, one in each stratum of depth")
    parser.add_argument("--identifiers", type=int, default=1, help="copying questions a text")
    parser.add_argument("--sums", type=int, default=2, help="arithmetic questions a text")
    parser.add_argument("--conversations", type=int, default=8, help="conversations, one batch")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--turn-tokens", type=int, default=100, help="tokens of text beside each fact told in a conversation")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE|DIR", help="filler and long texts")
    parser.add_argument("--domains", nargs="+", default=[], metavar="NAME=DIR")
    parser.add_argument(
        "--domain-packs",
        nargs="+",
        default=[],
        metavar="NAME=PACK",
        help="packs to compare on the domains (default: --pack alone, as `pack`)",
    )
    parser.add_argument("--domain-tokens", type=int, default=16_384, help="test tokens a domain")
    parser.add_argument("--domain-context", type=int, default=1024)
    parser.add_argument("--position-context", type=int, default=8192)
    parser.add_argument("--position-texts", type=int, default=8)
    parser.add_argument("--long", nargs="+", default=[], metavar="NAME=DIR", help="kinds of long texts for the task position")
    parser.add_argument("--alone", action="store_true", help="position: also code every span without reference to earlier ones")
    parser.add_argument("--long-questions", type=int, default=2, help="questions a text of each of the long tasks")
    parser.add_argument(
        "--baselines", default="", help="comma-separated baselines for the tasks planted and long, such as kvtc-0.25bit,fp8"
    )
    parser.add_argument("--baseline-text", nargs="+", default=[], metavar="FILE|DIR", help="texts that these are fitted on")
    parser.add_argument("--continuation-prompts", type=int, default=4, help="prompts from each of --domains")
    parser.add_argument("--new-tokens", type=int, default=32, help="of a continuation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--json-out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="PNG of bits against position")
    parser.add_argument("--restart", action="store_true", help="forget what --json-out holds")
    return parser.parse_args(arguments)


def checked(options: argparse.Namespace) -> tuple[list[str], list[str], list[int], dict[str, str]]:
    """Tasks, qualities, contexts and domains of the options. Raises InvalidOption."""
    every = [t for t in TASKS if t not in _NAMED_ONLY and (t != "domains" or options.domains)]
    tasks = every if options.tasks is None else options.tasks.split(",")
    if unknown := [t for t in tasks if t not in TASKS]:
        raise InvalidOption(f"unknown task {unknown[0]!r}", f"choose from {', '.join(TASKS)}")
    if "domains" in tasks and not options.domains:
        raise InvalidOption("the task domains needs texts", "give --domains NAME=DIR ...")
    qualities = [q for q in dict.fromkeys(options.qualities.split(",")) if q]
    for quality in qualities:
        step_name(quality)
    try:
        contexts = [int(word) for word in options.contexts.split(",")]
    except ValueError as error:
        raise InvalidOption(f"--contexts {options.contexts}", "give whole numbers, such as 2048,4096") from error
    for name in (
        "samples",
        "conversations",
        "turns",
        "domain_tokens",
        "domain_context",
        "position_context",
        "position_texts",
        "new_tokens",
    ):
        if getattr(options, name) < 1:
            raise InvalidOption(f"--{name.replace('_', '-')} {getattr(options, name)}", "give a positive number")
    if options.baselines and not {"planted", "long"} & set(tasks):
        raise InvalidOption("--baselines answer the tasks planted and long", "name one of these in --tasks, or leave --baselines out")
    return tasks, qualities, contexts, named_paths("--domains", options.domains)


def load_parts(path: Path, settings: dict[str, Any], restart: bool) -> Parts:
    """What an earlier run with the same settings finished. InvalidOption when the file is of another run."""
    if restart or not path.exists():
        return {}
    try:
        document = json.loads(path.read_text())
        earlier, parts = document["settings"], document["parts"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidOption(f"{path} is not such an evaluation", "choose another --json-out, or --restart to overwrite it") from error
    if changed := [key for key in settings if settings[key] != earlier.get(key)]:
        raise InvalidOption(
            f"{path} holds rows of other settings ({', '.join(changed)})", "choose another --json-out, or --restart to overwrite it"
        )
    return parts


def open_engine(options: argparse.Namespace, pool_tokens: int) -> Engine:
    """The engine of --pair, or of --target and --draft."""
    named = {"device": options.device, "dtype": options.dtype, "pool_tokens": pool_tokens}
    if options.pair:
        return Engine.from_pair(options.pair, draft=options.draft, **named)
    return Engine.from_pretrained(options.target, options.draft or "trunk", **named)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The evaluation: returns the document that it also wrote to --json-out."""
    tasks, qualities, contexts, domains = checked(options)
    on_gpu = options.device.startswith("cuda") or (options.device == "auto" and torch.cuda.is_available())
    batch = options.batch or min(16 if on_gpu else 4, options.samples)
    if batch < 1 or options.samples % batch:
        raise InvalidOption(f"{options.samples} samples in batches of {batch}", "give --samples as a multiple of --batch")
    talk = options.turns * (options.turn_tokens + 128)
    longest = max(*contexts, talk, options.position_context, 512)
    asked = max(options.facts + options.identifiers + options.sums, 4 * options.long_questions)
    planted = batch * (2 * max(contexts) + asked * 512)  # originals, restored copies, each question's own pages
    talking = options.conversations * talk * max(1, len(qualities))
    pages = {"planted": planted, "long": planted, "conversation": talking, "continuation": 32 * (_CONTINUATION_CONTEXT + 512)}
    engine = open_engine(options, max((pages[task] for task in tasks if task in pages), default=0) + 2 * longest + _ROOM)
    suspender = Suspender(engine.core, options.pack, log)
    texts = list(read_files(options.text).values()) if options.text else list(itertools.islice(library_texts(options.seed), _LIBRARY_TEXTS))
    plan = Plan(
        tuple(qualities),
        texts,
        options.samples,
        batch,
        options.seed,
        options.facts,
        options.identifiers,
        options.sums,
        options.conversations,
        options.turns,
        options.turn_tokens,
        options.long_questions,
        tuple(select_baselines(options.baselines.split(","))) if options.baselines else (),
    )
    config, pack = engine.core.target.config, suspender.codec.pack
    full_dim = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    pair = options.pair or Path(options.target).name
    settings = {
        "tasks_version": VERSION,
        "pair": pair,
        "draft": engine.drafter_name,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "pack": pack.digest[:16],
        "batch": batch,
        "seed": plan.seed,
        "facts": plan.facts,
        "identifiers": plan.identifiers,
        "sums": plan.sums,
        "conversations": plan.conversations,
        "turns": plan.turns,
        "turn_tokens": plan.turn_tokens,
        "domain_context": options.domain_context,
        "position_context": options.position_context,
        "long_questions": plan.long_questions,
        "text": sha256("\0".join(texts).encode()).hexdigest()[:16],
    }
    parts = load_parts(options.json_out, settings, options.restart)
    document: dict[str, Any] = {
        "pair": pair,
        "device": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu",
        "command": command_line("eval_sessions.py", None),
        "settings": settings,
        "rows": [],
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy", "zstandard")},
        "parts": parts,
    }

    def save() -> None:
        document["rows"] = [
            *rows_of(parts, full_dim),
            *domain_rows(parts),
            *position_rows(parts, full_dim),
            *continuation_rows(parts, full_dim),
        ]
        write_atomically(options.json_out, json.dumps(document, indent=1) + "\n")

    log(f"{pair} on {document['device']}, draft {engine.drafter_name}, {', '.join(qualities)}; {len(parts)} parts kept")

    def encode(text: str) -> list[int]:
        return engine.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[misc]

    baselines = None
    if plan.baselines:
        known = [encode(text) for text in read_files(options.baseline_text).values()] if options.baseline_text else []
        baselines = FittedBaselines(engine.core, windows(known, _BASELINE_CONTEXT, _BASELINE_TOKENS // _BASELINE_CONTEXT))
    runner = Runner(engine, suspender, plan, parts, save, log, baselines)

    if "planted" in tasks:
        for context in contexts:
            runner.planted(context)
    if "long" in tasks:
        for context in contexts:
            runner.planted(context, LONG)
    if "conversation" in tasks:
        runner.conversations()
    if "domains" in tasks:
        packs = {name: CodecPack.load(path) for name, path in named_paths("--domain-packs", options.domain_packs).items()} or {"pack": pack}
        for label, one in packs.items():
            one.check({role: value for role, value in pack.fingerprints.items() if role in ("target", "draft", "tokenizer")})
            pair_codec = PairCodec(one, engine.core.target, engine.core.source)
            for name, folder in domains.items():
                sequences = domain_windows(folder, options.domain_context, options.domain_tokens, encode)
                run_domain(pair_codec, name, label, sequences, [*qualities, RECOMPUTED], parts, save)
    if "position" in tasks:
        kinds = {name: list(read_files([path]).values()) for name, path in named_paths("--long", options.long).items()} or {"text": texts}
        methods = [*qualities, *(quality + ALONE for quality in qualities if options.alone)]
        for kind, own in kinds.items():
            sequences = long_windows(own, options.position_context, options.position_texts, encode)
            run_positions(suspender, kind, sequences, methods, parts, save)
    if "continuation" in tasks:
        run_continuations(engine, suspender, options, domains, qualities, parts, save)
    save()
    return document


def run_domain(
    pair_codec: PairCodec, name: str, label: str, sequences: list[list[int]], qualities: list[str], parts: Parts, save: Callable[[], None]
) -> None:
    """Measures what is missing of one domain with the pack called `label`."""
    prefix = f"domain/{name}/{digest(sequences)}/{label}/{pair_codec.pack.digest[:16]}"
    for stale in [key for key in parts if key.startswith(f"domain/{name}/") and key.split("/")[3] == label and not key.startswith(prefix)]:
        del parts[stale]
    missing = [q for q in qualities if f"{prefix}/{q}" not in parts]

    def done(quality: str, row: dict[str, Any]) -> None:
        parts[f"{prefix}/{quality}"] = row
        save()
        log(f"domain {name}, {label} {quality}: {row['bits_per_element']:.4f} bits, KL {row['kl']:.4f}, top-1 {row['top1_agreement']:.4f}")

    if missing:
        measure_domain(pair_codec, sequences, missing, done)


def run_continuations(
    engine: Engine,
    suspender: Suspender,
    options: argparse.Namespace,
    domains: dict[str, str],
    qualities: list[str],
    parts: Parts,
    save: Callable[[], None],
) -> None:
    """Measures what is missing of the groups of prompts: the built-in ones, and a question about a text of each domain."""
    groups = {f"{kind} prompts": [engine.encode([{"role": "user", "content": text}]) for text in texts] for kind, texts in KINDS.items()}
    for name, folder in domains.items():
        texts = list(read_files([folder]).values())[: options.continuation_prompts]
        cut = [engine.tokenizer.decode(encoded(engine, text)[:_CONTINUATION_CONTEXT]) for text in texts]  # type: ignore[union-attr]
        question = "Explain in detail what this is and how it works."
        groups[name] = [engine.encode([{"role": "user", "content": f"{text}\n\n{question}"}]) for text in cut]
    keys = {
        name: f"continuation/{name}/{digest_of(prompts)}/{options.new_tokens}/{','.join(qualities)}" for name, prompts in groups.items()
    }

    def done(name: str, part: dict[str, Any]) -> None:
        parts[keys[name]] = part
        save()
        alike = {m: sum(n == options.new_tokens for n in own["equal"]) for m, own in part["methods"].items()}
        log(f"continuation {name}, alike of {part['prompts']}: {alike}")

    missing = {name: prompts for name, prompts in groups.items() if keys[name] not in parts}
    continue_sessions(engine, suspender, missing, qualities, options.new_tokens, done)


def encoded(engine: Engine, text: str) -> list[int]:
    """Token ids of a text's beginning, at most four times what a continuation takes of it."""
    return engine.tokenizer(text[: 16 * _CONTINUATION_CONTEXT], add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[misc]


def digest_of(prompts: list[list[int]]) -> str:
    """Short SHA-256 of prompts of any lengths."""
    return sha256(repr(prompts).encode()).hexdigest()[:16]


def run_positions(suspender: Suspender, kind: str, sequences: list[list[int]], qualities: list[str], parts: Parts, save: Any) -> None:
    """Measures what is missing of the long texts of a kind."""
    for number, ids in enumerate(sequences):
        prefix = f"position/{kind}/{digest([ids])}"

        def done(quality: str, bins: list[dict[str, Any]], prefix: str = prefix) -> None:
            parts[f"{prefix}/{quality}"] = {"bins": bins}
            save()

        missing = [q for q in (NLL, *qualities) if f"{prefix}/{q}" not in parts]
        if missing:
            measure_positions(suspender, ids, missing, done)
            log(f"position, {kind}: text {number + 1} of {len(sequences)}")


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse(arguments)
        document = run(options)
        positions = [row for row in document["rows"] if row["task"] == "position" and row["nll"] is not None]
        if options.plot and positions:
            plot_positions(positions, f"{document['pair']}: size of the code against position", options.plot)
    except (ForetoldError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_report(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
