"""Finding a pair's codec pack: given, cached, or fitted; packs for every source of drafts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from engine.calibrate.corpus import documents, library_texts
from engine.calibrate.recipe import CalibrationOptions, calibrate, quick_pack
from engine.engine import Engine
from engine.errors import InvalidOption, PackMismatch
from engine.model.decoder import Decoder, DecoderConfig
from engine.runtime.sampling import SamplingParams
from engine.sessions.codec_params import find_pack, known_pack, load_pack, pair_fingerprints
from engine.sessions.file import SessionFile


@pytest.fixture
def home(pack_home, tmp_path, monkeypatch):
    """A fresh cache folder, and packs that no other test has fitted; from few tokens still."""
    monkeypatch.setattr("engine.sessions.codec_params.quick_pack", partial(quick_pack, num_tokens=768, context=128, rank=48))
    monkeypatch.setattr("engine.sessions.kv_codec.known_pack", known_pack)
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def packs_in(home):
    return sorted(path.name for path in (home / "packs").glob("*.safetensors"))


def test_a_pack_is_fitted_once_and_cached(chat_engine, home):
    said: list[str] = []
    engine = chat_engine("none")
    first = find_pack(engine.core, log=said.append)
    assert any("fitting a quick one" in line for line in said) and any("held-out R2 of keys" in line for line in said)
    assert len(packs_in(home)) == 1
    del said[:]
    assert find_pack(chat_engine("none").core, log=said.append).digest == first.digest and said == []
    # one that was damaged is fitted again
    file = home / "packs" / packs_in(home)[0]
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    healed = find_pack(engine.core, log=said.append)
    assert said and find_pack(engine.core, file).digest == healed.digest
    find_pack(chat_engine("trunk").core, log=said.append)
    assert len(packs_in(home)) == 2, "another source of drafts, another pack"


@pytest.mark.parametrize("draft", ["draft", "trunk", "none"])
def test_the_pack_asks_for_what_the_engine_has(chat_engine, draft):
    engine = chat_engine(draft)
    pack = find_pack(engine.core, log=lambda _: None)
    layers = {"draft": 2, "trunk": 1, "none": 0}[draft]
    taps = pack.predictor_settings["taps"]
    assert bool(taps) == (draft != "none") and all(1 <= tap <= layers for tap in taps)
    assert pack.predictor_settings["target_taps"] == [0], "too shallow a target to run any layers again"
    assert pack.layout.first_layer == engine.core.exit_layer == (1 if draft == "trunk" else 0)
    assert {role: pack.fingerprints[role] for role in ("target", "draft", "tokenizer")} == pair_fingerprints(engine.core)
    assert pack.fingerprints["draft"] == {"trunk": "trunk-1", "none": "none"}.get(draft, pack.fingerprints["draft"])
    assert -1 < pack.info["r2_k"] <= 1


def test_a_full_calibration_without_a_draft(chat_engine, tmp_path):
    engine = chat_engine("none")
    docs, _ = documents(library_texts(), engine.tokenizer, 2500, 128)
    options = CalibrationOptions(context=128, tokens_per_batch=512, held_out_tokens=512)
    pack = calibrate(engine.core.target, None, docs, options=options, fingerprints=pair_fingerprints(engine.core), log=lambda _: None)
    assert pack.predictor_settings["taps"] == []
    pack.save(tmp_path / "pack.safetensors")
    session = engine.session(pack=str(tmp_path / "pack.safetensors"))
    session.generate("what comes of it", SamplingParams(max_new_tokens=30, ignore_eos=True))
    session.suspend(tmp_path / "a.kv")
    other = engine.session(tmp_path / "a.kv", pack=tmp_path / "pack.safetensors")  # the same file, named differently
    assert other.token_ids == session.token_ids and other.conversation.sequence.length == len(session.token_ids) - 1


def test_packs_that_do_not_belong(chat_engine, tmp_path):
    engine = chat_engine("none")
    pack = find_pack(engine.core, log=lambda _: None)
    prints = pair_fingerprints(engine.core)
    for role in prints:
        replace(pack, fingerprints=prints | {role: "another"}).save(tmp_path / "pack")
        with pytest.raises(PackMismatch, match=f"made for another {role}"):
            load_pack(tmp_path / "pack", prints)
    with pytest.raises(InvalidOption, match="there is no codec pack"):
        load_pack(tmp_path / "none", prints)
    with pytest.raises(InvalidOption, match="there is no codec pack"):
        load_pack(tmp_path, prints)
    (tmp_path / "text").write_text("no pack at all")
    with pytest.raises(PackMismatch, match="cannot be read"):
        load_pack(tmp_path / "text", prints)
    replace(pack, predictor={}).save(tmp_path / "pack")
    with pytest.raises(PackMismatch, match="holds no predictor"):
        engine.session(pack=tmp_path / "pack")
    replace(find_pack(chat_engine("trunk").core, log=lambda _: None), fingerprints=prints).save(tmp_path / "pack")
    with pytest.raises(InvalidOption, match="first_layer"):
        engine.session(pack=tmp_path / "pack")
    replace(find_pack(chat_engine("draft").core, log=lambda _: None), fingerprints=prints).save(tmp_path / "pack")
    with pytest.raises(InvalidOption, match="this engine has none"):
        engine.session(pack=tmp_path / "pack")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_without_a_folder_are_told_apart_by_their_weights(hf_config, dtype):
    config = DecoderConfig.from_hf(hf_config("llama", num_hidden_layers=1))
    prints = [
        pair_fingerprints(Engine(Decoder.from_config(config, dtype=dtype, seed=seed), draft=None).core)["target"] for seed in (0, 0, 1)
    ]
    assert prints[0] == prints[1] != prints[2]
    first, second = (Decoder.from_config(config, dtype=dtype, seed=0) for _ in range(2))
    layer = second.layers[0]
    layer.o_proj.unpack()
    layer.o_proj.plain.data[0, 0] += 1
    layer.o_proj.pack(second.gemm)
    second._weights = []
    prints = [pair_fingerprints(Engine(decoder).core)["target"] for decoder in (first, second)]
    assert prints[0] != prints[1], "one number in a matrix that bf16 packs for the CPU"


def test_without_a_tokenizer_a_pack_must_be_given(random_decoder, home):
    with pytest.raises(InvalidOption, match="no tokenizer"):
        find_pack(Engine(random_decoder(0)).core)


@pytest.fixture
def fits(home, monkeypatch):
    """Says how many packs were fitted."""
    fitted, fit = [], partial(quick_pack, num_tokens=768, context=128, rank=48)
    monkeypatch.setattr("engine.sessions.codec_params.quick_pack", lambda *args, **options: fitted.append(1) or fit(*args, **options))
    return fitted


PARAMS = SamplingParams(max_new_tokens=30, ignore_eos=True)


def test_a_pack_is_fitted_when_something_is_coded_and_not_before(chat_engine, fits, tmp_path):
    with chat_engine("none").session(quality="balanced", log=lambda _: None) as session:
        session.generate("what comes of it", PARAMS)
        report = session.suspend(tmp_path / "a.kv", fit=False)
        assert session.unfitted and not fits and report.reason.startswith("kept as ids: there are no codec parameters")
        assert (report.restore, report.quality, report.estimated_kl) == ("recompute", "balanced", 0.0)
        ids = list(session.token_ids)
    with chat_engine("none").session(tmp_path / "a.kv", log=lambda _: None) as session:
        assert session.token_ids == ids and session.quality == "balanced" and session.resumed.restore == "recompute"
        session.generate(" and then", PARAMS)
        assert not fits, "an answer waits for no pack"
        assert session.suspend(tmp_path / "a.kv").restore == "decode" and fits == [1] and not session.unfitted
    stored = SessionFile.load(tmp_path / "a.kv")
    assert stored.spans and stored.num_cached == len(stored.token_ids) - 1
    with chat_engine("none").session(tmp_path / "a.kv", log=lambda _: None) as session:
        assert session.resumed.restore == "decode" and fits == [1], "the one in the cache"


@pytest.mark.parametrize("quality, shortest", [("tokens", 0), ("auto", 1000), ("near-lossless", 1000)])
def test_what_is_not_coded_needs_no_pack(chat_engine, fits, monkeypatch, tmp_path, quality, shortest):
    monkeypatch.setattr("engine.sessions.session.SHORTEST", shortest)
    with chat_engine("none").session(quality=quality, log=lambda _: None) as session:
        session.generate("what comes of it", PARAMS)  # all of it among the last tokens, which near-lossless runs again
        assert session.suspend(tmp_path / "a.kv").restore == "recompute" and not session.unfitted and not fits


def test_spans_of_another_draft_are_kept_until_their_tokens_are_coded_anew(chat_engine, fits, tmp_path):
    file = tmp_path / "a.kv"
    with chat_engine("draft").session(quality="compact", log=lambda _: None) as session:
        session.generate("what comes of it", PARAMS)
        session.suspend(file)
    coded = SessionFile.load(file)
    assert fits == [1]
    with chat_engine("none").session(file, log=lambda _: None) as session:
        assert session.resumed.restore == "recompute"
        session.generate(" and then", PARAMS)
        report = session.suspend(file, fit=False)
        assert fits == [1] and session.unfitted and report.restore == "recompute" and report.estimated_kl == 0.0
        ids = list(session.token_ids)
    kept = SessionFile.load(file)
    assert (kept.spans, kept.fingerprints, kept.num_cached, kept.quality) == (coded.spans, coded.fingerprints, coded.num_cached, "compact")
    assert kept.token_ids == ids
    with chat_engine("draft").session(file, log=lambda _: None) as session:
        assert session.resumed.restore == "decode" and session.resumed.tokens == coded.num_cached and session.token_ids == ids
    engine = chat_engine("none")
    with engine.session(file, log=lambda _: None) as session:
        assert session.generate("", PARAMS).token_ids == engine.generate([ids], PARAMS)[0].token_ids
        assert session.suspend(file).restore == "decode" and fits == [1, 1]
    anew = SessionFile.load(file)
    assert anew.fingerprints["draft"] == "none" and anew.num_cached == len(anew.token_ids) - 1


def test_a_quality_that_could_not_be_coded_is_refused_before_an_answer(random_decoder, home, tmp_path):
    engine = Engine(random_decoder(0))
    with pytest.raises(InvalidOption, match="no tokenizer"):
        engine.session(quality="balanced")
    with engine.session(log=lambda _: None) as session:  # auto: the ids tell everything
        session.generate([1, 2, 3], PARAMS)
        assert session.suspend(tmp_path / "a.kv").restore == "recompute"


def test_a_tokenizer_is_read_once_for_its_fingerprint(chat_engine, monkeypatch) -> None:
    engine, calls = chat_engine("none"), []
    prints = pair_fingerprints(engine.core)
    monkeypatch.setattr("engine.sessions.codec_params.tokenizer_fingerprint", lambda tokenizer: calls.append(tokenizer) or "other")
    assert pair_fingerprints(engine.core) == prints and not calls
    monkeypatch.setattr(type(engine.core.tokenizer), "__len__", lambda self: 5)
    assert [pair_fingerprints(engine.core)["tokenizer"] for _ in range(2)] == ["other"] * 2 and len(calls) == 1, "it has got other tokens"
