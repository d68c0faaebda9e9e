"""A tiny target and its draft sources, for tests of the scheduler."""

from __future__ import annotations

import pytest

from draft.spans import SpanPolicy
from engine.engine import Engine
from engine.runtime.block_runner import block_decoding
from engine.runtime.drafters import load_draft_head
from engine.runtime.model_runner import CAPTURED_LENGTHS, MAX_ROWS, GraphedDecoder, PlainDecoding

SHAPE = {"num_hidden_layers": 3, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def target(random_decoder):
    return random_decoder(1, **SHAPE)


@pytest.fixture(scope="module")
def drafts(target, random_decoder, make_draft_head, tmp_path_factory):
    """Draft sources by name; the model is the target itself, so that its drafts are accepted."""
    head = load_draft_head(make_draft_head(tmp_path_factory.mktemp("head"), target, exit_layer=1), target)
    states = load_draft_head(make_draft_head(tmp_path_factory.mktemp("states"), target, state_layers=(1, 3)), target)
    return {"none": None, "model": random_decoder(1, **SHAPE), "exit": 1, "head": head, "states": states}


@pytest.fixture
def as_on_a_gpu():
    """`as_on_a_gpu(engine)`: the engine with the runners that it has on a GPU, on a CPU without graphs."""

    def change(engine: Engine) -> Engine:
        core, scheduler = engine.core, engine.core.scheduler
        if core.device.type == "cuda":
            assert isinstance(core.runner, GraphedDecoder)
            return engine
        runner = core.runner = scheduler.target = GraphedDecoder(core.target, core.pool, capture=False)
        scheduler.plain = PlainDecoding(runner)
        if core.source is not None:
            own = core.source.cached_decoder
            cached = None if own is None else GraphedDecoder(own, core.draft_pool, capture=False)
            core.drafter = scheduler.drafter = core.source.drafter(runner, core.draft_pool, cached=cached, deterministic=core.deterministic)
            scheduler.blocks = block_decoding(runner, core.drafter)
            scheduler.drafting = SpanPolicy(lengths=CAPTURED_LENGTHS, most_rows=MAX_ROWS)
            assert scheduler.blocks is not None
        return engine

    return change
