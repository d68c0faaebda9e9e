"""Folders of texts of many kinds, sorted out of the files that a machine has: what codec.sh calibrates on and tests on, kept apart.

    PYTHONPATH=.:scripts python scripts/gpu/texts.py --from /usr SITE_PACKAGES --chat-pair smollm2 --out TEXTS

TEXTS/cal/KIND: std lib rst man yaml logs json chat, to calibrate on; TEXTS/mix/KIND: other files of the same kinds (a quarter, by their digest).
TEXTS/curve/KIND: css php html vim cuda cython sql shell, for the divergence curve. TEXTS/test/KIND: perl javascript cheaders markdown xml tcl cmake
changelog code chat, on which nobody calibrates. TEXTS/long/KIND: code, agent, prose; texts of some 40,000 tokens.
Logs and a part of the JSON come from a seeded generator (`eval.domain_texts`), agent sessions are drawn over source files (`eval.agent_text`), and chat
are answers of --chat-pair's target to built-in messages. Kinds without files are left out and named. Takes a minute and no network; a machine without
such files is given a folder made on another one.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import random
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from engine.cli.options import Parser
from engine.engine import Engine
from engine.errors import ForetoldError, InvalidOption
from engine.runtime.sampling import SamplingParams
from eval.agent_text import agent_session
from eval.domain_texts import write_folders
from everyday_prompts import messages

CALIBRATION = ("std", "lib", "rst", "man", "yaml", "logs", "json", "chat")
CURVE = ("css", "php", "html", "vim", "cuda", "cython", "sql", "shell")
TEST = ("perl", "javascript", "cheaders", "markdown", "xml", "tcl", "cmake", "changelog", "code", "chat")
LONG = ("code", "agent", "prose")
SUFFIXES = {
    ".rst": "rst", ".yaml": "yaml", ".yml": "yaml", ".css": "css", ".php": "php", ".html": "html", ".vim": "vim", ".cu": "cuda", ".cuh": "cuda",
    ".pyx": "cython", ".sql": "sql", ".sh": "shell", ".pl": "perl", ".pm": "perl", ".js": "javascript", ".h": "cheaders", ".md": "markdown",
    ".xml": "xml", ".tcl": "tcl", ".cmake": "cmake", ".txt": "prose",
}  # fmt: skip
LONG_CHARACTERS = 160_000
_FILE_BYTES = (2_000, 400_000)  # of a file that is taken, at least and at most
_HELD_OUT_OF = 4  # files of a kind that is calibrated on, of which one is kept for `mix`
_APART = ("transformers", "torch")  # packages that the kind `code` is taken from
_MOST_LOOKED_AT = 400_000  # files


def kind_of(path: Path, library: Path) -> str | None:
    """What a file is by its name and place; None: nothing that is asked for. library: the standard library's folder."""
    name = path.name.removesuffix(".gz")
    if name.lower().startswith("changelog"):
        return "changelog"
    if path.parent.parent.name == "man" and path.parent.name.startswith("man"):
        return "man"
    if path.suffix == ".py":
        inside = library in path.parents and "site-packages" not in path.parts
        return "std" if inside else None if set(_APART) & set(path.parts) else "lib"
    return SUFFIXES.get(Path(name).suffix)


def text_of(path: Path) -> str | None:
    """A file's text, unpacked where it is gzipped; None where it is none, or too short or long."""
    least, most = _FILE_BYTES
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read(most + 1)
        return data.decode("utf-8") if least <= len(data) <= most and b"\0" not in data else None
    except (OSError, EOFError, ValueError):
        return None


def sorted_files(roots: Sequence[Path]) -> dict[str, list[Path]]:
    """The files below `roots` by kind, each kind in an order that their paths decide."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[Path]] = {}
    seen = itertools.islice(itertools.chain.from_iterable(root.rglob("*.*") for root in [library, *roots]), _MOST_LOOKED_AT)
    for path in seen:
        kind = kind_of(path, library)
        if kind is not None and path.is_file() and not path.is_symlink():
            found.setdefault(kind, []).append(path)
    return {kind: sorted(set(paths), key=lambda p: sha256(str(p).encode()).digest()) for kind, paths in found.items()}


def put(folder: Path, texts: Iterator[str], most_bytes: int) -> int:
    """Write texts, each once, up to so many bytes; returns how many."""
    size = 0
    for text in texts:
        if size >= most_bytes:
            break
        name = sha256(text.encode()).hexdigest()[:12]
        if not (folder / f"{name}.txt").exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
            size += len(text.encode())
    return size


def held_out(text: str) -> bool:
    """Whether a text of a kind that is calibrated on is kept from it."""
    return int(sha256(text.encode()).hexdigest()[:8], 16) % _HELD_OUT_OF == 0


def answers(pair: str, questions: Sequence[str], new_tokens: int) -> list[str]:
    """Questions with the target's answers."""
    engine = Engine.from_pair(pair, draft="none")
    params = SamplingParams(max_new_tokens=new_tokens, temperature=0.8, seed=0)
    results = engine.generate([engine.encode([{"role": "user", "content": text}]) for text in questions], params)
    return [f"User: {asked}\n\nAssistant: {result.text}\n" for asked, result in zip(questions, results, strict=True)]


