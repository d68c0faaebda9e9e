"""Draft sources for a target: what a caller of the library passes, and trained draft heads loaded from their folders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from draft.head_file import (
    EMBED_NORM,
    FUSE,
    HEAD,
    JOIN,
    SCALE,
    STATE_NORM,
    TOKEN_IDS,
    open_draft_head,
    read_draft_head_tensor,
)
from draft.source import DraftHeadSource, DraftSource, EarlyExitSource, ModelSource, StateHeadSource
from draft.state_join import StateJoin
from engine.errors import BadDraftHead
from engine.model.decoder import Decoder
from engine.model.weights import expected_shapes

_EMBEDDING = "model.embed_tokens.weight"
_ROWS_AT_ONCE = 1024  # of a target's embeddings that are looked up for a draft head

Draft = DraftSource | Decoder | int | None  # a source, a model, so many of the target's first layers, none


def as_source(draft: Draft, folder: Path | None = None) -> DraftSource | None:
    """The source that a caller's `draft` stands for. folder: where a model came from."""
    if isinstance(draft, Decoder):
        return ModelSource(draft, folder)
    return EarlyExitSource(draft) if isinstance(draft, int) else draft


def load_draft_head(folder: str | Path, target: Decoder) -> DraftHeadSource | StateHeadSource:
    """The draft head in `folder`, in the target's dtype and on its device.

    Raises:
        BadDraftHead: it is missing, damaged, newer than the program, or made for a target of another shape.
    """
    config, stored = open_draft_head(folder)
    config.check_target(target.config)
    token_ids = stored[TOKEN_IDS].long()
    if int(token_ids[-1]) >= target.config.vocab_size:
        raise BadDraftHead(f"the draft head {folder} holds tokens that its target does not have", "copy the draft head's folder again")
    joins = {name: stored[name] for name in (STATE_NORM, EMBED_NORM, JOIN, FUSE) if name in stored}
    left_out = {TOKEN_IDS, *joins, *(name for name in stored if name.endswith(SCALE))}
    held = {name: tuple(tensor.shape) for name, tensor in stored.items() if name not in left_out}
    if HEAD not in held:
        held[HEAD] = (len(token_ids), target.config.hidden_size)
    # a head of its own matrix, which a CPU can lay out for its products, and no embeddings: tokens never reach these layers
    # nor an offset of norms: a draft head stores what they multiply by
    shape = target.config.last_layers(config.num_layers, vocab_size=config.vocab_size, tie_word_embeddings=False, norm_offset=False)
    expected = {name: sizes for name, sizes in expected_shapes(shape).items() if name != _EMBEDDING}  # before memory is taken for them
    if wrong := {name for name in expected.keys() | held.keys() if expected.get(name) != held.get(name)}:
        raise BadDraftHead(f"the draft head {folder} and its target disagree about {min(wrong)}", "train one for this target")

    def fill(places: dict[str, torch.Tensor]) -> None:
        for name, place in places.items():
            if name == HEAD and HEAD not in stored:
                if target.lm_head is None:
                    for rows, ids in zip(place.split(_ROWS_AT_ONCE), token_ids.to(target.device).split(_ROWS_AT_ONCE), strict=True):
                        rows.copy_(target.embed_tokens(ids))
                else:
                    head = target.lm_head.weight.detach()
                    place.copy_(head[token_ids.to(head.device)])
            elif name != _EMBEDDING:
                read_draft_head_tensor(stored, name, place)

    decoder = Decoder.filled(shape, fill, dtype=target.dtype, device=target.device, int8=config.bits == 8, gemm=target.gemm)
    decoder.embed_tokens = nn.Embedding.from_pretrained(decoder.embed_tokens.weight[:0].clone())
    token_ids = token_ids.to(target.device)
    if not joins:
        return DraftHeadSource(config, decoder, token_ids, Path(folder))
    parts = {name: torch.empty(tensor.shape, dtype=target.dtype, device=target.device) for name, tensor in joins.items()}
    for name, place in parts.items():
        read_draft_head_tensor(stored, name, place)
    join = StateJoin(config.state_layers, parts[STATE_NORM], parts[EMBED_NORM], parts[JOIN], parts.get(FUSE), target.config.rms_norm_eps)
    return StateHeadSource(config, decoder, join, token_ids, target.embed, Path(folder))
