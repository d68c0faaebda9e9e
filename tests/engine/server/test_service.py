"""The server under strain: callers that vanish, too many of them, foreign ones, an engine that fails, and the end."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

from engine.engine import Engine
from engine.errors import InvalidOption, ModelNotFound, NonFiniteLogits
from engine.runtime.sampling import SamplingParams
from engine.server.errors import ApiError
from engine.server.keys import Keys, read_keys

MESSAGES = [{"role": "user", "content": "Tell me of tides."}]
LONG = {"messages": MESSAGES, "temperature": 1, "max_tokens": 900, "ignore_eos": True, "stream": True}
CHAT = "/v1/chat/completions"


def send_and_vanish(url: str, body: dict, read: int, until: Callable[[], object] = lambda: True) -> int:
    """Post over a socket, read some bytes, wait for a condition, and close it; its port."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
        while read > 0:
            got = len(connection.recv(read))
            assert got
            read -= got
        while not until():
            time.sleep(0.002)
        return connection.getsockname()[1]


@pytest.mark.parametrize("read", [200, 3000])
def test_a_client_that_vanishes_from_its_stream_leaves_nothing(running, read):
    free, before = running.server.engine.core.pool.num_free_pages, running.server.metrics.summary()["totals"]["cancelled"]
    for _ in range(4):
        with running.unfinished(800):
            running.wait_idle(send_and_vanish(running.url, LONG | {"n": 2}, read))
    assert running.server.engine.core.pool.num_free_pages == free
    assert running.server.metrics.summary()["totals"]["cancelled"] - before >= 4
    assert running.post(CHAT, {"messages": MESSAGES, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("seen", [True, False])
def test_a_client_that_vanishes_before_its_answer_leaves_nothing(running, seen):
    free, before = running.server.engine.core.pool.num_free_pages, running.server.metrics.summary()["totals"]["cancelled"]
    for _ in range(4):
        with running.unfinished(800):
            until = (lambda: running.server.loop.num_open) if seen else lambda: True
            running.wait_idle(send_and_vanish(running.url, LONG | {"stream": False}, 0, until))
    assert running.server.engine.core.pool.num_free_pages == free
    assert running.server.metrics.summary()["totals"]["cancelled"] - before == 4 or not seen
    assert running.post(CHAT, {"messages": MESSAGES, "max_tokens": 2}).status_code == 200


def test_a_request_is_counted_before_it_is_gone(chat_engine, serve, monkeypatch):
    with serve(chat_engine()) as running:
        loop, counted = running.server.loop, []
        for what in ("finished", "cancelled"):
            count = getattr(loop.metrics, what)
            monkeypatch.setattr(
                loop.metrics, what, lambda *args, what=what, count=count: counted.append((what, loop.num_open)) or count(*args)
            )
        assert running.post(CHAT, {"messages": MESSAGES, "max_tokens": 2}).status_code == 200
        with running.unfinished(800):
            running.wait_idle(send_and_vanish(running.url, LONG, 200))
        assert counted == [("finished", 1), ("cancelled", 1)]


def test_a_full_queue_says_when_to_come_back(chat_engine, serve):
    with serve(chat_engine(max_batch=1), max_queue=2) as running:
        leave, ports = threading.Event(), []
        ask = lambda: ports.append(send_and_vanish(running.url, LONG, 0, leave.is_set))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(3)]
        with running.unfinished(800):
            for count, thread in enumerate(threads, 1):
                thread.start()
                while running.server.loop.num_open < count or not running.server.loop.num_running:
                    time.sleep(0.002)
            answer = running.post(CHAT, {"messages": MESSAGES, "max_tokens": 1})
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
            leave.set()
            for thread in threads:
                thread.join()
            for port in ports:
                running.wait_idle(port)
        assert running.post(CHAT, {"messages": MESSAGES, "max_tokens": 1}).status_code == 200


def test_a_call_of_many_choices_waits_for_its_turn(chat_engine, serve):
    with serve(chat_engine(max_batch=2), max_queue=2) as running:
        made = running.post(CHAT, {"messages": MESSAGES, "max_tokens": 3, "n": 8, "seed": 1}).json()
        assert len(made["choices"]) == 8


def test_a_deadline_ends_a_request(chat_engine, serve):
    with serve(chat_engine(), timeout_s=0.05) as running:
        with running.unfinished(800):
            answer = running.post(CHAT, LONG | {"stream": False})
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
            with running.client.stream("POST", CHAT, json=LONG) as stream:
                last = [line for line in stream.iter_lines() if line][-2:]
        assert '"timeout"' in last[0] and last[1] == "data: [DONE]"
        running.wait_idle()


def test_a_failing_step_ends_its_requests_and_no_others(chat_engine, serve, monkeypatch):
    engine = chat_engine()
    with serve(engine) as running:
        step = type(engine.core.scheduler).step
        monkeypatch.setattr(type(engine.core.scheduler), "step", lambda self: (_ for _ in ()).throw(RuntimeError("out of memory")))
        answer = running.post(CHAT, {"messages": MESSAGES, "max_tokens": 3})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "out of memory" not in answer.text
        monkeypatch.setattr(type(engine.core.scheduler), "step", step)
        assert running.post(CHAT, {"messages": MESSAGES, "max_tokens": 3}).status_code == 200
        assert running.client.get("/health").status_code == 200
        running.wait_idle()


def test_neither_prompts_nor_answers_nor_keys_are_logged(chat_engine, serve, monkeypatch, tmp_path, caplog, capfd):
    file = tmp_path / "keys"
    file.write_text("alice sk-alice-secret\n")
    secret, bearer = "buoy-4711-lantern", {"headers": {"Authorization": "Bearer sk-alice-secret"}}
    messages = [{"role": "user", "content": secret}]
    engine = chat_engine()
    with caplog.at_level(logging.DEBUG), serve(engine, keys=read_keys(file), local_only=False) as running:
        answered = running.post(CHAT, {"messages": messages, "max_tokens": 12, "temperature": 0}, **bearer)
        assert answered.status_code == 200
        assert running.post(CHAT, {"messages": messages, "temperature": secret}, **bearer).status_code == 400
        assert running.post(CHAT, {"messages": messages}, headers={"Authorization": "Bearer sk-alice-secret2"}).status_code == 401
        fails = RuntimeError("the step failed")
        monkeypatch.setattr(type(engine.core.scheduler), "step", lambda self: (_ for _ in ()).throw(fails))
        assert running.post(CHAT, {"messages": messages, "max_tokens": 3}, **bearer).status_code == 500
    own = [record for record in caplog.records if not record.name.startswith("http")]  # the client's own are its affair
    said = "\n".join([*map(logging.Formatter().format, own), *capfd.readouterr()])
    assert "the step failed" in said
    text = answered.json()["choices"][0]["message"]["content"]
    assert len(text) > 3
    assert not [word for word in (secret, "sk-alice", text) if word in said]


def test_a_failing_request_is_an_error_of_its_own(chat_engine, serve, monkeypatch):
    engine = chat_engine()
    with serve(engine) as running:
        submit = engine.core.submit

        def failing(conversation, tokens, params, **options):
            request = submit(conversation, tokens, params, **options)
            if params.seed == 13:
                request.error = NonFiniteLogits("the logits are NaN", "check the weights")
            return request

        monkeypatch.setattr(engine.core, "submit", failing)
        with httpx.Client(base_url=running.url, timeout=60) as other:
            answers = [
                c.post(CHAT, json={"messages": MESSAGES, "max_tokens": 3, "seed": s}) for c, s in ((running.client, 13), (other, 14))
            ]
        assert [answer.status_code for answer in answers] == [500, 200]
        assert answers[0].json()["error"]["code"] == "non_finite_logits"
        running.wait_idle()


def test_a_large_body_is_refused(chat_engine, serve):
    with serve(chat_engine(), max_body_bytes=2048) as running:
        answer = running.post(CHAT, {"messages": [{"role": "user", "content": "x" * 4000}]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        pieces = (b"x" * 500 for _ in range(20))  # without a length
        assert running.client.post(CHAT, content=pieces).status_code == 413
        assert running.post(CHAT, {"messages": MESSAGES, "max_tokens": 1}).status_code == 200


def test_keys_are_asked_for_and_name_namespaces(chat_engine, serve, tmp_path):
    file = tmp_path / "keys"
    file.write_text("\ufeffalice sk-alice-secret  # a byte order mark is no part of it\n\nsk-nameless-one\n")
    keys = read_keys(file)
    assert keys.namespace("Bearer sk-alice-secret") == "alice"
    nameless = keys.namespace("bearer sk-nameless-one")
    assert nameless.startswith("key-") and "nameless" not in nameless
    file.write_text("clé-secrète-ключ\n", encoding="utf-8")
    sent = "Bearer clé-secrète-ключ".encode().decode("latin-1")  # as a server hands a header's bytes on
    assert read_keys(file).namespace(sent).startswith("key-")
    assert Keys({}).namespace(None) == Keys({}).namespace("Bearer anything") == "default"
    with serve(chat_engine(), keys=keys, local_only=False) as running:
        for path in (CHAT, "/v1/completions", "/tokenize"):
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "sk-alice-secret"},
                {"Authorization": "Basic sk-alice-secret"},
            ):
                answer = running.post(path, {"messages": MESSAGES, "prompt": "x"}, headers=headers)
                assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
        for path in ("/metrics", "/stats", "/v1/models"):
            assert running.client.get(path).status_code == 401
        assert running.client.get("/health").status_code == running.client.get("/").status_code == 200
        allowed = {"Authorization": "Bearer sk-alice-secret"}
        assert running.post(CHAT, {"messages": MESSAGES, "max_tokens": 1}, headers=allowed).status_code == 200
        # a caller cannot choose
        seen = []
        submit = running.server.loop.submit
        running.server.loop.submit = lambda tickets: (seen.extend(t.namespace for t in tickets), submit(tickets))[1]
        running.post(CHAT, {"messages": MESSAGES, "max_tokens": 1, "namespace": "bob", "user": "bob", "cache_salt": "bob"}, headers=allowed)
        assert seen == ["alice"]
        texts = running.client.get("/metrics", headers=allowed).text + running.client.get("/stats", headers=allowed).text
        assert "alice" not in texts and "tides" not in texts


BAD_KEYS = ["", "# nothing\n", "short\n", "one two three\n", "sk-twice-twice\nsk-twice-twice\n", "a sk-first-key\na sk-second-key\n"]


@pytest.mark.parametrize("content", [*BAD_KEYS, "default sk-first-key\n"])
def test_a_bad_key_file_is_refused(tmp_path, content):
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(InvalidOption) as refused:
        read_keys(file)
    assert "sk-" not in str(refused.value)
    with pytest.raises(InvalidOption):
        read_keys(tmp_path)
    with pytest.raises(ApiError):
        Keys({b"x" * 32: "a"}).namespace("Bearer é")


def test_pages_of_other_sites_are_not_answered_without_keys(running):
    body = {"messages": MESSAGES, "max_tokens": 1}
    port = running.url.rsplit(":", 1)[1]
    assert running.post(CHAT, body, headers={"Origin": "http://evil.example"}).status_code == 403
    assert running.post(CHAT, body, headers={"Host": f"evil.example:{port}"}).status_code == 403
    assert running.post(CHAT, body, headers={"Origin": running.url}).status_code == 200
    assert running.post(CHAT, body, headers={"Host": f"localhost:{port}"}).status_code == 200
    assert running.post(CHAT, body, headers={"Host": "[::1"}).status_code == 403
    assert running.post(CHAT, body, headers={"Origin": "http://["}).status_code == 403


def test_running_requests_finish_when_the_server_stops(chat_engine, serve):
    engine = chat_engine()
    with serve(engine, grace_s=30) as running:
        found: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: found.append(running.post(CHAT, LONG | {"stream": False, "max_tokens": 200, "seed": 3})))
        with running.unfinished(100, until=lambda: not running.server.loop.accepting):
            thread.start()
            while not running.server.loop.num_open:
                time.sleep(0.005)
            running.server.loop.stop(300)
        thread.join()
        assert running.client.get("/health").status_code == 503
        refused = running.post(CHAT, {"messages": MESSAGES, "max_tokens": 1})
        assert refused.status_code == 503 and "retry-after" in refused.headers
    expected = chat_engine().generate([MESSAGES], SamplingParams(temperature=1.0, seed=3, max_new_tokens=200, ignore_eos=True))[0]
    assert found[0].json()["choices"][0]["message"]["content"] == expected.text


