"""KV events: a subscriber that follows them knows which pages the server holds; nothing of it stalls the engine."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import InvalidOption
from engine.kv.shared_prefixes import CachedPage
from engine.server.kv_events import KvEvents, page_hashes

zmq = pytest.importorskip("zmq", reason="the extra events is not installed")
msgpack = pytest.importorskip("msgpack", reason="the extra events is not installed")

CHAT, PROBE = "/v1/chat/completions", b"probe"


@pytest.fixture
def subscribed():
    context = zmq.Context()
    socket = context.socket(zmq.SUB)
    socket.subscribe(b"")

    def connect(publisher: KvEvents) -> None:
        """Returns once messages come through: a subscription takes a while to be known, and nobody is told of it. The publisher must be idle."""
        socket.connect(publisher.endpoint)
        while not socket.poll(20):
            publisher._socket.send(PROBE)

    def follow(held: dict[int, list[int]], publisher: KvEvents) -> list[list]:
        """Events until `held`, which is kept up to date, is what the publisher holds; fails when it never is."""
        found = []
        while held.keys() != publisher._held.keys():
            assert socket.poll(120_000), "events are missing"
            message = socket.recv_multipart()
            if message == [PROBE]:
                continue
            topic, number, payload = message
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
    yield connect, follow
    socket.close()
    context.term()


def test_a_subscriber_knows_what_the_server_holds(chat_engine, serve, subscribed):
    connect, follow = subscribed
    engine = chat_engine(prefix_sharing=True, pool_tokens=1024)
    with serve(engine, kv_events="tcp://127.0.0.1:*") as running:
        events = running.server.kv_events
        connect(events)
        held: dict[int, list[int]] = {}
        assert follow(held, events) == []

        def ask(text: str, **options) -> list[int]:
            messages = [{"role": "user", "content": text}]
            answer = running.post(CHAT, {"messages": messages, "temperature": 0, "max_tokens": 4, **options})
            assert answer.status_code == 200
            running.wait_idle()
            return engine.encode(messages)

        ids = ask("tide and buoy " * 12)
        follow(held, events)
        assert page_hashes("default", ids, 16)[: len(ids) // 16] == list(held)[: len(ids) // 16]
        assert [token for page in list(held.values())[: len(ids) // 16] for token in page] == ids[: len(ids) // 16 * 16]
        before = dict(held)
        ask("tide and buoy " * 12 + "and sails")  # a longer one with the same beginning: its own pages alone are new
        told = follow(held, events)
        assert before.items() <= held.items() and told[0][2] in before
        ask("tide and buoy " * 12, seed=3)  # of a namespace of its own inside, the same pages outside
        ask("tide and buoy " * 12)
        follow(held, events)
        for i in range(6):
            ask(f"{i} boats " * 40)
        assert any(event[0] == "BlockRemoved" for event in follow(held, events))
        shared = engine.core.shared_prefixes
        assert len(held) <= shared.num_pages
        shared.clear()
        events.flush()
        follow(held, events)
        assert held == {}


def test_namespaces_have_hashes_of_their_own():
    ids = list(range(64))
    mine, yours = page_hashes("alice", ids, 16), page_hashes("bob", ids, 16)
    assert len(mine) == 4 and not set(mine) & set(yours)
    assert page_hashes("alice", [*ids[:32], 99, *ids[33:]], 16)[:2] == mine[:2]
    assert page_hashes("alice", ids[:15], 16) == []
    assert (
        page_hashes("alice", ids[32:], 16, after=mine[1]) == mine[2:] == page_hashes("bob", np.array(ids[32:], np.int32), 16, after=mine[1])
    )


def test_pages_behind_some_that_nobody_was_told_of_have_the_texts_hashes():
    events = KvEvents("tcp://127.0.0.1:*", 16, "CPU")
    try:
        ids = np.arange(64, dtype=np.int32)
        pages = [CachedPage(number, None, None) for number in range(4)]
        events.stored("alice", ids, pages, 2)
        assert [page.key for page in pages[2:]] == page_hashes("alice", ids, 16)[2:]
        [[_, hashes, parent, told, *_]] = events._batch
        assert hashes == [page.key for page in pages[2:]] and parent == page_hashes("alice", ids, 16)[1] and told == list(range(32, 64))
    finally:
        events.close()


@pytest.mark.parametrize("endpoint", ["5557", "tcp://nowhere.invalid:5557", ""])
def test_a_bad_endpoint_is_named(endpoint):
    with pytest.raises(InvalidOption, match="KV events"):
        KvEvents(endpoint, 16, "CPU")
