"""Sources of drafts: what a user names, loaded and put to work for an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from draft.draft_head import TrunkAdapter
from draft.early_exit import TrunkDrafter, default_trunk_layers
from draft.errors import DraftError
from draft.head_file import HEAD, TOKEN_IDS, AdapterConfig, is_adapter, load_adapter
from draft.length import CostModel, LengthController, measure_costs
from draft.model import ModelDrafter
from draft.pretrained import shipped_adapter
from draft.protocols import Drafter
from draft.stopping import GREEDY_PRIOR, SAMPLED_PRIOR, Calibration
from engine.errors import BadAdapter, InvalidOption
from engine.hub.resolve import resolve_model
from engine.kv.pool import PagedPool
from engine.model.decoder import Decoder, DecoderConfig
from engine.model.weights import expected_shapes
from engine.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from engine.engine import Engine

_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class TrainedTrunk:
    """A trunk adapter loaded for a target.

    decoder: its layers, norm and head of R rows. token_ids [R] int64: the target's ids of these rows. folder: where it came from.
    """

    config: AdapterConfig
    decoder: Decoder
    token_ids: torch.Tensor
    folder: Path

    @property
    def fingerprint(self) -> str:
        """Of the draft, for packs and sessions."""
        return f"trunk-{self.config.trunk_layers}-{self.config.digest}"


Draft = Decoder | TrainedTrunk | int | None  # a model, a trained trunk, an untrained trunk of so many layers, none


@dataclass(frozen=True)
class DraftChoice:
    """What a user's draft option stands for: the folder of a model or of an adapter, an untrained trunk of so many layers, or none of these."""

    model: Path | None = None
    adapter: Path | None = None
    layers: int | None = None

    def load(self, target: Decoder) -> Draft:
        """In the target's dtype, on its device. Raises what `Decoder.from_pretrained` and `load_trained_trunk` raise."""
        if self.model is not None:
            return Decoder.from_pretrained(self.model, dtype=target.dtype, device=target.device)
        return self.layers if self.adapter is None else load_trained_trunk(self.adapter, target)


def choose_draft(draft: str | Path, target: DecoderConfig, trunk_layers: int | None = None) -> DraftChoice:
    """Resolve a draft option: "none"; "trunk", which is the adapter that ships for a target of this shape, if one does, and else the target's own
    first layers; the folder of an adapter; the folder or hub id of a model. trunk_layers: so many of the target's layers, untrained.

    Raises:
        InvalidOption, ModelNotFound, DownloadFailed, BadAdapter.
    """
    if trunk_layers is not None and str(draft) != "trunk":
        raise InvalidOption(f"trunk_layers={trunk_layers} means nothing with draft {str(draft)!r}", 'use draft="trunk", or leave it out')
    if str(draft) == "none":
        return DraftChoice()
    if str(draft) == "trunk":
        try:
            shipped = shipped_adapter(target) if trunk_layers is None else None
        except DraftError as error:
            raise BadAdapter(error.what, error.remedy) from error
        if shipped is not None:
            return DraftChoice(adapter=shipped)
        return DraftChoice(layers=default_trunk_layers(target.num_layers) if trunk_layers is None else trunk_layers)
    folder = Path(draft).expanduser()
    return DraftChoice(adapter=folder) if is_adapter(folder) else DraftChoice(model=resolve_model(draft))


