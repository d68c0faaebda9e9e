"""How a GPU's memory is shared out, on a made-up device."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from draft.source import NgramSource
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import InvalidOption
from engine.runtime import memory
from engine.runtime.block_runner import BlockDecoding
from engine.runtime.device_sampling import Drawing
from engine.runtime.memory import DeviceMemory, captured_bytes, plan_memory, step_bytes, token_bytes, workspace_bytes
from engine.runtime.model_runner import GraphedDecoder
from engine.runtime.prompt_passes import passes_bytes

GIB = 1 << 30


@pytest.fixture(scope="module")
def decoders(random_decoder):
    return random_decoder(0, num_hidden_layers=3), random_decoder(1, num_hidden_layers=2)


@pytest.fixture
def device(monkeypatch):
    """A device of 8 GiB, 7 of them free, in place of the CPU."""
    found = DeviceMemory(8 * GIB, 7 * GIB)
    monkeypatch.setattr(memory, "device_memory", lambda device: found)
    return found


@pytest.mark.parametrize("share", [0.5, 0.9, None])
def test_pools_get_what_the_share_leaves_beside_everything_else(decoders, share):
    target, draft = decoders
    config = EngineConfig(max_batch=4, gpu_memory_utilization=share, prefix_sharing=True)
    plan = plan_memory(target, draft, config, DeviceMemory(8 * GIB, 7 * GIB), captures=True)
    assert plan.used_bytes == GIB and plan.workspace_bytes == workspace_bytes(target, config) + workspace_bytes(draft, config)
    assert plan.captured_bytes == captured_bytes(target, draft, config) > 0
    limit = 8 * GIB * (share or memory.GPU_MEMORY_UTILIZATION)
    assert limit - token_bytes(target, draft) < plan.announced_bytes <= limit
    assert plan.pools_bytes == plan.pool_tokens * token_bytes(target, draft)
    alone = plan_memory(target, None, config, DeviceMemory(8 * GIB, 7 * GIB), captures=False)
    assert alone.captured_bytes == 0 and alone.pool_tokens > plan.pool_tokens
    assert f"({plan.pool_tokens} tokens)" in str(plan) and "of 8.00 GiB: 1.00 before" in str(plan)


def test_pools_are_no_larger_than_running_requests_can_fill(decoders):
    target, _ = decoders
    config = EngineConfig(max_batch=4, prefix_sharing=False)
    plan = plan_memory(target, None, config, DeviceMemory(8 * GIB, 7 * GIB), captures=False)
    assert plan.pool_tokens == 4 * target.config.max_position_embeddings
    named = plan_memory(target, None, dataclasses.replace(config, pool_tokens=640), DeviceMemory(8 * GIB, 7 * GIB), captures=False)
    assert named.pool_tokens == 640


def test_the_bytes_of_a_token_are_those_of_its_pools(decoders):
    target, draft = decoders
    pools = target.new_pool(8, 16), draft.new_pool(8, 16)
    assert sum(pool.bytes for pool in pools) == 8 * 16 * token_bytes(target, draft)


def test_what_is_refused(decoders):
    target, _ = decoders
    full = DeviceMemory(GIB, GIB // 100)
    with pytest.raises(InvalidOption, match=r"gpu_memory_utilization 0.9 of 1.00 GiB leaves no room.*0.99 GiB are used"):
        plan_memory(target, None, EngineConfig(), full, captures=False)
    with pytest.raises(InvalidOption, match=r"use smaller models, or end other programs"):
        plan_memory(target, None, EngineConfig(), full, captures=False)
    with pytest.raises(InvalidOption, match=r"give 0\.\d\d") as low:
        plan_memory(target, None, EngineConfig(gpu_memory_utilization=0.1), DeviceMemory(8 * GIB, 7 * GIB), captures=False)
    enough = float(low.value.remedy.removeprefix("give "))
    plan_memory(target, None, EngineConfig(gpu_memory_utilization=enough), DeviceMemory(8 * GIB, 7 * GIB), captures=False)
    with pytest.raises(InvalidOption, match=r"a KV cache of 1000000000 tokens takes"):
        plan_memory(target, None, EngineConfig(pool_tokens=10**9), DeviceMemory(8 * GIB, 7 * GIB), captures=False)
    for share in (0, -0.5, 1.01, "0.9", True, float("nan")):
        with pytest.raises(InvalidOption, match="gpu_memory_utilization cannot be"):
            EngineConfig(gpu_memory_utilization=share)
    with pytest.raises(InvalidOption, match="both say"):
        EngineConfig(gpu_memory_utilization=0.5, pool_tokens=4096)
    with pytest.raises(InvalidOption, match="the models are on a CPU"):
        Engine(target, gpu_memory_utilization=0.5)


def test_an_engine_is_as_large_as_its_plan(decoders, device):
    target, draft = decoders
    engine = Engine(target, draft=draft, max_batch=2, gpu_memory_utilization=0.8)
    [plan] = engine.core.memory_plans
    assert engine.core.pool.max_pages == plan.pool_tokens // 64 and engine.core.draft_pool.max_pages == plan.pool_tokens // 64
    assert engine.generate([[3, 4, 5]])[0].token_ids
    assert Engine(target).core.memory_plans[0].pool_tokens > 0


@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_captured_bytes_are_those_of_the_buffers_that_captures_allocate(decoders, kind, monkeypatch):
    target, draft = decoders
    engine = Engine(target, draft=draft if kind == "model" else NgramSource(), max_batch=4, pool_tokens=4096, page_size=16)
    core = engine.core
    core.runner = GraphedDecoder(target, core.pool, capture=False)
    cached = GraphedDecoder(draft, core.draft_pool, capture=False) if kind == "model" else None
    core.drafter = core.source.drafter(core.runner, core.draft_pool, cached=cached, deterministic=False)
    core.scheduler.blocks = BlockDecoding(core.runner, core.drafter)
    allocated, allocate = [], GraphedDecoder._allocate

    def held(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))

    def counted(self, key, **options):
        step = allocate(self, key, **options)
        allocated.append(held(vars(step.buffers).values()))
        return step

    monkeypatch.setattr(GraphedDecoder, "_allocate", counted)
    assert Drawing.of([core.sampling_defaults.params()], 96).greedy, (
        "the model's defaults here: one way to draw, of the two that are counted"
    )
    core.capture_steps()
    counts = captured_bytes(target, draft if kind == "model" else None, core.config)
    graphs = memory._GRAPH_BYTES
    monkeypatch.setattr(memory, "_GRAPH_BYTES", 0)
    buffers = captured_bytes(target, draft if kind == "model" else None, core.config)
    assert counts > buffers and (counts - buffers) % graphs == 0
    models = (target, draft) if kind == "model" else (target,)
    runners = (core.runner, cached) if kind == "model" else (core.runner,)
    of_passes = sum(passes_bytes(model, logits=model is target) for model in models)
    assert 0.3 * of_passes < sum(held(runner._prompts._buffers.values()) for runner in runners) < of_passes
    of_steps = buffers - of_passes - sum(memory._shared_bytes(model) for model in models)
    assert 0.3 * of_steps < sum(allocated) < of_steps


def test_a_steps_bytes_grow_with_its_logits(decoders):
    target, _ = decoders
    without, with_ = (step_bytes(target, 4, 3, logits=logits, page_size=64) for logits in (False, True))
    assert with_ - without == 12 * target.config.vocab_size * 4
