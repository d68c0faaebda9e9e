"""The server as a Ray Serve application; skipped where Ray is not installed (the extra `ray`)."""

from __future__ import annotations

import socket

import httpx
import pytest

from engine.errors import InvalidOption

ray = pytest.importorskip("ray", reason="the extra ray is not installed")


def test_a_replica_answers_and_streams(chat_folders, chat_engine):
    from ray import serve

    from engine.runtime.sampling import SamplingParams
    from engine.server.ray_app import application

    for wrong in ({"pairs": "smollm2"}, {"replicas": "two"}):
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
        assert httpx.get(f"{url}/health").status_code == 200
    finally:
        serve.shutdown()
        ray.shutdown()
