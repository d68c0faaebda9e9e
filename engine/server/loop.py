"""One thread drives the engine: requests come in through a queue, their tokens go out through a callback, step by step."""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import torch

from engine.engine import Engine
from engine.errors import ForetoldError
from engine.runtime.request import Request, StreamEvent
from engine.runtime.sampling import SamplingParams
from engine.server.errors import ApiError, as_api_error
from engine.server.metrics import ServerMetrics

log = logging.getLogger("foretold.server")
State = Literal["queued", "running", "done"]
T = TypeVar("T")
GATHER_S, GATHER_STEP_S = 0.01, 0.001
"""How long an idle engine that got a request waits at most for others that are being made ready, and between two looks."""
SWITCH_INTERVAL_S = 2e-4
"""After so long a thread that waits for Python's interpreter gets it. The engine's thread lets go of it only for moments too short for another one
to wake up in, so each time the server's thread wants it (some times a token) it waits as long as this; Python's own 5 ms show in the first token."""
SIGNALS_SEEN_S = 0.1
"""How long a thread that waits for a call leaves a signal's handler waiting at most."""

Event = StreamEvent | ApiError
"""What a step gave one request; one with a result, or an error, is its last."""


def is_last(event: Event) -> bool:
    """Whether no event follows."""
    return isinstance(event, ApiError) or event.result is not None


@dataclass(eq=False)
class Ticket:
    """One request between the server and the engine's thread.

    token_ids: of the prompt; row: the same, as `EngineCore.check_tokens` returned it. namespace: whose stored prefixes it may use. deadline:
    `time.monotonic()` after which it is ended. sink: gets each event, on whatever thread `EngineLoop.deliver` chooses.
    """

    token_ids: list[int]
    params: SamplingParams
    namespace: str
    sink: Callable[[Event], None]
    deadline: float | None = None
    state: State = "queued"
    submitted_at: float = field(default_factory=time.perf_counter)
    request: Request | None = None
    row: np.ndarray | None = None


class EngineThread(threading.Thread):
    """A thread that runs calls in turn; its owner loads an engine by it, and an `EngineLoop` then runs the engine.

    The same thread should do both. OpenMP keeps a team of threads for every thread that has computed, and once there are more of them than cores,
    threads no longer stay awake between two products of a step: GNU's implementation then sleeps and is woken some thousands of times a second.
    """

    def __init__(self) -> None:
        super().__init__(name="foretold-engine", daemon=True)
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._num_threads = torch.get_num_threads()

    def run(self) -> None:
        """Of the thread itself."""
        # a new thread's first product would run with another number of threads, and round otherwise
        torch.set_num_threads(self._num_threads)
        while (call := self._calls.get()) is not None:
            call()

    def call(self, function: Callable[[], T]) -> T:
        """What a function returns or raises that the thread runs; waits for it."""
        self._begin()
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(run)
        while True:
            # A signal that reaches another thread, or this one just before it waits, does not end a wait: its handler would run when the call is over.
            if wait([future], SIGNALS_SEEN_S).done:
                return future.result()

    def finish_with(self, function: Callable[[], None]) -> None:
        """Run a function, and end with it; does not wait."""
        self._begin()
        self._calls.put(function)
        self._calls.put(None)

    def _begin(self) -> None:
        if not self.is_alive():
            self.start()


