"""The baseline of `bench_vllm.py`'s mode `disk`: a connector that keeps a prompt's blocks as they are in a file, and reads them at a given speed.

vLLM's own `ExampleConnector` reads as fast as the system's cache gives files, and does not know the pages of every backend; this one copies whole
blocks, whatever is in them, a layer at a time.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole

_PIECE_BYTES = 1 << 20


@dataclass
class RawMetadata(KVConnectorMetadata):
    """Of a step: files to load into blocks before it, and to write blocks to after it."""

    loads: list[tuple[str, list[int]]] = field(default_factory=list)
    saves: list[tuple[str, list[int]]] = field(default_factory=list)


class RawConnector(KVConnectorBase_V1):
    """Options: path, a folder; bytes_per_s, of reading (0: as fast as it comes)."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = vllm_config.kv_transfer_config.kv_connector_extra_config
        self.folder, self.bytes_per_s = Path(options["path"]), float(options.get("bytes_per_s", 0))
        self.block_tokens = int(vllm_config.cache_config.block_size)
        self.is_worker = role == KVConnectorRole.WORKER
        self._layers: list[torch.Tensor] = []
        self._memory: torch.Tensor | None = None
        self._requests: dict[str, tuple[Any, list[int]]] = {}  # of the scheduler's side: requests that are not kept yet, and their blocks
        self._loading: set[str] = set()

    # --- scheduler ------------------------------------------------------------------------------------------------------

    def _whole(self, request: Any) -> int:
        """Tokens of a prompt in whole blocks, but the last token."""
        return (len(request.prompt_token_ids) - 1) // self.block_tokens * self.block_tokens

    def _file(self, request: Any) -> str:
        ids = list(request.prompt_token_ids[: self._whole(request)])
        return str(self.folder / f"{sha256(json.dumps(ids).encode()).hexdigest()[:32]}.raw")

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """The whole prompt where it was kept."""
        params = request.kv_transfer_params or {}
        whole = self._whole(request)
        if params.get("restore") is False or whole <= num_computed_tokens or not Path(self._file(request)).exists():
            return 0, False
        return whole - num_computed_tokens, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note what has to be loaded."""
        self._requests.setdefault(request.request_id, (request, []))
        if num_external_tokens:
            self._loading.add(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> RawMetadata:
        """What this step loads, and which prompts are whole behind it."""
        meta, counts = RawMetadata(), scheduler_output.num_scheduled_tokens
        cached = scheduler_output.scheduled_cached_reqs
        steps = [(new.req_id, new.num_computed_tokens, new.block_ids) for new in scheduler_output.scheduled_new_reqs]
        steps += zip(cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True)
        for name, computed, block_ids in steps:
            if name not in self._requests:
                continue
            request, blocks = self._requests[name]
            blocks += [] if block_ids is None else block_ids[0]
            own = blocks[: self._whole(request) // self.block_tokens]
            if name in self._loading:
                meta.loads.append((self._file(request), own))
                self._loading.discard(name)
            if computed + counts[name] >= len(request.prompt_token_ids):
                if not Path(self._file(request)).exists():
                    meta.saves.append((self._file(request), own))
                del self._requests[name]
        for name in scheduler_output.finished_req_ids:
            self._requests.pop(name, None)
        return meta

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Nothing is sent later."""
        return False, None

    # --- worker ---------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Keep vLLM's tensors, blocks first."""
        self._layers = [layer.transpose(0, 1) if layer.shape[0] == 2 and layer.ndim == 5 else layer for layer in kv_caches.values()]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Read files into blocks."""
        for name, blocks in self._connector_metadata.loads:
            began, done, places = time.perf_counter(), 0, torch.tensor(blocks, device=self._layers[0].device)
            with open(name, "rb", buffering=0) as file:
                for layer in self._layers:
                    part = self._staged((len(blocks), *layer.shape[1:]), layer)
                    view = memoryview(part.view(torch.uint8).flatten().numpy())
                    for at in range(0, len(view), _PIECE_BYTES):
                        done += file.readinto(view[at : at + _PIECE_BYTES])
                        if self.bytes_per_s and (ahead := began + done / self.bytes_per_s - time.perf_counter()) > 0:
                            time.sleep(ahead)
                    layer[places] = part.to(layer.device)  # which waits: the memory is used again

    def _staged(self, shape: tuple[int, ...], layer: torch.Tensor) -> torch.Tensor:
        """Memory of this shape on the host, page-locked where there is a GPU, as allocating that would take longer than reading."""
        count = torch.Size(shape).numel()
        if self._memory is None or len(self._memory) < count:
            self._memory = torch.empty(count, dtype=layer.dtype, pin_memory=layer.is_cuda)
        return self._memory[:count].view(shape)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All layers are there."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Whole prompts are written after the pass."""

    def wait_for_save(self) -> None:
        """Write the blocks of prompts that are whole."""
        for name, blocks in self._connector_metadata.saves:
            places = torch.tensor(blocks, device=self._layers[0].device)
            with open(f"{name}.part", "wb") as file:
                for layer in self._layers:
                    file.write(layer[places].contiguous().cpu().view(torch.uint8).numpy().tobytes())
            Path(f"{name}.part").rename(name)
