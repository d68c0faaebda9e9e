"""A store whose pair has no codec parameters yet: nobody waits for them to be fitted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.config import LoadedAs
from engine.runtime.sampling import SamplingParams
from engine.sessions import codec_params
from engine.sessions.fitting import PackFitting
from engine.store import prefix_cache

TEXT = "".join(f"def number_{i}(value):\n    '''Add {i} to it.'''\n    return value + {i}\n\n" for i in range(8))[:400]
GREEDY = SamplingParams(max_new_tokens=8, draft_length=0, ignore_eos=True)


@pytest.fixture
def unfitted(store_engine, monkeypatch, tmp_path):
    """`store_engine`, with an empty cache folder."""
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("engine.sessions.kv_codec.known_pack", codec_params.known_pack)
    return store_engine


class Stub:
    """A fitting that ends when it is told to."""

    def __init__(self, error: str | None = None) -> None:
        self.running, self.failure, self.stopped, self.ended = True, lambda: error, [], False

    def pause(self, paused: bool) -> None:
        self.stopped.append(paused)

    def end(self) -> None:
        self.ended = True


def test_an_answer_comes_before_the_parameters_and_is_kept_coded_behind_them(unfitted, monkeypatch, chat_engine) -> None:
    monkeypatch.setattr("engine.sessions.kv_codec.fitted_pack", lambda *_: pytest.fail("fitted while somebody waits"))
    first = unfitted("none")
    answer = first.generate(TEXT, GREEDY)[0]
    assert first.prefix_cache.codec is None and answer.restored_tokens == 0
    assert answer.token_ids == chat_engine("none").generate(TEXT, GREEDY)[0].token_ids
    first.flush()
    assert first.prefix_cache.codec is not None and first.prefix_cache.metrics.kept_tokens == 384
    assert any("they are fitted beside" in said for said in unfitted.said) and any("are fitted: texts" in said for said in unfitted.said)
    second = unfitted("none")
    assert second.prefix_cache.codec.pack.digest == first.prefix_cache.codec.pack.digest
    assert second.generate(TEXT, GREEDY)[0].restored_tokens == 384


def test_fitting_stops_while_requests_run(unfitted, monkeypatch) -> None:
    stub = Stub()
    monkeypatch.setattr(prefix_cache, "_ONCE_PATIENCE_S", 3600.0)
    monkeypatch.setattr(prefix_cache, "fitting_beside", lambda core: stub)
    engine = unfitted("none")
    stream = engine.stream(TEXT, GREEDY)
    next(stream)
    assert stub.stopped[-1]  # by its first step, not by a look some time later
    cache = engine.prefix_cache
    cache._give_way(stub)
    assert stub.stopped[-1]
    cache._busy_since -= prefix_cache._ONCE_PATIENCE_S
    cache._give_way(stub)
    assert not stub.stopped[-1]  # requests without end
    list(stream)
    cache._give_way(stub)
    assert cache._busy_since is None and not stub.stopped[-1]
    stub.running = False  # for the store's close, which waits for it


def test_ids_alone_are_kept_where_nothing_could_be_fitted(unfitted, monkeypatch) -> None:
    stub = Stub("no room for the models")
    monkeypatch.setattr(prefix_cache, "fitting_beside", lambda core: stub)
    engine = unfitted("none")
    engine.generate(TEXT, GREEDY)
    assert not engine.prefix_cache.flush(0.05)  # it waits, and its time is short
    stub.running = False
    engine.flush()
    assert stub.ended and engine.prefix_cache.codec is None and engine.prefix_cache.metrics.kept_tokens == 384
    assert [said for said in unfitted.said if "no room for the models" in said]


def test_a_closed_store_ends_the_fitting(unfitted, monkeypatch) -> None:
    stub = Stub()
    monkeypatch.setattr(prefix_cache, "fitting_beside", lambda core: stub)
    unfitted("none").close()
    assert stub.ended


def test_models_that_cannot_be_loaded_are_told_of(tmp_path) -> None:
    fitting = PackFitting(LoadedAs(str(tmp_path / "nowhere"), "none", "float32"))
    until = time.monotonic() + 300
    while fitting.running:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert "there is no folder" in str(fitting.failure())  # a long path is cut
    fitting.end()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
@pytest.mark.parametrize("paused", [False, True])
def test_a_process_that_fits_ends_with_a_killed_engine(chat_folders, tmp_path, paused) -> None:
    script = f"""
import os, signal
from engine.config import LoadedAs
from engine.sessions.fitting import PackFitting
fitting = PackFitting(LoadedAs({str(chat_folders.target)!r}, "none", "float32"))
fitting.pause({paused})
print(fitting._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"FORETOLD_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    process, until = Path("/proc") / killed.stdout.strip() / "stat", time.monotonic() + 300

    def alive() -> bool:
        try:
            return process.read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    while alive():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_rates_are_measured_while_nobody_is_served(store_engine) -> None:
    """A piece of that takes up to a second, on a machine and pair for which it was never done."""
    engine = store_engine("none", quality="auto")
    cache, worked = engine.prefix_cache, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "_start_worker", lambda: None)
        patch.setattr(cache, "_keep_some", lambda: worked.append(cache._jobs[0]))
        patch.setattr(prefix_cache, "known_rates", lambda codec: None)
        patch.setattr(prefix_cache, "SHORTEST", 0)
        engine.generate(TEXT, GREEDY)
        job = cache._jobs[0]
        assert cache.work_once()  # idle
        stream = engine.stream("another", SamplingParams(max_new_tokens=20, ignore_eos=True))
        next(stream)
        job.since -= 10 * prefix_cache._PATIENCE_S
        assert not cache.work_once()
        job.since -= prefix_cache._ONCE_PATIENCE_S
        assert cache.work_once()  # requests without end
        job.since = time.monotonic() - 2 * prefix_cache._PATIENCE_S
        patch.setattr(prefix_cache, "known_rates", lambda codec: object())
        assert cache.work_once() and len(worked) == 3
    list(stream)
