"""From a user's draft option to a loaded draft source; and what drafting costs and drafts with, remembered from one start to the next."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draft.early_exit import default_exit_layer
from draft.exit_copy import ExitCopyDrafter
from draft.head_file import is_draft_head
from draft.head_file import read_config as read_draft_head_config
from draft.policy import CostModel, Curve
from draft.pretrained import shipped_draft_head
from draft.source import DraftHeadSource, DraftSource, EarlyExitSource, ModelSource, NgramSource
from engine.config import check_memory_share
from engine.errors import InvalidOption, ModelNotFound
from engine.hub.cache import CacheFolder
from engine.hub.draft_copies import CopiesFile
from engine.hub.resolve import resolve_model
from engine.inputs import is_file, named_path, read_json_object
from engine.model.config import DecoderConfig, read_config
from engine.model.decoder import Decoder
from engine.model.device_map import DeviceMap, spread_layers, weight_bytes
from engine.model.linear import can_multiply_compiled, compiled_share, know_compiled_share, times_choose
from engine.runtime.core import EngineCore
from engine.runtime.draft_copy import CopiedDecoder
from engine.runtime.drafters import load_draft_head
from engine.runtime.memory import GPU_MEMORY_UTILIZATION, device_memory
from engine.runtime.sampling_defaults import SamplingDefaults
from kernels.cpu_decode import compiled_loads
from kernels.cpu_decode.file_blocks import formats

if TYPE_CHECKING:
    from engine.hub.gguf_blocks import GgufBlocks

COSTS_KEPT_S = 86_400.0
"""Age up to which remembered costs are taken as they are; older ones are used too, and measured again after the first tokens."""
_COSTS_VERSION = 5  # 5: on a CPU fewer forwards are timed, on processors that multiply matrices up to 64 rows
_PRODUCTS_VERSION = 4  # 4: products of matrices


@dataclass(frozen=True)
class DraftChoice:
    """What a user's draft option stands for: the folder of a model or of a draft head, an early exit after so many layers, the
    requests' own text, or none of these."""

    model: Path | None = None
    head: Path | None = None
    exit_layer: int | None = None
    ngram: bool = False

    def load(self, target: Decoder) -> DraftSource | None:
        """In the target's dtype, on its device, multiplied as its weights are. Raises what `Decoder.from_pretrained` and `load_draft_head` raise."""
        if self.model is not None:
            decoder = Decoder.from_pretrained(self.model, dtype=target.dtype, device=target.device, gemm=target.gemm)
            return ModelSource(decoder, self.model)
        if self.head is not None:
            return load_draft_head(self.head, target)
        if self.ngram:
            return NgramSource()
        return None if self.exit_layer is None else EarlyExitSource(self.exit_layer)

    def weight_bytes(self, target: DecoderConfig, dtype: torch.dtype) -> int:
        """Of the weights that drafts need beside the target's, as their configs say. Raises what reading these raises."""
        if self.model is not None:
            first, layers = weight_bytes(DecoderConfig.from_hf(read_config(self.model)), dtype)
            return first + sum(layers)
        if self.head is None:
            return 0
        head = read_draft_head_config(self.head)
        head.check_target(target)
        shape = target.last_layers(min(head.num_layers, target.num_layers), vocab_size=head.vocab_size, tie_word_embeddings=True)
        first, layers = weight_bytes(shape, dtype)  # one matrix of its vocabulary, which is the head's
        return first + sum(layers) + head.join_elements(target.hidden_size) * dtype.itemsize


def choose_draft(draft: str | Path, target: DecoderConfig, exit_layer: int | None = None) -> DraftChoice:
    """Resolve a draft option: "none"; "ngram", the requests' own text alone;
    "trunk", which is the draft head that ships for a target of this shape, if one does, and else an early exit;
    the folder of a draft head; a model as `resolve_model` takes it. exit_layer: early exit after so many of the target's layers, untrained.

    Raises:
        InvalidOption, ModelNotFound, DownloadFailed, BadDraftHead.
    """
    named_path(draft, "draft")
    if exit_layer is not None and str(draft) != "trunk":
        raise InvalidOption(f"exit_layer={exit_layer} means nothing with draft {str(draft)!r}", 'use draft="trunk", or leave it out')
    if str(draft) == "none":
        return DraftChoice()
    if str(draft) == "ngram":
        return DraftChoice(ngram=True)
    if str(draft) == "trunk":
        shipped = shipped_draft_head(target) if exit_layer is None else None
        if shipped is not None:
            return DraftChoice(head=shipped)
        return DraftChoice(exit_layer=default_exit_layer(target.num_layers) if exit_layer is None else exit_layer)
    folder = Path(draft).expanduser()
    return DraftChoice(head=folder) if is_draft_head(folder) else DraftChoice(model=resolve_model(draft))


