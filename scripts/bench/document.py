"""What a benchmark ends with: one JSON object, printed and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def print_document(document: dict[str, Any], file: Path | None) -> None:
    """Print the object in one line, and write it to a file, indented, where one is named."""
    print(json.dumps(document))
    if file is not None:
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