def load_trained_trunk(folder: str | Path, target: Decoder) -> TrainedTrunk:
    """The adapter in `folder`, in the target's dtype and on its device.

    Raises:
        BadAdapter: it is missing, damaged, newer than the program, or made for a target of another shape.
    """
    try:
        config, tensors = load_adapter(folder)
        config.check_target(target.config)
    except DraftError as error:
        raise BadAdapter(error.what, error.remedy) from error
    token_ids = tensors.pop(TOKEN_IDS).long()
    if int(token_ids[-1]) >= target.config.vocab_size:
        raise BadAdapter(f"the trunk adapter {folder} holds tokens that its target does not have", "copy the adapter's folder again")
    if HEAD not in tensors:
        head = target.embed_tokens.weight if target.lm_head is None else target.lm_head.weight
        tensors[HEAD] = head.detach()[token_ids.to(head.device)]
    # a head of its own matrix, which a CPU can lay out for its products, and no embeddings: tokens never reach these layers
    shape = replace(target.config, num_layers=config.num_layers, vocab_size=config.vocab_size, tie_word_embeddings=False)
    expected = {name: sizes for name, sizes in expected_shapes(shape).items() if name != _EMBEDDING}  # before memory is taken for them
    held = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wrong := {name for name in expected.keys() | held.keys() if expected.get(name) != held.get(name)}:
        raise BadAdapter(f"the trunk adapter {folder} and its target disagree about {min(wrong)}", "train one for this target")
    decoder = Decoder._materialise(shape, target.dtype, target.device)
    decoder.embed_tokens.weight = nn.Parameter(decoder.embed_tokens.weight[:0].clone(), requires_grad=False)
    places = {name: place for name, place in decoder.hf_tensors().items() if name != _EMBEDDING}
    for name, place in places.items():
        place.copy_(tensors[name])
    return TrainedTrunk(config, decoder.pack(in_bytes=config.bits == 8), token_ids.to(target.device), Path(folder))


def own_model(draft: Draft) -> Decoder | None:
    """The decoder with a KV pool of its own that a draft brings along."""
    return draft.decoder if isinstance(draft, TrainedTrunk) else draft if isinstance(draft, Decoder) else None


def build_drafter(
    target: Decoder, draft: Draft, new_pool: Callable[[Decoder], PagedPool], *, name: str = "model", deterministic: bool = False
) -> tuple[Drafter | None, PagedPool | None]:
    """The drafter, and the KV pool it has to itself. new_pool: makes a pool for a decoder; name: of a separate model, for reports.

    Raises:
        InvalidOption: a trunk deeper than the target.
    """
    model = own_model(draft)
    pool = None if model is None else new_pool(model)
    if isinstance(draft, Decoder) and pool is not None:
        return ModelDrafter(draft, pool, name=name, deterministic=deterministic), pool
    try:
        if isinstance(draft, TrainedTrunk) and pool is not None:
            adapter = TrunkAdapter(draft.decoder, draft.token_ids, pool, deterministic=deterministic)
            return TrunkDrafter(target, draft.config.trunk_layers, deterministic=deterministic, adapter=adapter), pool
        return (TrunkDrafter(target, draft, deterministic=deterministic) if isinstance(draft, int) else None), None
    except DraftError as error:
        raise InvalidOption(error.what, error.remedy) from error


def measure_engine(engine: Engine, drafter: Drafter) -> CostModel:
    """The warm-up of the automatic draft length: a few timed forwards on scratch sequences."""
    room = min(engine.context, drafter.max_positions, engine.pool.num_free_pages * engine.pool.page_size)
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= room]
    draft_decoder = engine.draft_decoder or engine.target
    pool = engine.pool if engine.draft_decoder is None or engine.draft_pool is None else engine.draft_pool
    adapter = drafter.adapter if isinstance(drafter, TrunkDrafter) else None
    own = (adapter.decoder, adapter.pool.new_sequence) if adapter else None
    return measure_costs(
        engine.target,
        drafter,
        draft_decoder,
        (engine.pool.new_sequence, pool.new_sequence),
        own_layers=own,
        token_counts=counts,
        deterministic=engine.deterministic,
    )


def new_controller(params: SamplingParams, costs: CostModel | None, device: torch.device) -> LengthController:
    """What chooses a request's draft lengths: on a CPU draft by draft, elsewhere per block, where nothing is read back while a block is drafted."""
    by_confidence = device.type == "cpu"
    return LengthController(
        params.draft_length, costs, Calibration(GREEDY_PRIOR if params.greedy else SAMPLED_PRIOR) if by_confidence else None
    )
