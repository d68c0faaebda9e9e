"""Draft heads that ship with the package: found by the target's shape, used for `trunk`, their pack taken where it fits."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import calibrate
from codec.pack import CodecPack
from draft import pretrained
from draft.head_file import CONFIG_FILE, PACK_FILE, read_config, read_draft_head
from draft.pretrained import FOLDER, shipped_draft_head
from engine.cli.command import run
from engine.errors import BadDraftHead
from engine.hub.fingerprint import model_fingerprint
from engine.loading import choose_draft
from engine.model.decoder import Decoder
from engine.runtime.sampling import SamplingParams
from engine.sessions.codec_params import find_pack, pair_fingerprints


@pytest.fixture
def shipped(tmp_path, chat_folders, monkeypatch):
    """The chat target's draft head as if it came with the package, beside another one and a file of no kind."""
    folder = tmp_path / "pretrained"
    monkeypatch.setattr(pretrained, "FOLDER", folder)
    shutil.copytree(chat_folders.head, folder / "b")
    shutil.copytree(chat_folders.head, folder / "a")
    config = json.loads((folder / "a" / CONFIG_FILE).read_text())
    (folder / "a" / CONFIG_FILE).write_text(json.dumps(config | {"target_fingerprint_config": "0" * 64}))
    (folder / "README.md").write_text("draft heads")
    return folder / "b"


def test_the_default_is_the_shipped_draft_head_of_a_target_of_its_shape(shipped, chat_engine, chat_folders, random_decoder):
    engine = chat_engine("trunk")
    assert engine.core.source.folder == shipped and engine.drafter_name == "draft head"
    assert (
        pair_fingerprints(engine.core)["draft"]
        == f"trunk-1-{read_draft_head(shipped)[0].digest}"
        == engine.core.source.fingerprint(model_fingerprint)
    )
    untrained = chat_engine("trunk", exit_layer=2)
    assert untrained.core.source.head_layers is None and untrained.core.exit_layer == 2 and untrained.drafter_name == "early exit"
    assert choose_draft("trunk", random_decoder(0).config).head is None
    config = json.loads((shipped / CONFIG_FILE).read_text())
    (shipped / CONFIG_FILE).write_text(json.dumps(config | {"version": 99}))
    with pytest.raises(BadDraftHead, match="version 99"):
        chat_engine("trunk")


def test_what_ships_is_whole(tmp_path, monkeypatch, random_decoder):
    for folder in (path.parent for path in FOLDER.rglob(CONFIG_FILE)):  # a head's other forms lie below it
        config, tensors = read_draft_head(folder)
        assert len(tensors["token_ids"]) == config.vocab_size and (folder / "README.md").is_file()
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        assert size <= 44 * 2**20
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "none")
    assert shipped_draft_head(random_decoder(0).config) is None


def test_the_pack_beside_the_draft_head_is_taken_where_it_fits(shipped, chat_engine, pack_home):
    said: list[str] = []
    fitted = find_pack(chat_engine("trunk").core, log=said.append)
    assert fitted.predictor_settings["taps"] == [1, 2], "the early exit's last state and the draft head's"
    marked = fitted.with_model(fitted.model, fitted.stored["variance"] * 2)
    marked.save(shipped / PACK_FILE)
    assert find_pack(chat_engine("trunk").core, log=said.append).digest == marked.digest != fitted.digest
    marked.fingerprints["draft"] = "trunk-1"
    marked.save(shipped / PACK_FILE)
    assert find_pack(chat_engine("trunk").core, log=said.append).digest == fitted.digest
    del said[:]
    (shipped / PACK_FILE).write_bytes(b"nothing")
    assert find_pack(chat_engine("trunk").core, log=said.append).digest == fitted.digest
    assert str(shipped / PACK_FILE) in said[-1] and "left out" in said[-1]


@pytest.mark.usefixtures("all_coded")
def test_a_calibrated_pack_of_a_draft_head_codes_its_sessions(chat_engine, chat_folders, tmp_path, monkeypatch):
    pack = str(tmp_path / "pack")
    arguments = [
        "calibrate.py",
        "--target",
        str(chat_folders.target),
        "--draft",
        str(chat_folders.head),
        "--tokens",
        "1500",
        "--context",
        "64",
    ]
    options = [
        "--weighting",
        "attention",
        "--level-strength",
        "0",
        "--predictor",
        "low_rank",
        "--rank",
        "24",
        "--budget",
        "9",
        "--dtype",
        "float32",
    ]
    monkeypatch.setattr("sys.argv", [*arguments, *options, "--device", "cpu", "--out", pack])
    assert calibrate.main() == 0
    found = CodecPack.load(pack)
    assert found.predictor_settings["taps"] == [1, 2] and found.layout.first_layer == 1
    with chat_engine("head").session(pack=pack, quality="near-lossless") as session:
        session.generate("def f(x):\n    return x", SamplingParams(max_new_tokens=30))
        session.suspend(tmp_path / "a.kv")
        with chat_engine("head").session(tmp_path / "a.kv", pack=pack) as resumed:
            assert resumed.token_ids == session.token_ids
            kept, back = (s.core.target.read_kv(s.conversation.sequence, 0, len(s.token_ids) - 1) for s in (session, resumed))
    assert (kept - back).norm() < 0.5 * (kept - kept.mean(0)).norm()


def test_a_session_of_another_draft_head_leaves_the_ids(chat_engine, chat_folders, tmp_path, make_draft_head):
    with chat_engine("head").session(quality="tokens") as session:
        session.generate("hello", SamplingParams(max_new_tokens=5))
        session.suspend(tmp_path / "a.kv")
    target = Decoder.from_pretrained(chat_folders.target, dtype=torch.float32)
    other = make_draft_head(tmp_path / "other", target, exit_layer=1, size=180)
    assert read_config(other).exit_layer == 1
    for draft in (other, "trunk"):
        with chat_engine(str(draft)).session(tmp_path / "a.kv") as resumed:
            assert resumed.token_ids == session.token_ids and resumed.resumed.restore == "recompute"


def test_the_command_line_takes_a_draft_heads_folder(chat_folders, pack_home, capsys, tmp_path):
    options = ["--target", str(chat_folders.target), "--dtype", "float32", "--device", "cpu", "--json", "--max-new-tokens", "24", "hello"]
    found = {}
    for draft in (str(chat_folders.head), "none"):
        assert run([*options, "--draft", draft, "--draft-length", "3"]) == 0
        found[draft] = json.loads(capsys.readouterr().out.splitlines()[-1])
    trained, plain = found.values()
    assert trained["text"] == plain["text"] and trained["speculation"]["drafter"] == "draft head"
    assert trained["speculation"]["accepted"] > 0 and trained["memory"]["draft_bytes"] > 0
    broken = tmp_path / "broken"
    shutil.copytree(chat_folders.head, broken)
    (broken / "adapter.safetensors").unlink()
    assert run([*options, "--draft", str(broken)]) == 2
    assert "error: there is no" in capsys.readouterr().err
