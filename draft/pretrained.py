"""Trained draft heads that come with the package, each in a folder of its own under `pretrained/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from draft.head_file import is_draft_head, read_config, target_digest

FOLDER = Path(__file__).parent / "pretrained"


def shipped_draft_head(target: Any) -> Path | None:
    """The folder of the draft head trained for a target of this shape (`target`: a decoder's config); the first by name where there are several, None
    where there is none. A target of the same shape with other weights drafts less well with it, and no less exactly."""
    wanted = target_digest(target)
    for candidate in sorted(FOLDER.iterdir()) if FOLDER.is_dir() else []:
        if is_draft_head(candidate) and read_config(candidate).target_fingerprint_config == wanted:
            return candidate
    return None
