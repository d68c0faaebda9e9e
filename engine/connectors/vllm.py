"""Foretold's storage inside vLLM: a connector (`KVConnectorBase_V1`) that restores stored prefixes before they are computed and keeps new ones.

The scheduler's side answers how much of a prompt a store holds, by token ids; the worker's side decodes it into vLLM's pages before the forward pass,
copies every page of 64 tokens that has been filled, and codes the copies behind vLLM's work. A restore that fails reports its blocks, and vLLM computes
them. docs/vllm.md says how it is used; written for vLLM 0.32.
"""

from __future__ import annotations

import functools
import itertools
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm import __version__ as vllm_version
from vllm.distributed import get_tensor_model_parallel_rank, get_tp_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole, SupportsHMA
from vllm.logger import init_logger

from codec.layouts import PackedKv, PagedKv
from codec.spec import NUM_SINKS
from engine.connectors.copies import BlockCopies
from engine.connectors.passes import CodedModel
from engine.connectors.prefixes import PrefixIndex, PrefixWorker, Restored, StoreOptions
from engine.connectors.rates import open_rates
from engine.errors import InvalidOption
from engine.hub.resolve import resolve_model
from engine.store.runs import PAGE_TOKENS

logger = init_logger(__name__)

_CLOSE_S = 60.0
_PROMPT_TOKENS = 64  # scheduled of a request: fewer are an answer's, or a prompt's last ones
_COPY_BYTES = 256 << 20  # page-locked memory, at least
_IDLE_S = 0.002
_MOST_TRIES = 3  # restores of a request that was preempted, or whose blocks could not be filled: then it is computed
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.attn$")


@dataclass
class RequestStep:
    """A request's part in a step. token_ids: from `first_token` on, what the worker has not been told. block_ids: all of the request's, or those after
    the ones told before where `appended`. load: tokens [start, end) to be restored, or None. scheduled: tokens that the step computes. computed: tokens
    whose KV lies in the blocks after the step."""

    name: str
    namespace: str
    first_token: int
    token_ids: list[int]
    block_ids: list[int]
    appended: bool
    load: tuple[int, int] | None
    scheduled: int
    computed: int


@dataclass
class StepMetadata(KVConnectorMetadata):
    """What the worker's side is told of a step. loads: requests that wait until they are restored, while others run. ended: names of requests that
    are over. is_idle: nothing runs in the step."""

    steps: list[RequestStep] = field(default_factory=list)
    loads: list[RequestStep] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    is_idle: bool = False


@dataclass(eq=False)
class _Tracked:
    """A request as the scheduler's side knows it. told: tokens that the worker knows. load: tokens to be restored at its next step, or before it into
    `blocks`. tries: restores that were asked for."""

    request: Any
    namespace: str
    told: int = 0
    load: int = 0
    blocks: list[int] = field(default_factory=list)
    tries: int = 0


@dataclass(eq=False)
class _Timed:
    """A step whose seconds are measured. kind: of `engine.connectors.rates`. tokens, start: computed or restored, after how many. began, ended: of
    `ForetoldConnector._now`; ended is None while it runs."""

    kind: str
    tokens: int
    start: int
    began: Any
    ended: Any = None

    @property
    def is_over(self) -> bool:
        """Whether its seconds are known, or never will be: another step has begun before it ended."""
        return self.ended is None or isinstance(self.ended, float) or bool(self.ended.query())

    @property
    def seconds(self) -> float:
        """From beginning to end."""
        if isinstance(self.ended, float):
            return float(self.ended - self.began)
        return float(self.began.elapsed_time(self.ended)) / 1e3