def choose_device_map(
    target: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    devices: Sequence[torch.device] | None,
    share: float | None = None,
    draft: DraftChoice | None = None,
) -> DeviceMap | None:
    """The target's layers over the devices that were named, or over all GPUs where it does not fit a single one beside its draft; None: on one device,
    as where `device` has a number.

    share: of each GPU's memory that may be used. draft: what lies on the first device too; None: nothing. Raises InvalidOption where the share is none,
    or the weights do not fit; and what reading the draft's config raises.
    """
    check_memory_share(share)
    share = GPU_MEMORY_UTILIZATION if share is None else share

    def beside() -> int:
        return 0 if draft is None else draft.weight_bytes(target, dtype)

    if devices is None:
        memory = device_memory(device)
        if memory is None or device.index is not None or torch.cuda.device_count() < 2:
            return None
        first, layers = weight_bytes(target, dtype)
        if first + sum(layers) + beside() <= share * memory.free_bytes:
            return None
        devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if len(devices) == 1:
        return None
    found = [device_memory(own) for own in devices]
    # a CPU's is the same for all: equal parts
    free = [1 << 50 if memory is None else int(share * memory.free_bytes) for memory in found]
    return spread_layers(target, dtype, devices, free, beside_bytes=beside())


def read_sampling_defaults(folder: Path | None) -> SamplingDefaults:
    """What generation_config.json of a model's folder says of sampling; nothing where there is none. Raises ModelNotFound."""
    path = None if folder is None else folder / "generation_config.json"
    if path is None or not is_file(path):
        return SamplingDefaults()
    return SamplingDefaults.of(read_json_object(path, ModelNotFound, "correct it, or download the model again"), str(path))


def quantized_blocks(spec: str | Path, dtype: torch.dtype, device: torch.device) -> GgufBlocks:
    """The blocks of a GGUF file that a target's weights can stay in.

    Raises:
        InvalidOption: the target is no GGUF file here, dtype or device are others than bfloat16 and the CPU, or llvmlite is missing.
    """
    if dtype != torch.bfloat16 or device.type != "cpu":
        raise InvalidOption(
            "quantised weights are multiplied on a CPU, with bfloat16 beside them", "leave out --weights, --dtype and --device"
        )
    path = Path(spec).expanduser()
    if path.suffix != ".gguf" or not is_file(path):
        raise InvalidOption(
            f"weights can stay quantised where the target is a GGUF file, and {str(spec)!r} is none", "give --target FILE.gguf"
        )
    if not can_multiply_compiled(dtype, device):
        raise InvalidOption("quantised weights need compiled products", 'install llvmlite: pip install "foretold[cpu]"')
    if not compiled_loads():
        raise InvalidOption(
            "quantised weights need compiled products, and they could not be loaded: memory cannot be made executable, or llvmlite is damaged",
            'install it again: pip install --force-reinstall "foretold[cpu]"',
        )
    from engine.hub.gguf_blocks import GgufBlocks  # its libraries take time, and few need them

    return GgufBlocks(path, formats())


# --- remembered measurements ---------------------------------------------------------------------------------------------------