def test_what_outlives_the_grace_is_ended_with_an_error(chat_engine, serve):
    with serve(chat_engine(), grace_s=30) as running:
        found: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: found.append(running.post(CHAT, LONG | {"stream": False})))
        with running.unfinished(800):
            thread.start()
            while not running.server.loop.num_open:
                time.sleep(0.005)
            running.server.loop.stop(0.0)
        thread.join()
        assert (found[0].status_code, found[0].json()["error"]["code"]) == (503, "stopping")
        assert running.server.engine.core.scheduler.idle


def test_metrics_count_under_the_names_that_dashboards_read(running, monkeypatch):
    monkeypatch.setattr("engine.server.metrics.RATE_WINDOW_S", 3600.0)

    def figure(name: str) -> float:
        lines = [line for line in running.client.get("/metrics").text.splitlines() if line.startswith(name + "{")]
        assert len(lines) == 1, name
        return float(lines[0].rsplit(" ", 1)[1])

    names = [
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:prefix_cache_queries_total",
        "vllm:time_to_first_token_seconds_count",
    ]
    names += [
        "vllm:e2e_request_latency_seconds_count",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
    ]
    before = {name: figure(name) for name in names}
    made = running.post(CHAT, {"messages": MESSAGES, "max_tokens": 9, "temperature": 0, "ignore_eos": True}).json()
    gained = {name: figure(name) - before[name] for name in names}
    assert gained["vllm:prompt_tokens_total"] == gained["vllm:prefix_cache_queries_total"] == made["usage"]["prompt_tokens"]
    assert gained["vllm:generation_tokens_total"] == 9 and gained["vllm:time_to_first_token_seconds_count"] == 1
    assert gained["vllm:spec_decode_num_draft_tokens_total"] == made["foretold"]["proposed"]
    assert gained["vllm:spec_decode_num_accepted_tokens_total"] == made["foretold"]["accepted"]
    running.wait_idle()
    assert figure("vllm:num_requests_running") == figure("vllm:num_requests_waiting") == 0
    assert figure("vllm:num_preemptions_total") == running.server.engine.core.scheduler.preemptions
    stats = running.client.get("/stats").json()
    assert stats["totals"]["generated_tokens"] >= 9 and stats["tokens_per_s"] > 0
    assert {tier["name"] for tier in stats["tiers"]} >= {"pool"}


