"""Engines whose target's KV is quantised: text, speculation, sessions, channel means, refusals, and what acceptance loses."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import engine.calibrate.channel_means as channel_means_module
import eval_hot
from engine.calibrate.channel_means import channel_means, measure_means
from engine.calibrate.corpus import documents, library_texts
from engine.engine import Engine
from engine.errors import InvalidOption
from engine.generate import main
from engine.hub.cache import CacheFolder
from engine.kv.formats import KV_CACHE_DTYPES, element_bits
from engine.kv.quantized_pool import FIRST_SLOTS, QuantizedPool
from engine.model.decoder import forward_reserved
from engine.runtime.memory import open_pool, token_bytes
from engine.runtime.sampling import SamplingParams
from kernels.quantized_kv import FORMATS, RING

IDS = [list(range(40, 52)), [200, 3, 77], list(range(90, 160))]


@pytest.fixture(scope="module")
def quantised_folders(tmp_path_factory, byte_tokenizer):
    """Folders of a tiny target with a head size that quantised formats take, and of a draft like it: its first two of four layers, a little altered."""
    root = tmp_path_factory.mktemp("hot")
    weights = {}
    for name, layers in (("target", 4), ("draft", 2)):
        torch.manual_seed(layers)
        config = transformers.LlamaConfig(
            vocab_size=264,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=1024,
            eos_token_id=256,
            pad_token_id=None,
            bos_token_id=None,
            tie_word_embeddings=True,
        )
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data = torch.randn_like(parameter.data) * 0.2
        if name == "target":
            for layer in model.model.layers[2:]:
                layer.self_attn.o_proj.weight.data *= 0.4
                layer.mlp.down_proj.weight.data *= 0.4
            weights = model.state_dict()
        else:
            model.load_state_dict({key: weights[key] * (1 + 0.1 * torch.randn_like(weights[key])) for key in model.state_dict()})
        model.save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def quantised_engine(quantised_folders, pack_home):
    """`quantised_engine(kv_format, draft="draft"|"trunk"|"none", **options)` -> a new float32 engine; packs and means lie in the tests' own cache."""

    def make(kv_format, draft="draft", **options):
        source = quantised_folders / "draft" if draft == "draft" else draft
        options = {"device": "cpu", "dtype": "float32", "page_size": 16, "pool_tokens": 1 << 13} | options
        return Engine.from_pretrained(quantised_folders / "target", source, kv_cache_dtype=kv_format, **options)

    return make


@pytest.mark.parametrize("kv_format,draft", [("q4", "draft"), ("q3", "trunk"), ("q2", "draft"), ("q2", "trunk")])
def test_greedy_text_with_and_without_speculation(quantised_engine, kv_format, draft):
    params = [SamplingParams(14, draft_length=length, ignore_eos=True) for length in (0, 3)]
    engine = quantised_engine(kv_format, draft, deterministic=True)
    plain = [engine.generate([ids], params[0])[0].token_ids for ids in IDS]
    together = engine.generate(IDS, params[1])
    assert [r.token_ids for r in together] == plain
    accepted, proposed = (sum(getattr(r.speculation, name) for r in together) for name in ("accepted", "proposed"))
    assert 0 < accepted < proposed
    engine.core.pool.check_integrity()
    assert engine.core.pool.num_free_pages == engine.core.pool.max_pages
    assert plain != [r.token_ids for r in quantised_engine("bf16", draft, deterministic=True).generate(IDS, params[0])] or kv_format == "q4"


