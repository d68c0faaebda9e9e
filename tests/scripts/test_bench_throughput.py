"""The throughput benchmark: right rows from tiny models, equal token counts, and nothing timed when a text is wrong."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import bench_throughput
from bench.document import command_line
from bench.throughput_check import TIE_BF16_STEPS, compare, shortfalls
from bench.throughput_runs import Foretold, Transformers, copy_gb_per_s, in_batches
from bench_throughput import main, parse
from engine.errors import InvalidOption


@pytest.fixture
def short(monkeypatch):
    """Small copies: the ceiling is not what is tested."""
    monkeypatch.setattr(bench_throughput, "copy_gb_per_s", lambda device, size: copy_gb_per_s(device, 1 << 16))
    monkeypatch.setattr(bench_throughput, "read_gb_per_s", lambda device: 3.0)


def options(model_options, *more):
    return [*model_options, "--new-tokens", "6", "--prompts", "3", "--repeats", "2", *more]


def test_rows_of_every_way(model_options, tmp_path, capsys, short):
    file = tmp_path / "out.json"
    assert main(options(model_options, "--batches", "1,2", "--temperature", "0,1", "--json-out", str(file))) == 0
    document = json.loads(file.read_text())
    ways = [
        ("foretold", "plain"),
        ("foretold", "speculative"),
        ("foretold", "ngram"),
        ("transformers", "plain"),
        ("transformers", "assisted"),
    ]
    found = [(r["batch"], r["temperature"], r["engine"], r["mode"]) for r in document["rows"]]
    assert found == [(b, t, *way) for b in (1, 2) for t in (0, 1) for way in (ways if b == 1 else ways[:4])]
    for row in document["rows"]:
        assert row["new_tokens"] == 6 and row["tokens_per_s"] > 0 and row["ttft_s"] > 0 and len(row["tokens_per_s_rounds"]) == 2
        assert row["tokens_per_s_best"] == max(row["tokens_per_s_rounds"])
        assert (row["floor_fraction"] is None) == (row["mode"] != "plain")
        assert (row["acceptance_rate"] is None) == (row["mode"] not in ("speculative", "ngram"))
        assert (row["draft_share"] is None) == (row["engine"] == "transformers")
        if row["engine"] == "foretold":
            assert 0 <= row["draft_share"] + row["verify_share"] <= 1
        plain = next(
            r
            for r in document["rows"]
            if (r["batch"], r["temperature"], r["engine"], r["mode"]) == (row["batch"], row["temperature"], "transformers", "plain")
        )
        assert row["over_transformers_plain"] == pytest.approx(row["tokens_per_s"] / plain["tokens_per_s"])
    assert len(document["checks"]) == 7 and all(c["passed"] and c["equal_share"] == 1 for c in document["checks"])
    assert [c["exact"] for c in document["checks"]] == [True, True, False, False, True, True, False]
    assert document["peak_bytes"] > document["announced_bytes"] > 0 and document["prompt_kind"] == "chat"
    assert {"device", "threads", "versions", "copy_gb_per_s", "command"} <= set(document) and str(tmp_path) not in file.read_text()
    assert "over transformers" in capsys.readouterr().out


def test_step_time_and_floor_are_what_the_row_says(model_options, tmp_path, short, monkeypatch):
    file, engines, run = tmp_path / "out.json", [], Foretold.run
    monkeypatch.setattr(Foretold, "run", lambda self, *rest: engines.append(self.engine) or run(self, *rest))
    assert main(options(model_options, "--engines", "foretold", "--modes", "plain", "--repeats", "1", "--json-out", str(file))) == 0
    document = json.loads(file.read_text())
    (row,) = document["rows"]
    floor_s = document["read_bytes"] / (document["read_gb_per_s"] * 1e9)
    assert row["floor_fraction"] == pytest.approx(floor_s * row["tokens_per_s"])  # alone, a step gives one token
    assert row["over_foretold_plain"] == 1 and row["over_transformers_plain"] is None
    assert engines and all(engine.core.shared_prefixes is None for engine in engines), "every turn computes its prompts"


@pytest.mark.parametrize("draft", ["head", "trunk"])
def test_an_early_exit_has_no_assisted_way_and_deterministic_text_is_exact(chat_folders, tmp_path, short, draft):
    file = tmp_path / "out.json"
    source = str(getattr(chat_folders, draft, draft))
    given = ["--target", str(chat_folders.target), "--draft", source, "--device", "cpu", "--deterministic", "--draft-length", "2"]
    assert main([*given, "--new-tokens", "8", "--prompts", "2", "--repeats", "1", "--prompt-tokens", "20", "--json-out", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["dtype"] == "bfloat16" and document["checks"][0]["exact"] and document["checks"][0]["equal_share"] == 1
    assert [(r["engine"], r["mode"], r["prompt_tokens"]) for r in document["rows"]] == [
        ("foretold", "plain", 20),
        ("foretold", "speculative", 20),
        ("foretold", "ngram", 20),
        ("transformers", "plain", 20),
    ]
    assert 0 < document["rows"][1]["drafts_per_step"] <= 2


@pytest.mark.parametrize(("wrong", "dtype"), [("speculative", "float32"), ("speculative", "bfloat16"), ("plain", "float32")])
def test_a_wrong_token_ends_the_run_before_anything_is_timed(model_options, tmp_path, capsys, monkeypatch, short, wrong, dtype):
    untouched = Foretold.run

    def run(self, prompts, count, temperature, seed):
        sample = untouched(self, prompts, count, temperature, seed)
        if self.mode != wrong:
            return sample
        worst = int(self.logits(prompts[0], sample.texts[0])[2].argmin())
        return dataclasses.replace(sample, texts=[[*sample.texts[0][:2], worst, *sample.texts[0][3:]], *sample.texts[1:]])

    monkeypatch.setattr(Foretold, "run", run)
    file = tmp_path / "out.json"
    assert main(options(model_options, "--dtype", dtype, "--json-out", str(file))) == 1
    document = json.loads(file.read_text())
    assert document["rows"] == [] and not document["passed"]
    assert any(f.get("prompt") == 0 and f["position"] == 2 for c in document["checks"] for f in c["failures"])
    printed = capsys.readouterr()
    assert "over transformers" not in printed.out and "nothing was timed" in printed.err


def test_both_judges_agree(chat_engine, chat_folders):
    from bench.throughput_runs import load_transformers

    engine = chat_engine(draft="none")
    ours, theirs = Foretold("plain", engine, 0), Transformers("plain", load_transformers(chat_folders.target, torch.float32, engine.device))
    prompt, text = [3, 200, 17, 40], [9, 80, 120]
    assert torch.allclose(ours.logits(prompt, text), theirs.logits(prompt, text), atol=1e-4)
    assert engine.core.pool.num_free_pages == chat_engine(draft="none").core.pool.num_free_pages
    end = 256  # both go on after it
    for who in (ours, theirs):
        sample = who.run([prompt, [*prompt, end]], 40, 0.0, 0)
        assert [len(t) for t in sample.texts] == [40, 40] and 0 < sample.ttft_s < sample.seconds
    assert ours.run([prompt], 30, 0.0, 0).texts == theirs.run([prompt], 30, 0.0, 0).texts


def test_random_shapes_are_measured_and_plotted(tmp_path, short):
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    given = ["--shape", "tiny+tiny", "--device", "cpu", "--batches", "1,2", "--new-tokens", "6", "--prompt-tokens", "16", "--repeats", "1"]
    assert main([*given, "--draft-length", "2", "--json-out", str(file), "--plot", str(picture)]) == 0
    document = json.loads(file.read_text())
    assert document["pair"] == "tiny+tiny" and document["prompt_kind"] == "random"
    found = [(r["batch"], r["mode"]) for r in document["rows"]]
    assert found == [(b, mode) for b in (1, 2) for mode in ("plain", "speculative", "ngram")]
    assert picture.read_bytes().startswith(b"\x89PNG")


class Fixed:
    """A judge with an opinion of its own."""

    def __init__(self, rows):
        self.rows = rows

    def logits(self, prompt, text):
        return torch.tensor(self.rows)[: len(text)]


def test_near_ties_pass_and_others_do_not():
    step = 2.0**-3  # of bfloat16 from 16 to 32
    rows = [[20.0, 0.0, 0.0], [0.0, 20.0, 20.0 - step], [20.0, 20.0 - (TIE_BF16_STEPS + 1) * step, 0.0]]
    assert shortfalls(torch.tensor(rows), [0, 2, 1], torch.bfloat16).tolist() == pytest.approx(
        [0, 1 / TIE_BF16_STEPS, 1 + 1 / TIE_BF16_STEPS]
    )
    tie = compare([[7]], [[0, 2, 0]], [[0, 1, 1]], Fixed(rows), torch.bfloat16, exact=False)
    assert tie["passed"] and tie["ties"] == 1 and tie["equal_tokens"] == 1 and tie["equal_share"] == pytest.approx(1 / 3)
    later = compare([[7]], [[0, 2, 1]], [[0, 1, 1]], Fixed(rows), torch.bfloat16, exact=False)
    assert (
        not later["passed"] and later["ties"] == 0 and later["failures"][0]["position"] == 1 and later["failures"][0]["worst_position"] == 2
    )
    other = compare([[7]], [[0, 1, 0]], [[0, 0, 0]], Fixed(rows), torch.bfloat16, exact=False)
    assert not other["passed"]  # ours is the best there, the other's is far off
    assert not compare([[7]], [[0, 2, 0]], [[0, 1, 1]], Fixed(rows), torch.float32, exact=False)["passed"]
    assert not compare([[7]], [[0, 2, 0]], [[0, 1, 1]], Fixed(rows), torch.bfloat16, exact=True)["passed"]
    assert not compare([[7]], [[0, 2]], [[0, 2, 0]], Fixed(rows), torch.bfloat16, exact=False)["passed"]
    broken = compare([[7]], [[0, 2, 0]], [[0, 1, 1]], Fixed([[float("nan")] * 3] * 3), torch.bfloat16, exact=False)
    assert not broken["passed"]


def test_many_near_ties_do_not_pass_as_rounding():
    rows = [[20.0, 19.9]] * 40
    once, often = [0] * 10 + [1] + [0] * 29, [0] * 10 + [1] * 5 + [0] * 25
    assert compare([[7]], [once], [[0] * 40], Fixed(rows), torch.bfloat16, exact=False)["passed"]
    result = compare([[7]], [often], [[0] * 40], Fixed(rows), torch.bfloat16, exact=False)
    assert not result["passed"] and result["failures"] == [{"strays": 5, "judged": 30}] and result["worst"] < 1


def test_batches_hold_every_prompt_and_are_full():
    ids = [[n] for n in range(5)]
    assert in_batches(ids, 2) == [[[0], [1]], [[2], [3]], [[4], [0]]]
    assert in_batches(ids[:1], 3) == [[[0], [0], [0]]]


def test_the_command_keeps_no_machine_paths():
    assert command_line(
        "bench_throughput.py", ["--target", "/some/where/model", "--json-out", "scripts/results/a.json", "--prompt-file=/b/c.txt"]
    ) == ("python scripts/bench_throughput.py --target model --json-out scripts/results/a.json --prompt-file=c.txt")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--engines", "vllm"],
        ["--modes", "fast"],
        ["--batches", "0"],
        ["--batches", "x"],
        ["--draft-length", "0"],
        ["--temperature", "-1"],
        ["--new-tokens", "1"],
        ["--draft-length", "65"],
        ["--json-out", "no/such/folder/a.json"],
        ["--plot", "no/such/folder/a.png"],
        ["--prompt-kind", "poems"],
    ],
)
def test_bad_options_are_refused_before_loading(wrong):
    with pytest.raises(InvalidOption):
        parse(["--pair", "smollm2", *wrong])


@pytest.mark.parametrize("shape", ["huge", "tiny+huge", "tiny+tiny+tiny"])
def test_unknown_shapes_are_refused(shape):
    with pytest.raises(InvalidOption, match="--shape"):
        parse(["--shape", shape])


def test_mistakes_found_after_loading_end_with_status_2(model_options, tmp_path, capsys):
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n\n")
    nothing = ["--engines", "transformers", "--modes", "speculative"]
    for wrong in (["--prompt-file", str(empty)], ["--new-tokens", "5000"], ["--prompts", "400"], nothing):
        assert main([*model_options, *wrong]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
