"""The draft head's folder: what is stored comes back, and nothing else is taken for it."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draft.errors import CorruptedDraftHead, DraftHeadMismatch, DraftHeadNotFound, ForeignDraftHead, NewerDraftHead
from draft.head_file import (
    CONFIG_FILE,
    TENSOR_FILE,
    DraftHeadConfig,
    dequantise,
    is_draft_head,
    quantise,
    read_config,
    read_draft_head,
    target_digest,
    write_draft_head,
)

TARGET = SimpleNamespace(
    architecture="llama",
    num_layers=3,
    hidden_size=48,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=80,
    vocab_size=97,
    rms_norm_eps=1e-6,
    qkv_bias=False,
    o_bias=False,
    qk_norm=False,
    rope=SimpleNamespace(theta=1e4),
)


def example(head="own", bits=8):
    torch.manual_seed(0)
    config = DraftHeadConfig("tiny", target_digest(TARGET), 2, 1, 11, head, bits, {"seed": 3})
    tensors = {
        "token_ids": torch.arange(0, 33, 3),
        "model.norm.weight": torch.rand(48),
        "model.layers.0.mlp.down_proj.weight": torch.randn(48, 80),
    }
    if head == "own":
        tensors["lm_head.weight"] = torch.randn(11, 48)
    return config, tensors


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("head", ["own", "tied"])
def test_what_is_saved_comes_back(tmp_path, head, bits):
    config, tensors = example(head, bits)
    saved = write_draft_head(tmp_path, replace(config, bits=16), tensors, bits)
    loaded, got = read_draft_head(tmp_path)
    assert loaded == config == saved and len(loaded.digest) == 64 and loaded.digest == saved.digest
    assert got.keys() == tensors.keys() and got["token_ids"].tolist() == tensors["token_ids"].tolist()
    assert torch.equal(got["model.norm.weight"], tensors["model.norm.weight"])
    for name in tensors.keys() - {"token_ids", "model.norm.weight"}:
        error, largest = (got[name].float() - tensors[name]).abs().max(), tensors[name].abs().max()
        assert 0 < error <= largest * (0.51 / 127 if bits == 8 else 2.0**-8)
    again = write_draft_head(tmp_path / "again", loaded, got)
    assert again.digest == saved.digest, "coded numbers are coded as themselves"
    assert is_draft_head(tmp_path) and not is_draft_head(tmp_path / "nowhere")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 200), st.floats(-9, 4), st.integers(0, 9))
def test_quantising_rounds_to_nearest(rows, width, exponent, seed):
    torch.manual_seed(seed)
    matrix = torch.randn(rows, width) * 10**exponent
    steps, scale = quantise(matrix)
    assert steps.shape == matrix.shape and scale.shape == (rows, -(-width // 64))
    bound = scale.float().repeat_interleave(64, 1)[:, :width]
    # half a step; at the largest weight a rounded-down scale may cost a little more: 127 times half a unit of its last place
    rounded = 2.0**-10 * matrix.abs() + 127 * 2.0**-25
    assert bool(((dequantise(steps, scale) - matrix).abs() <= 0.5 * bound + rounded).all())


def test_zeros_stay_zeros():
    assert bool((dequantise(*quantise(torch.zeros(3, 70))) == 0).all())


def test_the_digest_leaves_the_training_out(tmp_path):
    config, tensors = example()
    digest = write_draft_head(tmp_path, config, tensors).digest
    fields = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields | {"training": {"acceptance": 0.6}}))
    loaded, _ = read_draft_head(tmp_path)
    assert loaded.digest == digest and loaded.training == {"acceptance": 0.6}


@pytest.mark.parametrize(
    "change",
    [
        {"trunk_layers": 1},
        {"num_layers": 2},
        {"vocab_size": 12},
        {"head": "tied"},
        {"bits": 16},
        {"target_fingerprint_config": "0" * 64},
        {"more": 1},
    ],
)
def test_a_config_of_another_draft_head_is_refused(tmp_path, change):
    write_draft_head(tmp_path, *example())
    fields = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields | change))
    with pytest.raises(CorruptedDraftHead):
        read_draft_head(tmp_path)


@pytest.mark.parametrize("place", [0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_tensors_are_refused(tmp_path, place, damage):
    write_draft_head(tmp_path, *example())
    data = bytearray((tmp_path / TENSOR_FILE).read_bytes())
    at = int(place * len(data))
    if damage == "cut":
        del data[at:]
    else:
        data[at] ^= 16
    (tmp_path / TENSOR_FILE).write_bytes(data)
    with pytest.raises((CorruptedDraftHead, ForeignDraftHead)):
        read_draft_head(tmp_path)


def test_missing_foreign_and_newer_files_have_names(tmp_path):
    with pytest.raises(DraftHeadNotFound):
        read_draft_head(tmp_path)
    config, tensors = example()
    write_draft_head(tmp_path, config, tensors)
    fields = json.loads((tmp_path / CONFIG_FILE).read_text())
    for text, error in (
        ("{", CorruptedDraftHead),
        ("[]", ForeignDraftHead),
        ('{"model_type": "llama"}', ForeignDraftHead),
        (json.dumps(fields | {"version": 3}), NewerDraftHead),
        (json.dumps(fields | {"version": None}), CorruptedDraftHead),
        (json.dumps(fields | {"vocab_size": 0}), ForeignDraftHead),
        (json.dumps({k: v for k, v in fields.items() if k != "head"}), CorruptedDraftHead),
    ):
        (tmp_path / CONFIG_FILE).write_text(text)
        with pytest.raises(error):
            read_config(tmp_path)
    write_draft_head(tmp_path, config, tensors)
    (tmp_path / TENSOR_FILE).unlink()
    with pytest.raises(DraftHeadNotFound):
        read_draft_head(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": torch.arange(11).flip(0)},
        {"token_ids": torch.arange(12)},
        {"lm_head.weight": None},
        {"model.norm.weight": None},
        {"model.layers.1.mlp.down_proj.weight": torch.zeros(2, 2)},
        {"model.norm.weight": torch.full((48,), torch.nan)},
    ],
)
def test_tensors_that_do_not_fit_the_config_are_not_saved(tmp_path, change):
    config, tensors = example()
    with pytest.raises(CorruptedDraftHead):
        write_draft_head(tmp_path, config, {k: v for k, v in (tensors | change).items() if v is not None})
    assert not list(tmp_path.iterdir())


def test_a_target_of_another_shape_is_refused():
    config, _ = example()
    config.check_target(TARGET)
    with pytest.raises(DraftHeadMismatch, match="tiny"):
        config.check_target(SimpleNamespace(**(vars(TARGET) | {"num_layers": 4})))


def states_example(layers=(1, 3)):
    config, tensors = example("tied")
    joins = {
        "state_norm.weight": torch.rand(48),
        "embed_norm.weight": torch.rand(48),
        "join.weight": torch.randn(48, 96),
        "fuse.weight": torch.randn(48, 48 * len(layers)),
    }
    if len(layers) == 1:
        del joins["fuse.weight"]
    return replace(config, exit_layer=3, state_layers=layers), tensors | joins


@pytest.mark.parametrize("layers", [(3,), (1, 3), (1, 2, 3)])
def test_heads_on_last_states_come_back_and_are_of_a_newer_format(tmp_path, layers):
    config, tensors = states_example(layers)
    written = write_draft_head(tmp_path, config, tensors)
    found, stored = read_draft_head(tmp_path)
    assert found == written and found.state_layers == layers and set(stored) == set(tensors)
    assert (stored["join.weight"] - tensors["join.weight"]).abs().max() < 0.03
    found.check_target(TARGET)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["version"] == 2
    elements = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(("state_", "embed_", "join", "fuse")))
    assert found.join_elements(48) == elements
    write_draft_head(tmp_path, *example())
    text = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert text["version"] == 1 and "state_layers" not in text and read_config(tmp_path).state_layers == ()
    assert read_config(tmp_path).join_elements(48) == 0


def test_heads_on_last_states_that_are_not_whole_are_refused(tmp_path):
    config, tensors = states_example()
    for name in ("state_norm.weight", "embed_norm.weight", "join.weight", "fuse.weight"):
        with pytest.raises(CorruptedDraftHead, match="joins other states"):
            write_draft_head(tmp_path, config, {key: tensor for key, tensor in tensors.items() if key != name})
        with pytest.raises(CorruptedDraftHead, match="joins other states"):
            write_draft_head(tmp_path, config, tensors | {name: tensors[name][..., :-1]})
    with pytest.raises(CorruptedDraftHead, match="joins other states"):
        write_draft_head(tmp_path, replace(config, state_layers=()), tensors)
    for layers in ((1, 2), (3, 1), (0, 3), (3, 3), ("3",), "3", (True, 3)):
        with pytest.raises(ForeignDraftHead, match="states after"):
            replace(config, state_layers=layers)
    with pytest.raises(DraftHeadMismatch):
        replace(config, exit_layer=2, state_layers=(1, 2)).check_target(TARGET)
