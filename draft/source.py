"""Sources of drafts, loaded and ready: a model of its own, the target's first layers (early exit), a trained draft head over these, or the request's
own text.

Whatever an engine, a session or a calibration must know of a source is asked here; a new kind of source is a new subclass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from draft.draft_head import DraftHead
from draft.early_exit import EarlyExitDrafter, default_exit_layer
from draft.exit_copy import ExitCopy, ExitCopyDrafter
from draft.head_file import PACK_FILE, DraftHeadConfig
from draft.model import ModelDrafter
from draft.protocols import Drafter, KvPool
from draft.state_drafter import StateDrafter
from draft.state_join import StateJoin

ModelFingerprint = Callable[[Any, Path | None], str]  # (decoder, the folder it came from) -> hex digest


class DraftSource(ABC):
    """Where drafts come from.

    name: for reports. exit_layer: the target's first layers on whose states drafts rest; verification goes on after them, and their KV is recomputed
    at a resume, never stored (0: none). model: the draft where it is a language model of its own, else None. head_layers: the layers of a trained
    draft head, else None. folder: where it was loaded from, if it was.
    """

    name: str
    exit_layer: int = 0
    model: Any | None = None
    head_layers: Any | None = None
    folder: Path | None = None

    @property
    def cached_decoder(self) -> Any | None:
        """The decoder whose keys and values need a pool beside the target's; None where there is none."""
        return self.model or self.head_layers

    @property
    def codec_params_file(self) -> Path | None:
        """Where codec parameters made for this source and its target may lie; None where none come with it."""
        return None

    @abstractmethod
    def fingerprint(self, of_model: ModelFingerprint) -> str:
        """What codec parameters and sessions made with this source are marked with."""

    @abstractmethod
    def drafter(
        self,
        target: Any,
        pool: KvPool | None,
        *,
        cached: Any | None = None,
        deterministic: bool = False,
        copy: Callable[[Any, int, Any, Tensor], ExitCopy | None] | None = None,
    ) -> Drafter | None:
        """The source at work for a target; None where nothing is run. pool: of `cached_decoder`. cached: what runs that decoder (default: itself).
        copy: makes copies of weights for drafts, where that pays: (target, exit_layer, cached, token_ids) -> these.

        Raises:
            DraftError: the source does not fit the target.
        """


class ModelSource(DraftSource):
    """A small model with the target's vocabulary, up to padding.

    Args:
        model: its decoder. folder: where it came from.
    """

    def __init__(self, model: Any, folder: Path | None = None) -> None:
        self.model, self.folder = model, folder
        self._decoder = model
        self.name = folder.name if folder is not None else "model"

    def fingerprint(self, of_model: ModelFingerprint) -> str:
        """That of the model."""
        return of_model(self.model, self.folder)

    def drafter(
        self, target: Any, pool: KvPool | None, *, cached: Any | None = None, deterministic: bool = False, copy: Any | None = None
    ) -> Drafter:
        """See `DraftSource.drafter`."""
        assert pool is not None, "a draft model has a pool of its own"
        return ModelDrafter(cached or self._decoder, pool, name=self.name, deterministic=deterministic)


class EarlyExitSource(DraftSource):
    """The target's own first layers under its own norm and head, untrained.

    Args:
        exit_layer: how many.
    """

    name = "early exit"

    def __init__(self, exit_layer: int) -> None:
        self.exit_layer = exit_layer

    def fingerprint(self, of_model: ModelFingerprint) -> str:
        """The number of layers: all else is the target's."""
        return f"trunk-{self.exit_layer}"  # in session files and packs: stays

    def drafter(
        self, target: Any, pool: KvPool | None, *, cached: Any | None = None, deterministic: bool = False, copy: Any | None = None
    ) -> Drafter:
        """See `DraftSource.drafter`."""
        return EarlyExitDrafter(target, self.exit_layer, deterministic=deterministic)