@dataclass(eq=False)
class _Load:
    """A request's restore whose layers are being written into its blocks. done: layers that are."""

    step: RequestStep
    blocks: list[int]
    restored: Restored
    write: Callable[[int, torch.Tensor], None]
    done: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether all layers are written."""
        return self.done == self.restored.num_layers


def check_supported(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raises InvalidOption for what this connector does not serve: pipeline parallel ranks, several cache groups, quantised caches."""
    if vllm_config.parallel_config.pipeline_parallel_size != 1:
        raise InvalidOption(
            "ForetoldConnector with pipeline parallel ranks", "use tensor parallel ranks, or data parallel engines on one store"
        )
    if vllm_config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise InvalidOption(f"ForetoldConnector with a KV cache of {vllm_config.cache_config.cache_dtype}", "leave --kv-cache-dtype auto")
    groups = [] if kv_cache_config is None else kv_cache_config.kv_cache_groups
    if len(groups) > 1 or any(getattr(group.kv_cache_spec, "sliding_window", None) for group in groups):
        raise InvalidOption("ForetoldConnector with layers of several kinds of cache", "use a model whose layers attend to all tokens")


def open_index(vllm_config: Any) -> PrefixIndex:
    """The store and the codec parameters that a vLLM configuration names. Raises as `CodedModel.open` and `PrefixIndex`."""
    options = StoreOptions.from_mapping(vllm_config.kv_transfer_config.kv_connector_extra_config)
    return PrefixIndex(options, CodedModel.open(resolve_model(vllm_config.model_config.model), options.draft, options.pack))


class ForetoldConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. vLLM makes one for its scheduler and one for its worker.

    Raises:
        InvalidOption: an unknown option, or a set-up that is not served (`check_supported`). PackMismatch, BadStore: as the names say.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        shield_compiler()
        check_supported(vllm_config, kv_cache_config)
        index = open_index(vllm_config)
        self.ranks = int(vllm_config.parallel_config.tensor_parallel_size)
        if index.model.config.num_kv_heads % self.ranks:
            raise InvalidOption(
                f"{index.model.config.num_kv_heads} KV heads on {self.ranks} tensor parallel ranks",
                "use a number of ranks that divides them",
            )
        self.rank = 0
        self._offered: dict[str, int] = {}  # of the worker's side: pages of a request that were looked at for keeping
        self.index, self.block_tokens = index, int(vllm_config.cache_config.block_size)
        self.worker: PrefixWorker | None = None
        self.pages: PagedKv | None = None
        self._requests: dict[str, _Tracked] = {}  # of the scheduler's side
        self._blocks: dict[str, list[int]] = {}  # of the worker's side
        self._computed: list[tuple[str, int]] = []
        self._failed_blocks: set[int] = set()
        self._waiting: dict[str, _Tracked] = {}  # requests that the next step tells the worker's side to restore
        self._running: set[str] = set()  # requests of the last step that are not over
        self._loads: list[_Load] = []
        self._loaded: set[str] = set()
        self._loader: ThreadPoolExecutor | None = None
        self._lock = threading.Condition()  # of what the loader's thread changes, too
        self._num_loading, self._is_idle = 0, False
        self._layerwise = _waits_for_layers(vllm_config)
        self._step_tokens = int(vllm_config.scheduler_config.max_num_batched_tokens)
        self.rates = open_rates(_machine(vllm_config, index))
        self._timing: list[_Timed] = []  # steps whose seconds are being measured
        self._copies: BlockCopies | None = None  # of a GPU whose pages no other rank codes
        if role == KVConnectorRole.WORKER:
            self.rank = get_tensor_model_parallel_rank() if self.ranks > 1 else 0
            device = torch.device(vllm_config.device_config.device_type or "cpu")
            self.worker = PrefixWorker(index, dtype=vllm_config.model_config.dtype, device=device, log=logger.warning)

    @property
    def requires_kv_delivery(self) -> bool:
        """No: what is not kept is computed another time."""
        return False

    # --- scheduler ------------------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """What the store holds after what vLLM has, where restoring it is worth its time; restored within the step that runs the rest, or before."""
        tracked = self._requests.get(request.request_id)
        if not _is_served(request) or not _wants_restore(request) or (tracked is not None and tracked.tries >= _MOST_TRIES):
            return 0, False
        try:
            namespace = self.index.namespace(request.cache_salt)
            found = self.index.matched(list(request.all_token_ids), namespace, num_computed_tokens)
        except Exception as error:  # a lookup never costs a request its answer
            logger.warning_once(f"ForetoldConnector: the store cannot be asked: {error}")
            return 0, False
        if found and self.index.options.load == "auto":
            self.rates.refresh()
            if not self.rates.restoring_pays(found, num_computed_tokens, self._step_tokens):
                return 0, False
        return found, found > 0 and self._waits(request)

    def _waits(self, request: Any) -> bool:
        """Whether a restore runs beside other requests' steps, instead of within one that they would wait for."""
        load = self.index.options.load
        return load == "beside" or (load == "auto" and bool(self._running - {request.request_id}))

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note what the request's next step has to restore, or that it waits for that."""
        if not _is_served(request):
            return
        tracked = self._requests.setdefault(request.request_id, _Tracked(request, self.index.namespace(request.cache_salt)))
        if num_external_tokens:
            tracked.load, tracked.tries = num_external_tokens, tracked.tries + 1
            if self._waits(request):
                tracked.blocks = list(blocks.get_block_ids()[0])
                self._waiting[request.request_id] = tracked

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """Tell the worker's side of every request in the step."""
        meta, counts = StepMetadata(), scheduler_output.num_scheduled_tokens
        self._running, meta.is_idle = set(counts), not counts
        for name in scheduler_output.finished_req_ids:
            self._waiting.pop(name, None)
            if self._requests.pop(name, None) is not None:
                meta.ended.append(name)
        for name, tracked in self._waiting.items():
            end = tracked.request.num_computed_tokens
            meta.loads.append(self._step(name, end, 0, tracked.blocks, appended=False))
        self._waiting = {}
        for new in scheduler_output.scheduled_new_reqs:
            if new.req_id in self._requests:
                meta.steps.append(self._step(new.req_id, new.num_computed_tokens, counts[new.req_id], new.block_ids[0], appended=False))
        cached = scheduler_output.scheduled_cached_reqs
        for name, computed, block_ids in zip(cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True):
            if name in self._requests:
                own = [] if block_ids is None else block_ids[0]
                meta.steps.append(self._step(name, computed, counts[name], own, appended=name not in cached.resumed_req_ids))
        return meta

    def _step(self, name: str, computed: int, scheduled: int, block_ids: Sequence[int], *, appended: bool) -> RequestStep:
        tracked = self._requests[name]
        ids, first = tracked.request.all_token_ids, tracked.told
        fresh = list(ids[first:])
        tracked.told = first + len(fresh)
        load = (computed - tracked.load, computed) if tracked.load else None
        tracked.load = 0
        known = min(computed + scheduled, tracked.told)
        return RequestStep(name, tracked.namespace, first, fresh, list(block_ids), appended, load, scheduled, known)

    def request_finished(self, request: Any, block_ids: Sequence[int]) -> tuple[bool, dict[str, Any] | None]:
        """Its blocks are free at once: filled pages have been copied."""
        self._running.discard(request.request_id)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`."""
        return self.request_finished(request, ())

    # --- worker ---------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Take views of vLLM's pages. Raises InvalidOption for pages in an order that is not known."""
        assert self.worker is not None
        config = self.worker.model.config
        numbered = {int(match[1]): tensor for name, tensor in kv_caches.items() if (match := _LAYER.search(name))}
        if not set(range(config.num_layers)) <= numbered.keys():
            raise InvalidOption(
                f"vLLM has pages of layers {sorted(numbered)}, the model {config.num_layers} layers", "use a plain decoder model"
            )
        layers = [numbered[n] for n in range(config.num_layers)]
        heads, width = config.num_kv_heads // self.ranks, config.head_dim
        self.pages = pages_of(layers, heads, width, self.block_tokens)
        options, device = self.worker.options, layers[0].device
        if device.type == "cuda" and options.save and self.ranks == 1 and PAGE_TOKENS % self.block_tokens == 0:
            token_bytes = 2 * sum(layer[:1].nbytes for layer in self.pages.keys) // self.block_tokens
            room = min(options.queue_bytes, max(_COPY_BYTES, 2 * self._step_tokens * token_bytes))
            pair = _pair_axis(list(layers[0].shape))
            views = functools.partial(views_of, num_kv_heads=heads, head_dim=width, block_tokens=self.block_tokens, pair=pair)
            self._copies = BlockCopies(layers, 1 if pair == 0 else 0, views, room)
        logger.info("ForetoldConnector: %.0f MiB of weights for predictions", self.worker.passes.weight_bytes / 2**20)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin to restore what this step's requests wait for, and what others wait for that are not in it."""
        meta = self._connector_metadata
        worker = self.worker
        if worker is None or not isinstance(meta, StepMetadata):
            return
        self._is_idle = meta.is_idle
        if not meta.is_idle:
            worker.pace.began(prompt=any(step.scheduled >= _PROMPT_TOKENS or step.load is not None for step in meta.steps))
        if self._copies is not None:
            self._copies.before_writes()
        self._time(meta)
        for name in meta.ended:
            worker.end(name)
            self._blocks.pop(name, None)
            self._offered.pop(name, None)
        self._computed = []
        for step in meta.steps:
            if step.appended:
                self._blocks.setdefault(step.name, []).extend(step.block_ids)
            else:
                self._blocks[step.name] = list(step.block_ids)
            worker.extend(step.name, step.namespace, step.token_ids)
            self._computed.append((step.name, step.computed))
            if step.load is None:
                continue
            with worker.streaming():
                load = self._restored(worker, step, self._blocks[step.name])
            if load is not None:
                self._loads.append(load)
        if not self._layerwise:
            self._write_loads(None)
        for step in meta.loads:
            worker.extend(step.name, step.namespace, step.token_ids)
            worker.hold(step.name)
            if self._loader is None:
                self._loader = ThreadPoolExecutor(1, "foretold-loader")
            begun = torch.cuda.current_stream(worker.device).record_event() if worker.device.type == "cuda" else None
            with self._lock:
                self._num_loading += 1
            self._loader.submit(self._load_beside, worker, step, begun)

    def _restored(self, worker: PrefixWorker, step: RequestStep, blocks: list[int]) -> _Load | None:
        """What a request's step has to load, as far as it can be restored; blocks that cannot be are noted."""
        assert step.load is not None
        load, (start, end) = None, step.load
        done = start
        try:
            assert self.pages is not None, "pages are registered before the first step"
            if (restored := worker.restore(step.name, start, end)) is not None:
                load, done = _Load(step, blocks, restored, self.pages.writer(blocks, start, restored.end)), restored.end
        except Exception as error:  # whatever it is: vLLM computes these blocks
            logger.warning_once(
                f"ForetoldConnector: a stored prefix could not be restored, and is computed: {type(error).__name__}: {error}"
            )
        if done < end:
            self._fail(worker, step.name, blocks, done, end)
        return load

    @property
    def _heads(self) -> tuple[int, int]:
        """First and last of the KV heads whose pages this rank has."""
        assert self.pages is not None
        return self.rank * self.pages.num_kv_heads, (self.rank + 1) * self.pages.num_kv_heads

    def _fail(self, worker: PrefixWorker, name: str, blocks: Sequence[int], start: int, end: int) -> None:
        """Have vLLM compute tokens [start, end) of a request, and keep nothing of it: its step is run again."""
        worker.metrics.failures += 1
        worker.give_up(name)
        with self._lock:  # also of the loader's thread
            self._timing = [timed for timed in self._timing if timed.ended is not None]  # what failed was no restore
            self._failed_blocks |= set(blocks[start // self.block_tokens : -(-end // self.block_tokens)])

    def _write(self, worker: PrefixWorker, load: _Load, layers: int | None) -> None:
        """Write a restore's layers up to `layers` (None: all); where that fails, its blocks are noted and nothing more is written."""
        try:
            while load.done < (load.restored.num_layers if layers is None else layers):
                load.write(load.done, load.restored.layer(load.done, *self._heads))
                load.done += 1
        except Exception as error:
            logger.warning_once(
                f"ForetoldConnector: a restored prefix could not be written, and is computed: {type(error).__name__}: {error}"
            )
            load.done = load.restored.num_layers
            self._fail(worker, load.step.name, load.blocks, load.restored.start, load.restored.end)

    def _write_loads(self, layers: int | None) -> None:
        """`_write` of all restores within this step."""
        if self.worker is not None and self._loads:
            with self.worker.streaming():
                for load in self._loads:
                    self._write(self.worker, load, layers)
            self._loads = [load for load in self._loads if not load.is_whole]

    @torch.inference_mode()
    def _load_beside(self, worker: PrefixWorker, step: RequestStep, begun: Any) -> None:
        """In the loader's thread: restore a request that waits, after what the device did before `begun`."""
        try:
            with worker.streaming(begun):
                load = self._restored(worker, step, step.block_ids)
                if load is not None:
                    self._write(worker, load, None)
        except Exception as error:
            logger.warning_once(f"ForetoldConnector: a restore beside other requests failed: {type(error).__name__}: {error}")
            assert step.load is not None
            self._fail(worker, step.name, step.block_ids, *step.load)
        worker.release(step.name)
        with self._lock:
            self._loaded.add(step.name)
            self._num_loading -= 1
            self._lock.notify_all()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests that waited and are restored, or whose blocks were reported."""
        if self.worker is not None and not self._is_idle:
            self.worker.pace.ended()
        with self._lock:
            if self._is_idle and self._num_loading and not self._loaded:  # vLLM asks without a pause while nothing runs
                self._lock.wait(_IDLE_S)
            loaded, self._loaded = self._loaded, set()
        return None, loaded or None

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Multiply a layer's keys and values out and write them, before the layer looks at them."""
        if self._loads and (match := _LAYER.search(layer_name)):
            self._write_loads(int(match[1]) + 1)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: pages are copied when they are full, after the pass."""

    def wait_for_save(self) -> None:
        """Copy the pages that this step has filled."""
        worker = self.worker
        if worker is None or self.pages is None:
            return
        for load in self._loads:  # a pass that did not wait for its layers has read what was not there
            self._fail(worker, load.step.name, load.blocks, load.restored.start, load.restored.end)
        self._loads = []
        with self._lock:
            if self._timing and self._timing[-1].ended is None:
                self._timing[-1].ended = self._now()
        for name, first, last, sinks in self._agreed(worker):
            try:
                blocks = self._blocks[name]
                if first < last:
                    rows, ready = self._to_host(blocks, first * PAGE_TOKENS, last * PAGE_TOKENS)
                    if self.rank == 0:
                        worker.keep(name, rows, ready)
                if sinks:
                    rows, ready = self._to_host(blocks, 0, NUM_SINKS)
                    if self.rank == 0:
                        worker.keep_sinks(name, rows, ready)
            except Exception as error:
                worker.give_up(name)
                logger.warning_once(f"ForetoldConnector: a request is not kept: {type(error).__name__}: {error}")
        self._computed = []

    def _agreed(self, worker: PrefixWorker) -> list[tuple[str, int, int, bool]]:
        """Requests, their pages [first, last) to be kept and whether their sinks are: as the first rank sees it, which codes for all."""
        fresh = [(name, computed) for name, computed in self._computed if computed // PAGE_TOKENS > self._offered.get(name, 0)]
        if not fresh or not worker.options.save:
            return []
        found = []
        for name, computed in fresh:
            self._offered[name] = computed // PAGE_TOKENS
            if self.rank == 0:
                try:
                    pages = worker.wanted(name, computed)
                    sinks = worker.lacks_sinks(name)
                    if pages or sinks:
                        found.append((name, pages.start, pages.stop, sinks))
                except Exception as error:
                    worker.give_up(name)
                    logger.warning_once(f"ForetoldConnector: a request is not kept: {type(error).__name__}: {error}")
        return found if self.ranks == 1 else get_tp_group().broadcast_object(found, src=0)

    def _to_host(self, blocks: Sequence[int], start: int, end: int) -> tuple[torch.Tensor, Callable[[], Any]]:
        """Tokens of all heads, [T, L, 2, G, d] on the first rank's host, and what waits until they are there. On one GPU nothing is waited for here."""
        assert self.pages is not None
        if self._copies is not None:
            return self._copies.copy(blocks, start, end)
        rows = self.pages.read(blocks, start, end).to("cpu", self.pages.keys[0].dtype)
        if self.ranks == 1:
            return rows, lambda: None
        parts = [torch.empty_like(rows) for _ in range(self.ranks)] if self.rank == 0 else None
        torch.distributed.gather(rows, parts, dst=get_tp_group().ranks[0], group=get_tp_group().cpu_group)
        return (rows if parts is None else torch.cat(parts, 3)), lambda: None

    def _now(self) -> Any:
        """A time: of the device's current stream where there is a GPU, which nothing waits for."""
        assert self.worker is not None
        if self.worker.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _time(self, meta: StepMetadata) -> None:
        """Take the seconds of earlier steps down, and begin to measure this one where it serves one prompt alone."""
        with self._lock:
            over = list(itertools.takewhile(lambda timed: timed.is_over, self._timing))
            del self._timing[: len(over)]
        for timed in over:
            if timed.ended is not None and self.rank == 0:
                self.rates.add(timed.kind, timed.tokens, timed.start, timed.seconds)
        if len(meta.steps) != 1 or meta.loads or self._num_loading:
            return
        step = meta.steps[0]
        if step.load is not None and step.scheduled < _PROMPT_TOKENS:
            self._timing.append(_Timed("restore", step.load[1] - step.load[0], step.load[0], self._now()))
        elif step.load is None and step.scheduled >= _PROMPT_TOKENS:
            self._timing.append(_Timed("compute", step.scheduled, step.computed - step.scheduled, self._now()))

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be restored since the last call."""
        with self._lock:
            failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def shutdown(self) -> None:
        """Code what waits, for at most a minute, and close the store."""
        shield_compiler()
        if self._loader is not None:
            self._loader.shutdown()
        if self._copies is not None:
            self._copies.close()
        if self.worker is not None:
            self.worker.close(_CLOSE_S)
            self.worker = None
        else:
            self.index.close()


def _is_served(request: Any) -> bool:
    """Whether a request's text says all there is to its keys and values: no adapter of weights, no pictures, no embeddings."""
    return (
        request.lora_request is None
        and not getattr(request, "mm_features", None)
        and getattr(request, "prompt_embeds", None) is None
        and request.prompt_token_ids is not None
    )


def _wants_restore(request: Any) -> bool:
    """Whether a request may get restored keys and values: `kv_transfer_params={"restore": False}` and wanted prompt log probabilities say no."""
    params = request.kv_transfer_params
    return not (getattr(request, "skip_reading_prefix_cache", False) or (isinstance(params, Mapping) and params.get("restore") is False))


def shield_compiler() -> None:
    """Let vLLM start another engine in this process: it looks into the `__dict__` of every value of every module (0.32), and llvmlite's library object,
    loaded where the codec runs compiled, takes that name for one of its functions."""
    module = sys.modules.get("llvmlite.binding.ffi")
    table = getattr(getattr(module, "lib", None), "_fntab", None)
    if isinstance(table, dict):
        table.setdefault("__dict__", {})


def _machine(vllm_config: Any, index: PrefixIndex) -> list[object]:
    """What the seconds of steps depend on."""
    kind = vllm_config.device_config.device_type or "cpu"
    device = torch.cuda.get_device_name() if kind == "cuda" else f"{platform.processor()} {platform.machine()}"
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    threads = os.environ.get("OMP_NUM_THREADS"), os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
    place = [device, platform.node(), threads, torch.__version__, vllm_version, str(model.dtype), bool(model.enforce_eager)]
    return [*place, int(parallel.tensor_parallel_size), index.options.quality, index.model.pack.digest, sorted(index.model.prints.items())]


def _waits_for_layers(vllm_config: Any) -> bool:
    """Whether every pass with a restore calls `wait_for_layer_load`: a CUDA graph of a whole pass, replayed, does not."""
    if (vllm_config.device_config.device_type or "cpu") == "cpu":
        return True
    mode = vllm_config.compilation_config.cudagraph_mode
    return mode is not None and not mode.has_full_cudagraphs()


def pages_of(layers: Sequence[torch.Tensor], num_kv_heads: int, head_dim: int, block_tokens: int) -> PagedKv:
    """Views of a model's pages by the shape that vLLM's backends give them.

    Args:
        layers: of every layer [P, G, S, 2 d] (vLLM 0.32), [P, 2, S, G, d] or [2, P, S, G, d] (versions before), with S and G in either order.

    Raises:
        InvalidOption: another shape.
    """
    shape = list(layers[0].shape)
    if layers[0].device.type != "cpu":
        return views_of(layers, num_kv_heads, head_dim, block_tokens)
    if shape[1:] == [num_kv_heads, block_tokens, 2 * head_dim]:
        views = [layer.view(shape[0], num_kv_heads, 2 * block_tokens, head_dim).chunk(2, 2) for layer in layers]
        return _packed([keys for keys, _ in views], [values for _, values in views])
    if len(shape) == 5 and shape[2:] == [num_kv_heads, block_tokens, head_dim] and 2 in shape[:2]:
        pair = 0 if shape[0] == 2 else 1
        return _packed(*([layer.select(pair, half) for layer in layers] for half in (0, 1)))
    raise _unknown(shape)


def _pair_axis(shape: Sequence[int]) -> int | None:
    """The axis of a layer's pages that tells keys from values; None where they share rows."""
    return None if len(shape) != 5 else 0 if shape[0] == 2 else 1


def views_of(layers: Sequence[torch.Tensor], num_kv_heads: int, head_dim: int, block_tokens: int, pair: int | None = None) -> PagedKv:
    """As `pages_of`, of the order in which a GPU's backends keep a page. pair: of `_pair_axis`, where the number of pages may be 2, too.

    Raises InvalidOption: another shape.
    """
    shape = list(layers[0].shape)
    if shape[1:] == [num_kv_heads, block_tokens, 2 * head_dim]:
        halves = [[part.transpose(1, 2) for part in layer.split(head_dim, -1)] for layer in layers]
        return PagedKv([keys for keys, _ in halves], [values for _, values in halves])
    inner = ([block_tokens, num_kv_heads, head_dim], [num_kv_heads, block_tokens, head_dim])
    if len(shape) == 5 and shape[2:] in inner and 2 in shape[:2]:
        heads_first = shape[2:] == inner[1] and inner[0] != inner[1]
        return PagedKv.joined(layers, pair=0 if (_pair_axis(shape) if pair is None else pair) == 0 else 1, heads_first=heads_first)
    raise _unknown(shape)


def _unknown(shape: Sequence[int]) -> InvalidOption:
    return InvalidOption(f"vLLM's pages have the shape {list(shape)}, which is not known", "use a version that docs/vllm.md names")


def _packed(keys: list[torch.Tensor], values: list[torch.Tensor]) -> PackedKv:
    """Pages [P, G, S, d] of vLLM's CPU attention: the order that its kernel writes a page in is learned by letting it write numbers."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    _, heads, size, width = keys[0].shape
    dtype = keys[0].dtype
    isa = _get_attn_isa(dtype, size, width)
    number, orders = torch.arange(size * width), []
    found = [torch.zeros(size * width, dtype=torch.int64) for _ in (0, 1)]
    for unit in (1, 128, 128 * 128):  # digits that every dtype holds exactly
        digit = (number // unit % 128).view(size, 1, width).expand(size, heads, width).to(dtype).contiguous()
        page = torch.zeros(1, heads, 2 * size, width, dtype=dtype)
        halves = page.chunk(2, 2)
        ops.cpu_attn_reshape_and_cache(digit, digit.clone(), *halves, torch.arange(size), isa)
        for half in (0, 1):
            found[half] += halves[half][0, 0].flatten().long() * unit
    for half in (0, 1):
        if not torch.equal(found[half].sort().values, number):
            raise InvalidOption(f"vLLM's CPU pages (instruction set {isa}) are in an order that is not known", "use another block size")
        orders.append(found[half].argsort())
    return PackedKv(keys, values, *orders)


__all__ = ["ForetoldConnector", "RequestStep", "StepMetadata", "pages_of", "shield_compiler"]
