"""A server over the tiny pair, in this process: uvicorn on a thread, a real port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import uvicorn

from engine.server.app import Server, ServerConfig
from engine.server.bounded_http import BoundedHttpProtocol
from engine.server.keys import Keys
from engine.server.loop import EngineThread


@dataclass
class Running:
    """A server that answers at `url`."""

    server: Server
    url: str
    client: httpx.Client
    web: uvicorn.Server
    lost: set[int] = field(default_factory=set)  # ports of clients whose connections have ended here

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """POST a JSON body."""
        return self.client.post(path, json=body, **options)

    def wait_idle(self, gone: int | None = None, seconds: float = 120.0) -> None:
        """Until no request is left; fails when one is. gone: the port of a client that has left, whose request may not even have been read yet."""
        deadline = time.monotonic() + seconds

        def busy() -> bool:
            waits = gone is not None and gone not in self.lost
            return waits or bool(self.web.server_state.tasks or self.server.loop.num_open) or not self.server.engine.core.scheduler.idle

        while busy():
            assert time.monotonic() < deadline, "a request was left behind"
            time.sleep(0.01)

    @contextmanager
    def unfinished(self, tokens: int, until: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """No answer gets beyond so many tokens before a condition holds, or the block ends: what is done to it comes before its end, however long this
        thread is kept from running."""
        core, step = self.server.engine.core, self.server.engine.core.step

        def held() -> None:
            if any(request.num_new >= tokens for request in core.scheduler.running) and not until():
                time.sleep(0.002)
            else:
                step()

        core.step = held
        try:
            yield
        finally:
            core.step = step


@contextmanager
def running_server(engine: Any, thread: EngineThread | None = None, **options: Any) -> Iterator[Running]:
    """Serve until the block ends. thread: that loaded the engine."""
    config = ServerConfig(**({"model": "tiny", "keys": Keys({}), "local_only": True} | options))
    server = Server(engine, config, thread)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    lost = set[int]()

    class Watched(BoundedHttpProtocol):
        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            lost.add(self.client[1])

    # who keeps a connection gives it up first, however long this process stands still
    patience = {"timeout_graceful_shutdown": 2, "timeout_keep_alive": 3600}
    web = uvicorn.Server(uvicorn.Config(server.app, log_level="error", access_log=False, http=Watched, **patience))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not web.started:
        assert thread.is_alive()
        time.sleep(0.005)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Running(server, url, client, web, lost)
    finally:
        web.should_exit = True
        thread.join(120)
        listening.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serve() -> Callable[..., Any]:
    """`serve(engine, **ServerConfig options)`: a context with a `Running` server."""
    return running_server


@pytest.fixture(scope="package")
def running(chat_engine: Callable[..., Any]) -> Iterator[Running]:
    """One server for the tests that leave it as it was."""
    with running_server(chat_engine(max_batch=16)) as found:
        yield found
