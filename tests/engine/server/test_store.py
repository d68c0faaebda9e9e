"""Servers that share a store: a prefix comes back from another server, and from another key never."""

from __future__ import annotations

import pytest

from engine.server.keys import Keys, read_keys

TEXT = "".join(f"def number_{i}(value):\n    '''Add {i} to it.'''\n    return value + {i}\n\n" for i in range(12))
BODY = {"messages": [{"role": "user", "content": TEXT[:700]}], "temperature": 0, "max_tokens": 6}


@pytest.fixture
def store_options(tmp_path):
    return {"store": tmp_path / "store", "quality": "near-lossless", "log": lambda _: None}


def cached(running, **options) -> int:
    answer = running.post("/v1/chat/completions", BODY, **options)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_another_server_goes_on_where_one_stopped(chat_engine, serve, store_options):
    with serve(chat_engine(**store_options)) as first:
        assert cached(first) == 0
        # it stops here, and what it answered is stored
    with serve(chat_engine(**store_options)) as second:
        assert cached(second) >= 640
        tiers = {tier["name"]: tier for tier in second.client.get("/stats").json()["tiers"]}
        assert tiers["store"]["hits"] == 1 and tiers["store"]["bytes"] > 0 and tiers["store"]["tokens"] >= 640
        metrics = second.client.get("/metrics").text
        assert "foretold:store_hits" in metrics and "foretold:store_saved_s" in metrics


def test_keys_do_not_see_each_others_prefixes(chat_engine, serve, store_options, tmp_path):
    file = tmp_path / "keys"
    file.write_text("alice sk-alice-secret\nbob sk-bob-secret\n")
    keys = read_keys(file)
    alice, bob = ({"headers": {"Authorization": f"Bearer sk-{name}-secret"}} for name in ("alice", "bob"))
    with serve(chat_engine(**store_options), keys=keys, local_only=False) as running:
        assert cached(running, **alice) == 0
        running.wait_idle()
        running.server.engine.flush()
        assert cached(running, **bob) == 0
    with serve(chat_engine(**store_options), keys=keys, local_only=False) as running:
        assert cached(running, **alice) >= 640
    assert Keys({}).namespace(None) not in keys.digests.values()
