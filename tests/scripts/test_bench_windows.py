"""The windows benchmark, with a tiny model: both ways say the same, and the windows' bytes are few."""

from __future__ import annotations

import json

import pytest

import bench_windows


def test_both_ways_are_measured(tmp_path, capsys):
    out = tmp_path / "windows.json"
    given = ["--tokens", "900", "--batch", "2", "--new-tokens", "8", "--repeats", "1", "--json-out", str(out)]
    assert bench_windows.main(["--shape", "tiny-window", *given]) == 0
    every, own = json.loads(out.read_text())["rows"]
    assert (
        [json.loads(line)["windows"] for line in capsys.readouterr().out.splitlines()[1:]]
        == [every["windows"], own["windows"]]
        == [False, True]
    )
    assert own["equal_tokens"] == every["equal_tokens"] == [8, 8]
    # one of six layers keeps all: the others their window of 64, 128 tokens to take back, and what a chunk adds
    assert own["text_bytes"] < 0.7 * every["text_bytes"] and own["pool_bytes"] < every["pool_bytes"]
    assert own["reused_tokens"] == every["reused_tokens"] == 768 and own["tokens_per_s"] > 0
    with pytest.raises(SystemExit):
        bench_windows.main(["--shape", "tiny", *given])
