"""`python -m engine.store DIR`: what a store holds, whether it is whole, and making it smaller."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import ForetoldError, InvalidOption
from engine.inputs import shown
from engine.store.store import RunStore, byte_count


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidOption(message, "see --help")

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file, flush=True)  # argparse's own hides that nothing was written


def _parser() -> argparse.ArgumentParser:
    p = _Parser(prog="python -m engine.store", description="Look at a store of coded prefixes (--store DIR), and tidy it up.")
    p.add_argument("folder", type=Path, metavar="DIR", help="the store's folder")
    p.add_argument(
        "action",
        nargs="?",
        default="list",
        choices=("list", "verify", "shrink", "delete"),
        help="list: models, namespaces, bytes (default); verify: read and check every file; shrink: evict down to --bytes; delete: a --namespace",
    )
    p.add_argument("--bytes", metavar="N", help="for shrink: what all runs may take; K, M, G and T are powers of 1,024")
    p.add_argument("--namespace", metavar="NAME", help="for delete")
    p.add_argument("--repair", action="store_true", help="for verify: remove damaged and unreachable files, make the index anew")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Exit status: 0, 1 when `verify` found damage, 2 for a named error, 130 when interrupted."""
    try:
        args = _parser().parse_args(argv)
        for option, action in (("bytes", "shrink"), ("namespace", "delete")):
            if (getattr(args, option) is not None) != (args.action == action):
                raise InvalidOption(f"{action} and --{option} belong together", f"give DIR {action} --{option} ...")
        if args.repair and args.action != "verify":
            raise InvalidOption("--repair belongs to verify", "give DIR verify --repair")
        limit_bytes = None if args.bytes is None else byte_count(args.bytes)
        store = RunStore(args.folder, create=False, to_look=args.action == "list" or (args.action == "verify" and not args.repair))
        try:
            found = _act(store, args, limit_bytes)
        finally:
            store.close()
    except ForetoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # of --help alone: what the store cannot read or write is a named error
        return _unprinted(error)
    try:
        if sys.stdout is None:
            raise OSError("it is closed")
        print(json.dumps(found) if args.json else _in_words(args, found), flush=True)
    except OSError as error:
        return _unprinted(error)
    return 1 if args.action == "verify" and not (found["sound"] or found["repaired"]) else 0


def _unprinted(error: OSError) -> int:
    """Exit status after standard output could not be written: 141 when its reader has left, else 2, and why."""
    if not isinstance(error, BrokenPipeError):
        print(f"error: standard output cannot be written: {error.strerror or error} (free space, or send it elsewhere)", file=sys.stderr)
    with suppress(OSError, AttributeError):  # the interpreter would try once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141 if isinstance(error, BrokenPipeError) else 2


def _act(store: RunStore, args: argparse.Namespace, limit_bytes: int | None) -> dict[str, Any]:
    if args.action == "verify":
        return store.verify(repair=args.repair).as_dict()
    if args.action == "shrink":
        assert limit_bytes is not None
        removed = store.shrink(limit_bytes)
    elif args.action == "delete":
        removed = store.delete(args.namespace)
    else:
        return store.describe()
    runs, num_bytes = store.totals
    return {"removed": removed, "runs": runs, "bytes": num_bytes}


def _in_words(args: argparse.Namespace, found: dict[str, Any]) -> str:
    if args.action == "list":
        lines = [f"{shown(str(args.folder), 400)[1:-1]}: {found['runs']:,} runs, {found['bytes']:,} bytes (index {found['index_bytes']:,})"]
        for row in found["roots"]:
            used = "never used" if not row["used_at"] else time.strftime("used %Y-%m-%d %H:%M", time.localtime(row["used_at"]))
            lines.append(
                f"  namespace {row['namespace']!r}, {shown(row['label'])[1:-1] if row['label'] else 'models unnamed'}, {row['quality']}: "
                f"{row['runs']:,} runs ({row['coded_runs']:,} coded), {row['tokens']:,} tokens, {row['bytes']:,} bytes, {used}"
            )
        return "\n".join(lines)
    if args.action == "verify":
        lines = [f"{found['runs']:,} runs are whole: {found['tokens']:,} tokens, {found['bytes']:,} bytes"]
        for kind in ("damaged", "unreachable"):
            lines += [f"{kind}: {name}" for name in found[kind]]
        if found["unindexed"] or found["missing"]:
            lines.append(f"index: {found['unindexed']} files unknown to it, {found['missing']} entries without a file")
        return "\n".join([*lines, *(["repaired"] if found["repaired"] else [])])
    return f"{found['removed']:,} runs removed; {found['runs']:,} runs, {found['bytes']:,} bytes remain"


if __name__ == "__main__":
    sys.exit(main())
