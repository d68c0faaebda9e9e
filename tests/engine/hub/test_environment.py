"""What a command does before its imports."""

from __future__ import annotations

import gc
import sys

import pytest

from engine.hub.environment import without_collection


def test_a_commands_imports_are_not_searched_for_garbage_nor_is_what_they_made(monkeypatch):
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    with without_collection():
        assert gc.isenabled(), "PyTorch is there already"
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(ImportError), without_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and frozen == [False]
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled() and len(frozen) == 1, "a caller's own choice stays"
    finally:
        gc.enable()
