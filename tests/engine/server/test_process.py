"""The server as a process of its own: killed in the middle of an answer, started again on the same store, and stopped."""

from __future__ import annotations

import time

import httpx
import pytest
import torch

from bench.server_processes import ServerProcess
from engine.sessions.rates import rates_of

TEXT = "".join(f"def number_{i}(value):\n    '''Add {i} to it.'''\n    return value + {i}\n\n" for i in range(12))
BODY = {"messages": [{"role": "user", "content": TEXT[:700]}], "temperature": 0, "max_tokens": 6}
CHAT = "/v1/chat/completions"


def cached(url: str) -> int:
    answer = httpx.post(url + CHAT, json=BODY, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def stored_tokens(url: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return float(next(line for line in lines if line.startswith("foretold:store_kept_tokens{")).rsplit(" ", 1)[1])


def test_a_killed_servers_conversations_come_back(chat_engine, model_options, tmp_path):
    with_pack = chat_engine(store=tmp_path / "other", log=lambda _: None)
    rates_of(with_pack.prefix_cache.codec, 1 << 20, lambda _: None)  # pack and rates lie in the tests' cache folder now
    with_pack.close()
    options = [*model_options, "--store", str(tmp_path / "store"), "--threads", str(torch.get_num_threads()), "--max-batch", "1"]
    first = ServerProcess(options)
    try:
        assert cached(first.url) == 0
        deadline = time.monotonic() + 300
        while stored_tokens(first.url) < 640:  # a run of 256 tokens at a time
            assert time.monotonic() < deadline, (first.said(), stored_tokens(first.url))
            time.sleep(0.05)
        long = BODY | {
            "max_tokens": 250,
            "ignore_eos": True,
            "stream": True,
            "n": 64,
        }  # one after the other: not over before the kill comes
        with httpx.stream("POST", first.url + CHAT, json=long, timeout=60) as stream:
            assert stream.status_code == 200
            pieces = stream.iter_bytes()
            next(pieces)
            first.kill()
            with pytest.raises(httpx.HTTPError):
                list(pieces)
    finally:
        first.kill()
    second = ServerProcess(options)
    try:
        assert cached(second.url) >= 640
    finally:
        status = second.close()
    assert status == 0  # after SIGTERM
