"""A tiny target and its draft sources, for tests of the scheduler."""

from __future__ import annotations

import pytest

from engine.runtime.drafters import load_draft_head

SHAPE = {"num_hidden_layers": 3, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def target(random_decoder):
    return random_decoder(1, **SHAPE)


@pytest.fixture(scope="module")
def drafts(target, random_decoder, make_draft_head, tmp_path_factory):
    """Draft sources by name; the model is the target itself, so that its drafts are accepted."""
    head = load_draft_head(make_draft_head(tmp_path_factory.mktemp("head"), target, exit_layer=1), target)
    return {"none": None, "model": random_decoder(1, **SHAPE), "exit": 1, "head": head}
