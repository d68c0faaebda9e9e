"""A target whose layers are spread over devices: which lie where, and that text, caches and sessions are those of one device."""

from __future__ import annotations

import json

import pytest
import torch

from draft.source import NgramSource
from engine.engine import Engine
from engine.errors import InvalidOption
from engine.generate import main
from engine.kv.spread_pool import SpreadPool
from engine.loading import DraftChoice, choose_device_map
from engine.model.config import DecoderConfig, read_config
from engine.model.decoder import Decoder, forward_reserved
from engine.model.device_map import DeviceMap, devices_named, spread_layers, weight_bytes
from engine.runtime import memory
from engine.runtime.memory import DeviceMemory
from engine.runtime.sampling import SamplingParams

CPU, META = torch.device("cpu"), torch.device("meta")
PROMPTS = [[3, 4, 9, 20], [7] * 33, [2, 3, 5] * 12]


@pytest.fixture(scope="module")
def config(hf_config):
    return DecoderConfig.from_hf(hf_config("llama", num_hidden_layers=6, eos_token_id=None))


def spread_over(config, count, dtype=torch.float32):
    return spread_layers(config, dtype, [CPU] * count, [1 << 30] * count)


@pytest.fixture
def pair_of(hf_config):
    """`pair_of(family)` -> the same tiny model on one device and in two parts."""

    def make(family, parts=2, **options):
        config = DecoderConfig.from_hf(hf_config(family, eos_token_id=None, **options))
        whole = Decoder.from_config(config, dtype=torch.float32)
        spread = Decoder.from_config(config, dtype=torch.float32, device_map=spread_over(config, parts))
        for decoder in (whole, spread):
            for parameter in decoder.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(15.0)
        return whole, spread

    return make


# --- which layers lie where ------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_weights(config):
    decoder = Decoder.from_config(config, dtype=torch.float32)
    first, layers = weight_bytes(config, torch.float32)
    assert first + sum(layers) == sum(p.nbytes for p in decoder.parameters()) and len(layers) == 6
    assert weight_bytes(config, torch.bfloat16)[0] * 2 == first


def test_the_fullest_device_is_as_empty_as_can_be(config):
    first, layers = weight_bytes(config, torch.float32)
    one = layers[0]

    def counts(*free):
        found = spread_layers(config, torch.float32, [torch.device("cuda", n) for n in range(len(free))], [int(f) for f in free])
        assert found.main == torch.device("cuda", 0) and found.parts[0][0] == 0 and found.parts[-1][1] == 6
        assert all(a[1] == b[0] for a, b in zip(found.parts, found.parts[1:], strict=False)), "layers are in order, none is left out"
        return {device.index: end - begin for begin, end, device in found.parts}

    assert counts(first + 100 * one, 100 * one) == {0: 3, 1: 3}
    assert counts(first + 1.5 * one, 2.5 * one, 3.5 * one) == {0: 1, 1: 2, 2: 3}
    assert counts(first + 9 * one, 3 * one)[0] > 3, "the larger one has more"
    assert counts(first, 7 * one) == {1: 6}, "a device with room for the embeddings alone has no layer"
    with pytest.raises(InvalidOption, match=r"the target's weights take .* GiB in float32, and the devices have"):
        counts(first + 2 * one, 3 * one)


def test_devices_are_named():
    assert devices_named("cpu, cpu") == devices_named([CPU, "cpu"]) == [CPU, CPU]
    for wrong, message in (
        ("", "unknown device"),
        ([], "devices names none"),
        ("cpu,meta", "not supported"),
        ("cuda:0,cpu", "no CUDA device" if not torch.cuda.is_available() else "several kinds"),
        (3, "devices cannot be 3"),
        ([None], "unknown device"),
    ):
        with pytest.raises(InvalidOption, match=message):
            devices_named(wrong)


def test_a_target_larger_than_one_gpu_is_spread_unasked(config, monkeypatch):
    first, layers = weight_bytes(config, torch.float32)
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def placed(free, gpu=gpu, share=None):
        monkeypatch.setattr("engine.loading.device_memory", lambda device: DeviceMemory(1 << 40, free) if device.type == "cuda" else None)
        return choose_device_map(config, torch.float32, gpu, None, share)

    assert placed(10 * (first + sum(layers))) is None
    found = placed(first + 4 * layers[0])
    assert [device.index for _, _, device in found.parts] == [0, 1]
    assert placed(first + 4 * layers[0], torch.device("cuda", 1)) is None, "one was named"
    with pytest.raises(InvalidOption, match="gpu_memory_utilization cannot be"):
        placed(first + 4 * layers[0], share="0.5")
    assert choose_device_map(config, torch.float32, CPU, None) is None and choose_device_map(config, torch.float32, CPU, [CPU]) is None
    with pytest.raises(InvalidOption, match="give more devices"):
        placed(first + layers[0])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert placed(1) is None, "one GPU: loading says what is missing"


