"""What an engine is made with, beside its models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from draft.policy import CostModel
from engine.errors import InvalidOption
from engine.inputs import is_whole, shown
from engine.kv.formats import PLAIN, check_name


@dataclass(frozen=True)
class LoadedAs:
    """How an engine's models were loaded, for another process to load the same ones: arguments of `Engine.from_pretrained`, folders where that has
    resolved a name to one."""

    target: str
    draft: str
    dtype: str
    exit_layer: int | None = None
    weights: str = "auto"


@dataclass(frozen=True)
class EngineConfig:
    """Options of an engine.

    pool_tokens: most tokens of KV each pool may hold; None: 131,072 on a CPU; on a GPU what memory allows. page_size: tokens a page.
    max_batch: most requests at once. prefill_chunk: tokens of one request's prompt a step; None: what suits the
    device, see `engine.runtime.memory.prefill_chunk`.
    deterministic: batch-invariant kernels, so that greedy text is the same with and without speculation, to the bit.
    kv_cache_dtype: format of the target's KV cache, one of `engine.kv.formats.KV_CACHE_DTYPES`; a draft's stays its own.
    prefix_sharing: pages of finished and running requests stay in the pool while nobody needs them, and a request that begins with the same
    tokens shares them instead of running them (docs/guarantees.md says what its text depends on then).
    costs: frozen costs for the automatic draft length; None: measured at the first request that needs them, and corrected as text is generated.
    target_dir: folder the target came from, for fingerprints; it is not read here. pair: name of the known pair, for reports.
    gpu_memory_utilization: share of a GPU's memory that may be used in all, other programs and the weights included; the KV pools get what is left of
    it; None: `engine.runtime.memory.GPU_MEMORY_UTILIZATION`. Not beside pool_tokens.
    ngrams: whether requests whose draft length is automatic also draft from their own text, where there is a source of drafts.
    loaded_as: how another process loads these models; None: they came from no folder.

    Raises:
        InvalidOption: a number below what makes sense, a value of another type, or an unknown format.
    """

    pool_tokens: int | None = None
    page_size: int = 64
    max_batch: int = 64
    prefill_chunk: int | None = None
    deterministic: bool = False
    kv_cache_dtype: str = PLAIN
    costs: CostModel | None = None
    target_dir: Path | None = None
    pair: str | None = None
    ngrams: bool = True
    prefix_sharing: bool = True
    gpu_memory_utilization: float | None = None
    loaded_as: LoadedAs | None = None

    def __post_init__(self) -> None:
        for name in ("page_size", "max_batch", "prefill_chunk"):
            value = getattr(self, name)
            if name == "prefill_chunk" and value is None:
                continue
            if not is_whole(value) or value < 1:
                raise InvalidOption(f"{name} cannot be {shown(value)}", "give a whole number from 1 on")
        if self.pool_tokens is not None and (not is_whole(self.pool_tokens) or self.pool_tokens < self.page_size):
            raise InvalidOption(f"pool_tokens cannot be {shown(self.pool_tokens)}", f"give at least one page of {self.page_size} tokens")
        check_memory_share(self.gpu_memory_utilization)
        if self.gpu_memory_utilization is not None and self.pool_tokens is not None:
            raise InvalidOption("pool_tokens and gpu_memory_utilization both say how large the KV pools are", "give one of them")
        for name in ("deterministic", "ngrams", "prefix_sharing"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidOption(f"{name} cannot be {shown(getattr(self, name))}", "give True or False")
        if self.costs is not None and not isinstance(self.costs, CostModel):
            raise InvalidOption(f"costs cannot be {shown(self.costs)}", "give a CostModel, or leave it out")
        check_name(self.kv_cache_dtype)


def check_memory_share(share: object) -> None:
    """Raises InvalidOption unless it can be `EngineConfig.gpu_memory_utilization`."""
    if share is not None and (not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1):
        raise InvalidOption(f"gpu_memory_utilization cannot be {shown(share)}", "give a number above 0, up to 1")