def test_the_page_needs_nothing_from_elsewhere(running):
    page = running.client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text.replace("http://www.w3.org/2000/svg", "") and "https://" not in page.text


def test_many_streams_get_their_own_texts(running, chat_engine):
    count = 60
    expected = chat_engine(max_batch=16).generate(
        [MESSAGES] * count, [SamplingParams(temperature=1.0, seed=100 + i, max_new_tokens=4 + i % 17) for i in range(count)]
    )

    async def ask(client: httpx.AsyncClient, i: int) -> str:
        body = {"messages": MESSAGES, "temperature": 1, "seed": 100 + i, "max_tokens": 4 + i % 17, "stream": True}
        text = ""
        async with client.stream("POST", CHAT, json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        return text

    async def all_of_them() -> list[str]:
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(base_url=running.url, timeout=120, limits=limits) as client:
            return list(await asyncio.gather(*(ask(client, i) for i in range(count))))

    assert asyncio.run(all_of_them()) == [result.text for result in expected]
    running.wait_idle()


def test_the_command_refuses_what_it_cannot_serve(capsys, tmp_path: Path):
    from engine.cli.main import main as foretold
    from engine.serve import main

    taken = socket.create_server(("127.0.0.1", 0))
    keys = tmp_path / "keys"
    keys.write_text("short")
    cases = {
        "--api-key-file": ["--host", "0.0.0.0"],
        "--port": ["--port", "70000"],
        "--max-batch": ["--max-batch", "0"],
        "--prefill-chunk": ["--prefill-chunk", "0"],
        "--timeout": ["--timeout", "0"],
        "exclude": ["--pair", "smollm2", "--target", "x"],
        "listen": ["--port", str(taken.getsockname()[1])],
        "line 1": ["--api-key-file", str(keys)],
        "unrecognized": ["--no-such-option"],
        "--threads": ["--threads", "0"],
        "--quality only matters to a store": ["--quality", "tiny"],
        "--pack only matters to a store": ["--pack", "a"],
        "invalid choice: 'huge'": ["--quality", "huge", "--store", str(tmp_path / "store")],
    }
    for word, argv in cases.items():
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and word in said and said.count("\n") == 1
    taken.close()
    assert foretold(["serve", "--port", "70000"]) == 2 and "--port" in capsys.readouterr().err


def test_the_command_hands_its_options_on(monkeypatch, capsys, tmp_path: Path):
    """Those of the models, their threads and the store mean what they do to generate."""
    from engine.serve import main

    given = []

    def loaded(target, draft, **options):
        given.append(options | {"threads": torch.get_num_threads(), "target": target})
        raise ModelNotFound("there is none", "look elsewhere")

    monkeypatch.setattr(Engine, "from_pretrained", loaded)
    threads = torch.get_num_threads()
    for count in (threads, threads + 1):
        store = ["--store", str(tmp_path / "store"), "--quality", "tiny", "--pack", "a.pack", "--store-bytes", "1M"]
        assert main(["--port", "0", "--target", "x", "--dtype", "float32", "--threads", str(count), *store]) == 2
        assert "there is none" in capsys.readouterr().err
        wanted = {"target": "x", "dtype": "float32", "threads": count, "quality": "tiny", "pack": Path("a.pack"), "store_bytes": 1 << 20}
        assert {name: given[-1][name] for name in wanted} == wanted
    assert torch.get_num_threads() == threads, "the engine's own thread has them"
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("python 3")


def test_one_thread_loads_and_runs_the_engine(chat_engine, serve):
    import engine.server.loop as loop

    thread = loop.EngineThread()
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0)
    assert thread.call(threading.current_thread) is thread
    made = thread.call(chat_engine)
    stepped = []
    step = made.core.step
    made.core.step = lambda: (stepped.append(threading.current_thread()), step())[1]
    with serve(made, thread=thread) as running:
        assert running.post(CHAT, {"messages": MESSAGES, "max_tokens": 3}).status_code == 200
    assert set(stepped) == {thread} and not thread.is_alive()