def remember_products(dtype: torch.dtype, device: torch.device) -> None:
    """Have this process choose between compiled products and oneDNN's as the first one on this machine did, with as many threads: a choice by times
    that two processes measure could differ, and their texts with it."""
    if not times_choose(dtype, device):
        return
    threads = torch.get_num_threads()
    facts = (_PRODUCTS_VERSION, _processor(), torch.__version__, threads)
    cache, name = CacheFolder("products"), f"{sha256(repr(facts).encode()).hexdigest()[:24]}.json"
    content = cache.read(name, most_bytes=1 << 10)
    with suppress(ValueError, TypeError, KeyError, RecursionError):  # one that is damaged counts as none
        if content is not None:
            share = float(json.loads(content)["compiled_share"])
            if share > 0:
                know_compiled_share(threads, share)
                return
    if math.isfinite(share := compiled_share(threads)):
        cache.write(name, json.dumps({"compiled_share": share}).encode())


def remember_costs(core: EngineCore) -> None:
    """Give a core the costs of drafting that an earlier process measured on this machine, and keep those it measures itself.

    They are known by what they depend on: processor, threads, PyTorch, dtype, KV format and mode, and the shapes and bytes of target and draft. A
    file that is damaged counts as none.
    """
    if core.drafter is None or core.cost_model is not None:
        return
    cache, name = CacheFolder("costs"), f"{_costs_key(core)}.json"
    content = cache.read(name, most_bytes=1 << 20)
    found = None if content is None else _read_costs(content)
    if found is not None:
        core.cost_model, measured = found
        core.costs_stale = not 0 <= time.time() - measured <= COSTS_KEPT_S

    def keep(costs: CostModel, free: bool) -> None:
        # measured beside other programs, they serve until the next process measures them again
        cache.write(name, json.dumps({"costs": asdict(costs), "measured_unix_s": time.time() if free else 0.0}).encode())

    core.on_costs = keep


def remember_copies(core: EngineCore) -> None:
    """Have a core draft from the copies of weights that an earlier process made of the same bytes, and keep those it makes itself.

    Nothing is kept where the target's weights did not come from files, or the draft head has no digest.
    """
    if not isinstance(core.drafter, ExitCopyDrafter) or not isinstance(core.source, DraftHeadSource):
        return
    target, digest = core.target, core.source.config.digest
    if target.weight_sum is None or not digest:
        return
    for copied in (core.drafter.copy.first, core.drafter.copy.head.decoder):
        if isinstance(copied, CopiedDecoder):
            # a draft head may share its head's rows with the target
            copied.kept = CopiesFile((*copied.facts, target.weight_sum, repr(target.config), digest))


def _costs_key(core: EngineCore) -> str:
    assert core.source is not None and core.drafter is not None
    config, cached = core.config, core.source.cached_decoder
    facts = [
        _COSTS_VERSION,
        _processor() if core.device.type == "cpu" else torch.cuda.get_device_name(core.device),
        torch.__version__,
        torch.get_num_threads(),
        str(core.dtype),
        (config.kv_cache_dtype, config.page_size, config.deterministic),
        (repr(core.target.config), core.target.weight_bytes),  # quantised weights multiply several rows at another price
        type(core.runner).__name__,
        (type(core.source).__name__, core.exit_layer, core.drafter.runs_last_draft, core.drafter.weight_bytes),
        None if cached is None else repr(cached.config),
    ]
    return sha256(repr(facts).encode()).hexdigest()[:24]


@functools.cache
def _processor() -> str:
    """Name of the machine, its processor and the number of cores this process may use; nothing is started to find out."""
    model = ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.node()} {platform.machine()} {model} {cores}"


def _read_costs(content: bytes) -> tuple[CostModel, float] | None:
    """Costs and the time they were measured at, from a file's content; None where it holds none."""
    try:
        found = json.loads(content)
        costs, measured = found["costs"], float(found["measured_unix_s"])
        last = None if costs["last"] is None else _curve(costs["last"])
        return CostModel(_curve(costs["draft"]), _curve(costs["verify"]), bool(costs["runs_last_draft"]), last), measured
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def _curve(points: Sequence[Any]) -> Curve:
    """Raises ValueError or TypeError for points that no measurement gives."""
    curve = tuple((int(tokens), float(seconds)) for tokens, seconds in points)
    tokens = [0, *(n for n, _ in curve)]
    if not curve or any(a >= b for a, b in pairwise(tokens)):
        raise ValueError("no ascending numbers of tokens")
    if not all(0 < seconds < math.inf for _, seconds in curve):
        raise ValueError("no seconds")
    return curve
