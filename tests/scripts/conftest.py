"""The scripts are tried on the same tiny models as the engine."""

from __future__ import annotations

from tests.engine.conftest import (
    byte_tokenizer,
    chat_engine,
    chat_folders,
    hf_config,
    make_draft_head,
    model_options,
    pack_home,
    random_decoder,
    tiny_model,
)

__all__ = [
    "byte_tokenizer",
    "chat_engine",
    "chat_folders",
    "hf_config",
    "make_draft_head",
    "model_options",
    "pack_home",
    "random_decoder",
    "tiny_model",
]
