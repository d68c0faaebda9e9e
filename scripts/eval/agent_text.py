"""Texts as a coding agent's session leaves them: files read, searched, edited, read again and tested, from real source files.

    python scripts/eval/agent_text.py --text SOURCES... --out FOLDER --sessions 4 --characters 160000

Most of such a session stands in it before: a file that is read a second time, numbered lines that a search shows again, an edit that quotes what it
replaces, the same test report. All choices come from a seed; the same files give the same texts.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.cli.options import Parser
from engine.errors import ForetoldError, InvalidOption
from eval.text_tokens import read_files

_SHOWN_LINES = 160
_TASKS = ("Rename what is unclear here", "Find out why the test fails", "Add the missing check", "Make this part easier to read")
_MESSAGES = ("expected 3, got 4", "unexpected keyword argument", "list index out of range", "object is not iterable")


def agent_session(rng: random.Random, files: Sequence[tuple[str, str]], characters: int) -> str:
    """A session of at least `characters` characters over files (name, content). Raises InvalidOption for files without enough lines."""
    contents = {name: [line for line in text.splitlines() if line.strip()] for name, text in files}
    contents = {name: lines for name, lines in contents.items() if len(lines) >= 40}
    if not contents:
        raise InvalidOption("no file has 40 lines", "give longer source files")
    parts: list[str] = []
    size = 0
    for event in _events(rng, contents):
        parts.append(event)
        size += len(event)
        if size >= characters:
            break
    return "".join(parts)


def _events(rng: random.Random, contents: dict[str, list[str]]) -> Iterator[str]:
    names = list(contents)
    while True:
        name = rng.choice(names)
        lines = contents[name]
        first = rng.randrange(max(1, len(lines) - _SHOWN_LINES))
        shown = range(first, min(len(lines), first + _SHOWN_LINES))
        yield f"\n<user>\n{rng.choice(_TASKS)}: {name}, around line {first + 1}.\n</user>\n"
        yield _call("read_file", f'"path": "{name}", "line": {first + 1}') + _numbered(lines, shown)
        word = rng.choice([w for w in " ".join(lines[i] for i in shown).split() if w.isidentifier() and len(w) > 3] or ["self"])
        found = [i for i in range(len(lines)) if word in lines[i].split()][:12]
        yield _call("search", f'"path": "{name}", "word": "{word}"') + "".join(f"{name}:{i + 1}: {lines[i]}\n" for i in found)
        yield f"\n<assistant>\nI change {word} in {name}, then run the tests again.\n</assistant>\n"
        place = rng.choice(shown[: len(shown) // 2])
        old = lines[place : place + 6]
        new = [line.replace(word, f"{word}_{rng.randrange(10)}") for line in old]
        lines[place : place + 6] = new
        yield _call("edit", f'"path": "{name}"') + "".join(f"- {line}\n" for line in old) + "".join(f"+ {line}\n" for line in new)
        yield _call("read_file", f'"path": "{name}", "line": {first + 1}') + _numbered(lines, shown)
        failed = rng.randrange(3)
        report = "".join(f"tests/test_{names.index(name)}.py::test_{n} {'FAILED' if n < failed else 'PASSED'}\n" for n in range(12))
        yield _call("run_tests", '"path": "tests"') + report + f"{failed} failed: {rng.choice(_MESSAGES)}\n"


def _call(tool: str, arguments: str) -> str:
    return f'\n<tool>\n{{"name": "{tool}", {arguments}}}\n</tool>\n'


def _numbered(lines: Sequence[str], shown: range) -> str:
    return "".join(f"{i + 1:5d}  {lines[i]}\n" for i in shown)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for a user's mistake."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE|DIR", help="source files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the texts")
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--files", type=int, default=5, help="files a session works on")
    parser.add_argument("--characters", type=int, default=160_000, help="of a session, at least")
    parser.add_argument("--seed", type=int, default=0)
    try:
        args = parser.parse_args(arguments)
        if min(args.sessions, args.files, args.characters) < 1:
            raise InvalidOption("sessions, files and characters are at least 1", "check the options")
        known = [(f"src/file_{digest[:6]}.py", text) for digest, text in sorted(read_files(args.text).items())]
        args.out.mkdir(parents=True, exist_ok=True)
        for number in range(args.sessions):
            rng = random.Random(f"{args.seed}/{number}")
            text = agent_session(rng, rng.sample(known, min(args.files, len(known))), args.characters)
            (args.out / f"session-{number}.txt").write_text(text, encoding="utf-8")
    except (ForetoldError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