def test_requests_that_arrive_together_begin_together(chat_engine, monkeypatch):
    import engine.server.loop as module
    from engine.server.loop import EngineLoop, Ticket
    from engine.server.metrics import ServerMetrics

    engine, batches = chat_engine(), []
    step = engine.core.step

    def watched():
        batches.append(len(engine.core.scheduler.waiting) + len(engine.core.scheduler.running))
        step()

    engine.core.step = watched
    found = threading.Semaphore(0)
    loop = EngineLoop(engine, ServerMetrics("tiny", {}, lambda: 0), lambda events: [found.release() for _, event in events if event.result])
    params = SamplingParams(max_new_tokens=2, ignore_eos=True)
    tickets = [Ticket(engine.encode("tide"), params, "default", lambda _: None) for _ in range(3)]
    loop.start()
    with monkeypatch.context() as patch:
        patch.setattr(module, "GATHER_S", 600.0)  # this thread may be kept from running between two of them
        with loop.arrival():
            for ticket in tickets:
                loop.submit([ticket])
        for _ in tickets:
            assert found.acquire(timeout=120)
    assert batches[0] == 3
    with loop.arrival():  # nothing comes: whoever is there does not wait for long
        loop.submit([Ticket(engine.encode("buoy"), params, "default", lambda _: None)])
        assert found.acquire(timeout=120)
    loop.stop(5)
