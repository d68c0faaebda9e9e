"""From a user's draft option to a loaded draft source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from draft.early_exit import default_exit_layer
from draft.head_file import is_draft_head
from draft.pretrained import shipped_draft_head
from draft.source import DraftSource, EarlyExitSource, ModelSource
from engine.errors import InvalidOption
from engine.hub.resolve import resolve_model
from engine.model.config import DecoderConfig
from engine.model.decoder import Decoder
from engine.runtime.drafters import load_draft_head


@dataclass(frozen=True)
class DraftChoice:
    """What a user's draft option stands for: the folder of a model or of a draft head, an early exit after so many layers, or none of these."""

    model: Path | None = None
    head: Path | None = None
    exit_layer: int | None = None

    def load(self, target: Decoder) -> DraftSource | None:
        """In the target's dtype, on its device. Raises what `Decoder.from_pretrained` and `load_draft_head` raise."""
        if self.model is not None:
            return ModelSource(Decoder.from_pretrained(self.model, dtype=target.dtype, device=target.device), self.model)
        if self.head is not None:
            return load_draft_head(self.head, target)
        return None if self.exit_layer is None else EarlyExitSource(self.exit_layer)


def choose_draft(draft: str | Path, target: DecoderConfig, exit_layer: int | None = None) -> DraftChoice:
    """Resolve a draft option: "none"; "trunk", which is the draft head that ships for a target of this shape, if one does, and else an early exit;
    the folder of a draft head; the folder or hub id of a model. exit_layer: early exit after so many of the target's layers, untrained.

    Raises:
        InvalidOption, ModelNotFound, DownloadFailed, BadDraftHead.
    """
    if exit_layer is not None and str(draft) != "trunk":
        raise InvalidOption(f"exit_layer={exit_layer} means nothing with draft {str(draft)!r}", 'use draft="trunk", or leave it out')
    if str(draft) == "none":
        return DraftChoice()
    if str(draft) == "trunk":
        shipped = shipped_draft_head(target) if exit_layer is None else None
        if shipped is not None:
            return DraftChoice(head=shipped)
        return DraftChoice(exit_layer=default_exit_layer(target.num_layers) if exit_layer is None else exit_layer)
    folder = Path(draft).expanduser()
    return DraftChoice(head=folder) if is_draft_head(folder) else DraftChoice(model=resolve_model(draft))
