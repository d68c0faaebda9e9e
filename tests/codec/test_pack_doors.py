"""Packs that others wrote, with digests that are right: whatever they hold, loading ends as a usable pack or one named error."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from codec.codec import KvCodec
from codec.errors import CodecError, CorruptedCode, PredictorError
from codec.pack import CodecPack, _digest
from codec.predictor.dense import DensePredictor, load_predictor
from codec.predictor.features import FeatureSpec
from codec.predictor.gptq import LowBitWeights
from codec.predictor.low_rank import Predictor

BOUNDED = settings(max_examples=120, deadline=10_000, derandomize=True, database=None)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from([10**9, -1, 0, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def parts(make_pack, make_source, completed_pack):
    """(tensors, description) of a whole pack of each kind."""
    made = {"fallback": (completed_pack._tensors(), completed_pack._meta())}
    for kind in ("global", "per_layer"):
        pack = make_pack(make_source(1), kind)
        made[kind] = pack._tensors(), pack._meta()
    return made


def forge(path: Path, tensors: dict[str, torch.Tensor], meta: dict) -> Path:
    """A file of these tensors and this description, with the digest that belongs to them."""
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"foretold": json.dumps(meta), "digest": _digest(tensors, meta)})
    return path


def spoilt(tensors, name, value):
    changed = tensors[name].clone()
    changed.view(-1)[0] = value
    return tensors | {name: changed}


def test_forging_alone_changes_nothing(tmp_path, parts):
    for kind, (tensors, meta) in parts.items():
        pack = CodecPack.load(forge(tmp_path / kind, tensors, meta))
        assert KvCodec(pack).encode(torch.randn(20, pack.layout.dim), torch.zeros(20, pack.layout.dim), "balanced")


@pytest.mark.parametrize("kind", ["global", "per_layer", "fallback"])
def test_every_tensor_is_needed_in_its_shape_and_dtype_and_finite(tmp_path, parts, kind):
    tensors, meta = parts[kind]
    for name, tensor in tensors.items():
        variants = [{k: v for k, v in tensors.items() if k != name}, tensors | {name: tensor[..., :-1]}, tensors | {name: tensor.double()}]
        variants += [tensors | {name: tensor[None]}, tensors | {name: torch.zeros(0)}]
        if tensor.is_floating_point() and tensor.numel():
            variants += [spoilt(tensors, name, value) for value in (math.nan, math.inf, -math.inf)]
        if name in ("variance", "basis.8.peak"):
            variants.append(spoilt(tensors, name, -1.0))
        if name.startswith("predictor.") or not tensor.numel():
            continue
        for number, changed in enumerate(variants):
            with pytest.raises(CodecError):
                CodecPack.load(forge(tmp_path / f"{name}{number}", changed, meta))
    with pytest.raises(CorruptedCode, match="no part of one"):
        CodecPack.load(forge(tmp_path / "more", tensors | {"extra": torch.zeros(2)}, meta))
    with pytest.raises(CorruptedCode, match=r"cannot be undone|not finite"):
        CodecPack.load(forge(tmp_path / "singular", tensors | {"weight": torch.zeros_like(tensors["weight"])}, meta))


def test_a_fallback_basis_belongs_to_its_version_and_to_whole_layers(tmp_path, parts):
    tensors, meta = parts["fallback"]
    assert meta["version"] == 3 and parts["global"][1]["version"] == 2
    layer = tensors["fallback.layer"].clone()
    layer[0] = (int(layer[0]) + 1) % 4
    with pytest.raises(CorruptedCode, match="not those of its layers"):
        CodecPack.load(forge(tmp_path / "layer", tensors | {"fallback.layer": layer}, meta))
    with pytest.raises(CorruptedCode, match="format version"):
        CodecPack.load(forge(tmp_path / "old", tensors, meta | {"version": 2}))
    with pytest.raises(CorruptedCode, match="format version"):
        CodecPack.load(forge(tmp_path / "new", parts["global"][0], parts["global"][1] | {"version": 3}))


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": None},
        {"layout": {"num_layers": 10**9, "num_kv_heads": 2, "head_dim": 16, "first_layer": 1}},
        {"layout": {"num_layers": "5", "num_kv_heads": 2, "head_dim": 16, "first_layer": 1}},
        {"layout": {"num_layers": 5.0, "num_kv_heads": 2, "head_dim": 16, "first_layer": 1}},
        {"layout": {"num_layers": 5, "num_kv_heads": 2, "head_dim": 16}},
        {"layout": {"num_layers": 5, "num_kv_heads": 2, "head_dim": 16, "first_layer": 9}},
        {"layout": {"num_layers": 60000, "num_kv_heads": 60000, "head_dim": 60000, "first_layer": 0}},
        {"transform": "other"},
        {"transform": "per_layer"},
        {"transform": []},
        {"fingerprints": {"target": 5}},
        {"fingerprints": []},
        {"predictor_settings": None},
        {"info": 5},
        {"version": math.inf},
        {"version": "2"},
        {"version": True},
        {"kind": []},
    ],
)
def test_descriptions_of_another_shape(tmp_path, parts, changes, takes_less):
    tensors, meta = parts["global"]
    file = forge(tmp_path / "x", tensors, meta | changes)

    def refused():
        with pytest.raises(CodecError):
            CodecPack.load(file)

    takes_less(1, refused)


@BOUNDED
@given(
    st.dictionaries(
        st.sampled_from(["layout", "transform", "predictor_settings", "fingerprints", "info", "version", "kind"]), JSON, max_size=3
    )
)
def test_any_json_in_a_description(parts, tmp_path_factory, changes):
    tensors, meta = parts["global"]
    with contextlib.suppress(CodecError):
        CodecPack.load(forge(tmp_path_factory.mktemp("pack") / "x", tensors, meta | changes))


@BOUNDED
@given(st.binary(max_size=300))
def test_any_bytes_as_a_pack(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("pack") / "x"
    path.write_bytes(content)
    with pytest.raises(CodecError):
        CodecPack.load(path)


def test_names_that_are_no_file(tmp_path):
    for name in ("x" * 300, "a\0b", "."):
        with pytest.raises(FileNotFoundError):
            CodecPack.load(tmp_path / name)


def predictors():
    generator = torch.Generator().manual_seed(0)
    spec = FeatureSpec((1, 2), (0,))
    codes = torch.randint(-8, 8, (30, 12), generator=generator, dtype=torch.int8)
    weights = LowBitWeights(codes, torch.rand(1, 12, generator=generator).half(), 4, 64)
    dense = DensePredictor.pack(spec, 10, weights, torch.randn(30), torch.rand(30) + 0.1, torch.randn(12), torch.randn(30))
    low = Predictor.pack(spec, 10, torch.randn(30, 4, generator=generator), torch.randn(4), torch.randn(4, 12), torch.randn(12))
    return {"dense": dense, "low rank": low}


@pytest.mark.parametrize("name", ["dense", "low rank"])
def test_predictors_that_contradict_themselves(name):
    tensors, options = predictors()[name]
    assert load_predictor(tensors, options).dim == 12
    wrong: list[tuple[dict, dict]] = [(tensors, {k: v for k, v in options.items() if k != key}) for key in options if key != "group"]
    wrong += [(tensors, options | {"taps": value}) for value in (None, 5, [-1], ["a"], [1.5], [1, 2, 3, 4])]
    wrong += [(tensors, options | {"target_taps": value}) for value in ([], [10**9], [0, 1, 2])]
    wrong += [(tensors, options | {"draft_size": value}) for value in (0, -1, "a", None, 10**9, math.inf)]
    if name == "dense":
        wrong += [(tensors, options | {"level_strength": value}) for value in (math.nan, -1, 2, "a")]
        wrong += [(tensors, options | {"group": value}) for value in (0, -1, None, "a")]
        wrong.append((tensors | {"std": torch.zeros(30)}, options))
    for key, tensor in tensors.items():
        wrong.append((tensors | {key: tensor[:-1]}, options))
        if key != "attention":
            wrong.append(({k: v for k, v in tensors.items() if k != key}, options))
        if tensor.is_floating_point():
            wrong.append((spoilt(tensors, key, math.nan), options))
    for some, other in wrong:
        with pytest.raises(PredictorError):
            load_predictor(some, other)


def test_the_files_are_those_of_the_test(tmp_path, parts):
    """The forged file differs from a saved one in nothing."""
    tensors, meta = parts["global"]
    assert {k: v.shape for k, v in load_file(forge(tmp_path / "x", tensors, meta)).items()} == {k: v.shape for k, v in tensors.items()}
