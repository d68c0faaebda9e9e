"""A server over the tiny pair, in this process: uvicorn on a thread, a real port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """POST a JSON body."""
        return self.client.post(path, json=body, **options)

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Until no request is left; fails when one is."""
        deadline = time.monotonic() + seconds
        while self.server.loop.num_open or not self.server.engine.core.scheduler.idle:
            assert time.monotonic() < deadline, "a request was left behind"
            time.sleep(0.01)


@contextmanager
def running_server(engine: Any, thread: EngineThread | None = None, **options: Any) -> Iterator[Running]:
    """Serve until the block ends. thread: that loaded the engine."""
    config = ServerConfig(**({"model": "tiny", "keys": Keys({}), "local_only": True} | options))
    server = Server(engine, config, thread)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    web = uvicorn.Server(
        uvicorn.Config(server.app, log_level="error", access_log=False, http=BoundedHttpProtocol, timeout_graceful_shutdown=2)
    )
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not web.started:
        assert thread.is_alive()
        time.sleep(0.005)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Running(server, url, client)
    finally:
        web.should_exit = True
        thread.join(30)
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
