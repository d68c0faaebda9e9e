"""Batches that are kept full: a row a batch, of requests that all came back whole."""

from __future__ import annotations

import json

import pytest

from bench import continuous_batch

ARGS = ["--shape", "tiny", "--requests", "5", "--repeats", "1", "--prompt-tokens", "3-9", "12-20", "--new-tokens", "4-8"]


def test_a_row_a_batch(capsys, tmp_path):
    assert continuous_batch.main([*ARGS, "--batches", "2,4", "--json-out", str(tmp_path / "rates.json")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == json.loads((tmp_path / "rates.json").read_text())["rows"]
    assert [(row["batch"], row["requests"], row["prompt_tokens"]) for row in lines] == [
        (batch, 5, prompt) for batch in (2, 4) for prompt in ([3, 9], [12, 20])
    ]
    for row in lines:
        assert row["tokens_per_s"] > 0 and row["ttft_ms"][0] <= row["ttft_ms"][1] and row["token_ms"][0] <= row["token_ms"][1]


def test_the_requests_are_the_same_in_every_run():
    prompts, lengths = continuous_batch.drawn(20, (3, 9), (4, 8), 100)
    assert (prompts, lengths) == continuous_batch.drawn(20, (3, 9), (4, 8), 100)
    assert {len(prompt) for prompt in prompts} == set(range(3, 10)) and set(lengths) == set(range(4, 9))


def test_a_request_that_comes_back_short_is_no_figure(monkeypatch):
    monkeypatch.setattr(continuous_batch, "ours", lambda args, batch: (100, lambda prompts, lengths: [(n - 1, 0.1, 0.1) for n in lengths]))
    with pytest.raises(SystemExit, match="came back with"):
        continuous_batch.main(ARGS)
    for wrong in (["--prompt-tokens", "9-3"], ["--engine", "vllm"], ["--engine", "vllm", "--folder", "x", "--batches", "2,4"]):
        with pytest.raises(SystemExit):
            continuous_batch.main([*ARGS, *wrong])