class EngineLoop:
    """Runs an engine on a thread of its own. Every method may be called from any thread.

    A request is queued, admitted by the engine's scheduler, and ended by itself, by `cancel`, by its deadline or by a failure of the engine;
    each of these is followed by one last event, but for `cancel`. What the engine's own thread raises ends the requests it was serving, and
    the loop goes on.

    Args:
        engine: nobody else may use it while the loop runs.
        metrics: told of every request.
        deliver: called on the engine's thread with all (ticket, event) of a step; it must not block.
        max_queue: requests waiting at once for a place in the running batch; more are refused.
        thread: that runs the engine; it ends with the loop. The one that loaded it, where it runs on a CPU.
        after_step: called on that thread after every step, and before it waits for requests; it must not block.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: ServerMetrics,
        deliver: Callable[[list[tuple[Ticket, Event]]], None],
        *,
        max_queue: int = 256,
        thread: EngineThread | None = None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self.core, self.metrics, self.max_queue = engine, engine.core, metrics, max_queue
        self._deliver, self._after_step = deliver, after_step
        self._inbox: queue.SimpleQueue[tuple[str, Ticket | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[Ticket] = set()  # every ticket without its last event
        self._active: dict[Request, Ticket] = {}  # of the engine's thread: submitted to the scheduler
        self._draining = threading.Event()
        self._num_arriving = 0
        self._thread = EngineThread() if thread is None else thread

    # --- for the server -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin serving."""
        sys.setswitchinterval(min(SWITCH_INTERVAL_S, sys.getswitchinterval()))
        self._thread.finish_with(self._run)

    @contextmanager
    def arrival(self) -> Iterator[None]:
        """While a request that is here already is made ready to be submitted: an idle engine waits a moment for it, to begin with a whole batch."""
        with self._lock:
            self._num_arriving += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_arriving -= 1

    @property
    def accepting(self) -> bool:
        """Whether requests are taken: the loop runs and is not about to stop."""
        return self._thread.is_alive() and not self._draining.is_set()

    @property
    def num_open(self) -> int:
        """Requests queued or running."""
        return len(self._open)

    @property
    def num_running(self) -> int:
        """Requests in the running batch."""
        return len(self.core.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests queued for it."""
        return max(0, self.num_open - self.num_running)

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue the requests of one call, all or none.

        Raises:
            ApiError: 429 when the queue is full, 503 when the server is stopping.
        """
        if not self.accepting:
            raise ApiError(503, "the server is stopping", code="stopping", retry_after_s=5)
        with self._lock:
            waiting = self.num_waiting
            if waiting and waiting + len(tickets) > self.max_queue:
                self.metrics.refused()
                raise ApiError(429, f"{waiting} requests are waiting already", code="queue_full", retry_after_s=1 + waiting // 32)
            self._open.update(tickets)
        for ticket in tickets:
            self._inbox.put(("submit", ticket))

    def cancel(self, ticket: Ticket) -> None:
        """End a request whose client is gone, within a step. It gets no further event; nothing happens to one that has ended."""
        self._inbox.put(("cancel", ticket))

    def stop(self, grace_s: float) -> None:
        """Take no more requests, let those there are finish for at most grace_s, end the rest with an error, and end the thread."""
        self._draining.set()
        deadline = time.monotonic() + grace_s
        while self._open and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(0.02)
        self._inbox.put(("stop", None))
        self._thread.join()

    # --- the engine's thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._after_step()
            if not self._take_inbox(block=not self._active):
                self._end_all(ApiError(503, "the server is stopping", code="stopping", retry_after_s=5))
                return
            if self._active:
                self._step()

    def _take_inbox(self, *, block: bool) -> bool:
        """Handle what came in; False when the loop is to end. block: wait for something, and a moment for what arrives with it (`arrival`)."""
        gather_until = 0.0
        while True:
            try:
                if block:
                    what, ticket = self._inbox.get()
                    gather_until = time.monotonic() + GATHER_S
                elif self._num_arriving and (left := gather_until - time.monotonic()) > 0:
                    what, ticket = self._inbox.get(timeout=min(left, GATHER_STEP_S))
                else:
                    what, ticket = self._inbox.get(block=False)
            except queue.Empty:
                if self._num_arriving and time.monotonic() < gather_until:
                    continue
                return True
            block = False
            if ticket is None:
                return False
            if what == "submit":
                self._begin(ticket)
            elif ticket.state != "done":
                self.metrics.cancelled()  # before it is forgotten: whoever sees no open request sees all of them counted
                self._drop(ticket)

    def _begin(self, ticket: Ticket) -> None:
        if ticket.state == "done":  # cancelled before it was looked at
            return
        try:
            with self.core.lock:  # a store's worker codes between steps
                request = self.core.submit(
                    self.core.open_sequence_state(), ticket.token_ids, ticket.params, owns_cache=True, row=ticket.row
                )
        except ForetoldError as error:
            self._end([(ticket, as_api_error(error))])
            return
        except Exception:
            log.exception("a request could not be queued")
            self._end([(ticket, _internal())])
            return
        request.submitted_at, request.namespace = ticket.submitted_at, ticket.namespace
        ticket.request, ticket.state = request, "running"
        self._active[request] = ticket

    def _step(self) -> None:
        try:
            self.core.step()
        except Exception:
            log.exception("a step of the engine failed; the requests it served are ended")
            self._end_all(_internal())
            return
        now = time.monotonic()
        events: list[tuple[Ticket, Event]] = []
        for request, ticket in self._active.items():
            if request.error is not None:
                events.append((ticket, as_api_error(request.error)))
                continue
            news = request.news(self.core.memory)
            if news is not None:
                events.append((ticket, news))
                self.metrics.tokens(len(news.token_ids))
            if ticket.deadline is not None and now > ticket.deadline and request.finish_reason is None:
                self.core.abandon(request)
                events.append((ticket, ApiError(504, "the request took longer than it may", code="timeout")))
        self._end(events)

    def _end(self, events: list[tuple[Ticket, Event]]) -> None:
        """Hand events on, and forget the requests whose last one is among them."""
        for ticket, event in events:
            if is_last(event):
                self.metrics.finished(ticket.submitted_at, None if isinstance(event, ApiError) else event.result)
                self._forget(ticket)
        if events:
            self._deliver(events)

    def _drop(self, ticket: Ticket) -> None:
        if ticket.request is not None:
            self.core.abandon(ticket.request)
        self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        ticket.state = "done"
        if ticket.request is not None:
            self._active.pop(ticket.request, None)
        with self._lock:
            self._open.discard(ticket)

    def _end_all(self, error: ApiError) -> None:
        with self._lock:
            tickets = list(self._open)
        for ticket in tickets:
            if ticket.request is not None:
                self.core.abandon(ticket.request)
        self._end([(ticket, error) for ticket in tickets])


def _internal() -> ApiError:
    return ApiError(500, "the engine failed while it served this request", code="internal_error")