@pytest.mark.usefixtures("all_coded")
@pytest.mark.parametrize("draft", ["draft", "trunk", "none"])
def test_a_suspended_session_goes_on_in_quantised_pages(quantised_engine, draft, tmp_path):
    text = "def area(r):\n    return 3.14 * r * r\n\nclass Circle:\n    def __init__(self, radius):\n        self.radius = radius\n"
    params = SamplingParams(12, ignore_eos=True, draft_length=2)
    with quantised_engine("q4", draft).session(quality="near-lossless", log=lambda _: None) as session:
        session.generate(text, params)
        kept, length = session.token_ids, session.conversation.sequence.length
        figures = session.kv_figures
        rows = session.core.target.read_kv(session.conversation.sequence, 0, length)
        session.suspend(tmp_path / "a.kv")
    pages = -(-length // 16)
    assert (
        figures["hot_bytes"] == pages * 16 * 4 * 2 * (16 + 2) + 4 * 2 * (4 + RING) * 32 * 4
        and figures["raw_bytes"] == length * 4 * 2 * 32 * 2
    )
    back = {}
    for kv_format in ("bf16", "q4", "q2"):
        engine = quantised_engine(kv_format, draft)
        with engine.session(tmp_path / "a.kv", log=lambda _: None) as resumed:
            assert resumed.token_ids == kept
            back[kv_format] = engine.core.target.read_kv(resumed.conversation.sequence, 0, length)
            torch.testing.assert_close(back[kv_format][:4], rows[:4], rtol=1e-3, atol=1e-3)
            resumed.generate(" return", params)
            resumed.suspend(tmp_path / "b.kv")
        engine.core.pool.check_integrity()

    def lost(a, b):
        return float((a - b).square().sum() / b.square().sum())

    assert lost(back["bf16"], rows) < 0.2 and lost(back["q4"], rows) < 0.2
    if draft != "trunk":  # whose features are of the format they were computed in
        assert 1e-3 < lost(back["q4"], back["bf16"]) < 0.011 and 0.04 < lost(back["q2"], back["bf16"]) < 0.13, (
            "what was decoded, in quantised pages"
        )


def test_memory_is_what_the_pool_holds(quantised_engine):
    sizes = {kv_format: quantised_engine(kv_format, "none").memory()["pool_bytes"] for kv_format in KV_CACHE_DTYPES}
    bits = {kv_format: element_bits(kv_format, 32, torch.float32) for kv_format in KV_CACHE_DTYPES}
    assert bits == {"bf16": 32, "q4": 4.5, "q3": 3.5, "q2": 2.5}
    elements = sizes["bf16"] // 4
    for kv_format in FORMATS:
        exact = FIRST_SLOTS * 4 * 2 * (4 + RING) * 32 * 4  # slots, layers, key and value, tokens, channels, float32
        assert sizes[kv_format] == elements * bits[kv_format] / 8 + exact


# --- means --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_home(monkeypatch, tmp_path):
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path))
    monkeypatch.setattr(channel_means_module, "NUM_TOKENS", 300)
    return tmp_path


def test_means_are_measured_once_and_mend_when_damaged(quantised_engine, fresh_home, capsys):
    engine = quantised_engine("bf16", "none")
    given = engine.core.target, engine.tokenizer, engine.core.config.target_dir
    first = channel_means(*given)
    assert "measuring" in capsys.readouterr().err
    assert torch.equal(channel_means(engine.core.target, None, engine.core.config.target_dir), first), "kept means need no tokenizer"
    assert capsys.readouterr().err == ""
    (file,) = (fresh_home / "hot").glob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:], b"", b"{}" * 40):
        file.write_bytes(damaged)
        assert torch.equal(channel_means(*given), first)
        assert "measuring" in capsys.readouterr().err and file.read_bytes() == whole
    assert list((fresh_home / "hot").glob("*.part")) == []


def test_means_that_cannot_be_kept_are_used_with_a_warning(quantised_engine, fresh_home, monkeypatch, capsys):
    engine = quantised_engine("bf16", "none")
    given = engine.core.target, engine.tokenizer, engine.core.config.target_dir
    first = channel_means(*given)
    (fresh_home / "file").write_text("")
    monkeypatch.setenv("FORETOLD_HOME", str(fresh_home / "file" / "home"))
    monkeypatch.setattr(CacheFolder, "_warned", False)
    capsys.readouterr()
    for _ in range(2):
        assert torch.equal(channel_means(*given), first)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1 and "FORETOLD_HOME" in lines[0]


def test_means_are_those_of_the_text(quantised_engine):
    engine = quantised_engine("bf16", "none")
    mean = measure_means(engine.core.target, engine.tokenizer, 2000)
    assert mean.shape == (4, 2, 1, 32) and mean.dtype == torch.float32
    texts, _ = documents(library_texts(seed=1), engine.tokenizer, 2000, 200)
    rows = []
    for ids in texts:
        sequence = engine.core.pool.new_sequence()
        with torch.inference_mode():
            forward_reserved(engine.core.target, torch.tensor(ids), [sequence], [len(ids)], logits="none")
        rows.append(engine.core.target.read_kv(sequence, 4, len(ids)))
    other = torch.cat(rows).mean(0)
    assert float((other - mean.flatten()).norm() / other.norm()) < 0.35


