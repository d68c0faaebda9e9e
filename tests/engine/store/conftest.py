"""Engines over a store of the test's own."""

from __future__ import annotations

import pytest


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store_engine(chat_engine, folder):
    """`store_engine(draft, **options)` -> an engine with the test's store; all are closed at the end. `said`: what they logged."""
    made = []

    def make(draft: str = "draft", **options):
        engine = chat_engine(draft, **({"store": folder, "quality": "near-lossless", "log": make.said.append} | options))
        made.append(engine)
        return engine

    make.said = []
    yield make
    for engine in made:
        engine.close()
