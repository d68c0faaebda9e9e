"""The load benchmark: every request comes back once with its own text, and what would be wrong is found."""

from __future__ import annotations

import json

import pytest

import bench_load
from bench_load import faults, main, parse, quantile
from engine.errors import InvalidOption

TINY = ["--shape", "tiny+tiny", "--device", "cpu", "--requests", "6", "--new-tokens", "5", "--prompt-tokens", "12", "--exact"]


def test_a_stream_is_served_and_its_figures_are_what_they_say(tmp_path, capsys):
    file = tmp_path / "load.json"
    assert main([*TINY, "--rates", "50,1000", "--max-batch", "3", "--json-out", str(file)]) == 0
    document = json.loads(file.read_text())
    assert [r["rate"] for r in document["rows"]] == [50, 1000] and document["pair"] == "tiny+tiny"
    for row in document["rows"]:
        assert row["requests"] == row["equal_texts"] == 6
        assert row["tokens_per_s"] == pytest.approx(30 / row["seconds"]) and row["goodput"] == pytest.approx(
            6 * row["good_share"] / row["seconds"]
        )
        assert 0 < row["ttft_p50_s"] <= row["ttft_p99_s"] and 0 < row["token_p50_s"] <= row["token_p99_s"]
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda requests, returned: returned.__setitem__(1, 2), "request 1 came back 2 times"),
        (lambda requests, returned: returned.__setitem__(2, 0), "request 2 came back 0 times"),
        (lambda requests, returned: requests[3].token_ids.pop(), "request 3 came back 1 times with 4 tokens"),
        (lambda requests, returned: requests[4].token_ids.__setitem__(-1, 0), "request 4 has another text"),
    ],
    ids=["twice", "lost", "short", "altered"],
)
def test_a_fault_ends_the_run(monkeypatch, capsys, fault, told):
    untouched = bench_load.stream

    def stream(*args):
        requests, arrivals, returned, seconds = untouched(*args)
        fault(requests, returned)
        return requests, arrivals, returned, seconds

    monkeypatch.setattr(bench_load, "stream", stream)
    assert main([*TINY, "--rates", "500"]) == 1
    printed = capsys.readouterr()
    assert told in printed.err and len(printed.out.splitlines()) == 1


def test_another_requests_text_is_found_without_exactness():
    class Pools:
        class core:
            class pool:
                check_integrity = staticmethod(lambda: None)

            draft_pool = None

    class Served:
        error, prompt_tokens = None, 1

        def __init__(self, text):
            self.token_ids = [0, *text]

    args, alone = parse([*TINY[:-1], "--new-tokens", "2"]), [[1, 2], [3, 4], [5, 6]]
    assert faults(Pools, [Served([1, 2]), Served([3, 9]), Served([5, 6])], [1] * 3, alone, args) == []
    assert faults(Pools, [Served([1, 2]), Served([1, 2]), Served([5, 6])], [1] * 3, alone, args) == ["request 1 has the text of another"]


def test_quantiles():
    assert quantile([3.0], 99) == 3.0 and quantile([1.0, 2.0, 3.0], 50) == 2.0 and quantile(list(map(float, range(101))), 99) == 99.0


@pytest.mark.parametrize(
    "wrong",
    [
        ["--rates", "0"],
        ["--rates", "x"],
        ["--requests", "0"],
        ["--new-tokens", "1"],
        ["--slo-ttft", "0"],
        ["--shape", "tiny+tiny+tiny"],
        ["--draft-length", "65"],
    ],
    ids=str,
)
def test_bad_options_are_refused(wrong):
    options = ["--shape", "tiny"] if "--shape" not in wrong else []
    with pytest.raises(InvalidOption):
        parse([*options, *wrong])


def test_a_model_with_a_tokenizer_is_loaded(model_options):
    assert main([*model_options, "--rates", "200", "--requests", "3", "--new-tokens", "4", "--prompt-tokens", "10", "--exact"]) == 0
