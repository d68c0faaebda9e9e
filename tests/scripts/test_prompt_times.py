"""Times of prompts: a line a size, and none of a pass whose logits are wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count

import pytest

from bench import prompt_times
from engine.kv.shared_prefixes import SharedPages, SharedPrefixes
from engine.runtime import memory, model_runner, prompt_passes
from engine.runtime.model_runner import GraphedDecoder
from engine.text.known_texts import KnownTexts

ARGS = ["--shape", "tiny", "--contexts", "0,256", "--repeats", "1"]


def test_a_line_a_size(capsys, tmp_path):
    assert prompt_times.main([*ARGS, "--prompts", "64,200,2x60", "--json-out", str(tmp_path / "times.json")]) == 0
    first, *lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    report = json.loads((tmp_path / "times.json").read_text())
    assert {**first, "rows": lines} == report and first["pass_rows"] == list(prompt_passes.PASS_ROWS)
    assert [(row["context"], row["prompts"], row["tokens"]) for row in lines] == [
        (context, *sizes) for context in (0, 256) for sizes in ((1, 64), (1, 200), (2, 60))
    ]
    assert all(min(row["engine_ms"], row["pass_ms"], row["own_ms"]) > 0 and row["relative_rms"] < 1e-4 for row in lines)


def test_a_captured_pass_is_told_and_a_wrong_one_refused(capsys, monkeypatch):
    """Steps without graphs stand for captured ones; then they read another token than they were given."""

    class Runner(GraphedDecoder):
        def __init__(self, decoder, pool):
            super().__init__(decoder, pool, capture=False)

    monkeypatch.setattr("engine.runtime.core.graphed", Runner)
    for module in (prompt_passes, model_runner, memory):  # put back what the option changes
        monkeypatch.setattr(module, "PASS_ROWS", module.PASS_ROWS)
    assert prompt_times.main([*ARGS, "--prompts", "200,2100"]) == 0
    assert [json.loads(line)["captured"] for line in capsys.readouterr().out.splitlines()[1:]] == [True, False, True, False]
    assert prompt_times.main([*ARGS, "--prompts", "200,1100,1300", "--pass-rows", "256,1200"]) == 0
    assert [json.loads(line)["captured"] for line in capsys.readouterr().out.splitlines()[1:]] == [True, True, False] * 2
    with pytest.raises(SystemExit):
        prompt_times.main([*ARGS, "--pass-rows", "256,128"])
    run = GraphedDecoder.run
    monkeypatch.setattr(Runner, "run", lambda self, asked: run(self, replace(asked, token_ids=asked.token_ids.roll(1))))
    with pytest.raises(SystemExit, match=r"1 x 200 tokens: logits \d\.\d+ from the own pass's"):
        prompt_times.main([*ARGS, "--prompts", "200"])


def test_what_the_host_does(capsys):
    assert prompt_times.main(["--shape", "tiny", "--contexts", "100,1000", "--repeats", "1", "--prompts", "60,3x60", "--host"]) == 0
    _, *lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["context"], row["prompts"]) for row in lines] == [(100, 1), (100, 3), (1000, 1), (1000, 3)]
    assert all(min(row["check_ms"], row["launch_ms"], row["end_ms"]) > 0 for row in lines)
    with pytest.raises(SystemExit, match="were known"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedPrefixes, "share", lambda *_: SharedPages())
        prompt_times.main(["--shape", "tiny", "--contexts", "100", "--repeats", "1", "--prompts", "60", "--host"])


def test_token_ids_of_a_chat(capsys, chat_folders, monkeypatch):
    args = ["--tokenizer", str(chat_folders.target), "--contexts", "9000", "--repeats", "1"]
    assert prompt_times.main(args) == 0
    _, row = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["context"] > 9000 and min(row["first_ms"], row["again_ms"]) > 0
    numbers = count()
    monkeypatch.setattr(KnownTexts, "ids", lambda self, part, encode: [*encode(part)[:-1], next(numbers)])
    with pytest.raises(SystemExit, match="other ids"):
        prompt_times.main(args)
