"""The server's benchmark on a tiny model: its modes find nothing wrong here, and its client reads what a server writes."""

from __future__ import annotations

import json

import pytest

from bench.server_client import Answer
from bench_server import main


def test_the_modes_find_a_server_that_loses_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path))
    small = [
        "--streams",
        "40",
        "--stream-tokens",
        "6",
        "--vanish",
        "20",
        "--requests",
        "80",
        "--rounds",
        "1",
        "--batch",
        "3",
        "--new-tokens",
        "6",
    ]
    assert main(["--tiny", "--modes", "overhead,streams,vanish,memory", *small]) == 0
    rows = {(row["what"], row.get("batch")): row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert rows["overhead", 1]["ratio"] > 0 and rows["overhead", 3]["http_cpu_ms_per_token"] > 0
    streams = rows["streams", None]
    assert (streams["count"], streams["wrong_texts"]) == (40, 0) and streams["distinct_texts"] > 30
    vanish = rows["vanish", None]
    assert vanish["count"] == 20 and vanish["pool_share_in_use"] == 0
    assert vanish["after"]["files"] <= vanish["before"]["files"] and vanish["after"]["threads"] <= vanish["before"]["threads"]
    memory = rows["memory", None]
    assert memory["count"] == 80 and memory["rss_bytes"][-1] - memory["rss_bytes"][4] < 16 << 20


@pytest.mark.parametrize("argv", [["--modes", "speed"], ["--streams", "0"], ["--requests", "5"], ["--tiny", "--pair", "smollm2"]])
def test_wrong_options_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as refused:
        main(argv)
    assert refused.value.code == 2 and "error:" in capsys.readouterr().err


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(*pieces: bytes) -> bytes:
    return HEAD + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))


def test_an_answer_is_read_whole_or_not_at_all():
    one = b'data: {"choices":[{"index":0,"delta":{"content":"ti"}}]}\n\n'
    other = 'data: {"choices":[{"index":0,"delta":{"content":"de \u00e9"}}]}\n\n'.encode()
    whole = chunked(one, other + b'data: {"choices":[],"usage":{}}\n\ndata: [DONE]\n\n')
    assert Answer(0.0, bytearray(whole)).text() == "tide é"
    for content in (b"", b"HTTP/1.1 500 Internal\r\n\r\n{}", chunked(one), HEAD):
        with pytest.raises(ValueError, match=r"no stream|without its end"):
            Answer(0.0, bytearray(content)).text()
