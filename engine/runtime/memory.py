"""How much memory the KV pools are given, and the pools themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

from engine.config import EngineConfig
from engine.errors import InvalidOption
from engine.kv.formats import PLAIN, check_format, element_bits
from engine.kv.pool import KvPool
from engine.kv.quantized_pool import QuantizedPool
from engine.kv.text_ends import ENDS_OF_A_TEXT
from engine.kv.windowed_pool import REWIND_TOKENS, WindowedPool, WindowGroup
from engine.model.decoder import Decoder
from engine.runtime.block_runner import common_lengths
from engine.runtime.model_runner import MAX_ROWS, PROMPT_LENGTHS, bucket, decode_shape, sizes_beside, sizes_up_to
from engine.runtime.prompt_passes import PASS_ROWS, passes_bytes, request_sizes
from engine.runtime.reserve import MOST_STEP_TOKENS
from kernels.decode_layer import DecodeBuffers
from kernels.decode_layer.plans import MOST_SKINNY, choose_plan
from kernels.quantized_kv import FORMATS

POOL_TOKENS_CPU = 1 << 17
CACHED_TOKENS_CPU, CACHED_BYTES_CPU = 1 << 15, 1 << 30  # of prefixes that are kept for later requests, whichever is less
PREFILL_TOKENS = 2048  # of all prompts a step, on a CPU
CACHED_WINDOWS = 32  # ends of texts, with the windows before them, that a GPU has room for beside those of running requests
_CACHED_SHARE = 4  # of the tokens of its other layers, the part that such ends may take at most
START_TOKENS = 4096  # what a pool begins with; it doubles on demand
GPU_MEMORY_UTILIZATION = 0.9  # of a GPU's memory that an engine and all other programs may take, unless its options say otherwise
_LOGIT_COPIES = 5  # float32 tensors of a row's vocabulary that sampling holds at once: logits, scaled, cut, sorted, probabilities
_ATTENTION_PARTS = 4  # of the context that attention of 1,024 rows is done in
_LIBRARY_BYTES = 2 * (32 << 20)  # workspaces of the matrix library, one a stream
_GRAPH_BYTES = 2 << 20  # of a captured step that the driver keeps beside its buffers
_GIB = 2.0**30


class DeviceMemory(NamedTuple):
    """Bytes of a device: in all, and free; what the allocator holds and nobody uses counts as free."""

    total_bytes: int
    free_bytes: int


def device_memory(device: torch.device) -> DeviceMemory | None:
    """Measured now; None for a CPU, whose memory the system hands out as it is written."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


@dataclass(frozen=True)
class MemoryPlan:
    """What an engine will take of a device, in bytes, before its pools are allocated.

    total: of the device. used: before the pools, by other programs and by this process: weights, CUDA's context. workspace: of passes outside of
    captured steps. captured: buffers of the steps that `EngineCore.capture_steps` captures. pools: of both KV pools, for pool_tokens tokens each.
    device: its name, where there are several. windows: of layers that keep their window alone: (window, tokens, bytes), part of the pools'.
    """

    total_bytes: int
    used_bytes: int
    workspace_bytes: int
    captured_bytes: int
    pools_bytes: int
    pool_tokens: int
    device: str = ""
    windows: tuple[tuple[int, int, int], ...] = ()

    @property
    def announced_bytes(self) -> int:
        """Most of the device that is taken, by this engine and what was there before."""
        return self.used_bytes + self.own_bytes

    @property
    def own_bytes(self) -> int:
        """Of these, what comes after the weights."""
        return self.workspace_bytes + self.captured_bytes + self.pools_bytes

    def __str__(self) -> str:
        """One line for people."""
        where = f"of {self.device} " if self.device else ""
        windows = "".join(f"; windows of {own}: {tokens} tokens, {size / _GIB:.2f}" for own, tokens, size in self.windows)
        return (
            f"{where}{self.announced_bytes / _GIB:.2f} of {self.total_bytes / _GIB:.2f} GiB: {self.used_bytes / _GIB:.2f} before, KV pools "
            f"{self.pools_bytes / _GIB:.2f} ({self.pool_tokens} tokens{windows}), captured steps {self.captured_bytes / _GIB:.2f}, "
            f"workspace {self.workspace_bytes / _GIB:.2f}"
        )


