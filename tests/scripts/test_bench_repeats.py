"""bench_repeats.py: where readings lie, whose bytes they are, and that references save some on tiny random weights."""

from __future__ import annotations

import pytest
import torch

import bench_repeats
from bench.resume_shapes import build
from engine.errors import InvalidOption
from engine.sessions.file import Span
from engine.sessions.kv_codec import SessionCodec


def test_readings_stand_behind_other_text():
    texts = [list(range(1000)), list(range(5000, 6000))]
    for number, (ids, starts, probe) in enumerate(bench_repeats.sessions_of(texts, 300, 3)):
        assert len(starts) == 3 and len(ids) == 3 * (300 + 96)
        for start in starts:
            assert ids[start : start + 300] == texts[number][:300]
            assert set(ids[start - 96 : start]) <= set(texts[1 - number])
        assert probe == texts[number][300:428]


def test_bytes_are_those_of_the_spans_shares():
    spans = [Span(4, 64, bytes(600)), Span(64, 128, bytes(64)), Span(128, 300, bytes(344))]
    table = bench_repeats.binned(spans, [60, 200], 300)
    assert table[0] == [(16, 4 * 10 + 12), (28, 28.0), (0, 0.0), (0, 0.0)]
    assert table[1] == [(16, 32.0), (48, 96.0), (36, 72.0), (0, 0.0)]
    row = {"quality": "tiny", "references": True, "kl": 0.5, "top1_agreement": 1.0, "bytes": 1008, "tokens": 300, "readings": table}
    found = bench_repeats.summed([row, row | {"kl": 0.25}], 16)
    assert found["kl"] == 0.375 and found["bits_per_element"] == 8 * 1008 / (16 * 300)
    assert found["readings"][1] == {"bits_per_element": 1.0, "bits_by_distance": [1.0, 1.0, 1.0, None]}


def test_references_save_bytes_at_the_same_step():
    torch.manual_seed(0)
    engine, pack = build("tiny", torch.device("cpu"), torch.float32, 4096)
    texts = [torch.randint(512, (600,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(2)]
    session = bench_repeats.sessions_of(texts, 192, 2)[0]
    plain, refers = bench_repeats.measure(engine.core, SessionCodec(engine.core, pack), session, "near-lossless")
    assert [plain["references"], refers["references"]] == [False, True]
    assert refers["bytes"] < plain["bytes"] and plain["tokens"] == refers["tokens"]
    assert sum(size for _, size in refers["readings"][0]) == pytest.approx(sum(size for _, size in plain["readings"][0]), rel=0.15)


@pytest.mark.parametrize("options", [["--readings", "1"], ["--documents", "0"], ["--document-tokens", "63"], ["--qualities", "good"]])
def test_options_that_repeat_nothing_are_refused(options):
    with pytest.raises(InvalidOption):
        bench_repeats.parse(options)
