"""What a benchmark gives: one JSON object, printed and kept, at its end or row by row."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def measured_on(device: torch.device) -> dict[str, Any]:
    """The object's "device" and "versions"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"
    return {"device": name, "versions": {"python": platform.python_version(), "torch": torch.__version__}}


def command_line(script: str, argv: Sequence[str] | None) -> str:
    """The command of `scripts/SCRIPT` with these arguments (None: the process's own), without what only this machine knows: of paths the last part
    stays, but for those inside the repository."""
    root = Path(__file__).resolve().parents[2]

    def short(word: str) -> str:
        option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        path = Path(value).expanduser()
        inside = path.resolve().is_relative_to(root) and not path.is_absolute()
        return word if "/" not in value or inside else option + equals + path.name

    return " ".join([f"python scripts/{script}", *map(short, sys.argv[1:] if argv is None else argv)])


def print_document(document: dict[str, Any], file: Path | None) -> None:
    """Print the object in one line, and write it to a file, indented, where one is named."""
    print(json.dumps(document))
    if file is not None:
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


class RowDocument:
    """The object of a benchmark whose "rows" come one by one: what is beside them is printed at once, each row as it comes, and the file is written
    with each.

    Args:
        about: the object without its rows. file: None: it is printed alone.
    """

    def __init__(self, about: dict[str, Any], file: Path | None) -> None:
        self._document: dict[str, Any] = about | {"rows": []}
        self._file = file
        print(json.dumps(about), flush=True)

    def add(self, row: dict[str, Any]) -> None:
        """The next row."""
        self._document["rows"].append(row)
        print(json.dumps(row), flush=True)
        if self._file is not None:
            self._file.write_text(json.dumps(self._document, indent=1) + "\n", encoding="utf-8")
