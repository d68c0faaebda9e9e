"""The connector inside the real vLLM. Skipped where vLLM is not installed, or the default pair is not in the cache: `pip install "foretold[vllm]"` in
an environment of its own, then `python -m pytest tests/engine/connectors/test_vllm.py`.

One process serves all tests: starting vLLM takes longer than they do.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import random
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm", reason="vLLM is not installed here")
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import supports_hma
from vllm.lora.request import LoRARequest

from codec.spec import QUALITY_DIVERGENCE
from engine.connectors.vllm import ForetoldConnector, _is_served, pages_of
from engine.errors import InvalidOption
from engine.hub.cache import cache_home
from scripts.bench_vllm import tiny_codec

FOLDERS = sorted((cache_home() / "models").glob("smollm2-135m-instruct-*"))
pytestmark = pytest.mark.skipif(not FOLDERS, reason="the default pair is not in the cache: python -m engine.generate fetches it")
NEW_TOKENS = 24
KL_BOUND = 1.3 * QUALITY_DIVERGENCE["balanced"]  # what is promised is a mean; some 70 tokens of three texts lie around it


def load(store: Path | None, settings=None, **options) -> LLM:
    """vLLM with the connector, or without. settings: of vLLM."""
    extra = {"store": str(store), "min_tokens": 128, "load": "within"} | options  # what a test restores depends on no machine's speed
    transfer = KVTransferConfig(
        kv_connector="ForetoldConnector",
        kv_connector_module_path="engine.connectors.vllm",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=extra,
    )
    common = {
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_batched_tokens": 512,  # prompts run in chunks
        "max_logprobs": 50,
        "enable_prefix_caching": True,
        "kv_transfer_config": None if store is None else transfer,
        "disable_log_stats": True,
    }
    return LLM(str(FOLDERS[0]), **(common | (settings or {})))


def close(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Token ids of pieces of the standard library, each of 700 or fewer."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(FOLDERS[0])(inspect.getsource(inspect.getmodule(ArgumentParser))).input_ids  # type: ignore[arg-type]
    return [ids[700 * n : 700 * n + size] for n, size in enumerate((700, 600, 520))]


def run(llm: LLM, prompts, new_tokens: int = NEW_TOKENS, **options) -> list:
    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, logprobs=50, **options)
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def texts(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def worker():
    return get_kv_transfer_group().worker


def scheduler(llm: LLM):
    return llm.llm_engine.engine_core.engine_core.scheduler


def switch(llm: LLM, **options) -> None:
    """Change the options of a running engine's connector, of both its sides."""
    for index in (worker().index, scheduler(llm).connector.index):
        index.options = replace(index.options, **options)


