"""Request traces as sequences of block ids: single requests with `hash_ids`, or sessions with runs of blocks."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.errors import InvalidOption
from engine.inputs import open_regular

_MAX_LINE_BYTES = 64 << 20


class Request(NamedTuple):
    """One prompt."""

    arrival_s: float
    namespace: str  # block ids mean nothing outside it
    num_tokens: int
    blocks: np.ndarray  # int32 [blocks]
    num_system_blocks: int  # blocks at the start that hold tool descriptions and the system prompt
    session: int
    log2_p: np.ndarray | None = None  # float32 [blocks], of each block given those before it


@dataclass
class Trace:
    """Requests in the order they arrive; sessions are kept as runs of blocks until they are needed, a prompt has thousands."""

    block_tokens: int
    num_sessions: int
    order: list[tuple[float, int, int]]  # arrival_s, session, index inside it
    sessions: list[dict[str, Any]]

    def __iter__(self) -> Iterator[Request]:
        for arrival_s, session, index in self.order:
            about = self.sessions[session]
            num_tokens, runs = about["requests"][index]
            if about["single"]:
                bits = about["log2_p"]
                log2_p = None if bits is None else np.asarray(bits, np.float32)
                yield Request(arrival_s, "", num_tokens, np.asarray(runs, dtype=np.int32), 0, session, log2_p)
                continue
            blocks = np.concatenate(
                [np.arange(first, first + count, dtype=np.int32) for first, count in zip(runs[::2], runs[1::2], strict=True)]
            )
            yield Request(arrival_s, str(session), num_tokens, blocks, about["num_system_blocks"], session)


def read_trace(path: str, limit: int | None = None, hours: float = 8.0, seed: int = 0) -> Trace:
    """Read a trace; its kind is seen in the first line.

    Args:
        limit: only the first so many sessions, or single requests.
        hours: sessions, which all start at 0 in the file, arrive uniformly in this time, drawn with `seed`.

    Raises:
        InvalidOption: the file cannot be read, is damaged, or holds something else.
    """
    try:
        with open_regular(Path(path), InvalidOption, "name a file") as raw, gzip.open(raw) if path.endswith(".gz") else raw as file:
            lines = [json.loads(line) for line, _ in zip(_lines(file), range(limit or 10**9), strict=False) if line.strip()]
        if not lines:
            raise ValueError("it is empty")
        if "hash_ids" in lines[0]:
            return _single_requests(lines)
        return _sessions(lines, hours, seed)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, IndexError) as error:
        remedy = "give a JSON-lines file with hash_ids a request, or with requests and runs a session"
        raise InvalidOption(f"the trace {Path(path).name} cannot be used: {type(error).__name__}: {error}", remedy) from error


def _lines(file: Any) -> Iterator[bytes]:
    """Lines of an open file. Raises ValueError for one of more than _MAX_LINE_BYTES."""
    while line := file.readline(_MAX_LINE_BYTES + 1):
        if len(line) > _MAX_LINE_BYTES:
            raise ValueError(f"a line has more than {_MAX_LINE_BYTES:,} bytes")
        yield line


def _single_requests(lines: list[dict[str, Any]]) -> Trace:
    block_tokens = lines[0].get("block_tokens", 512)
    order, sessions = [], []
    for i, line in enumerate(lines):
        bits = line.get("log2_p")
        if line.get("block_tokens", 512) != block_tokens or (bits is not None and len(bits) != len(line["hash_ids"])):
            raise ValueError(f"request {i} has blocks of another size than the first, or not a probability a block")
        if not (line["input_length"] - block_tokens < len(line["hash_ids"]) * block_tokens):
            raise ValueError(f"request {i} has {line['input_length']} tokens in {len(line['hash_ids'])} blocks of {block_tokens}")
        sessions.append({"single": True, "requests": [(line["input_length"], line["hash_ids"])], "log2_p": bits})
        order.append((line["timestamp"] / 1000.0, i, 0))
    order.sort(key=lambda entry: entry[0])
    return Trace(block_tokens, len(lines), order, sessions)


def _sessions(lines: list[dict[str, Any]], hours: float, seed: int) -> Trace:
    starts = np.random.default_rng(seed).uniform(0, hours * 3600, len(lines))
    block_tokens = lines[0]["block_tokens"]
    order, sessions = [], []
    for i, (line, start_s) in enumerate(zip(lines, starts, strict=True)):
        if line["block_tokens"] != block_tokens:
            raise ValueError(f"session {line['session']} has blocks of {line['block_tokens']} tokens, the first {block_tokens}")
        requests = [(request[1], request[5]) for request in line["requests"]]
        order += [(float(start_s) + request[0], i, j) for j, request in enumerate(line["requests"])]
        num_system = (line["tool_tokens"] + line["system_tokens"]) // block_tokens
        sessions.append({"single": False, "requests": requests, "num_system_blocks": num_system})
    order.sort()
    return Trace(block_tokens, len(lines), order, sessions)
