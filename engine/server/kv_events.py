"""Which pages of KV this server holds, told to whoever subscribes: routers send a request where its beginning is.

ZeroMQ PUB socket, in the form that vLLM's subscribers read. A message has three parts: the topic, a number counted up from 0 (8 bytes, big-endian;
a gap tells a subscriber that it missed something), and msgpack of `[unix seconds, events]`. Events:

- `["BlockStored", hashes, parent_hash, token_ids, block_size, None, medium]`: pages of block_size tokens in a row; parent_hash: of the page before
  them, or None.
- `["BlockRemoved", hashes, medium]`.

A hash is 8 bytes of the SHA-256 of the hash before it and the page's token ids, as a whole number; a namespace's first one begins with its name.
Token ids are what callers wrote: subscribers must be trusted with all of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from engine.errors import InvalidOption
from engine.kv.shared_prefixes import CachedPage

TOPIC = b"kv-events"
HIGH_WATER_MESSAGES = 10_000  # for a slow subscriber; it misses what comes beyond


def page_hashes(namespace: str, token_ids: Sequence[int] | np.ndarray, page_size: int, *, after: int | None = None) -> list[int]:
    """Hashes of all whole pages of a text, or of those that come after a page with the hash `after`."""
    before = sha256(namespace.encode("utf-8", "surrogatepass")).digest()[:8] if after is None else after.to_bytes(8, "big")
    found, ids, size = [], np.asarray(token_ids, dtype=np.uint32).tobytes(), 4 * page_size
    for start in range(0, len(ids) - size + 1, size):
        before = sha256(before + ids[start : start + size]).digest()[:8]
        found.append(int.from_bytes(before, "big"))
    return found


class KvEvents:
    """Publishes what becomes of the pages of one `SharedPrefixes`, whose `listener` it is.

    The engine's thread calls every method but `close`. Pages of the same text in several of the cache's namespaces count as one.

    Args:
        endpoint: to bind, such as tcp://127.0.0.1:5557.
        page_size: tokens a page.
        medium: where pages lie, "GPU" or "CPU".

    Raises:
        InvalidOption: the endpoint cannot be bound, or pyzmq or msgpack is not installed.
    """

    def __init__(self, endpoint: str, page_size: int, medium: str) -> None:
        try:
            import msgpack
            import zmq
        except ImportError as missing:
            raise InvalidOption(
                f"KV events need the package {missing.name}", "install the extra: pip install 'foretold[events]'"
            ) from missing
        self._pack = msgpack.packb
        self._page_size, self._medium = page_size, medium
        self._held: Counter[int] = Counter()
        self._batch: list[list[Any]] = []
        self._sequence = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.set_hwm(HIGH_WATER_MESSAGES)
        self._socket.linger = 1000
        try:
            self._socket.bind(endpoint)
        except (zmq.ZMQError, ValueError) as error:
            self._socket.close()
            self._context.term()
            raise InvalidOption(f"KV events cannot be published at {endpoint}: {error}", "give tcp://127.0.0.1:5557, say") from error
        self.endpoint = bytes(self._socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()  # type: ignore[arg-type]

    def stored(self, namespace: str, token_ids: np.ndarray, pages: Sequence[CachedPage], first: int) -> None:
        """Pages are kept now: those of a text from number `first` on, behind others that were."""
        before, size = pages[first - 1].key if first else None, self._page_size
        if before is None and first:  # kept before anybody listened
            before = page_hashes(namespace, token_ids[: first * size], size)[-1]
        hashes = page_hashes(namespace, token_ids[first * size : len(pages) * size], size, after=before)
        run: list[int] = []
        for number, key in enumerate(hashes):
            pages[first + number].key = key
            self._held[key] += 1
            if self._held[key] > 1:
                continue
            if run and number != run[-1] + 1:
                self._store(hashes, before, token_ids[first * size :], run)
                run = []
            run.append(number)
        if run:
            self._store(hashes, before, token_ids[first * size :], run)

    def _store(self, hashes: list[int], before: int | None, token_ids: np.ndarray, pages: list[int]) -> None:
        """pages: numbers in a row, of those with these hashes and tokens. before: hash of the page before all of them."""
        start, end = pages[0], pages[-1] + 1
        parent = hashes[start - 1] if start else before
        ids = token_ids[start * self._page_size : end * self._page_size].tolist()
        self._batch.append(["BlockStored", hashes[start:end], parent, ids, self._page_size, None, self._medium])

    def dropped(self, entry: CachedPage) -> None:
        """A page is kept no longer, if it ever was."""
        if entry.key is None:
            return
        self._held[entry.key] -= 1
        if not self._held[entry.key]:
            del self._held[entry.key]
            if self._batch and self._batch[-1][0] == "BlockRemoved":
                self._batch[-1][1].append(entry.key)
            else:
                self._batch.append(["BlockRemoved", [entry.key], self._medium])

    def flush(self) -> None:
        """Send what happened since the last call, if anything did; never waits."""
        if self._batch:
            batch, self._batch = self._batch, []
            self._socket.send_multipart([TOPIC, self._sequence.to_bytes(8, "big"), self._pack([time.time(), batch])])
            self._sequence += 1

    def close(self) -> None:
        """Send what is left and free the port; once the engine's thread has ended."""
        self.flush()
        self._socket.close()
        self._context.term()
