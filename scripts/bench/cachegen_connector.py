"""The baseline of `bench_vllm.py`'s mode `cachegen`: a connector that keeps a prompt's keys and values as CacheGen codes them (`baselines.cachegen`).

LMCache's own connector does not run on a CPU (docs/vllm.md). Keys are coded as vLLM keeps them, rotated. The histograms are those of the first prompt
that is kept; as CacheGen profiles them ahead, they lie beside the folder and are not counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from baselines.cachegen import CacheGen
from codec.layouts import PackedKv, PagedKv
from codec.spec import NUM_SINKS, KvLayout
from engine.connectors.vllm import pages_of
from scripts.bench.raw_connector import RawConnector


class CacheGenConnector(RawConnector):
    """Options: path, a folder."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        model = vllm_config.model_config
        parallel = vllm_config.parallel_config
        self._shape = model.get_num_layers(parallel), model.get_num_kv_heads(parallel), model.get_head_size()
        self._pages: PagedKv | PackedKv | None = None
        self._codec: CacheGen | None = None

    @property
    def _profile(self) -> Path:
        """Tokens whose histograms are used."""
        return self.folder.with_name(f"{self.folder.name}-histograms")

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take views of vLLM's pages."""
        self._pages = pages_of(list(kv_caches.values()), *self._shape[1:], self.block_tokens)

    def _fitted(self, sample: torch.Tensor | None) -> CacheGen:
        """The codec with the histograms that are kept; of `sample` [T, D] where none are."""
        if self._codec is None:
            layers, heads, width = self._shape
            self._codec = CacheGen(KvLayout(num_layers=layers, num_kv_heads=heads, head_dim=width))
            path = self._profile
            if sample is None:
                sample = torch.load(path, weights_only=True)
            else:
                torch.save(sample.bfloat16(), path)
            self._codec.fit(sample.float()[NUM_SINKS:])
        return self._codec

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Decode files into blocks."""
        for name, blocks in self._connector_metadata.loads:
            rows = self._fitted(None).decode(Path(name).read_bytes())
            layers, heads, width = self._shape
            assert self._pages is not None
            self._pages.write(blocks, 0, rows.view(len(rows), layers, 2, heads, width))

    def wait_for_save(self) -> None:
        """Code the blocks of prompts that are whole."""
        for name, blocks in self._connector_metadata.saves:
            assert self._pages is not None
            rows = self._pages.read(blocks, 0, len(blocks) * self.block_tokens).flatten(1).float().cpu()
            Path(name).write_bytes(self._fitted(None if self._profile.exists() else rows).encode(rows))
