"""A stored prefix comes back in pieces into every kind of pool: with windows, with few bits, over several devices."""

from __future__ import annotations

import copy
from functools import partial

import pytest

from engine.calibrate.recipe import quick_pack
from engine.engine import Engine
from engine.kv.quantized_pool import QuantizedPool
from engine.kv.spread_pool import SpreadPool
from engine.kv.windowed_pool import WindowedPool
from engine.runtime.sampling import SamplingParams
from engine.sessions.rates import Rates
from tests.engine.conftest import measured
from tests.engine.store.test_restore_pieces import GREEDY, LONG, SMALL, STREAM, check_empty, submit

KINDS = {
    WindowedPool: ("gemma3", {}, {}),
    QuantizedPool: ("llama", {"head_dim": 32}, {"kv_cache_dtype": "q4"}),
    SpreadPool: ("llama", {}, {"devices": "cpu,cpu", "device": "auto"}),
}


@pytest.fixture(params=[(kind, draft) for kind in KINDS for draft in ("trunk", "none")], ids=lambda p: f"{p[0].__name__}-{p[1]}")
def make_engine(request, tiny_model, byte_tokenizer, tmp_path, monkeypatch):
    """`make_engine(**options)` -> a float32 engine with a pool of the kind and the test's store; all are closed at the end."""
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("engine.sessions.codec_params.quick_pack", partial(quick_pack, num_tokens=768, context=128, rank=48))
    monkeypatch.setattr("engine.sessions.rates.measure", measured(Rates(0.0, 1e-6, 0.0, 1.0)))
    monkeypatch.setattr("engine.sessions.rates.SHORTEST", 0)
    (kind, draft), folder, made = request.param, tmp_path / "model", []
    family, shape, options = KINDS[kind]
    reference = copy.deepcopy(tiny_model(family, vocab_size=264, eos_token_id=256, max_position_embeddings=1024, **shape).reference)
    for parameter in reference.parameters():  # calmer, so that a code's error stays one
        if parameter.dim() > 1:
            parameter.data *= 0.4
    reference.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)

    def make(**more):
        common = {"device": "cpu", "dtype": "float32", "page_size": 16, "pool_tokens": 1 << 13, "log": lambda _: None}
        engine = Engine.from_pretrained(
            folder, draft, **(common | options | {"store": tmp_path / "store", "quality": "near-lossless"} | more)
        )
        assert isinstance(engine.core.pool, kind)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def test_pieces_are_the_same_as_all_at_once_and_leave_what_came(make_engine) -> None:
    engine = make_engine()
    engine.generate(LONG, GREEDY)
    engine.close()
    wanted = make_engine(prefill_chunk=384).generate(LONG, GREEDY)[0]
    assert wanted.restored_tokens == 768
    engine = make_engine(**SMALL)
    stream, first, same = (submit(engine, *each) for each in (("Once upon a time", STREAM), (LONG,), (LONG,)))
    results = [engine.core.finish(request) for request in (first, same)]
    assert [result.token_ids for result in results] == [wanted.token_ids] * 2
    assert [(result.reused_tokens, result.restored_tokens) for result in results] == [(768, 768), (768, 0)]
    engine.core.finish(stream)
    check_empty(engine)


@pytest.mark.parametrize("broken", ["cancelled", "store closed"])
def test_a_restore_that_is_broken_off_half_way(make_engine, broken) -> None:
    engine = make_engine()
    engine.generate(LONG, GREEDY)
    engine.close()
    wanted = make_engine(**SMALL).generate(LONG, GREEDY)[0].token_ids
    engine = make_engine(**SMALL)
    request = submit(engine, LONG)
    while request.sequence.length < 256:
        engine.core.step()
    assert request.restoring is not None
    if broken == "cancelled":
        engine.core.abandon(request)
        check_empty(engine)
        request = submit(engine, LONG)
    else:
        engine.prefix_cache.close()
    result = engine.core.finish(request)
    assert result.token_ids == wanted and result.reused_tokens == 768
    assert result.restored_tokens == (768 if broken == "store closed" else 512), "the rest; what came before is shared"
    check_empty(engine)
    assert engine.generate(LONG, SamplingParams(max_new_tokens=2, ignore_eos=True))[0].reused_tokens == 768
