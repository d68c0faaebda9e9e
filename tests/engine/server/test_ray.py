"""The server as a Ray Serve application; skipped where Ray is not installed (the extra `ray`)."""

from __future__ import annotations

import os
import socket
import time

import httpx
import pytest

from engine.errors import InvalidOption

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
psutil = pytest.importorskip("psutil")


def test_a_replica_answers_and_streams(chat_folders, chat_engine):
    from ray import serve

    from engine.runtime.sampling import SamplingParams
    from engine.server.ray_app import application

    for wrong in ({"pairs": "smollm2"}, {"replicas": "two"}, {"quality": "balanced"}):
        with pytest.raises(InvalidOption):
            application(wrong)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    messages = [{"role": "user", "content": "Tell me of tides."}]
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
    try:
        serve.start(http_options={"port": port})
        target, draft = str(chat_folders.target), str(chat_folders.draft)
        serve.run(application({"target": target, "draft": draft, "device": "cpu"}), name="foretold")
        body = {"messages": messages, "temperature": 0, "max_tokens": 8}
        url = f"http://127.0.0.1:{port}"
        text = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]["content"]
        assert text == chat_engine(dtype="bfloat16").generate([messages], SamplingParams(max_new_tokens=8))[0].text
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body | {"stream": True}, timeout=60) as stream:
            assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
    finally:
        serve.shutdown()
        ray.shutdown()


def test_a_killed_replicas_successor_finds_what_it_stored(chat_folders, tmp_path):
    from ray import serve

    from engine.server.ray_app import application

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    target, draft = str(chat_folders.target), str(chat_folders.draft)
    options = {"target": target, "draft": draft, "device": "cpu", "store": str(tmp_path / "store"), "quality": "near-lossless"}
    body = {"messages": [{"role": "user", "content": "tide and buoy " * 50}], "temperature": 0, "max_tokens": 4}
    url = f"http://127.0.0.1:{port}"

    def replicas() -> list[int]:
        found = psutil.Process().children(recursive=True)
        return [process.pid for process in found if "ServeReplica" in " ".join(process.cmdline())]

    def store_metric(name: str) -> float:
        lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
        return float(next(line for line in lines if line.startswith(f"foretold:store_{name}{{")).rsplit(" ", 1)[1])

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
    try:
        serve.start(http_options={"port": port})
        serve.run(application(options), name="foretold")
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        deadline = time.monotonic() + 300
        while store_metric("kept_tokens") < 640:
            assert time.monotonic() < deadline, "too little was stored"
            time.sleep(0.1)
        (killed,) = replicas()
        os.kill(killed, 9)
        while True:
            try:
                again = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
                if again.status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert time.monotonic() < deadline
            time.sleep(0.5)
        # a model as small as this may be quicker to run again than to restore: its known prefix is skipped then
        assert store_metric("hits") + store_metric("skipped") == 1
        assert again.json()["choices"][0]["message"]["content"] == answer["choices"][0]["message"]["content"]
    finally:
        serve.shutdown()
        ray.shutdown()
