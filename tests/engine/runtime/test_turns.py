"""The engine's lock: whoever asks first gets it first, its holder may ask again, and an interrupt leaves nobody waiting."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from contextlib import nullcontext

import pytest

from engine.runtime import turns
from engine.runtime.sampling import SamplingParams
from engine.runtime.turns import Turns


def start(lock, thread):
    """Start it, and return once it waits, or has ended."""
    before = len(lock._waiting)
    thread.start()
    while len(lock._waiting) <= before and thread.is_alive():
        thread.join(0.001)


def begun(lock, calls):
    """Threads that run these, each begun once the one before waits."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        start(lock, thread)
    return threads


def test_threads_get_it_in_the_order_in_which_they_asked():
    lock, order = Turns(), []

    def ask(number):
        with lock:
            order.append(number)

    with lock:
        threads = begun(lock, [lambda n=n: ask(n) for n in range(6)])
    for _ in range(3):  # whoever gives it back comes behind all that wait
        ask(-1)
    for thread in threads:
        thread.join(300)
    assert order == [0, 1, 2, 3, 4, 5, -1, -1, -1]


def test_its_holder_takes_it_again_and_nobody_else_does():
    lock, others = Turns(), []
    with lock:
        with lock:
            assert lock.mine
        (thread,) = begun(lock, [lambda: (others.append(lock.mine), lock.__enter__(), others.append(lock.mine), lock.__exit__())])
        assert lock.mine and others == [False]
    thread.join(300)
    assert others == [False, True] and not lock.mine


def test_one_at_a_time_has_it():
    lock, inside, most, total = Turns(), 0, 0, 0

    def work():
        nonlocal inside, most, total
        for _ in range(300):
            with lock:
                inside += 1
                most = max(most, inside)
                time.sleep(0)
                total, inside = total + 1, inside - 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert (most, total) == (1, 2400)


class Interrupted(BaseException):
    pass


class Interrupting(deque):
    """A queue; `at`: which use of it by a thread called "interrupted" raises, or calls what is given instead."""

    at, uses, instead = 0, 0, None

    def _used(self):
        if threading.current_thread().name == "interrupted":
            self.uses += 1
            if self.uses == self.at:
                if self.instead is None:
                    raise Interrupted
                self.instead()

    def __contains__(self, item):
        self._used()
        return super().__contains__(item)

    def append(self, item):
        self._used()
        super().append(item)
        self._used()

    def __getitem__(self, at):
        self._used()
        return super().__getitem__(at)

    def remove(self, item):
        self._used()
        super().remove(item)
        self._used()


@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.parametrize("held", [False, True])
def test_a_thread_that_is_interrupted_anywhere_gives_up_its_turn(monkeypatch, at, held):
    monkeypatch.setattr(turns, "_LOOK_S", 0.2)
    lock, got, raised = Turns(), [], []
    lock._waiting = queue = Interrupting()
    queue.at = at

    def ask():
        try:
            with lock:
                pass
        except Interrupted:
            raised.append(at)

    def later():
        with lock:
            got.append(True)

    first = threading.Thread(target=ask, name="interrupted", daemon=True)
    with lock if held else nullcontext():
        start(lock, first)
        (second,) = begun(lock, [later])
    first.join(300)
    second.join(300)
    later()
    assert len(got) == 2 and not lock.mine and (raised or queue.uses < at)


@pytest.mark.parametrize("at", range(1, 9))
def test_a_handler_may_ask_anywhere(monkeypatch, at):
    """As a signal's handler and a finaliser do, in the thread that is asking."""
    monkeypatch.setattr(turns, "_LOOK_S", 0.2)
    lock, got = Turns(), []
    lock._waiting = queue = Interrupting()
    queue.at = at

    def handler():
        with lock:
            got.append("handler")

    def ask():
        with lock:
            got.append("thread")

    def later():
        with lock:
            got.append("later")

    queue.instead = handler
    with lock:
        first = threading.Thread(target=ask, name="interrupted", daemon=True)
        start(lock, first)
        (second,) = begun(lock, [later])
    first.join(300)
    second.join(300)
    assert {"thread", "later"} <= set(got) and ("handler" in got or queue.uses < at) and not queue and not lock.mine


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="has no timers")
def test_a_signals_handler_asks_while_threads_do(monkeypatch):
    lock, handled, ended = Turns(), 0, threading.Event()

    def work():
        while not ended.is_set():
            with lock:
                pass

    def handler(*_):
        nonlocal handled
        with lock:
            handled += 1

    before = signal.signal(signal.SIGALRM, handler)
    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(100):  # each once the one before was handled
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.00001 * number)
            while handled == number:
                with lock:
                    pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)  # drops one that has not been delivered, which could end the process
        signal.signal(signal.SIGALRM, before)
        ended.set()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads) and not lock.mine and not lock._waiting


def test_a_place_whose_thread_has_gone_is_passed_over(monkeypatch):
    monkeypatch.setattr(turns, "_LOOK_S", 0.05)
    lock, got = Turns(), []
    lock._waiting.append(threading.Lock())

    def ask():
        with lock:
            got.append(True)

    (thread,) = begun(lock, [ask])
    thread.join(300)
    assert got and not lock._waiting


def test_modes_that_cannot_be_set_aside_leave_it_free(monkeypatch):
    lock = Turns()
    with monkeypatch.context() as patch:
        patch.setattr(turns, "own_torch_modes", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError), lock:
            pass
    with lock:
        assert lock._depth == 1


def test_nobody_waits_for_more_than_a_step_of_a_stream(chat_engine, monkeypatch):
    """Measured beside a stream of SmolLM2 before the lock was fair: 272 steps, at the worst of 50 suspends."""
    core, steps, waited, ended = chat_engine("none").core, 0, [], threading.Event()
    step, asked = core.scheduler.step, []

    class Queue(deque):
        def append(self, item):
            super().append(item)
            if threading.current_thread() is threading.main_thread():
                asked.append(steps)  # in its place, so that no step comes between asking and counting, whatever this thread is kept by

    core.lock._waiting = Queue()
    monkeypatch.setattr(turns, "_LOOK_S", 600.0)  # a thread that stands still for so long is passed over

    def counted():
        nonlocal steps
        steps += 1
        result = step()
        time.sleep(0.002)
        return result

    def stream():
        while not ended.is_set():
            with core.lock:
                params = SamplingParams(max_new_tokens=500, ignore_eos=True, draft_length=0)
                request = core.submit(core.open_sequence_state(), list(range(20)), params, owns_cache=True)
            for _ in core.events(request):
                if ended.is_set():
                    break

    monkeypatch.setattr(core.scheduler, "step", counted)
    thread = threading.Thread(target=stream)
    thread.start()
    try:
        while steps < 3:
            time.sleep(0.001)
        for _ in range(50):
            with core.lock:
                waited.append(steps - asked[-1])
            with core.lock:  # asked for again at once, as the next piece of a suspend is: the stream comes first
                pass
    finally:
        ended.set()
        thread.join(300)
    assert len(waited) == 50 and max(waited) <= 1  # the one that ran


def test_tokens_of_another_threads_step_come_before_the_next_step(chat_engine):
    core = chat_engine("none").core
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, draft_length=0)
    with core.lock:
        requests = [core.submit(core.open_sequence_state(), [1, 2, 3 + n], params, owns_cache=True) for n in range(2)]
    first, second = (core.events(request) for request in requests)
    for told in range(1, 7):
        assert len(next(first).token_ids) == len(next(second).token_ids) == 1
        assert all(request.num_new == told for request in requests)
    assert core.scheduler.idle
