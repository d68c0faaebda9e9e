"""Replay of made-up traces: every row follows from the trace, whatever the policy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bench_trie
from bench.traces import read_trace
from bench.trie_replay import MEASURED
from engine.errors import InvalidOption
from engine.kv.eviction import POLICIES
from engine.kv.tiers import RestoreTimes

BLOCK = 512


def conversation(path: Path, prompts: list[list[int]]) -> Path:
    lines = [
        {"timestamp": 1000 * i, "input_length": len(ids) * BLOCK - 100, "output_length": 5, "hash_ids": ids}
        for i, ids in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def sessions(path: Path, count: int = 6) -> Path:
    rng = np.random.default_rng(3)
    lines = []
    for i in range(count):
        requests, blocks = [], 4
        for j in range(10):
            blocks += int(rng.integers(1, 5))
            # every third prompt drops the last block of the one before it and goes on with others
            runs = [1, blocks] if j % 3 else [1, blocks - 1, 1000 + 10 * j, 2]
            requests.append([j * 60.0, 64 * sum(runs[1::2]) + 7, 20, 1.0, 2.0, runs])
        lines.append({"session": i, "block_tokens": 64, "tool_tokens": 100, "system_tokens": 92, "requests": requests})
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def run(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert bench_trie.main([*options, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_rows_and_the_infinite_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = conversation(tmp_path / "t.jsonl", [[1, 2, 3], [1, 2, 3, 4], [5], [1, 2, 9], [5]])
    found = run(capsys, "--trace", str(trace), "--capacity-bytes", "1T")
    assert found["trace"] == "t.jsonl" and found["capacity_bytes"] == 2**40 and str(tmp_path) not in json.dumps(found)
    assert [row["policy"] for row in found["rows"]] == ["infinite", *POLICIES]
    hit = 3 * BLOCK + 2 * BLOCK + (BLOCK - 100)
    for row in found["rows"]:
        assert row["requests"] == 5 and row["prompt_tokens"] == 12 * BLOCK - 500
        assert row["hit_tokens"] == hit and row["hit_rate"] == hit / row["prompt_tokens"]
        assert row["recompute_s"] > 0 and row["restore_s"] > 0
    times = RestoreTimes.from_json(MEASURED)
    assert found["rows"][0]["recompute_s"] == pytest.approx(sum(times.recompute.first(n) for n in (3 * BLOCK, 2 * BLOCK, BLOCK - 100)))


def test_capacity_counts_compressed_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = conversation(tmp_path / "t.jsonl", [[i % 4, 10 + i % 4] for i in range(20)])
    two_prompts = 4 * BLOCK * 1000
    options = ["--trace", str(trace), "--bytes-per-token", "1000", "--policies", "lru", "--capacity-bytes"]
    # 4 prompts in a cycle: with room for 2 LRU never hits, with room for all it always does, a byte less costs a page of each
    for capacity, ratio, tokens in [
        (two_prompts, 1, 0),
        (2 * two_prompts, 1, 2 * BLOCK - 100),
        (two_prompts, 2, 2 * BLOCK - 100),
        (2 * two_prompts - 1, 1, BLOCK),
    ]:
        row = run(capsys, *options, str(capacity), "--ratio", str(ratio))["rows"][1]
        assert row["hit_tokens"] == 16 * tokens and row["capacity_bytes"] == capacity and row["ratio"] == ratio


def test_session_traces_every_policy_below_the_oracle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = sessions(tmp_path / "s.jsonl.gz")
    options = ["--trace", str(trace), "--bytes-per-token", "100", "--policies", ",".join((*POLICIES, "lru-sessions"))]
    found = run(capsys, *options, "--capacity-bytes", "200K,10M", "--hours", "0.1")
    rows = {(row["policy"], row.get("capacity_bytes")): row["hit_tokens"] for row in found["rows"]}
    oracle = rows[("infinite", None)]
    assert found["sessions"] == 6
    for policy in (*POLICIES, "lru-sessions"):
        assert 0 < rows[(policy, 200 * 2**10)] < rows[(policy, 10 * 2**20)] <= oracle
    assert all(rows[(policy, 10 * 2**20)] == oracle for policy in POLICIES)
    again = run(capsys, *options, "--capacity-bytes", "200K,10M", "--hours", "0.1")
    assert again["rows"] == found["rows"]
    other = run(capsys, *options, "--capacity-bytes", "200K", "--hours", "0.1", "--seed", "1")
    assert other["rows"][1]["hit_tokens"] != rows[("lru", 200 * 2**10)]
    assert run(capsys, *options, "--capacity-bytes", "1G", "--sessions", "2")["rows"][0]["requests"] == 20


def test_oracle_against_a_count_without_a_trie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sessions(tmp_path / "s.jsonl.gz")
    seen: set[tuple[int, tuple[int, ...]]] = set()
    hit = 0
    for request in read_trace(str(path)):
        blocks = request.blocks.tolist()
        prefixes = [(request.session, tuple(blocks[:n])) for n in range(1, len(blocks) + 1)]
        hit += sum(prefix in seen for prefix in prefixes) * 64
        seen.update(prefixes)
    assert run(capsys, "--trace", str(path), "--capacity-bytes", "1G", "--policies", "lru")["rows"][0]["hit_tokens"] == hit > 0


def test_arrivals_are_seeded_and_keep_the_gaps(tmp_path: Path) -> None:
    path = str(sessions(tmp_path / "s.jsonl.gz"))
    first, again, other = (list(read_trace(path, seed=seed)) for seed in (0, 0, 1))
    assert [r.arrival_s for r in first] == [r.arrival_s for r in again] != [r.arrival_s for r in other]
    assert [r.arrival_s for r in first] == sorted(r.arrival_s for r in first)
    for session in range(6):
        times = [r.arrival_s for r in first if r.session == session]
        assert np.allclose(np.diff(times), 60.0)
    assert first[0].num_system_blocks == 3


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = conversation(tmp_path / "t.jsonl", [[1, 2], [1, 2], [3]])
    times = tmp_path / "times.json"
    times.write_text(json.dumps({"source": "here", "recompute": [[512, 1.0]], "restore": {"host": [[512, 0.25]]}}))
    out, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    options = ["--trace", str(trace), "--capacity-bytes", "1G,2G", "--policies", "lru,value", "--times", str(times)]
    assert bench_trie.main([*options, "--json-out", str(out), "--plot", str(picture)]) == 0
    found = json.loads(out.read_text())
    assert found["command"].endswith("--times times.json --json-out rows.json --plot rows.png") and str(tmp_path) not in out.read_text()
    assert found["rows"][0]["restore_s"] == pytest.approx(found["rows"][0]["recompute_s"] / 4)
    assert found["restore_times"]["source"] == "here" and picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "best"], "no eviction policy 'best'"),
        (["--capacity-bytes", "many"], "no capacity"),
        (["--capacity-bytes", "0"], "no capacity"),
        (["--ratio", "0.5"], "--ratio"),
        (["--ratio", "x"], "--ratio"),
        (["--sessions", "0"], "--sessions"),
        (["--bytes-per-token", "-1"], "--bytes-per-token"),
        (["--half-life-s", "0"], "--half-life-s"),
        (["--times", "nowhere.json"], "nowhere.json cannot be read"),
        (["--operations", "0"], "--operations 0"),
        (["--operations", "10", "--calls", "0"], "0 calls"),
        (["--draw", "0"], "--draw 0"),
        (["--trace", "nowhere.jsonl"], "'nowhere.jsonl' cannot be read"),
    ],
)
def test_mistakes_end_with_one_line(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = conversation(tmp_path / "t.jsonl", [[1]])
    assert bench_trie.main(["--trace", str(trace), "--capacity-bytes", "1G", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no json\n",
        b"{}\n",
        b"[1]\n",
        b'{"hash_ids": [1], "input_length": 9999, "timestamp": 0}\n',
        b'{"session": 1, "block_tokens": 64}\n',
        b'{"hash_ids": [1], "input_length": 2, "timestamp": 0, "block_tokens": 2, "log2_p": []}\n',
    ],
)
def test_damaged_traces(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(InvalidOption, match=r"bad\.jsonl cannot be used"):
        read_trace(str(tmp_path / "bad.jsonl"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(content or b"x")[:-9])
    with pytest.raises(InvalidOption, match=r"cut\.jsonl\.gz cannot be used"):
        read_trace(str(tmp_path / "cut.jsonl.gz"))


def test_a_prior_keeps_what_the_model_expects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts that part behind a block that all begin with: half of them go on with block 1, nobody goes on twice with another."""
    draw, lines = np.random.default_rng(0), []
    for i in range(400):
        likely = bool(draw.random() < 0.3)
        blocks, bits = ([0, 1, 2], [0.0, -1.7, 0.0]) if likely else ([0, 10 + 2 * i, 11 + 2 * i], [0.0, -9.0, 0.0])
        lines.append({"timestamp": 5000 * i, "input_length": 6, "output_length": 0, "block_tokens": 2, "hash_ids": blocks, "log2_p": bits})
    trace = tmp_path / "drawn.jsonl"
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert next(iter(read_trace(str(trace)))).log2_p.tolist() in ([0.0, pytest.approx(-1.7), 0.0], [0.0, -9.0, 0.0])
    found = run(
        capsys,
        "--trace",
        str(trace),
        "--capacity-bytes",
        str(2 * 1000 * 4),
        "--bytes-per-token",
        "1000",
        "--policies",
        "lru,value-counts,value",
    )
    hits = {row["policy"]: row["hit_tokens"] for row in found["rows"]}
    assert hits["lru"] < hits["value"] and hits["value-counts"] <= hits["value"] <= hits["infinite"]


def test_operations_at_a_size(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench_trie.main(["--operations", "60", "--calls", "3", "--json-out", str(tmp_path / "o.json")]) == 0
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == rows
    assert {row["nodes"] >= 60 for row in rows} == {True} and len(rows) == 8 and all(row["us"] > 0 for row in rows)
