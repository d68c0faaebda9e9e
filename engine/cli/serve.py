"""What `python -m engine.serve` does: its options, the engine they name, and the server around it."""

from __future__ import annotations

import argparse
import errno
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import uvicorn

from engine.cli.command import load, memory_line, print_versions, quiet_libraries
from engine.cli.options import DEFAULT_PAIR, Parser, check_models, check_store, model_options, report, store_options
from engine.cli.terminal import prepare_streams, print_status
from engine.engine import Engine
from engine.errors import BadStore, CacheNotWritable, DiskFull, ForetoldError, InvalidOption, ModelNotFound
from engine.server.app import Server, ServerConfig
from engine.server.bounded_http import BoundedHttpProtocol
from engine.server.keys import read_keys
from engine.server.loop import EngineThread
from engine.sessions.session import DEFAULT_QUALITY, SESSION_QUALITIES

_BACKLOG = 2048  # connections that wait to be taken, as uvicorn asks for
KEEP_ALIVE_S = 75
"""How long a connection without a request is kept. Longer than clients keep theirs (OpenAI's for 5 s, balancers for 60 s): the one who closes first
must be the one who asks, or a request that is sent just then is lost."""


def parser() -> argparse.ArgumentParser:
    """All options of the server."""
    p = Parser(prog="python -m engine.serve", description="Serve OpenAI's protocol: chat completions, completions, models, metrics.")
    model_options(p)
    store_options(p, "prefixes seen before are not computed again: their KV is kept here, coded; every API key has a namespace of its own")
    p.add_argument("--quality", choices=SESSION_QUALITIES, help=f"of what the store keeps; default {DEFAULT_QUALITY}")
    p.add_argument("--pack", type=Path, metavar="FILE", help="the store's codec pack; default: the pair's own, fitted at first use")
    p.add_argument("--version", action="store_true", help="print the versions that figures depend on, and leave")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; other than this machine's own needs --api-key-file")
    p.add_argument("--port", type=int, default=8000, help="port; 0: any free one, which is printed")
    p.add_argument("--api-key-file", type=Path, metavar="FILE", help="one key a line, or a name and a key; each is a namespace")
    p.add_argument("--served-model-name", metavar="NAME", help="the model's name for clients; default: the pair's or the target's")
    p.add_argument("--max-batch", type=int, default=64, metavar="N", help="requests running at once; default 64")
    p.add_argument(
        "--max-queue", type=int, default=256, metavar="N", help="requests waiting at once, more are answered with 429; default 256"
    )
    p.add_argument("--max-body-bytes", type=int, default=32 << 20, metavar="N", help="largest request; default 32 MiB")
    p.add_argument("--timeout", type=float, default=3600.0, metavar="S", help="longest life of a request, in seconds; default 3600")
    p.add_argument(
        "--grace", type=float, default=30.0, metavar="S", help="at SIGTERM, running requests may go on so many seconds; default 30"
    )
    p.add_argument("--deterministic", action="store_true", help="greedy text does not depend on who else is served")
    p.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help="tokens of one prompt that are computed between two tokens of the others; default: 256 on a CPU, 4,096 on a GPU",
    )
    p.add_argument("--pool-tokens", type=int, metavar="N", help="tokens the KV pool holds; default: what memory allows")
    p.add_argument(
        "--prefix-sharing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prompts that begin as one before share its pages while nobody needs them (default: yes)",
    )
    p.add_argument(
        "--kv-events", metavar="ENDPOINT", help="publish which pages are held, for routers: tcp://127.0.0.1:5557, say (docs/server.md)"
    )
    return p


