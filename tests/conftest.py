"""Settings for all tests."""

from __future__ import annotations

import gc
import os
import random
import sys
import time
import zlib
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # read when triton is imported first, by whichever test comes first
    os.environ.setdefault("TRITON_INTERPRET", "1")

# every run tries the same examples
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

# The models are tiny: a second thread costs more than it brings, and on a busy machine it costs seconds.
torch.set_num_threads(1)

# Importing and collecting make millions of objects that live until the end; at Python's own thresholds (700, 10, 10) the collector
# walks them again and again, a sixth of a run's CPU time.
gc.set_threshold(10_000, 10, 10)


@pytest.fixture(autouse=True)
def own_seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test draws from PyTorch's global generator, and the keys of requests without a seed, are the same in every run, whichever tests came
    before."""
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    if (core := sys.modules.get("engine.runtime.core")) is not None:
        monkeypatch.setattr(core, "secrets", SimpleNamespace(randbits=random.Random(seed).getrandbits))


@pytest.fixture(scope="session")
def takes_less() -> Callable[[float, Callable[[], object]], None]:
    """`takes_less(seconds, act)`: act takes less than so many of this process's CPU seconds, in one of three tries: a machine that stands still for a
    while counts as computing, and so does what an earlier test's threads have not done yet."""

    def check(seconds: float, act: Callable[[], object]) -> None:
        took = []
        while not took or took[-1] >= seconds:
            assert len(took) < 3, took
            began = time.process_time()
            act()
            took.append(time.process_time() - began)

    return check


def pytest_collection_finish(session: pytest.Session) -> None:
    """Libraries and collected tests are never garbage: the collector need not walk them again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """What is left is released as the interpreter ends; libraries in C++ report it as leaked else."""
    gc.unfreeze()
