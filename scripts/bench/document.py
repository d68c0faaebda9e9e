"""What a benchmark ends with: one JSON object, printed and kept."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch


def measured_on(device: torch.device) -> dict[str, Any]:
    """The object's "device" and "versions"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"
    return {"device": name, "versions": {"python": platform.python_version(), "torch": torch.__version__}}


def print_document(document: dict[str, Any], file: Path | None) -> None:
    """Print the object in one line, and write it to a file, indented, where one is named."""
    print(json.dumps(document))
    if file is not None:
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
