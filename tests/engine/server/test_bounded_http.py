"""What comes before a request is one: heads that are too large or too slow, trailers, and ports that others have."""

from __future__ import annotations

import errno
import json
import socket
import time

import httpx
import pytest
from openai._constants import DEFAULT_CONNECTION_LIMITS

from engine.cli.serve import listen, serve
from engine.errors import InvalidOption
from engine.server import bounded_http
from engine.server.bounded_http import MAX_HEAD_BYTES

BODY = json.dumps({"prompt": "The sea"}).encode()
BEGUN = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n"


def connect(running) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=120)


def flood(connection: socket.socket, piece: bytes, count: int) -> int:
    """Bytes that were taken of so many pieces, before the connection was closed."""
    sent = 0
    try:
        for _ in range(count):
            connection.sendall(piece)
            sent += len(piece)
    except OSError as error:
        assert error.errno in (errno.EPIPE, errno.ECONNRESET)
    return sent


def answer(connection: socket.socket) -> bytes:
    found = b""
    try:
        while piece := connection.recv(1 << 16):
            found += piece
    except ConnectionResetError:  # what was sent behind the refusal was not read
        pass
    return found


@pytest.mark.parametrize(
    "begun, piece",
    [
        (BEGUN, b"X-Header: " + b"y" * 1000 + b"\r\n"),  # many headers
        (BEGUN + b"X-Header: ", b"y" * 1000),  # one, joined from its pieces
        (BEGUN, b"x" * 1000),  # a name
        (b"GET /", b"x" * 1000),
        (b"", b"A" * 1000),
        (b"", b"\r\n" * 500),
        (BEGUN + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n", b"X-Trailer: " + b"y" * 1000 + b"\r\n"),
        (BEGUN + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX-Trailer: ", b"y" * 1000),
        (BEGUN + b"Transfer-Encoding: chunked\r\n\r\n1;x=", b"y" * 1000),
    ],
)
def test_no_head_or_trailer_grows_without_bound(running, begun, piece):
    with connect(running) as connection:
        connection.sendall(begun)
        sent, most = flood(connection, piece, 20_000), 16 << 20  # what the system's buffers take, and no more
        assert sent < most
    assert running.post("/tokenize", {"prompt": "The sea"}).status_code == 200


def test_a_head_that_is_too_large_is_answered(running):
    with connect(running) as connection:
        connection.sendall(BEGUN + b"X-Header: " + b"y" * (MAX_HEAD_BYTES + 1))
        assert answer(connection).startswith(b"HTTP/1.1 431 ")


def test_heads_and_bodies_within_the_bounds_are_served(running):
    """Large headers again and again on one connection, pipelined requests, and a body of many small chunks."""
    with connect(running) as connection:
        head = BEGUN + b"X-Header: " + b"y" * (MAX_HEAD_BYTES // 2) + b"\r\nContent-Length: " + str(len(BODY)).encode() + b"\r\n"
        connection.sendall((head + b"\r\n" + BODY) * 3)
        chunks = b"".join(b"1\r\n" + bytes([letter]) + b"\r\n" for letter in BODY + b" " * MAX_HEAD_BYTES)
        connection.sendall(BEGUN + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
        assert answer(connection).count(b"HTTP/1.1 200 OK") == 4
    with connect(running) as connection:  # the head's end and much of a body in one piece
        body = BODY + b" " * (4 * MAX_HEAD_BYTES)
        connection.sendall(BEGUN + b"Connection: close\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body)
        assert answer(connection).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("sent", [b"", b"P", BEGUN])
def test_a_head_that_does_not_end_is_given_up(running, monkeypatch, sent):
    monkeypatch.setattr(bounded_http, "MAX_HEAD_S", 0.2)
    with connect(running) as connection:
        connection.sendall(sent)
        assert answer(connection).startswith(b"HTTP/1.1 408 ")


def test_an_answer_may_take_longer_than_a_head(running, monkeypatch):
    body = {"prompt": "The sea", "max_tokens": 300, "temperature": 0, "ignore_eos": True}
    with httpx.Client(base_url=running.url, timeout=120, limits=httpx.Limits(keepalive_expiry=None)) as client:
        client.post("/tokenize", json={"prompt": "The sea"})  # connects: a connection's first head has the time, too
        monkeypatch.setattr(bounded_http, "MAX_HEAD_S", 0.05)
        began = time.monotonic()
        with running.unfinished(100, until=lambda: time.monotonic() - began > 0.2):
            assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 300
    assert time.monotonic() - began > 0.2


def test_a_connection_is_kept_longer_than_clients_keep_it(chat_engine, monkeypatch):
    """uvicorn closes one after 5 s, and OpenAI's client gives it up after 5 s: a request between the two would be lost."""
    from engine.server.app import Server, ServerConfig
    from engine.server.keys import Keys

    seen = []
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: seen.append(self.config.timeout_keep_alive))
    with listen("127.0.0.1", 0) as listening:
        serve(Server(chat_engine(), ServerConfig("tiny", Keys({}))), listening)
    assert seen == [75] and 75 > 60 > DEFAULT_CONNECTION_LIMITS.keepalive_expiry


def test_no_second_server_gets_a_port_that_is_taken():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(InvalidOption, match="cannot listen"):  # which does not listen yet
            listen("127.0.0.1", port)


def test_a_port_whose_last_connections_linger_is_free():
    with listen("127.0.0.1", 0) as first:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as `serve` does
        first.listen()
        port = first.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            taken, _ = first.accept()
            taken.close()  # the first to close waits
            assert client.recv(1) == b""
    listen("127.0.0.1", port).close()


def test_a_socket_that_cannot_listen_is_named(chat_engine):
    """Of two sockets that got a port while connections to it lingered, one cannot."""
    from engine.server.app import Server, ServerConfig
    from engine.server.keys import Keys

    both = [socket.socket() for _ in range(2)]
    for one in both:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", both[0].getsockname()[1]))
    both[0].listen()
    with pytest.raises(InvalidOption, match="cannot listen"):
        serve(Server(chat_engine(), ServerConfig("tiny", Keys({}))), both[1])
    for one in both:
        one.close()
