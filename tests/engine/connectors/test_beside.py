"""What the connector does beside an engine's steps: copies that wait for nothing, coding that yields, and rates that say whether restoring pays."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from codec.layouts import PagedKv
from engine.connectors.copies import BlockCopies, HostBuffer
from engine.connectors.pace import QUIET_S, Pace, Yielding
from engine.connectors.rates import StepRates, open_rates


class Clock:
    """Seconds that only sleeping, or a test, lets pass."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


def test_an_idle_engine_is_not_waited_for() -> None:
    clock = Clock()
    pace = Pace(0.04, clock, clock.sleep)
    for _ in range(10):
        clock.now += 1
        pace.wait()
    assert clock.slept == 0 and pace.is_idle
    pace.began(prompt=False)
    assert not pace.is_idle
    pace.ended()
    assert not pace.is_idle
    clock.now += 1.01 * QUIET_S
    assert pace.is_idle


@pytest.mark.parametrize("share", [0.04, 0.25])
def test_beside_steps_coding_gets_its_share(share: float) -> None:
    clock = Clock()
    pace = Pace(share, clock, clock.sleep)
    pace.began(prompt=False)
    began, used = clock.now, 0.0
    for _ in range(2000):
        clock.now += 0.001  # what a call of coding takes
        used += 0.001
        pace.wait()
    assert share * 0.6 < used / (clock.now - began) <= share * 1.05


def test_a_prompt_keeps_coding_away_until_its_step_ends() -> None:
    clock = Clock()
    pace = Pace(0.5, clock, clock.sleep)
    pace.began(prompt=True)
    ends = clock.now + 0.7

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now >= ends and pace._in_step:
            pace.ended()

    pace._sleep = sleep
    pace.wait()
    assert clock.now >= ends and 0.7 <= clock.slept < 0.8  # not before
    pace._sleep = clock.sleep
    pace.began(prompt=True)
    pace.ended()  # the device may still be at work
    before = clock.slept
    pace.wait()
    assert QUIET_S <= clock.slept - before < 2 * QUIET_S
    # without an end, a slice after two seconds more than the share asks for
    pace._sleep = clock.sleep
    pace.began(prompt=True)
    before = clock.now
    pace.wait()
    assert 2.0 <= clock.now - before < 2.5


def test_who_waits_for_the_store_is_not_kept_waiting_by_steps() -> None:
    clock = Clock()
    pace = Pace(0.0, clock, clock.sleep)
    pace.began(prompt=True)
    pace.rush()
    pace.wait()
    assert clock.slept == 0 and pace.is_rushed
    pace.rush(False)
    assert not pace.is_idle


def test_every_torch_call_of_the_thread_yields_and_no_other() -> None:
    calls: list[str] = []
    pace = Pace(1.0)
    pace.wait = lambda: calls.append(threading.current_thread().name)  # type: ignore[method-assign]
    with Yielding(pace):
        other = threading.Thread(target=lambda: torch.ones(3).sum(), name="other")
        other.start()
        other.join()
        assert float(torch.ones(3).sum()) == 3.0
    assert len(calls) >= 2 and "other" not in calls
    count = len(calls)
    torch.ones(3)
    assert len(calls) == count, "behind the block"


def test_pieces_of_host_memory_come_back() -> None:
    buffer, generator = HostBuffer(100_000, pinned=False), random.Random(3)
    held: list[tuple[torch.Tensor, int]] = []
    for n in range(400):
        if held and generator.random() < 0.5:
            tensor, value = held.pop(generator.randrange(len(held)))
            assert (tensor == value).all()
            buffer.give(tensor)
        elif (tensor := buffer.take([generator.randrange(1, 60), 33], torch.float32)) is not None:
            held.append((tensor.fill_(n), n))
    assert buffer.take([100_001], torch.uint8) is None
    for tensor, value in held:
        assert (tensor == value).all()
        buffer.give(tensor)
    assert buffer.free_bytes == 100_000 and buffer.take([100_000], torch.uint8) is not None


LAYOUTS = {"apart": (2, 9, 16, 3, 8), "together": (9, 2, 16, 3, 8)}


