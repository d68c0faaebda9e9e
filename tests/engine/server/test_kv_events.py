"""KV events: a subscriber that follows them knows which pages the server holds; nothing of it stalls the engine."""

from __future__ import annotations

import pytest

from engine.errors import InvalidOption
from engine.server.kv_events import KvEvents, page_hashes

zmq = pytest.importorskip("zmq", reason="the extra events is not installed")
msgpack = pytest.importorskip("msgpack", reason="the extra events is not installed")

CHAT = "/v1/chat/completions"


@pytest.fixture
def subscribed():
    context = zmq.Context()
    socket = context.socket(zmq.SUB)
    socket.subscribe(b"")

    def follow(held: dict[int, list[int]], seconds: float = 0.4) -> list[list]:
        """Events until none comes for a while; `held` is kept up to date."""
        found = []
        while socket.poll(int(1e3 * seconds)):
            topic, number, payload = socket.recv_multipart()
            assert topic == b"kv-events" and int.from_bytes(number, "big") == follow.next
            follow.next += 1
            for event in msgpack.unpackb(payload)[1]:
                found.append(event)
                if event[0] == "BlockStored":
                    _, hashes, parent, ids, size, lora, medium = event
                    assert len(ids) == size * len(hashes) and lora is None and medium == "CPU"
                    assert parent is None or parent in held
                    assert not held.keys() & set(hashes)
                    held.update({key: ids[i * size : (i + 1) * size] for i, key in enumerate(hashes)})
                else:
                    assert event[0] == "BlockRemoved"
                    for key in event[1]:
                        del held[key]
        return found

    follow.next = 0
    yield socket, follow
    socket.close()
    context.term()


def test_a_subscriber_knows_what_the_server_holds(chat_engine, serve, subscribed):
    socket, follow = subscribed
    engine = chat_engine(prefix_sharing=True, pool_tokens=1024)
    with serve(engine, kv_events="tcp://127.0.0.1:*") as running:
        socket.connect(running.server.kv_events.endpoint)
        held: dict[int, list[int]] = {}
        assert follow(held, 0.3) == []

        def ask(text: str, **options) -> list[int]:
            messages = [{"role": "user", "content": text}]
            answer = running.post(CHAT, {"messages": messages, "temperature": 0, "max_tokens": 4, **options})
            assert answer.status_code == 200
            return engine.encode(messages)

        ids = ask("tide and buoy " * 12)
        follow(held)
        assert page_hashes("default", ids, 16)[: len(ids) // 16] == list(held)[: len(ids) // 16]
        assert [token for page in list(held.values())[: len(ids) // 16] for token in page] == ids[: len(ids) // 16 * 16]
        before = dict(held)
        ask("tide and buoy " * 12 + "and sails")  # a longer one with the same beginning: its own pages alone are new
        events = follow(held)
        assert before.items() <= held.items() and events[0][2] in before
        ask("tide and buoy " * 12, seed=3)  # of a namespace of its own inside, the same pages outside
        ask("tide and buoy " * 12)
        follow(held)
        for i in range(6):
            ask(f"{i} boats " * 40)
        events = follow(held)
        assert any(event[0] == "BlockRemoved" for event in events)
        shared = engine.core.shared_prefixes
        assert len(held) <= shared.num_pages
        shared.clear()
        running.server.kv_events.flush()
        follow(held)
        assert held == {}


def test_namespaces_have_hashes_of_their_own():
    ids = list(range(64))
    mine, yours = page_hashes("alice", ids, 16), page_hashes("bob", ids, 16)
    assert len(mine) == 4 and not set(mine) & set(yours)
    assert page_hashes("alice", [*ids[:32], 99, *ids[33:]], 16)[:2] == mine[:2]
    assert page_hashes("alice", ids[:15], 16) == []


@pytest.mark.parametrize("endpoint", ["5557", "tcp://nowhere.invalid:5557", ""])
def test_a_bad_endpoint_is_named(endpoint):
    with pytest.raises(InvalidOption, match="KV events"):
        KvEvents(endpoint, 16, "CPU")
