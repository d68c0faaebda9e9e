"""What the scripts of GPU leases are given: texts sorted by kind, models joined from pieces, and the host's part of a step measured alone."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.errors import InvalidOption
from engine.hub.pairs import PAIRS
from engine.runtime.drafters import load_draft_head
from gpu import convert_pair, profile_steps, shape_folder, texts


@pytest.fixture
def roots(tmp_path, monkeypatch) -> Path:
    """A machine's files: 12 of each kind, the standard library among them."""
    monkeypatch.setattr(texts.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib" / "python3")})
    names = {
        "lib/python3/a{}.py": "std",
        "site-packages/b{}.py": "lib",
        "c{}.rst": "rst",
        "share/man/man1/d{}.1": "man",
        "e{}.yaml": "yaml",
    }
    names |= {"f{}.css": "css", "g{}.pm": "perl", "h{}.md": "markdown", "doc{}/changelog.gz": "changelog", "i{}.txt": "prose"}
    for pattern, kind in names.items():
        for n in range(12):
            path = tmp_path / pattern.format(n)
            path.parent.mkdir(parents=True, exist_ok=True)
            text = f"{kind} {n} ä\n" * 400
            path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    (tmp_path / "short.css").write_text("x", encoding="utf-8")
    (tmp_path / "binary.md").write_bytes(b"\0" * 5000)
    return tmp_path


def test_files_are_sorted_by_kind_and_what_is_tested_is_not_calibrated_on(roots, tmp_path_factory, capsys) -> None:
    out = tmp_path_factory.mktemp("out") / "texts"
    assert texts.main(["--from", str(roots), "--out", str(out), "--megabytes", "0.1"]) == 0
    said = capsys.readouterr().out
    assert "curve/php: left out" in said and "cal/chat: left out" in said and "curve/css: left out" not in said

    def of(folder: str) -> set[str]:
        return {path.read_text(encoding="utf-8") for path in (out / folder).glob("*.txt")}

    for kind in ("std", "lib", "rst", "man", "yaml"):
        calibrated, tested = of(f"cal/{kind}"), of(f"mix/{kind}")
        assert calibrated and tested and not calibrated & tested
        assert all(text.startswith(f"{kind} ") for text in calibrated | tested)
    for folder in ("curve/css", "test/perl", "test/markdown", "test/changelog"):
        assert of(folder) and all(text.startswith(folder.split("/")[1]) for text in of(folder)), folder
    for kind in ("logs", "json"):
        assert of(f"cal/{kind}") and of(f"mix/{kind}") and not of(f"cal/{kind}") & of(f"mix/{kind}")
    assert len(of("long/agent")) == 4 and min(map(len, of("long/agent"))) >= texts.LONG_CHARACTERS
    assert texts.main(["--out", str(out)]) == 2 and "holds something already" in capsys.readouterr().err


def test_pieces_are_joined_in_order_and_must_be_all_of_the_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    pieces = [tmp_path / f"part{n}" for n in range(3)]
    for n, piece in enumerate(pieces):
        piece.write_bytes(bytes([n]) * (n + 1))
    source = replace(PAIRS["smollm2"].target, num_bytes=6)
    convert_pair.join_pieces(source, pieces)
    joined = tmp_path / "home" / "downloads" / f"{source.name}.gguf"
    assert joined.read_bytes() == b"\0\1\1\2\2\2"
    with pytest.raises(InvalidOption, match="have 3 bytes, the file 6"):
        convert_pair.join_pieces(source, pieces[:2])


def test_a_shape_s_folder_has_what_another_engine_reads(tmp_path) -> None:
    assert shape_folder.main(["--shape", "tiny", "--prompts", "3", "--prompt-tokens", "5", "--out", str(tmp_path)]) == 0
    config, prompts = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("config.json", "prompts.json"))
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["vocab_size"] == 512 and config["dtype"] == "bfloat16"
    assert [len(prompt) for prompt in prompts] == [5, 5, 5] and all(0 <= token < 512 for prompt in prompts for token in prompt)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the runners of a GPU, on a CPU")
@pytest.mark.parametrize("states", [None, (4,)], ids=["exit", "states"])
@pytest.mark.parametrize("length", [0, 2])
def test_the_host_s_part_of_a_step_runs_no_pass(random_decoder, make_draft_head, tmp_path, states, length) -> None:
    target = random_decoder(0, num_hidden_layers=4)
    folder = make_draft_head(tmp_path, target, **({} if states is None else {"state_layers": states}))
    core = Engine(target, draft=load_draft_head(folder, target), page_size=16, pool_tokens=1 << 13, max_batch=3).core
    profile_steps.use_captured_runners(core)
    row = profile_steps.host_part(core, [[3, 4, 5]] * 3, length, 8, 0)
    assert 0 < row["host_us"] <= row["host_median_us"]
    assert not [name for name in row["host_calls"] if "mm" in name or "matmul" in name or "softmax" in name]
    assert sum(row["host_calls"].values()) < 12 and row["host_calls"]["aten.clone.default"] >= 1
    assert core.scheduler.idle
    ticks = iter(range(1000))
    found = profile_steps.joining(core, [[3, 4, 5]] * 3, length, 20, 2, lambda: float(next(ticks)))
    assert found == {"decoding": 1e6, "prompt": 1e6, "after": 1e6, "prompts": found["prompts"]} and 4 <= found["prompts"] <= 10
    assert core.scheduler.idle and core.pool.num_free_pages == core.pool.num_pages
