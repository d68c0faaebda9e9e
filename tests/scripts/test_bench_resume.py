"""bench_resume.py: its rows and stages on tiny random weights, the comparison before it times, and the arithmetic of links."""

from __future__ import annotations

import json

import pytest
import torch

import bench_resume
from bench.resume_links import crossovers, link_rows, seconds
from bench.resume_runs import ResumeBench
from bench.resume_shapes import SHAPES, build
from codec.spec import NUM_SINKS
from engine.errors import InvalidOption

CONTRACT = {
    "target",
    "draft",
    "tokens",
    "quality",
    "recompute_s",
    "resume_s",
    "draft_prefill_s",
    "decode_s",
    "stored_bytes",
    "raw_bytes",
}
STAGES = {"read_s", "check_s", "ids_s", "rans_s", "target_layers_s", "predict_s", "write_s", "suspend_s", "append_s", "fixed_s"}


def row(tokens, recompute_s, resume_s, stored_bytes=1000):
    return {
        "target": "t",
        "draft": "d",
        "quality": "balanced",
        "tokens": tokens,
        "recompute_s": recompute_s,
        "resume_s": resume_s,
        "stored_bytes": stored_bytes,
        "raw_bytes": 1000 * tokens,
        "ids_bytes": tokens,
    }


def test_rows_and_files(tmp_path, capsys):
    out, plot = tmp_path / "resume.json", tmp_path / "resume.png"
    argv = ["--shapes", "tiny", "--tokens", "64,200", "--device", "cpu", "--repeats", "1", "--json-out", str(out), "--plot", str(plot)]
    assert bench_resume.main(argv) == 0
    document = json.loads(out.read_text())
    assert [r["tokens"] for r in document["rows"]] == [64, 200] and document["device"] == "cpu"
    for r in document["rows"]:
        assert set(r) >= CONTRACT | STAGES and all(r[name] >= 0 for name in STAGES)
        config = SHAPES["tiny"].target
        assert r["raw_bytes"] == 2 * r["tokens"] * config.num_layers * config.kv_width
        assert 0 < r["twin_error"] < 1e-2 and r["speed_up"] == pytest.approx(r["recompute_s"] / r["resume_s"])
    assert [r["append_tokens"] for r in document["rows"]] == [60, 196], "from a page's border that lies 200 tokens back"
    assert document["rows"][1]["stored_bytes"] > document["rows"][0]["stored_bytes"]
    assert {r["link"] for r in document["links"]} == {r["link"] for r in document["crossovers"]}
    assert str(tmp_path) not in document["command"] and plot.stat().st_size > 1000
    assert "seconds to the first token" in capsys.readouterr().out


def test_the_first_layers_of_a_draft_alone(tmp_path):
    """A draft that is looked at no deeper than half catches up later, and the host's memory is a link as fast as it was measured."""
    out = tmp_path / "resume.json"
    few = ["--draft-layers", "1", "--taps", "1", "--recomputed-layers", "1"]
    assert bench_resume.main(["--shapes", "tiny", "--tokens", "64", "--device", "cpu", "--repeats", "1", "--json-out", str(out), *few]) == 0
    document = json.loads(out.read_text())
    found = document["rows"][0]
    assert found["draft_catch_up_s"] > 0 and document["restore"]["draft_flops"] * 4 < document["restore"]["prefill_flops"]
    host = next(r for r in document["links"] if r["link"] == "host memory")
    assert host["raw bf16"] == pytest.approx(found["host_copy_s"] + document["step_s"])


def test_a_restored_kv_that_differs_is_not_timed(monkeypatch, capsys, tmp_path):
    def wrong(self, ids, quality):
        raise AssertionError("the restored KV differs")

    monkeypatch.setattr(ResumeBench, "check", wrong)
    monkeypatch.setattr(ResumeBench, "run", None)
    assert bench_resume.main(["--shapes", "tiny", "--tokens", "64", "--device", "cpu", "--json-out", str(tmp_path / "a.json")]) == 1
    captured = capsys.readouterr()
    assert "differs" in captured.err and "speed" not in captured.out and not (tmp_path / "a.json").exists()