def checked(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check options before anything is loaded. Raises InvalidOption."""
    args = parser().parse_args(argv)
    if args.version:
        return args
    check_models(args)
    bounds = {"port": (0, 65535), "max_batch": (1, 4096), "max_queue": (1, 1 << 20)}
    bounds |= {"max_body_bytes": (1024, 1 << 31), "prefill_chunk": (1, 1 << 20), "pool_tokens": (1, 1 << 40)}
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise InvalidOption(f"--{name.replace('_', '-')} cannot be {value}", f"give a whole number from {low} to {high}")
    for name in ("timeout", "grace"):
        if not 0 < getattr(args, name) <= 1e7:
            raise InvalidOption(f"--{name} cannot be {getattr(args, name)}", "give seconds above 0")
    if args.api_key_file is None and not is_local(args.host):
        raise InvalidOption(
            f"without API keys the server listens on this machine alone, not on {args.host}",
            "give --api-key-file FILE, or --host 127.0.0.1",
        )
    for name in ("quality", "pack"):
        if args.store is None and getattr(args, name) is not None:
            raise InvalidOption(f"--{name} only matters to a store", "add --store DIR")
    try:
        check_store(args)
    except (BadStore, CacheNotWritable, DiskFull) as error:  # a server serves without it
        print_status(f"warning: {error}; serving without a store")
        args.store = None
    return args


def is_local(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def run(argv: list[str] | None = None) -> int:
    """Exit status: 0 after a stop by a signal, 2 for a named error."""
    prepare_streams()
    try:
        args = checked(argv)
        if args.version:
            print_versions()
            return 0
        keys = read_keys(args.api_key_file)
        listening = listen(args.host, args.port)
        try:
            thread = EngineThread()
            engine = thread.call(lambda: _engine(args))
            config = ServerConfig(
                model=args.served_model_name or args.pair or args.target or DEFAULT_PAIR,
                keys=keys,
                max_queue=args.max_queue,
                max_body_bytes=args.max_body_bytes,
                timeout_s=args.timeout,
                grace_s=args.grace,
                local_only=not keys.digests,
                kv_events=args.kv_events,
            )
            serve(Server(engine, config, thread), listening)
        finally:
            listening.close()
    except ForetoldError as error:
        return report(error)
    return 0


def _engine(args: argparse.Namespace) -> Engine:
    quiet_libraries()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    options = {
        "kv_cache_dtype": args.kv_cache_dtype,
        "deterministic": args.deterministic,
        "max_batch": args.max_batch,
        "prefill_chunk": args.prefill_chunk,
        "pool_tokens": args.pool_tokens,
        "prefix_sharing": args.prefix_sharing,
    }
    engine = load(args, **options)
    if engine.tokenizer is None:
        raise ModelNotFound("the target has no tokenizer", "a server needs one: use a folder that holds it")
    print_status(memory_line(engine))
    engine.core.measure_costs()  # not at the first request's expense
    captured = engine.core.capture_steps()
    if captured is not None:
        print_status(f"[{captured.steps} steps captured in {captured.seconds:.1f} s]")
    return engine


def listen(host: str, port: int) -> socket.socket:
    """A socket that nobody else gets, taken before minutes of loading; `serve` listens on it. Raises InvalidOption."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        try:
            try:
                listening.bind(
                    address
                )  # by itself: two sockets that both allow the address to be used again would both get it, until one listens
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                # connections of a server that has ended may linger, and are no reason to wait
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listening.bind(address)
        except OSError:
            listening.close()
            raise
    except (OSError, UnicodeError) as error:
        raise InvalidOption(f"the server cannot listen on {host}, port {port}: {error}", "choose another --host or --port") from error
    return listening


def serve(server: Server, listening: socket.socket) -> None:
    """Answer requests until SIGINT or SIGTERM; then no new ones, and those running end (`ServerConfig.grace_s`). Raises InvalidOption."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    host, port = listening.getsockname()[:2]
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # for the connections, so that the next server gets the port at once
    try:
        listening.listen(_BACKLOG)  # uvloop says nothing of a socket that cannot
    except OSError as error:
        raise InvalidOption(f"the server cannot listen on {host}, port {port}: {error}", "choose another --port") from error
    shown = f"[{host}]" if ":" in host else host
    alone = "; without API keys it answers this machine alone" if server.config.local_only else ""
    grace = server.config.grace_s
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(grace) + 1,
        timeout_keep_alive=KEEP_ALIVE_S,
        http=BoundedHttpProtocol,
        limit_concurrency=None,
    )
    web = _Announced(config, f"serving {server.config.model} at http://{shown}:{port}{alone}")
    with _ended_by_signals(web):
        web.run(sockets=[listening])


@contextmanager
def _ended_by_signals(web: uvicorn.Server) -> Iterator[None]:
    """SIGINT and SIGTERM end the server and nothing else: uvicorn raises those it was stopped by again, which would end the process by the signal."""

    def stop(*_: object) -> None:
        web.should_exit = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Announced(uvicorn.Server):
    """Says a line once connections are taken: whoever reads it may connect at once."""

    def __init__(self, config: uvicorn.Config, line: str) -> None:
        super().__init__(config)
        self._line = line

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print_status(self._line)