def filled(layout: str, device: str = "cpu") -> tuple[list[torch.Tensor], int]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(LAYOUTS[layout], generator=generator).to(torch.bfloat16).to(device) for _ in range(3)], list(LAYOUTS).index(layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_are_what_pages_hold(layout: str) -> None:
    layers, pair = filled(layout)

    def view(some):
        return PagedKv.joined(some, pair=pair, heads_first=False)

    copies, pages, blocks = BlockCopies(layers, 1 - pair, view, 1 << 17), view(layers), [7, 0, 3, 5, 8]
    try:
        found = [(a, b, *copies.copy(blocks, a, b)) for a, b in ((0, 64), (0, 4), (16, 80), (48, 80))]
        copies.before_writes()
        for a, b, rows, ready in found:
            ready()
            ready()
            assert torch.equal(rows, pages.read(blocks, a, b).to(torch.bfloat16)), (a, b)
        assert copies._buffer.free_bytes == 1 << 17
        large = copies.copy(blocks * 30, 0, 16 * 150)  # more than the buffer holds
        large[1]()
        assert torch.equal(large[0], pages.read(blocks * 30, 0, 16 * 150).to(torch.bfloat16))
    finally:
        copies.close()


def test_a_copy_that_fails_gives_its_memory_back() -> None:
    layers, pair = filled(next(iter(LAYOUTS)))

    def view(some):
        return PagedKv.joined(some, pair=pair, heads_first=False)

    copies = BlockCopies(layers, 1 - pair, view, 1 << 17)
    try:
        with pytest.raises(RuntimeError, match="out of DATA bounds"):
            copies.copy([0, 1000], 0, 32)  # no such block
        assert copies._buffer.free_bytes == 1 << 17
        rows, ready = copies.copy([0, 1], 0, 32)
        ready()
        assert torch.equal(rows, view(layers).read([0, 1], 0, 32).to(torch.bfloat16))
    finally:
        copies.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_from_a_gpu_makes_no_call_that_waits() -> None:
    layers, pair = filled("apart", "cuda")

    def view(some):
        return PagedKv.joined(some, pair=pair, heads_first=False)

    copies, blocks = BlockCopies(layers, 1 - pair, view, 1 << 20), [7, 0, 3, 5]
    truth = view(layers).read(blocks, 0, 64).to("cpu", torch.bfloat16)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        found = [copies.copy(blocks, 0, 64) for _ in range(8)]
        copies.before_writes()
        for layer in layers:
            layer.zero_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for rows, ready in found:
        ready()
        assert torch.equal(rows, truth)
    copies.close()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path))


def measured(rates: StepRates, kind: str, took, sizes=(512, 1024, 2048, 4096)) -> None:
    for _ in range(2):
        for tokens in sizes:
            rates.add(kind, tokens, 0, took(tokens))


def test_what_is_not_known_is_restored(home) -> None:
    rates = StepRates(["a"])
    assert rates.restoring_pays(4096, 0, 2048) and rates.seconds("compute", 10, 0, 10) is None
    measured(rates, "restore", lambda n: 5.0)
    assert rates.restoring_pays(4096, 0, 2048)
    rates.add("compute", 1000, 0, 0.001)  # the first of a process
    rates.add("compute", 1000, 0, 0.001)
    assert rates.restoring_pays(4096, 0, 2048)


def test_restores_with_a_fixed_cost_pay_for_long_prompts_only(home) -> None:
    rates = StepRates(["b"])
    measured(rates, "restore", lambda n: 0.04 + 1e-5 * n)
    measured(rates, "compute", lambda n: 1e-3 + 2e-5 * n + 2e-9 * n * n / 2)
    pays = [n for n in (256, 1024, 2048, 4096, 8192, 16384) if rates.restoring_pays(n, 0, 8192)]
    assert pays == [4096, 8192, 16384]
    assert rates.seconds("restore", 3000, 0, 3000) == pytest.approx(0.07, rel=0.02)
    # another process knows them, and one of another machine does not
    assert not StepRates(["b"]).restoring_pays(256, 0, 8192) and StepRates(["c"]).restoring_pays(256, 0, 8192)
    assert open_rates(["b"]) is open_rates(["b"])
    later = StepRates(["b"])
    measured(rates, "compute", lambda n: 1.0 + n)
    assert not later.restoring_pays(256, 0, 8192)
    later.refresh()
    measured(later, "compute", lambda n: 1.0 + n)
    assert later.restoring_pays(256, 0, 8192)


def test_well_known_sizes_are_written_now_and_then(home, monkeypatch) -> None:
    rates, written, clock = StepRates(["f"]), [], Clock()
    monkeypatch.setattr("engine.connectors.rates.time.monotonic", clock)
    monkeypatch.setattr(rates._cache, "write", lambda *_: written.append(clock.now))
    for _ in range(10):
        rates.add("compute", 1000, 0, 0.01)
    assert len(written) == 4, "until its median rests on five"
    clock.now += 11
    rates.add("compute", 1000, 0, 0.01)
    rates.add("compute", 4000, 0, 0.04)
    assert len(written) == 6


def test_one_slow_step_changes_nothing(home) -> None:
    rates = StepRates(["d"])
    for _ in range(5):
        measured(rates, "restore", lambda n: 1e-5 * n)
        measured(rates, "compute", lambda n: 2e-5 * n)
    rates.add("restore", 2048, 0, 60.0)
    assert all(rates.restoring_pays(n, 0, 2048) for n in (512, 2048, 8192))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"compute": 3, "restore": []}', b'{"compute": [[1, 0, -5]], "restore": [[0, 0, 1]]}', b"[" * 5000]
)
def test_rates_that_cannot_be_read_are_as_if_unknown(home, content: bytes) -> None:
    rates = StepRates(["e"])
    rates._cache.write(rates._name, content)
    assert StepRates(["e"]).restoring_pays(1000, 0, 1000)
