"""Draft heads' folders that others wrote, with digests that are right: loading ends as a draft head or one named error."""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from draft.errors import DraftHeadError
from draft.head_file import (
    CONFIG_FILE,
    FORMAT,
    TENSOR_FILE,
    VERSION,
    DraftHeadConfig,
    _digest,
    is_draft_head,
    read_config,
    read_draft_head,
    write_draft_head,
)

BOUNDED = settings(max_examples=120, deadline=10_000, derandomize=True, database=None)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from([10**9, -1, 0, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "format",
    "version",
    "target",
    "target_fingerprint_config",
    "trunk_layers",
    "num_layers",
    "vocab_size",
    "head",
    "bits",
    "training",
]


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "token_ids": torch.arange(0, 33, 3),
        "model.norm.weight": torch.rand(48, generator=generator),
        "model.layers.0.mlp.down_proj.weight": torch.randn(48, 80, generator=generator),
        "lm_head.weight": torch.randn(11, 48, generator=generator),
    }
    write_draft_head(tmp_path, DraftHeadConfig("tiny", "0" * 64, 2, 1, 11, "own", 8, {"seed": 3}), tensors)
    return tmp_path


def forge(folder, edit):
    """The folder with its stored tensors changed by `edit(dict)` and the digest that belongs to them."""
    stored = load_file(folder / TENSOR_FILE)
    edit(stored)
    save_file(stored, folder / TENSOR_FILE, {"format": FORMAT, "digest": _digest(read_config(folder), stored)})


def spoil(name, value):
    def edit(stored):
        stored[name] = stored[name].clone()
        stored[name].view(-1)[0] = value

    return edit


MATRIX = "model.layers.0.mlp.down_proj.weight"
EDITS = [
    lambda t: t.pop("token_ids"),
    lambda t: t.pop(MATRIX),
    lambda t: t.pop(MATRIX + ".scale"),
    lambda t: t.pop("lm_head.weight"),
    lambda t: t.update({"token_ids": t["token_ids"].float()}),
    lambda t: t.update({"token_ids": t["token_ids"].flip(0)}),
    lambda t: t.update({"token_ids": t["token_ids"] - 5}),
    lambda t: t.update({"token_ids": torch.zeros(0, dtype=torch.int32)}),
    lambda t: t.update({MATRIX: t[MATRIX].flatten()}),
    lambda t: t.update({MATRIX: t[MATRIX].long()}),
    lambda t: t.update({MATRIX + ".scale": t[MATRIX + ".scale"].float()}),
    lambda t: t.update({MATRIX + ".scale": -t[MATRIX + ".scale"]}),
    lambda t: t.update({MATRIX + ".scale": t[MATRIX + ".scale"][:-1]}),
    lambda t: t.update({"model.norm.weight.scale": torch.ones(48, 1).half()}),
    lambda t: t.update(
        {"model.layers.": torch.zeros(1)}
        | {"model.layers.x.y": torch.zeros(1), "model.layers.00.z": torch.zeros(1)}
        | {"model.layers.7.y": torch.zeros(1)}
    ),
    spoil("model.norm.weight", math.nan),
    spoil("model.norm.weight", math.inf),
    spoil(MATRIX + ".scale", math.inf),
]


@pytest.mark.parametrize("number", range(len(EDITS)))
def test_tensors_that_do_not_fit(folder, number):
    read_draft_head(folder)
    forge(folder, EDITS[number])
    with pytest.raises(DraftHeadError):
        read_draft_head(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 10**9},
        {"num_layers": 1.0},
        {"num_layers": True},
        {"vocab_size": 10**30},
        {"bits": 8.0},
        {"bits": 16},
        {"head": []},
        {"head": "tied"},
        {"target": None},
        {"target_fingerprint_config": 5},
        {"training": []},
        {"version": True},
        {"version": None},
        {"more": 1},
        {"digest": 5},
    ],
)
def test_configs_of_another_shape(folder, changes, takes_less):
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | changes))

    def read():
        if changes != {"digest": 5}:
            with pytest.raises(DraftHeadError):
                forge(folder, lambda tensors: None)
                read_draft_head(folder)
        else:  # a field that is no part of the file is taken from the tensors
            assert read_draft_head(folder)[0].digest != 5

    takes_less(1, read)


@BOUNDED
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_any_json_in_a_config(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("head")
    fields = asdict(DraftHeadConfig("tiny", "0" * 64, 2, 1, 11, "own")) | {"format": FORMAT, "version": VERSION}
    fields.pop("digest")
    (folder / CONFIG_FILE).write_text(json.dumps(fields | changes))
    with contextlib.suppress(DraftHeadError):
        read_config(folder)
    is_draft_head(folder)


@BOUNDED
@given(st.binary(max_size=200), st.sampled_from([CONFIG_FILE, TENSOR_FILE]))
def test_any_bytes_in_a_draft_head(tmp_path_factory, content, name):
    folder = tmp_path_factory.mktemp("head")
    tensors = {
        "token_ids": torch.arange(2),
        "model.norm.weight": torch.ones(3),
        "model.layers.0.x": torch.ones(3),
        "lm_head.weight": torch.ones(2, 3),
    }
    write_draft_head(folder, DraftHeadConfig("tiny", "0" * 64, 2, 1, 2, "own"), tensors)
    (folder / name).write_bytes(content)
    with pytest.raises(DraftHeadError):
        read_draft_head(folder)


def test_pipes_nesting_and_names_that_are_none(folder):
    (folder / CONFIG_FILE).write_text('{"format":' + "[" * 100_000)
    assert not is_draft_head(folder)
    with pytest.raises(DraftHeadError):
        read_draft_head(folder)
    for name in ("x" * 300, "a\0b"):
        assert not is_draft_head(folder / name)
        with pytest.raises(DraftHeadError):
            read_draft_head(folder / name)
    if hasattr(os, "mkfifo"):
        (folder / CONFIG_FILE).unlink()
        os.mkfifo(folder / CONFIG_FILE)
        assert not is_draft_head(folder)
        with pytest.raises(DraftHeadError):
            read_draft_head(folder)
