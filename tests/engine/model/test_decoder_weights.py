"""Loading: shards, dtypes, tied heads, files that do not fit, and how much memory it takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelNotFound, UnsupportedArchitecture
from engine.model.decoder import Decoder, forward_reserved
from engine.model.linear import Projection

FAMILIES = ["llama", "llama-bias", "mistral", "qwen2", "qwen3"]


def copy_of(model, folder: Path, edit) -> Path:
    """A copy of the model's folder whose tensors went through `edit(dict)`."""
    shutil.copytree(model.folder, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_folders_load_the_same_weights(tiny_model, tmp_path, family):
    model = tiny_model(family)
    model.reference.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = Decoder.from_pretrained(tmp_path, dtype=torch.float32)
    for name, ours in again.hf_tensors().items():
        assert torch.equal(ours, model.decoder.hf_tensors()[name]), name


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_huge_pages_are_the_same(tiny_model, monkeypatch, family, dtype):
    model = tiny_model(family)
    plain = Decoder.from_pretrained(model.folder, dtype=dtype)
    monkeypatch.setattr("engine.model.decoder._LEAST_HUGE_BYTES", 0)
    huge = Decoder.from_pretrained(model.folder, dtype=dtype)
    if dtype == torch.float32:  # no other layout is made of it: all matrices lie in one room
        matrices = [projection.matrix for projection in huge.modules() if isinstance(projection, Projection)] + [huge.embed_tokens.weight]
        start = min(matrix.data_ptr() for matrix in matrices)
        end = max(matrix.data_ptr() + matrix.nbytes for matrix in matrices)
        assert end - start < sum(matrix.nbytes for matrix in matrices) + 64 * len(matrices)
    for name, tensor in plain.hf_tensors().items():
        assert torch.equal(huge.hf_tensors()[name], tensor), name
    moved = huge.to(torch.float64)
    assert all(torch.equal(moved.hf_tensors()[name], tensor.double()) for name, tensor in plain.hf_tensors().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_file_is_in_its_place(tiny_model, family):
    model = tiny_model(family)
    stored = load_file(model.folder / "model.safetensors")
    ours = model.decoder.hf_tensors()
    assert set(stored) - {"lm_head.weight"} <= set(ours)
    for name, tensor in stored.items():
        if name in ours:
            assert torch.equal(ours[name], tensor), name
    assert model.decoder.weight_bytes == sum(t.numel() * 4 for t in model.reference.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_converted_on_the_way(tiny_model, tmp_path, dtype):
    model = tiny_model("llama")
    decoder = Decoder.from_pretrained(model.folder, dtype=dtype)
    assert decoder.dtype == dtype and decoder.device.type == "cpu"
    for name, ours in decoder.hf_tensors().items():
        assert torch.equal(ours, model.decoder.hf_tensors()[name].to(dtype)), name
    stored_half = copy_of(model, tmp_path, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    widened = Decoder.from_pretrained(stored_half, dtype=torch.float32)
    assert torch.equal(widened.layers[1].o_proj.weight, decoder.layers[1].o_proj.weight.float())


def test_a_tied_head_is_one_tensor_even_after_a_move(tiny_model, tmp_path):
    model = tiny_model("qwen3")
    for decoder in (model.decoder, Decoder.from_pretrained(model.folder, dtype=torch.float32).to(torch.bfloat16)):
        assert decoder.lm_head is None
        assert decoder.weight_bytes == sum(t.numel() for t in model.reference.parameters()) * decoder.dtype.itemsize
    repeated = copy_of(model, tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(Decoder.from_pretrained(repeated, dtype=torch.float32).embed_tokens.weight, model.decoder.embed_tokens.weight)


def test_moving_a_decoder_moves_what_it_computes_with(tiny_model):
    model = tiny_model("llama")
    ids = torch.arange(9)
    moved = Decoder.from_pretrained(model.folder, dtype=torch.float32)
    forward_reserved(moved, ids, [moved.new_pool(1).new_sequence()], [9])
    moved = moved.to(torch.bfloat16)
    fresh = Decoder.from_pretrained(model.folder, dtype=torch.bfloat16)
    assert torch.equal(
        forward_reserved(moved, ids, [moved.new_pool(1).new_sequence()], [9]).logits,
        forward_reserved(fresh, ids, [fresh.new_pool(1).new_sequence()], [9]).logits,
    )


@torch.inference_mode()
def test_packed_weights_compute_what_plain_ones_do(tiny_model, monkeypatch):
    """bf16 on a CPU without compiled products: the packed layout holds the same numbers and can be given back."""
    monkeypatch.setenv("FORETOLD_KERNELS", "reference")
    decoder = Decoder.from_pretrained(tiny_model("qwen2").folder, dtype=torch.bfloat16)
    ids = torch.arange(20)
    plain = {name: tensor.clone() for name, tensor in decoder.hf_tensors().items()}
    packed_logits = forward_reserved(decoder, ids, [decoder.new_pool(1).new_sequence()], [20]).logits
    size = decoder.weight_bytes
    for projection in (m for m in decoder.modules() if isinstance(m, Projection)):
        projection.unpack()
    decoder._weights = []
    assert decoder.weight_bytes == size
    assert all(torch.equal(tensor, plain[name]) for name, tensor in decoder.hf_tensors().items())
    assert all(not m.matrix.is_mkldnn for m in decoder.modules() if isinstance(m, Projection))
    plain_logits = forward_reserved(decoder, ids, [decoder.new_pool(1).new_sequence()], [20]).logits
    assert (packed_logits - plain_logits).norm() < 0.02 * plain_logits.norm()


def test_a_tied_head_has_a_copy_for_products_where_it_is_small(tiny_model, monkeypatch):
    monkeypatch.setenv("FORETOLD_KERNELS", "reference")
    folder, ids = tiny_model("qwen3").folder, torch.arange(20)
    decoder = Decoder.from_pretrained(folder, dtype=torch.bfloat16)
    if decoder.layers[0].qkv_proj.packed is None:  # type: ignore[union-attr]
        pytest.skip("this processor has no use for packed weights")
    logits = forward_reserved(decoder, ids, [decoder.new_pool(1).new_sequence()], [20]).logits
    monkeypatch.setattr("engine.model.linear.LARGEST_COPY_BYTES", 1000)
    plain = Decoder.from_pretrained(folder, dtype=torch.bfloat16)
    assert decoder.weight_bytes - plain.weight_bytes == plain.embed_tokens.weight.numel() * 2
    assert torch.allclose(logits, forward_reserved(plain, ids, [plain.new_pool(1).new_sequence()], [20]).logits, rtol=0.02, atol=0.02)
    assert decoder.float().weight_bytes == 2 * plain.weight_bytes, "moving the weights gives the copy up"


def test_end_tokens_are_the_generation_configs_where_it_has_some(tiny_model, tmp_path):
    model = tiny_model("llama")
    assert model.decoder.config.eos_token_ids == (5,)
    shutil.copytree(model.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert Decoder.from_pretrained(tmp_path, dtype=torch.float32).config.eos_token_ids == (7, 9)


def test_random_weights_repeat_with_their_seed(tiny_model):
    config = tiny_model("qwen2").decoder.config
    made = [Decoder.from_config(config, dtype=torch.float32, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(made[0].layers[2].down_proj.weight, made[1].layers[2].down_proj.weight)
    assert not torch.equal(made[0].layers[2].down_proj.weight, made[2].layers[2].down_proj.weight)
    out = forward_reserved(made[0], torch.arange(9), [made[0].new_pool(1).new_sequence()], [9])
    assert out.logits.isfinite().all() and out.logits.std() > 0


def test_missing_misshapen_and_unknown_tensors_are_named(tiny_model, tmp_path):
    model = tiny_model("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ModelNotFound, match="up_proj"):
        Decoder.from_pretrained(copy_of(model, tmp_path / "a", lambda t: t.pop(name)), dtype=torch.float32)
    with pytest.raises(ModelNotFound, match=r"\[3, 48\].*\[80, 48\]"):
        Decoder.from_pretrained(copy_of(model, tmp_path / "b", lambda t: t.update({name: torch.zeros(3, 48)})), dtype=torch.float32)
    with pytest.raises(UnsupportedArchitecture, match=r"gate_proj\.bias"):
        bias = {"model.layers.0.mlp.gate_proj.bias": torch.zeros(80)}
        Decoder.from_pretrained(copy_of(model, tmp_path / "c", lambda t: t.update(bias)), dtype=torch.float32)
    with pytest.raises(UnsupportedArchitecture, match="I8"):
        packed = {name: torch.zeros(80, 48, dtype=torch.int8)}
        Decoder.from_pretrained(copy_of(model, tmp_path / "d", lambda t: t.update(packed)), dtype=torch.float32)


def test_broken_and_absent_files_are_refused(tiny_model, tmp_path):
    model = tiny_model("llama")
    shutil.copytree(model.folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    for broken in (b"", content[:5], content[:200], content[:-1], b"\xff" * 64):
        weights.write_bytes(broken)
        with pytest.raises(ModelNotFound, match="not a complete safetensors file"):
            Decoder.from_pretrained(tmp_path, dtype=torch.float32)
    weights.unlink()
    with pytest.raises(ModelNotFound, match=r"no model\.safetensors"):
        Decoder.from_pretrained(tmp_path, dtype=torch.float32)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ModelNotFound, match="model-00001-of-00002"):
        Decoder.from_pretrained(tmp_path, dtype=torch.float32)


_MEASURE = """
import os, sys, torch
from engine.model.decoder import Decoder
import transformers.models.llama.configuration_llama
def high_water():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024
Decoder.from_pretrained(sys.argv[1], dtype=torch.bfloat16)  # what loading anything at all costs
for dtype in ("bfloat16", "float32"):
    if os.fork() == 0:  # a process whose peak is its own
        base = high_water()
        decoder = Decoder.from_pretrained(sys.argv[2], dtype=getattr(torch, dtype))
        print(dtype, decoder.weight_bytes, high_water() - base, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_loading_never_holds_two_copies(tiny_model, hf_config, tmp_path):
    """A model of 100 MB (bf16) on disk, in two shards, loaded in bf16 and in float32; the peak while loading stays near one copy."""
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 10000}
    config = hf_config("llama", **wide, num_hidden_layers=2)
    from engine.model.decoder import DecoderConfig

    tensors = Decoder.from_config(DecoderConfig.from_hf(config), dtype=torch.bfloat16).hf_tensors()
    config.save_pretrained(tmp_path)
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, own in shards.items():
        save_file({name: tensors[name].clone() for name in own}, tmp_path / shard)
    where = {name: shard for shard, own in shards.items() for name in own}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    del tensors
    small = tiny_model("llama").folder
    command = [sys.executable, "-c", _MEASURE, str(small), str(tmp_path)]
    root = Path(__file__).parents[3]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # a fork does not inherit the threads that its parent would wait for
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, timeout=300, env=alone)
    found = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in found] == ["bfloat16", "float32"]
    for dtype, *numbers in found:
        weights, peak = map(int, numbers)
        assert weights > 98e6 * (2 if dtype == "float32" else 1)
        # the read buffer is 16 MB; a second copy, even in bf16, would be 100 MB
        assert peak < 1.15 * weights + 32e6, dtype


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama-bias"])
def test_bf16_weights_are_packed_layer_by_layer_without_being_mixed_up(tiny_model, family):
    """Every layer's matrices pass through the same memory; what is packed from it must be its own."""
    model = tiny_model(family)
    loaded = Decoder.from_pretrained(model.folder, dtype=torch.bfloat16)
    plain = {name: tensor.bfloat16() for name, tensor in model.decoder.hf_tensors().items()}
    found = loaded.hf_tensors()
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(found[name], tensor), name
    assert loaded.weight_sum == model.decoder.weight_sum is not None
    assert all(not parameter.requires_grad for parameter in loaded.parameters())