def joined(texts: Sequence[str], count: int) -> Iterator[str]:
    """`count` texts of at least LONG_CHARACTERS, put together from short ones; fewer where there is not enough."""
    left = iter(texts)
    for _ in range(count):
        parts: list[str] = []
        for text in left:
            parts.append(text)
            if sum(map(len, parts)) >= LONG_CHARACTERS:
                yield "\n\n".join(parts)
                break


def write_texts(
    out: Path, roots: Sequence[Path], *, most_bytes: int, chat_pair: str | None, chats: int, chat_tokens: int
) -> dict[str, int]:
    """Make all folders; returns the bytes of each, 0 for those without files."""
    found, sizes = sorted_files(roots), {}

    def of(kind: str) -> Iterator[str]:
        return (text for text in map(text_of, found.get(kind, [])) if text is not None)

    made: dict[str, tuple[list[str], list[str]]] = {}  # kinds that no file holds: to calibrate on, to test on
    with tempfile.TemporaryDirectory() as folder:
        write_folders(Path(folder), None, 1 / _HELD_OUT_OF)
        for kind in ("logs", "json", "code"):
            parts = [sorted((Path(folder) / place / kind).glob("*")) for place in ("train", "test")]
            made[kind] = tuple([p.read_text(encoding="utf-8") for p in part] for part in parts)  # type: ignore[assignment]
    if chat_pair is not None:
        others = (Path(__file__).parents[1] / "train" / "other_prompts.txt").read_text(encoding="utf-8").splitlines()
        made["chat"] = answers(chat_pair, messages(chats), chat_tokens), answers(chat_pair, others[:chats], chat_tokens)
    for kind in CALIBRATION:
        own, other = made.get(kind, ([], []))
        sizes[f"cal/{kind}"] = put(out / "cal" / kind, iter(own) if own else (t for t in of(kind) if not held_out(t)), most_bytes)
        sizes[f"mix/{kind}"] = put(
            out / "mix" / kind, iter(other) if own else (t for t in of(kind) if held_out(t)), most_bytes // _HELD_OUT_OF
        )
    for place, kinds in (("curve", CURVE), ("test", TEST)):
        for kind in kinds:
            own, other = made.get(kind, ([], []))
            texts = iter([*own, *other] if kind == "code" else other) if own else of(kind)
            sizes[f"{place}/{kind}"] = put(out / place / kind, texts, most_bytes // _HELD_OUT_OF)
    code = [text for own in made["code"] for text in own]
    sizes["long/code"] = put(out / "long" / "code", joined(code, 2), sys.maxsize)
    sizes["long/prose"] = put(out / "long" / "prose", joined(list(itertools.islice(of("prose"), 200)), 2), sys.maxsize)
    sources = [(f"src/file_{n}.py", text) for n, text in enumerate(code)]
    sessions = (agent_session(random.Random(n), sources, LONG_CHARACTERS) for n in range(4))
    sizes["long/agent"] = put(out / "long" / "agent", sessions if code else iter(()), sys.maxsize)
    return sizes


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for a user's mistake."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", nargs="*", type=Path, default=[], dest="roots", metavar="DIR", help="folders to look for files in")
    parser.add_argument("--out", type=Path, required=True, metavar="TEXTS", help="folder for the texts, which is not there yet")
    parser.add_argument("--megabytes", type=float, default=3.0, help="of each kind to calibrate on; of others a quarter")
    parser.add_argument("--chat-pair", help="a known pair, whose target answers built-in messages")
    parser.add_argument("--chats", type=int, default=400, help="messages to calibrate on")
    parser.add_argument("--chat-tokens", type=int, default=220, help="of an answer at most")
    try:
        args = parser.parse_args(arguments)
        if args.out.exists() and any(args.out.iterdir()):
            raise InvalidOption(f"{args.out} holds something already", "choose another --out")
        missing = [str(root) for root in args.roots if not root.is_dir()]
        if missing or args.megabytes <= 0 or min(args.chats, args.chat_tokens) < 1:
            raise InvalidOption(f"no folder {missing[0]}" if missing else "sizes are above 0", "check the options")
        sizes = write_texts(
            args.out,
            args.roots,
            most_bytes=round(1e6 * args.megabytes),
            chat_pair=args.chat_pair,
            chats=args.chats,
            chat_tokens=args.chat_tokens,
        )
    except (ForetoldError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, size in sizes.items():
        print(f"{name}: {size:,} bytes" if size else f"{name}: left out, no file of its kind (name more folders with --from)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