def test_the_check_finds_a_wrong_product():
    engine, pack = build("tiny", torch.device("cpu"), torch.bfloat16, 2048)
    core = engine.core
    bench = ResumeBench(core, pack)
    ids = torch.randint(512, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    assert bench.check(ids, "balanced") < 1e-2
    with torch.inference_mode():
        bench.codec.pages.matrix.mul_(1.1)
    with pytest.raises(AssertionError, match="differs from the plain twin"):
        bench.check(ids, "balanced")


def test_a_target_whose_layers_share_their_weights():
    engine, pack = build("tiny-one-layer", torch.device("cpu"), torch.bfloat16, 2048)
    layers = list(engine.core.target.layers)
    assert len(layers) == SHAPES["tiny-one-layer"].target.num_layers == pack.layout.num_layers and len(set(map(id, layers))) == 1
    ids = torch.randint(512, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    assert ResumeBench(engine.core, pack).check(ids, "balanced") < 1e-2


def test_synthetic_codes_take_about_a_bit_a_component():
    engine, pack = build("tiny", torch.device("cpu"), torch.bfloat16, 2048)
    core = engine.core
    bench = ResumeBench(core, pack)
    ids = torch.randint(512, (260,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.inference_mode():
        state = core.open_sequence_state()
        state.token_ids[:] = ids
        bench.codec.run_target(state, len(ids))
        spans = bench.codec.encode(state, NUM_SINKS, len(ids), "balanced")
    bits = 8 * sum(len(s.data) for s in spans) / (len(ids) - NUM_SINKS) / SHAPES["tiny"].components
    assert 0.5 < bits < 2.5


def test_seconds_over_a_link():
    found = seconds(row(1000, 2.0, 0.5), 1000.0, 0.25)
    assert found == {"recompute": 3.25, "raw bf16": 1000.25, "fp8": 500.25, "foretold": 1.75}


def test_kvtc_joins_where_it_was_measured(tmp_path):
    out = tmp_path / "resume.json"
    argv = ["--shapes", "tiny", "--tokens", "64", "--device", "cpu", "--repeats", "1", "--kvtc", "kvtc-2bit", "--json-out", str(out)]
    assert bench_resume.main([*argv, "--plot", str(tmp_path / "a.png")]) == 0
    document = json.loads(out.read_text())
    (found,) = document["rows"]
    assert found["kvtc"] == "kvtc-2bit" and 0 < found["kvtc_bytes"] < found["raw_bytes"] / 4 and found["kvtc_decode_s"] > 0
    link = next(r for r in document["links"] if r["link"] == "NVMe")
    assert link["kvtc"] == pytest.approx(found["kvtc_bytes"] / 5e9 + found["kvtc_decode_s"] + document["step_s"])
    assert "kvtc" in document["crossovers"][0]


def test_crossovers_lie_between_measured_lengths():
    rows = [row(1000, 1.0, 2.0), row(2000, 2.0, 2.5), row(4000, 4.0, 3.0)]
    (found,) = crossovers(link_rows(rows, {"fast": 1e12}, 0.0))
    assert found["recompute"] == 2667 and found["raw bf16"] is None and found["link"] == "fast"
    (found,) = crossovers(link_rows(rows, {"slow": 1e3}, 0.0))
    assert found["raw bf16"] == found["fp8"] == 1000
    late = [row(1000, 3.0, 2.0), row(2000, 2.0, 2.5), row(4000, 4.0, 3.0)]
    (found,) = crossovers(link_rows(late, {"fast": 1e12}, 0.0))
    assert found["recompute"] == 2667, "the lead must last"


@pytest.mark.parametrize(
    "argv, what",
    [
        (["--shapes", "huge"], "unknown shapes 'huge'"),
        (["--shapes", "tiny", "--tokens", "10"], "at least 64"),
        (["--shapes", "tiny", "--tokens", "many"], "not a number"),
        (["--shapes", "tiny", "--kvtc", "fp8"], "--kvtc fp8"),
        (["--shapes", "tiny", "--kvtc", "kvtc"], "--kvtc kvtc"),
        (["--shapes", "tiny", "--qualities", "best"], "cannot be 'best'"),
        (["--pair", "smollm2", "--taps", "3"], "calibrated pack's own"),
        (["--shapes", "tiny", "--json-out", "no/such/folder/a.json"], "cannot be written"),
    ],
)
def test_mistakes(argv, what, capsys):
    with pytest.raises(InvalidOption, match=what):
        bench_resume.parse(argv)
    assert bench_resume.main(argv) == 2 and what in capsys.readouterr().err