def test_a_model_without_tokenizer_needs_kept_means(quantised_engine, fresh_home):
    target = quantised_engine("bf16", "none").core.target
    with pytest.raises(InvalidOption, match="no tokenizer"):
        Engine(target, None, kv_cache_dtype="q4")


def test_what_does_not_go_is_refused_by_name(quantised_engine, chat_engine, capsys, chat_folders):
    with pytest.raises(InvalidOption, match="unknown KV cache dtype 'q5'"):
        quantised_engine("q5", "none")
    target = chat_engine("none").core.target
    with pytest.raises(InvalidOption, match="head size"):
        open_pool(target, "q4", 4, 16, 4)
    with pytest.raises(InvalidOption, match="channel means"):
        open_pool(quantised_engine("bf16", "none").core.target, "q4", 4, 16, 4)
    with pytest.raises(InvalidOption, match="head size"):
        token_bytes(target, None, "q2")
    assert main(["--target", str(chat_folders.target), "--device", "cpu", "--hot", "q4", "hi"]) == 2
    assert "use --kv-cache-dtype bf16" in capsys.readouterr().err


def options_of(folders):
    """Options that name the tiny pair."""
    return ["--target", str(folders / "target"), "--draft", str(folders / "draft"), "--device", "cpu", "--dtype", "float32"]


def test_command_line(quantised_folders, pack_home, capsys):
    options = options_of(quantised_folders)
    assert main([*options, "--hot", "q3", "--json", "--max-new-tokens", "8", "colours"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert found["hot"] == "q3" and ", q3]" in captured.err
    assert 0 < found["kv"]["hot_bytes"] < found["memory"]["pool_bytes"]


# --- what it costs ------------------------------------------------------------------------------------------------------


def test_acceptance_stays_within_a_point(quantised_engine):
    engine = quantised_engine("bf16")
    text = engine.encode("".join(f"def f{n}(x, y):\n    return x * {n} + y\n\n\n" for n in range(60)))
    windows = [text[start : start + 128] for start in range(0, 128 * 8, 128)]
    rows = {kv_format: eval_hot.loss(engine, kv_format, windows, 128) for kv_format in KV_CACHE_DTYPES}
    plain = rows["bf16"]
    assert abs(plain["kl"]) < 1e-6 and 0.3 < plain["expected_acceptance"] < 0.99
    kl = [rows[kv_format]["kl"] for kv_format in FORMATS]
    assert kl == sorted(kl) and kl[0] > 1e-4 and kl[2] < 0.3
    for kv_format in ("q4", "q3"):
        for found in (rows[kv_format], rows[kv_format]["running"]):
            assert abs(found["expected_acceptance"] - plain["expected_acceptance"]) < 0.01
    pool = eval_hot.pool_of(engine, "q4", 128)
    assert isinstance(pool, QuantizedPool) and pool.bits == 4


def test_eval_script(quantised_folders, pack_home, tmp_path, capsys):
    for number in range(3):
        (tmp_path / f"{number}.py").write_text("".join(f"def f{n}(x):\n    return x * {n + number}\n\n\n" for n in range(20)))
    models = options_of(quantised_folders)
    sizes = ["--tokens", "128", "--context", "64", "--prompts", "2", "--prompt-tokens", "20", "--new-tokens", "12", "--draft-length", "2"]
    out = tmp_path / "hot.json"
    assert eval_hot.main([*models, "--text", str(tmp_path), *sizes, "--formats", "bf16,q2", "--json-out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["bf16", "q2"]
    found = json.loads(out.read_text())
    assert found["test_sequences"] == 2 and found["command"].startswith("python scripts/eval_hot.py --target")
    plain, kv_format = found["rows"]
    assert plain["kl"] < 1e-6 < kv_format["kl"] and kv_format["bits_per_element"] == 2.5
    for row in found["rows"]:
        assert [s["temperature"] for s in row["speculation"]] == [0.0, 1.0]
        for s in row["speculation"]:
            assert s["new_tokens"] == 24 and 0 <= s["accepted"] <= s["proposed"] and s["proposed"] > 0
    refused = {
        "unknown KV cache dtype 'q7'": ["--formats", "q4,q7"],
        "nothing to score": ["--context", "4"],
        "at least": ["--draft-length", "0"],
    }
    for said, options in refused.items():
        assert eval_hot.main([*models, "--text", str(tmp_path), *options]) == 2
        assert said in capsys.readouterr().err