class DraftHeadSource(DraftSource):
    """A trained draft head: layers, norm and head of a reduced vocabulary that go on from the target's states after its first layers.

    Args:
        config: of the head. head_layers: a decoder of its layers, norm and R rows of head. token_ids: [R] int64, the target's ids of these rows.
        folder: where it came from.
    """

    name = "draft head"

    def __init__(self, config: DraftHeadConfig, head_layers: Any, token_ids: Tensor, folder: Path) -> None:
        self.config, self.head_layers, self.token_ids, self.folder = config, head_layers, token_ids, folder
        self.exit_layer = config.exit_layer

    @property
    def codec_params_file(self) -> Path | None:
        """In the head's own folder."""
        return None if self.folder is None else self.folder / PACK_FILE

    def fingerprint(self, of_model: ModelFingerprint) -> str:
        """The number of layers under the head, and the digest of the head."""
        return f"trunk-{self.exit_layer}-{self.config.digest}"  # likewise

    def drafter(
        self,
        target: Any,
        pool: KvPool | None,
        *,
        cached: Any | None = None,
        deterministic: bool = False,
        copy: Callable[[Any, int, Any, Tensor], ExitCopy | None] | None = None,
    ) -> Drafter:
        """See `DraftSource.drafter`."""
        assert pool is not None and self.head_layers is not None, "a draft head has a pool of its own"
        head = DraftHead(cached or self.head_layers, self.token_ids, pool, deterministic=deterministic)
        copies = None if copy is None else copy(target, self.exit_layer, cached, self.token_ids)
        if copies is None:
            return EarlyExitDrafter(target, self.exit_layer, deterministic=deterministic, draft_head=head)
        return ExitCopyDrafter(target, self.exit_layer, draft_head=head, copy=copies, deterministic=deterministic)


class StateHeadSource(DraftSource):
    """A trained draft head that goes on from the target's last states. It says nothing of the target's first layers' states, so codec parameters and
    sessions are those of an untrained early exit (`EarlyExitSource`) after as many layers as it has when nobody says otherwise.

    Args:
        config: of the head. layers: a decoder of its layers, norm and R rows of head. join: what their rows are made with. token_ids: [R] int64, the
            target's ids of the head's rows. embed: token ids [N] -> the target's embeddings [N, E]. num_layers: of the target. folder: where it came
            from.
    """

    name = "draft head"

    def __init__(
        self,
        config: DraftHeadConfig,
        layers: Any,
        join: StateJoin,
        token_ids: Tensor,
        embed: Callable[[Tensor], Tensor],
        folder: Path,
    ) -> None:
        self.config, self.layers, self.join, self.token_ids, self.embed, self.folder = config, layers, join, token_ids, embed, folder
        self.exit_layer = default_exit_layer(config.exit_layer)

    @property
    def cached_decoder(self) -> Any | None:
        """The own layers."""
        return self.layers

    @property
    def codec_params_file(self) -> Path | None:
        """In the head's own folder."""
        return None if self.folder is None else self.folder / PACK_FILE

    def fingerprint(self, of_model: ModelFingerprint) -> str:
        """That of the early exit."""
        return EarlyExitSource(self.exit_layer).fingerprint(of_model)

    def drafter(
        self, target: Any, pool: KvPool | None, *, cached: Any | None = None, deterministic: bool = False, copy: Any | None = None
    ) -> Drafter:
        """See `DraftSource.drafter`; copies are not made."""
        assert pool is not None, "a draft head has a pool of its own"
        head = DraftHead(cached or self.layers, self.token_ids, pool, deterministic=deterministic)
        return StateDrafter(target, self.exit_layer, draft_head=head, join=self.join, embed=self.embed, deterministic=deterministic)


class NgramSource(DraftSource):
    """Each request's own tokens: what followed an earlier occurrence of its last ones (`draft.ngram`). It runs no model and keeps no cache, so codec
    parameters and sessions are those of a target without a draft."""

    name = "ngram"

    def fingerprint(self, of_model: ModelFingerprint) -> str:
        """That of no draft."""
        return "none"

    def drafter(
        self, target: Any, pool: KvPool | None, *, cached: Any | None = None, deterministic: bool = False, copy: Any | None = None
    ) -> None:
        """Nothing is run: the drafting policy looks into the text itself."""
        return None