@pytest.mark.parametrize("kind", ["model", "head", "tied head"])
def test_the_drafts_bytes_are_counted_before_it_is_loaded(hf_config, tmp_path, make_draft_head, kind):
    config = DecoderConfig.from_hf(hf_config("llama", num_hidden_layers=6, eos_token_id=None))
    target = Decoder.from_config(config, dtype=torch.float32)
    if kind == "model":
        (tmp_path / "config.json").write_text(json.dumps(hf_config("llama", num_hidden_layers=2, eos_token_id=None).to_dict()))
        choice, held = DraftChoice(model=tmp_path), Decoder.from_config(DecoderConfig.from_hf(read_config(tmp_path)), dtype=torch.float32)
    else:
        choice = DraftChoice(head=make_draft_head(tmp_path, target, layers=2, size=40, head="own" if kind == "head" else "tied", bits=16))
        held = choice.load(target).head_layers
    assert choice.weight_bytes(config, torch.float32) == held.weight_bytes
    assert DraftChoice(exit_layer=2).weight_bytes(config, torch.float32) == DraftChoice(ngram=True).weight_bytes(config, torch.float32) == 0


def test_a_draft_takes_its_room_on_the_first_device(config, monkeypatch, tmp_path, hf_config):
    (tmp_path / "config.json").write_text(json.dumps(hf_config("llama", num_hidden_layers=3, eos_token_id=None).to_dict()))
    draft, gpu = DraftChoice(model=tmp_path), torch.device("cuda")
    beside = draft.weight_bytes(config, torch.float32)
    first, layers = weight_bytes(config, torch.float32)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def placed(room, draft, devices=None):
        """Layers of the first device, of which `room` bytes may be used."""
        memory = DeviceMemory(1 << 40, int(room / 0.9) + 8)
        monkeypatch.setattr("engine.loading.device_memory", lambda device: memory if device.type == "cuda" else None)
        found = choose_device_map(config, torch.float32, gpu, devices, None, draft)
        return None if found is None else found.parts[0][1]

    whole = first + sum(layers)
    assert placed(whole, None) is None and placed(whole, draft) < 6, "a target that fits alone does not beside its draft"
    assert placed(whole + beside, draft) is None
    named = [torch.device("cuda", number) for number in range(2)]
    assert placed(whole, draft, named) == placed(whole, None, named) - round(beside / layers[0] / 2) < placed(whole, None, named)
    with pytest.raises(InvalidOption, match=r"its draft's .* GiB, and the devices have"):
        placed((whole + beside) / 2 - layers[0], draft)


# --- the forward pass -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "gemma3", "mixtral"])
@torch.inference_mode()
def test_every_pass_is_that_of_one_device(pair_of, family):
    whole, spread = pair_of(family)
    depth = whole.config.num_layers
    assert isinstance(spread.new_pool(2, 16), SpreadPool) and len(spread.device_map.parts) == 2
    ids = torch.randint(0, 90, (40,), generator=torch.Generator().manual_seed(1))
    found = []
    for decoder in (whole, spread):
        pool = decoder.new_pool(2, 16, max_pages=12)  # it grows
        one, two = pool.new_sequence(), pool.new_sequence()
        outs = [forward_reserved(decoder, ids, [one, two], [30, 10], taps=(0, 1, 2, depth))]
        one.advance(30)
        outs.append(forward_reserved(decoder, ids[:3], [one], [3], deterministic=True, logits="last"))
        lower = forward_reserved(decoder, ids[:5], [two], [5], last_layer=2, starts=[0])
        outs += [lower, forward_reserved(decoder, None, [two], [5], hidden=lower.hidden, first_layer=2, starts=[0])]
        kv = decoder.read_kv(one, 3, 20, first_layer=1)
        copy = pool.new_sequence(40)
        decoder.write_kv(copy, 0, kv, first_layer=1)
        assert torch.allclose(decoder.read_kv(copy, 0, 17, first_layer=1), kv, atol=1e-4)
        fork = one.fork(20)
        fork.ensure(24, 18)  # copies a page of every part
        outs.append(forward_reserved(decoder, ids[:2], [fork], [2], starts=[18]))
        pool.check_integrity()
        found.append((outs, kv))
    for mine, theirs in zip(*(outs for outs, _ in found), strict=True):
        assert (mine.logits is None) == (theirs.logits is None)
        assert mine.logits is None or torch.equal(mine.logits, theirs.logits)
        assert torch.equal(mine.hidden, theirs.hidden) and all(torch.equal(mine.taps[tap], theirs.taps[tap]) for tap in mine.taps)
    assert torch.equal(found[0][1], found[1][1])