def prefill_chunk(device: torch.device) -> int:
    """Tokens of one prompt a step, when nobody says otherwise.

    On a GPU a prompt of 4,096 tokens is one chunk: with the 1.5B shape an H200 takes 25 ms for it, of which launches, that longer passes hide, are 15.
    On a CPU requests share whole chunks, so they are short: with smollm2 1,024 tokens took 2.48, 2.27, 2.22 and 2.08 s in chunks of 128, 256, 512 and
    1,024.
    """
    return 4096 if device.type == "cuda" else 256


def restore_tokens(device: torch.device, chunk: int) -> int:
    """Tokens of a stored prefix that are restored in one step, where so many of a prompt are computed: for those running meanwhile both take about as
    long, as restoring is so much faster. On a GPU a piece has to be long: it waits for the device at its end."""
    return (4 if device.type == "cuda" else 2) * chunk


def plan_devices(target: Decoder, draft: Decoder | None, config: EngineConfig, *, captures: bool) -> tuple[MemoryPlan, ...]:
    """`plan_memory` of every device that holds layers of the target, measured now; () on a CPU. All have pools for the same tokens; the draft lies on
    the target's main device. Raises InvalidOption."""
    parts = [(target.device, target.config.num_layers)]
    if target.device_map is not None:
        parts = [(device, end - first) for first, end, device in target.device_map.parts]
        if all(device != target.device for device, _ in parts):
            parts.insert(0, (target.device, 0))
    plans = []
    for device, layers in parts:
        found = device_memory(device)
        if found is not None:
            beside = draft if device == target.device else None
            plan = plan_memory(target, beside, config, found, captures=captures, layers=layers)
            plans.append(replace(plan, device=str(device) if len(parts) > 1 else ""))
    tokens = min((plan.pool_tokens for plan in plans), default=0)
    return tuple(replace(plan, pool_tokens=tokens, pools_bytes=plan.pools_bytes * tokens // plan.pool_tokens) for plan in plans)


def plan_memory(
    target: Decoder, draft: Decoder | None, config: EngineConfig, memory: DeviceMemory, *, captures: bool, layers: int | None = None
) -> MemoryPlan:
    """How a device's memory is shared out. draft: the decoder with the second pool, if there is one. captures: whether steps are captured.
    layers: of the target that lie on the device; None: all.

    Without `EngineConfig.pool_tokens` the pools get what `gpu_memory_utilization` leaves beside everything else, and no more than max_batch requests of
    the longest kind can fill, unless pages are kept for later ones (prefix_sharing).

    Raises:
        InvalidOption: the pools that are asked for do not fit, or nothing is left for any.
    """
    used = memory.total_bytes - memory.free_bytes
    workspace = workspace_bytes(target, config) + (0 if draft is None else workspace_bytes(draft, config))
    captured = captured_bytes(target, draft, config) if captures else 0
    of_token = token_bytes(target, draft, config.kv_cache_dtype, layers)
    pools = PoolSizes.of(target, draft, config, layers)
    share = GPU_MEMORY_UTILIZATION if config.gpu_memory_utilization is None else config.gpu_memory_utilization
    left = int(memory.total_bytes * share) - used - workspace - captured
    tokens = config.pool_tokens
    if tokens is not None and pools.bytes(tokens) > memory.free_bytes:
        raise InvalidOption(
            f"a KV cache of {tokens} tokens takes {pools.bytes(tokens) / _GIB:.2f} GiB, and {memory.free_bytes / _GIB:.2f} GiB of the GPU are free",
            "give fewer pool_tokens, or end other programs",
        )
    if tokens is None:
        most = config.max_batch * target.config.max_position_embeddings
        tokens = pools.most_tokens(left, most)
        if not config.prefix_sharing:
            tokens = min(tokens, most)
        if tokens < min(START_TOKENS, target.config.max_position_embeddings):
            enough = (used + workspace + captured + START_TOKENS * of_token) / memory.total_bytes
            raise InvalidOption(
                f"gpu_memory_utilization {share:g} of {memory.total_bytes / _GIB:.2f} GiB leaves no room for a KV cache: {used / _GIB:.2f} GiB are "
                f"used, captured steps and workspace take {(workspace + captured) / _GIB:.2f} GiB",
                f"give {math.ceil(100 * enough) / 100:.2f}" if enough <= 1 else "use smaller models, or end other programs",
            )
    windows = tuple((own.window, count := own.pool_tokens(tokens), int(count * own.token_bytes)) for own in pools.windows)
    return MemoryPlan(memory.total_bytes, used, workspace, captured, int(pools.bytes(tokens)), tokens, windows=windows)


@dataclass(frozen=True)
class WindowLayers:
    """Layers of one window that keep pages of their own. token_bytes: of a token in them. running_tokens: that all running requests need at once.
    cached_tokens: of the ends of texts that are kept for later ones."""

    window: int
    layers: tuple[int, ...]
    token_bytes: float
    running_tokens: int
    cached_tokens: int

    @property
    def most_tokens(self) -> int:
        """Of their pool on a GPU, where the other layers' is large."""
        return self.running_tokens + self.cached_tokens

    def pool_tokens(self, tokens: int) -> int:
        """The same beside a pool of `tokens` tokens for the other layers: as few ends are kept as that holds few texts."""
        return min(tokens, self.running_tokens + min(self.cached_tokens, tokens // _CACHED_SHARE))


@dataclass(frozen=True)
class PoolSizes:
    """Bytes of a token in both pools: token_bytes where all of a text is kept, and of layers that keep a window alone."""

    token_bytes: float
    windows: tuple[WindowLayers, ...]

    @classmethod
    def of(cls, target: Decoder, draft: Decoder | None, config: EngineConfig, layers: int | None = None) -> PoolSizes:
        """Of an engine; layers: of the target that count, None for all. Raises InvalidOption as `token_bytes`."""
        windows = window_layers(target, config)
        every = target.config.num_layers if layers is None else layers
        rest = every - sum(len(own.layers) for own in windows)
        return cls(token_bytes(target, draft, config.kv_cache_dtype, rest), windows)

    def bytes(self, tokens: int) -> float:
        """Of both pools, of so many tokens."""
        return tokens * self.token_bytes + sum(own.pool_tokens(tokens) * own.token_bytes for own in self.windows)

    def most_tokens(self, room: float, most: int) -> int:
        """Largest pools that `room` bytes hold; `most` tokens where those of windows fit and nothing else takes any."""
        held = sum(own.most_tokens * own.token_bytes for own in self.windows)
        each = self.token_bytes + sum(own.token_bytes for own in self.windows)
        found = int(room / each) if each else most
        if self.windows and room >= held:
            found = max(found, int((room - held) / self.token_bytes)) if self.token_bytes else most
        return found


def step_tokens(target: Decoder, config: EngineConfig) -> int:
    """Most tokens of one request that a step writes."""
    return max(MOST_STEP_TOKENS, config.prefill_chunk or prefill_chunk(target.device))


def window_layers(target: Decoder, config: EngineConfig) -> tuple[WindowLayers, ...]:
    """The target's layers that keep pages of their own: those with a window that, with what a step adds, is shorter than the model's context; () where
    the layers lie on several devices."""
    shapes = target.layer_shapes if target.device_map is None else []
    bits = element_bits(config.kv_cache_dtype, target.config.head_dim, target.dtype)
    found = []
    for window in sorted({shape.window for shape in shapes if shape.window is not None}):
        held = window + REWIND_TOKENS + 3 * config.page_size  # three pages are held in part
        if held + step_tokens(target, config) < target.config.max_position_embeddings:
            layers = tuple(number for number, shape in enumerate(shapes) if shape.window == window)
            running = config.max_batch * (held + MOST_STEP_TOKENS) + max(PREFILL_TOKENS, step_tokens(target, config))
            kept = CACHED_WINDOWS * held if config.prefix_sharing else 0
            found.append(WindowLayers(window, layers, len(layers) * target.config.kv_width * bits / 8, running, kept))
    return tuple(found)


def token_bytes(target: Decoder, draft: Decoder | None, kv_format: str = PLAIN, layers: int | None = None) -> float:
    """Of a token in both pools. kv_format: of the target's; layers: of the target that count, None for all. Raises InvalidOption when the target cannot
    have the format."""
    check_format(kv_format, target.config.head_dim)
    models = [(target, kv_format, target.config.num_layers if layers is None else layers)]
    if draft is not None:
        models.append((draft, PLAIN, draft.config.num_layers))
    return sum(count * m.config.kv_width * element_bits(format_, m.config.head_dim, m.dtype) / 8 for m, format_, count in models)


def workspace_bytes(decoder: Decoder, config: EngineConfig) -> int:
    """Most that a pass outside of captured steps holds at once: activations of a step's prompt tokens, logits of all requests, the library's own."""
    c = decoder.config
    tokens = max(PREFILL_TOKENS, config.prefill_chunk or prefill_chunk(decoder.device))
    rows = max(config.max_batch, MAX_ROWS)
    return tokens * _activation_bytes(decoder) + rows * c.vocab_size * 4 * _LOGIT_COPIES + _LIBRARY_BYTES


def _activation_bytes(decoder: Decoder) -> int:
    """Most that a token's activations take at once."""
    c = decoder.config
    gated = c.intermediate_size * max(1, c.experts_per_token)
    return (4 * c.hidden_size + 2 * (c.num_heads + c.num_kv_heads) * c.head_dim + 3 * gated) * decoder.dtype.itemsize


def captured_bytes(target: Decoder, draft: Decoder | None, config: EngineConfig) -> int:
    """Buffers of the steps that are captured at the start: those of greedy requests, and of requests under the model's own sampling defaults."""
    found, steps = 0, 0
    passes = [(target, _target_steps(config, draft is not None))]
    if draft is not None:
        passes.append((draft, _draft_steps(config)))
    for decoder, shapes in passes:
        for batch, length, logits in shapes:
            found += step_bytes(decoder, batch, length, logits=logits, page_size=config.page_size, deterministic=config.deterministic)
            steps += 1
        if not config.deterministic:
            found += passes_bytes(decoder, logits=decoder is target) + _shared_bytes(decoder)
            steps += len(PASS_ROWS) * len(request_sizes(config.max_batch))
    return found + steps * _GRAPH_BYTES


def _shared_bytes(decoder: Decoder) -> int:
    """Activations of the largest pass of a prompt that is captured, which graphs share, with the library's own. Attention keeps a float32 result for
    each part of the context."""
    parts = _ATTENTION_PARTS * decoder.config.num_heads * decoder.config.head_dim * torch.float32.itemsize
    return PASS_ROWS[-1] * (_activation_bytes(decoder) + parts) + _LIBRARY_BYTES


def _target_steps(config: EngineConfig, drafts: bool) -> Iterator[tuple[int, int, bool]]:
    """(requests, new tokens of each, whether logits are kept) of the target's captured passes."""
    most = MOST_SKINNY if config.deterministic else MAX_ROWS
    for batch in sizes_up_to(min(config.max_batch, MAX_ROWS)):
        for sampled in (False, True):
            if batch <= most:
                yield batch, 1, True
            for length in common_lengths(batch):
                if batch * (1 + length) <= most:
                    yield from [(batch, 1 + length, sampled)] * (2 if drafts else 1)
        for length in PROMPT_LENGTHS if not config.deterministic else ():
            if batch * length <= most:
                yield batch, length, True
    of_requests = 0 if drafts else bucket(min(config.max_batch, MAX_ROWS))  # steps that keep states for a draft head are others
    for batch in sizes_beside(config.max_batch) if not config.deterministic else ():
        if batch > of_requests:
            yield from [(batch, 1, True)] * 2


def _draft_steps(config: EngineConfig) -> Iterator[tuple[int, int, bool]]:
    """The same of the draft's passes: one for each draft of a block, and prompts."""
    most = MOST_SKINNY if config.deterministic else MAX_ROWS
    for batch in sizes_up_to(min(config.max_batch, MAX_ROWS)):
        for sampled in (False, True):
            for length in common_lengths(batch):
                if batch * (1 + length) <= most:
                    yield batch, 2, sampled
                    yield from [(batch, 1, sampled)] * (length - 1)
        for length in PROMPT_LENGTHS if not config.deterministic else ():
            if batch * length <= most:
                yield batch, length, False


def step_bytes(decoder: Decoder, batch: int, length: int, *, logits: bool, page_size: int, deterministic: bool = False) -> int:
    """Of a captured step's buffers, and of what sampling from its logits holds."""
    shape = decode_shape(decoder.config)
    plan = choose_plan(shape, batch * length, batch=batch, deterministic=deterministic)
    pages = min(64, -(-decoder.config.max_position_embeddings // page_size))
    buffers = DecodeBuffers.allocate(shape, batch, length, pages, page_size, dtype=decoder.dtype, device="meta", logits=logits, plan=plan)
    held = [value for field in fields(buffers) if isinstance(value := getattr(buffers, field.name), torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def most_cached_pages(pool: KvPool) -> int:
    """Pages that known beginnings may keep: a GPU's pool has its size at once, all of it; on a CPU, where a pool grows with what is kept, a few."""
    if pool.device.type == "cuda":
        return pool.max_pages
    return min(pool.max_pages, CACHED_TOKENS_CPU // pool.page_size, max(1, CACHED_BYTES_CPU // max(1, pool.page_bytes)))


def most_cached_ends(pool: KvPool) -> int:
    """Windows that known texts may keep, of those that others went on from and of the rest each: as many as fit the memory of `most_cached_pages`."""
    if not isinstance(pool, WindowedPool):
        return 1
    if pool.device.type == "cuda":
        return CACHED_WINDOWS // 2
    tokens = sum(own.window + REWIND_TOKENS for own in pool.windowed)
    size = sum((own.window + REWIND_TOKENS) / pool.page_size * own.pool.page_bytes for own in pool.windowed)
    return max(2 * ENDS_OF_A_TEXT, int(min(CACHED_TOKENS_CPU / tokens, CACHED_BYTES_CPU / size)) // 2)


def page_counts(tokens: int, page_size: int) -> tuple[int, int]:
    """Pages of page_size tokens that a pool for `tokens` tokens starts with, and grows to. Raises InvalidOption for less than one page."""
    if tokens < page_size:
        raise InvalidOption(f"pool_tokens cannot be {tokens}", f"give at least one page of {page_size} tokens")
    most = tokens // page_size
    return min(most, -(-START_TOKENS // page_size)), most


def open_pool(
    target: Decoder,
    kv_format: str,
    num_pages: int,
    page_size: int,
    max_pages: int,
    *,
    means: torch.Tensor | None = None,
    windows: Sequence[WindowLayers] = (),
    step_tokens: int = 0,
) -> KvPool:
    """A pool for the target's KV in one of `KV_CACHE_DTYPES`.

    means: [L, 2, G, d] float32, channel means of keys before rotation and of values; needed by quantised formats only. windows: layers that keep pages
    of their own; step_tokens: of one request that a step writes at most, which these have to hold beside the window.

    Raises:
        InvalidOption: see `check_format`, or a quantised format without means.
    """
    check_format(kv_format, target.config.head_dim)
    if kv_format != PLAIN and target.device_map is not None:
        raise InvalidOption(f"the KV format {kv_format} lies on one device, and the target's layers on several", "use bf16, or one device")
    if kv_format != PLAIN and means is None:
        raise InvalidOption(f"the KV format {kv_format} takes off channel means, and there are none", "measure them, or use bf16")

    def part(layers: Sequence[int], start: int, most: int) -> KvPool:
        if means is None or kv_format == PLAIN:
            return target.new_pool(start, page_size, max_pages=most, num_layers=len(layers))
        own = means[list(layers)].to(target.device)
        return QuantizedPool(FORMATS[kv_format], own, start, page_size, dtype=target.dtype, max_pages=most)

    every = range(target.config.num_layers)
    if not windows:
        return part(every, num_pages, max_pages)
    groups = []
    for own in windows:
        start, most = num_pages, max_pages
        if target.device.type == "cuda":
            start = most = -(-own.pool_tokens(max_pages * page_size) // page_size)
        else:  # grows with what is held, twice a request's at first: pages that follow one another are read faster
            start = min(start, 2 * -(-(own.window + REWIND_TOKENS + step_tokens) // page_size))
        groups.append(WindowGroup(own.window, own.layers, part(own.layers, start, most)))
    rest = sorted(set(every).difference(*(own.layers for own in windows)))
    config = target.config
    return WindowedPool(rest, part(rest, num_pages, max_pages), groups, config.num_kv_heads, config.head_dim, step_tokens)
