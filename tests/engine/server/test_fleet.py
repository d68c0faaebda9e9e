"""Two servers behind vllm-router; skipped where it is not installed (the extra `fleet`)."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest

pytest.importorskip("vllm_router", reason="the extra fleet is not installed")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@contextmanager
def router(urls: list[str]):
    """The router's URL, in front of these servers."""
    port = free_port()
    command = [sys.executable, "-m", "vllm_router.launch_router", "--port", str(port), "--policy", "cache_aware", "--worker-urls", *urls]
    command += ["--health-check-interval-secs", "1", "--health-failure-threshold", "1", "--prometheus-port", str(free_port())]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            try:
                if httpx.get(f"{url}/health", timeout=60).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(120)


def ask(url: str, content: str, **options) -> str:
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 12, **options}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    answer.raise_for_status()
    return answer.json()["choices"][0]["message"]["content"]


def test_a_router_sends_a_prefix_where_it_was_and_elsewhere_when_that_server_is_gone(chat_engine, serve):
    conversations = [f"{name} " * 40 for name in ("tide", "buoy", "boat", "sail", "rope", "fish")]
    with serve(chat_engine()) as first, serve(chat_engine()) as second:
        servers = [first, second]
        with router([server.url for server in servers]) as url:
            expected = [ask(url, text) for text in conversations]

            def counts() -> list[int]:
                return [server.server.metrics.summary()["totals"]["requests"] for server in servers]

            homes = []
            for text in conversations:
                seen = []
                for turn in range(3):
                    before = counts()
                    ask(url, text + f"and turn {turn}")
                    seen.append([after - own for after, own in zip(counts(), before, strict=True)].index(1))
                homes.append(seen)
            assert sum(len(set(seen)) == 1 for seen in homes) >= 4  # prefix affinity; the router may still balance load
            first.server.loop.stop(5)  # its health says 503 from now on
            deadline = time.monotonic() + 120
            while True:
                try:
                    found = [ask(url, text) for text in conversations]
                    break
                except httpx.HTTPError:
                    assert time.monotonic() < deadline
                    time.sleep(0.5)
            assert found == expected


def test_a_stopped_servers_conversations_come_back_from_the_store(chat_engine, serve, tmp_path):
    options = {"store": tmp_path / "store", "quality": "near-lossless", "log": lambda _: None}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "tide and buoy " * 50}], "temperature": 0, "max_tokens": 4}
    with serve(chat_engine(**options)) as first, serve(chat_engine(**options)) as second:
        servers = [first, second]
        with router([server.url for server in servers]) as url:
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status()
            home = next(server for server in servers if server.server.metrics.summary()["totals"]["requests"])
            home.server.engine.flush()
            home.server.loop.stop(5)
            deadline = time.monotonic() + 120
            while (answer := httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)).status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.5)
            assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 640