@torch.inference_mode()
def test_a_layers_tensors_are_on_its_device(config, monkeypatch):
    """The second part lies on a device of another kind, where operations between devices fail: it has shapes and no values."""
    monkeypatch.setenv("FORETOLD_KERNELS", "reference")
    decoder = Decoder.from_config(config, dtype=torch.float32, device_map=DeviceMap(CPU, ((0, 3, CPU), (3, 6, META))))
    assert {p.device for p in decoder.layers[2].parameters()} == {CPU} and {p.device for p in decoder.layers[3].parameters()} == {META}
    moved, to = [], torch.Tensor.to

    def seen(self, *args, **options):
        if args and isinstance(args[0], torch.device) and args[0] != self.device:
            moved.append((self.device.type, args[0].type, self.shape == (20, 48)))
            if self.device == META:
                return torch.zeros(self.shape, dtype=self.dtype)
        return to(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", seen)
    pool = decoder.new_pool(8, 16)
    sequence = pool.new_sequence(20)
    out = decoder.forward(torch.arange(20), [sequence], [20], taps=(2, 5))
    assert out.logits.device == CPU and out.hidden.device == CPU and out.taps[5].device == CPU
    assert moved.count(("cpu", "meta", True)) == 2, "the residual stream and what is still to be added to it, once"
    assert moved.count(("meta", "cpu", True)) == 2, "the last states, and the one that was asked for"
    assert pool.layer(2)[0].device == CPU and pool.layer(4)[0].device == META and pool.device == CPU


# --- text -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("draft", ["none", "model", "exit", "ngram"])
def test_text_is_that_of_one_device(pair_of, random_decoder, draft, params):
    whole, spread = pair_of("llama", parts=3, num_hidden_layers=6)
    sources = {"none": None, "model": random_decoder(7, num_hidden_layers=2), "exit": 3, "ngram": NgramSource()}
    own = SamplingParams(max_new_tokens=16, draft_length=0 if draft == "none" else 3, **params)
    texts = []
    for decoder in (whole, spread):
        engine = Engine(decoder, draft=sources[draft], page_size=16, pool_tokens=2048, prefix_sharing=True)
        texts.append([result.token_ids for _ in range(2) for result in engine.generate(PROMPTS, own)])
        engine.core.pool.check_integrity()
        assert engine.core.pool.num_free_pages == engine.core.pool.max_pages
    assert texts[0] == texts[1]


@pytest.mark.usefixtures("all_coded")
def test_a_session_goes_on_over_several_devices(chat_folders, tmp_path):
    texts = {}
    for name, devices in (("one", None), ("two", "cpu,cpu")):
        engine = Engine.from_pretrained(chat_folders.target, "none", devices=devices, dtype="float32")
        assert (engine.core.target.device_map is None) == (devices is None)
        session = engine.session(quality="near-lossless")
        session.chat("hello there", SamplingParams(max_new_tokens=6))
        session.suspend(tmp_path / name)
        again = engine.session(tmp_path / name, restore="decode")
        assert again.resumed.restore == "decode"
        texts[name] = again.chat("and now?", SamplingParams(max_new_tokens=6)).token_ids
    assert texts["one"] == texts["two"]


def test_the_command_spreads_and_refuses(chat_folders, capsys):
    command = ["--target", str(chat_folders.target), "--dtype", "float32", "--json", "--max-new-tokens", "4", "hi"]
    found = []
    for more in (["--device", "cpu"], ["--devices", "cpu,cpu"]):
        assert main([*command, *more]) == 0
        out = capsys.readouterr()
        found.append(json.loads(out.out.splitlines()[-1])["text"])
    assert found[0] == found[1] and "layers 0 to" in out.err
    for more, message in (
        (["--devices", "cpu,cpu", "--device", "cpu"], "device and devices both say"),
        (["--devices", "tpu"], "unknown device"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err


def test_pools_are_as_large_as_the_fullest_device_allows(config, monkeypatch):
    decoder = Decoder.from_config(config, dtype=torch.float32, device_map=DeviceMap(CPU, ((0, 2, CPU), (2, 6, META))))
    free = {CPU: 64 << 20, META: 48 << 20}
    monkeypatch.setattr(memory, "device_memory", lambda device: DeviceMemory(64 << 20, free[device]))
    monkeypatch.setattr(memory, "_LIBRARY_BYTES", 0)
    engine_config = memory.EngineConfig(prefix_sharing=True, max_batch=2)
    first, second = memory.plan_devices(decoder, None, engine_config, captures=False)
    assert [str(plan).startswith(f"of {plan.device} ") for plan in (first, second)] == [True, True] and first.device
    assert first.pool_tokens == second.pool_tokens and second.pools_bytes == 2 * first.pools_bytes
    assert second.announced_bytes > first.announced_bytes and second.announced_bytes <= 0.9 * (64 << 20)
    assert str(decoder.device_map) == "layers 0 to 1 on cpu, layers 2 to 5 on meta"
