"""Engines over a store of the test's own."""

from __future__ import annotations

import pytest


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


ONCE = "no codec pack for this pair yet", "quick pack", "measured once for this machine and pair"
"""What is logged by the first engine of a pair, in whichever test that is."""


@pytest.fixture
def store_engine(chat_engine, folder):
    """`store_engine(draft, **options)` -> an engine with the test's store; all are closed at the end. `said`: what they logged, but for ONCE."""
    made = []

    def log(message: str) -> None:
        if not message.startswith(ONCE):
            make.said.append(message)

    def make(draft: str = "draft", **options):
        engine = chat_engine(draft, **({"store": folder, "quality": "near-lossless", "log": log} | options))
        made.append(engine)
        return engine

    make.said = []
    yield make
    for engine in made:
        engine.close()