def restorable(ids: list[int]) -> int:
    """Tokens of a prompt that a store with all its pages gives back."""
    return min(len(ids) // 64 * 64, len(ids) - 1)


@pytest.fixture(scope="module")
def twice(prompts):
    """Outputs of vLLM without the connector, computed and then from its own cache: what bf16 makes of the two may differ, by the processor."""
    llm = load(None)
    outputs = run(llm, prompts), run(llm, prompts)
    close(llm)
    return outputs


@pytest.fixture(scope="module")
def plain(twice):
    """Outputs of vLLM without the connector."""
    return twice[0]


@pytest.fixture(scope="module")
def store(prompts, plain, twice, tmp_path_factory) -> Path:
    """A store that one engine has filled; its answers were those without us, and those of a second request, from vLLM's own cache, as well."""
    folder = tmp_path_factory.mktemp("vllm") / "store"
    llm = load(folder)
    assert texts(run(llm, prompts)) == texts(plain) and worker().wait(300)
    again = run(llm, prompts)
    assert texts(again) == texts(twice[1]) and all(output.num_cached_tokens >= 512 for output in again[:2])
    saved = worker().metrics
    assert saved.restored_tokens == 0 and saved.saved_tokens == sum((len(ids) + NEW_TOKENS) // 64 * 64 for ids in prompts)
    assert saved.saved_bytes * 50 < saved.saved_tokens * 30 * 2 * 3 * 64 * 2
    close(llm)
    return folder


def divergence(found, truth) -> float:
    """KL(truth || found) over the tokens that both list, nats a position, as far as both went the same way."""
    total, count = 0.0, 0
    for own, other in zip(found, truth, strict=True):
        for p, q, a, b in zip(other.outputs[0].logprobs, own.outputs[0].logprobs, *texts([other, own]), strict=True):
            both = p.keys() & q.keys()
            total += sum(math.exp(p[t].logprob) * (p[t].logprob - q[t].logprob) for t in both)
            count += 1
            if a != b:
                break
    return total / count


def test_after_a_restart_prefixes_come_back(store: Path, prompts, plain) -> None:
    llm = load(store)
    found = run(llm, prompts)
    for output, ids in zip(found, prompts, strict=True):
        assert output.num_cached_tokens == restorable(ids)
    metrics = worker().metrics
    assert metrics.failures == 0 and metrics.restored_tokens == sum(output.num_cached_tokens for output in found)
    assert divergence(found, plain) < KL_BOUND
    assert scheduler(llm).connector._running == set()  # a restore of a request that is alone runs within its step
    # beside the steps of other requests
    switch(llm, load="beside")
    llm.reset_prefix_cache()
    beside = run(llm, prompts)
    assert [output.num_cached_tokens for output in beside] == [restorable(ids) for ids in prompts]
    assert divergence(beside, plain) < KL_BOUND and metrics.failures == 0
    # what was measured to be faster computed is computed
    rates = scheduler(llm).connector.rates
    assert rates is get_kv_transfer_group().rates  # of one process
    switch(llm, load="auto")
    for pays in (False, True, True):  # a process's first restore is not measured
        rates.restoring_pays = lambda *_, pays=pays: pays
        llm.reset_prefix_cache()
        assert bool(run(llm, prompts[:1])[0].num_cached_tokens) == pays
    assert sum(map(len, rates._found["restore"].values())) > 0
    switch(llm, load="within")
    # what returns is the prompt, from a token of vLLM's own cache on
    llm.reset_prefix_cache()
    run(llm, [prompts[0][:300]], extra_args={"kv_transfer_params": {"restore": False}})
    later = run(llm, [prompts[0]])
    assert later[0].num_cached_tokens == restorable(prompts[0]) and divergence(later, plain[:1]) < KL_BOUND
    # a request may ask to be computed
    llm.reset_prefix_cache()
    refused = run(llm, prompts, extra_args={"kv_transfer_params": {"restore": False}})
    assert texts(refused) == texts(plain) and not any(output.num_cached_tokens for output in refused)
    # another salt sees nothing
    llm.reset_prefix_cache()
    params = SamplingParams(max_tokens=1, temperature=0)
    salted = llm.generate([{"prompt_token_ids": prompts[0], "cache_salt": "other"}], params, use_tqdm=False)
    assert salted[0].num_cached_tokens == 0
    close(llm)


def test_two_engines_serve_from_one_store(store: Path, prompts, plain, tmp_path) -> None:
    """The second one goes on where the first one's text ended, and keeps what is new."""
    longer = [*prompts[2], *prompts[1][:300]]
    llm = load(store)
    first = run(llm, [longer])[0]
    assert first.num_cached_tokens == 512 and worker().wait(300)
    assert worker().metrics.saved_tokens >= 256
    close(llm)
    llm = load(store)
    assert run(llm, [longer])[0].num_cached_tokens == restorable(longer)
    close(llm)


def test_random_damage_costs_no_answer(store: Path, prompts) -> None:
    """Files are damaged before requests, or between the scheduler's lookup and the worker's: the text is as without us, or as from whole files."""
    llm = load(store, save=False)
    # vLLM's numbers depend on what else is in a step: every prompt is answered alone
    alone = [texts(run(llm, [ids], 8, extra_args={"kv_transfer_params": {"restore": False}}))[0] for ids in prompts]
    llm.reset_prefix_cache()
    whole = [texts(run(llm, [ids], 8))[0] for ids in prompts]
    files = sorted((store / "runs").rglob("*.run"))
    kept = {path: path.read_bytes() for path in files}
    generator, inner = random.Random(3), worker()
    restore = inner.restore
    computed = 0
    for trial in range(int(os.environ.get("FORETOLD_DAMAGE_TRIALS", "12"))):
        llm.reset_prefix_cache()
        n = generator.randrange(len(prompts))
        late = trial % 2 == 1
        switch(llm, load="beside" if trial % 4 > 1 else "within")

        def damage() -> None:
            for path in files:
                data = bytearray(kept[path])
                data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
                path.write_bytes(bytes(data))

        def late_restore(*arguments, damage=damage):
            damage()
            return restore(*arguments)

        if late:
            inner.restore = late_restore
        else:
            damage()
        found = run(llm, [prompts[n]], 8)[0]
        inner.restore = restore
        assert texts([found])[0] in (alone[n], whole[n])
        computed += found.num_cached_tokens == 0 or late
        for path, content in kept.items():
            path.write_bytes(content)
    assert computed == trial + 1 and inner.metrics.failures >= (trial + 1) // 2
    close(llm)


def lora_folder(folder: Path) -> Path:
    """An adapter of weights with random numbers."""
    config = json.loads((FOLDERS[0] / "config.json").read_text())
    rank, width = 8, config["hidden_size"]
    heads = config["num_attention_heads"] * (config.get("head_dim") or width // config["num_attention_heads"])
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "bias": "none"}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    generator, tensors = torch.Generator().manual_seed(1), {}
    for n in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{n}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(heads, rank, generator=generator) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_preempted_requests_and_those_of_lora_weights(prompts, plain, tmp_path) -> None:
    """Two prompts that together need one block more than there is; a request of an adapter is neither kept nor restored."""
    pair, store = [prompts[0][:510], prompts[1][:510]], tmp_path / "store"
    settings = {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": 8,
        "block_size": 128,
        "num_gpu_blocks_override": 10,
        "max_model_len": 1024,
    }
    llm = load(store, settings | {"dtype": "float32"}, load="beside")  # in which the text does not depend on what else is in a step
    truth = [run(llm, [ids], extra_args={"kv_transfer_params": {"restore": False}})[0] for ids in pair]
    assert worker().wait(300)
    llm.reset_prefix_cache()
    preempted = []
    inner = scheduler(llm)._preempt_request
    scheduler(llm)._preempt_request = lambda request, *rest, **more: preempted.append(request.request_id) or inner(request, *rest, **more)
    found = run(llm, pair, extra_args={"kv_transfer_params": {"restore": False}})
    assert preempted and texts(found) == texts(truth) and worker().wait(300)
    saved = worker().metrics.saved_tokens
    assert saved == 2 * 512  # every page once
    llm.reset_prefix_cache()
    preempted.clear()
    again = run(llm, pair)
    assert preempted and worker().metrics.restored_tokens >= 2 * 448 and worker().metrics.failures == 0
    assert divergence(again, truth) < KL_BOUND
    llm.reset_prefix_cache()
    restored = worker().metrics.restored_tokens
    params, lora = SamplingParams(max_tokens=4, temperature=0), LoRARequest("a", 1, str(lora_folder(tmp_path / "adapter")))
    other = llm.generate([{"prompt_token_ids": pair[0]}], params, use_tqdm=False, lora_request=lora)[0]
    assert other.num_cached_tokens == 0 and worker().wait(60)
    assert (worker().metrics.saved_tokens, worker().metrics.restored_tokens) == (saved, restored)
    close(llm)


def test_two_ranks_keep_and_restore(tmp_path) -> None:
    """A store that two tensor parallel ranks have filled serves two ranks and one."""
    model, pack = tiny_codec(tmp_path)
    script, out = Path(__file__).with_name("run_vllm.py"), tmp_path / "out.json"

    def answers(ranks: int, store: str) -> tuple[list[list[int]], list[int]]:
        command = [sys.executable, str(script), str(model), str(pack), store, str(ranks), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(out.read_text())
        return found["texts"], found["cached"]

    alone, shared = (str(tmp_path / name) for name in ("alone", "shared"))
    computed, none = answers(2, shared)
    assert none == [0, 0] and answers(1, alone) == (computed, none)
    restored = {(ranks, store): answers(ranks, store) for ranks, store in ((1, alone), (1, shared), (2, shared))}
    # the same codes, whoever gathered them; what they say is another matter, of a random model
    assert all(cached == [256, 384] for _, cached in restored.values())
    first = [[text[:4] for text in again] for again, _ in restored.values()]
    assert first[0] == first[1] == first[2]


def test_vllm_keeps_its_hybrid_allocator() -> None:
    assert supports_hma(ForetoldConnector)


def test_set_ups_that_are_not_served_are_refused(tmp_path) -> None:
    with pytest.raises(Exception, match="quality"):
        load(tmp_path / "store", quality="best")


def test_requests_that_are_not_served() -> None:
    class Request:
        lora_request, mm_features, prompt_embeds, prompt_token_ids = None, [], None, [1]

    request = Request()
    assert _is_served(request)
    request.lora_request = LoRARequest("a", 1, "somewhere")
    assert not _is_served(request)
    request.lora_request, request.mm_features = None, ["picture"]
    assert not _is_served(request)


def test_pages_of_every_version() -> None:
    heads, width, size, count = 3, 64, 32, 2
    for shape in ([count, heads, size, 2 * width], [2, count, heads, size, width]):
        layers = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2)]
        pages = pages_of(layers, heads, width, size)
        kv = torch.randn(40, 2, 2, heads, width, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        pages.write([1, 0], 0, kv)
        assert torch.equal(pages.read([1, 0], 0, 40), kv.float())
    with pytest.raises(InvalidOption):
        pages_of([torch.zeros(7, heads, size, width)], heads, width, size)
