"""Tables of an evaluation's rows, for people; joins the files of runs of eval_sessions that went side by side, a task each.

python scripts/eval_report.py planted.json conversation.json --json-out sessions.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codec_compare import write_json
from engine.cli.options import Parser
from engine.errors import ForetoldError, InvalidOption


def print_report(document: dict[str, Any]) -> None:
    """Prints every task's rows to standard output."""
    rows = document["rows"]
    print(f"{document['pair']} on {document['device']}")
    answered = [row for row in rows if row["task"] not in ("domain", "position", "continuation")]
    if answered:
        print_table(
            ["task", "context", "method", "bits", "asked", "right", "+-", "lost", "gained", "as untouched", "copied", "right by depth"],
            [answered_cells(row) for row in answered],
        )
    domains = [row for row in rows if row["task"] == "domain"]
    if domains:
        names = list(dict.fromkeys(r["domain"] for r in domains))
        by_name = {(r["domain"], r["pack"], r["method"]): r for r in domains}
        packs, methods = (list(dict.fromkeys(r[key] for r in domains)) for key in ("pack", "method"))
        print("\nbits per element / KL / top-1 agreement by kind of text")
        print_table(
            ["domain", "pack", "NLL", *methods],
            [
                [
                    name,
                    pack,
                    number(next(r["nll_untouched"] for r in domains if r["domain"] == name), 3),
                    *(cell(by_name.get((name, pack, method))) for method in methods),
                ]
                for name in names
                for pack in packs
            ],
        )
    positions = [row for row in rows if row["task"] == "position"]
    if positions:
        methods = list(positions[0]["bits_per_element"])
        print("\nbits per element by position / KL over what follows")
        print_table(
            ["kind", "position", "tokens", "NLL", *methods],
            [
                [
                    r["kind"],
                    f"{r['from']}-{r['to']}",
                    r["tokens"],
                    number(r["nll"], 3),
                    *(f"{number(r['bits_per_element'].get(m), 4)} / {number(r['kl'].get(m), 4)}" for m in methods),
                ]
                for r in positions
            ],
        )
    continued = [row for row in rows if row["task"] == "continuation"]
    if continued:
        print("\ngreedy continuations that are those of a session never stored")
        print_table(
            ["prompts of", "method", "bits", "prompts", "alike", "tokens alike"],
            [
                [
                    r["group"],
                    r["method"],
                    number(r["bits_per_element"], 4),
                    r["prompts"],
                    percent(r["equal_share"]),
                    f"{r['mean_equal_tokens']:.1f} of {r['new_tokens']}",
                ]
                for r in continued
            ],
        )


def answered_cells(row: dict[str, Any]) -> list[Any]:
    """A row of the table of answers; shares in percent."""
    copied = percent(row["copied_fraction"]) if "copied_fraction" in row else ""
    depths = " ".join(percent(b["accuracy"]) for b in row.get("by_depth", []))
    return [
        row["task"],
        row["context"] or "",
        row["method"],
        number(row["bits_per_element"], 4),
        row["questions"],
        percent(row["accuracy"]),
        percent(row["standard_error"]),
        row["lost"],
        row["gained"],
        percent(row["agreement"]),
        copied,
        depths,
    ]


def cell(row: dict[str, Any] | None) -> str:
    """One domain's figures with one method."""
    return "" if row is None else f"{row['bits_per_element']:.4f} / {row['kl']:.4f} / {percent(row['top1_agreement'])}"


def number(value: float | None, digits: int) -> str:
    """Fixed digits, or nothing."""
    return "" if value is None else f"{value:.{digits}f}"


def percent(value: float) -> str:
    """In percent with one digit."""
    return f"{100 * value:.1f}"


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns padded to their widest cell."""
    cells = [list(head), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(head))]
    for row in cells:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def join(paths: Sequence[Path]) -> dict[str, Any]:
    """One document from those of several runs. Raises InvalidOption when one is no evaluation, or of other settings or another device."""
    documents: list[dict[str, Any]] = []
    for path in paths:
        try:
            document = json.loads(path.read_text())
            same = (document["settings"], document["device"])
            documents.append({key: document[key] for key in ("rows", "parts", "command")} | document)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidOption(f"{path} is not such an evaluation", "give files that eval_sessions.py wrote") from error
        if same != (documents[0]["settings"], documents[0]["device"]):
            raise InvalidOption(f"{path} is of other settings or another device than {paths[0]}", "join runs with the same options")
    parts: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for document in documents:
        if twice := parts.keys() & document["parts"].keys():
            raise InvalidOption(f"{min(twice)} is in two of the files", "join runs of different tasks")
        parts |= document["parts"]
        rows += document["rows"]
    return documents[0] | {"rows": rows, "parts": parts, "command": [document["command"] for document in documents]}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="what eval_sessions.py wrote")
    parser.add_argument("--json-out", type=Path, help="the joined document, rows without the single answers")
    try:
        options = parser.parse_args(arguments)
        document = join(options.files)
        if options.json_out:
            write_json(options.json_out, {key: value for key, value in document.items() if key != "parts"})
    except (ForetoldError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_report(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
