"""A session's token ids coded with what a model expects next, for the quality that stores nothing but ids.

The model is the draft where it is a model of its own, else the target (a trunk's own guesses are poor). It runs in float32 whatever the engine's
dtype: passes of other shapes then differ by about 1e-4 in log-odds, where bfloat16 differs by up to 1 and no coder could bridge that cheaply.
An engine of another dtype loads the model a second time for as long as it takes.

Reading takes one step of the model per token of a lane, about LANE_TOKENS unless that makes more than MAX_LANES lanes: tens of seconds on a CPU
core, where the counted coder (`codec.token_ids`) takes milliseconds. Writing takes two passes over the text: one to code, one of another shape and
with fewer threads, from which the bytes are read back before they are trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from codec.errors import CorruptedCode
from codec.token_ids import MODELLED, checksum, encode_ids, read_frame, write_frame
from codec.token_paths import MAX_LANES, Distribution, Paths, decode_paths, encode_paths, lane_length, reads_back, width_of
from engine.errors import ForetoldError, InvalidOption
from engine.kv.pool import KvSequence
from engine.model.decoder import Decoder

if TYPE_CHECKING:
    from engine.engine import Engine

LANE_TOKENS = 1024
PASS_TOKENS = 64  # of a lane, in the pass that codes; bounds the rows of float64 probabilities at a time
CHECK_TOKENS = 12  # of every lane at once, in the pass the bytes are read back from
CHECK_STEPS = 4  # which begins with as many steps as a resume takes: one token of every lane
SMALLEST_MARGIN, LARGEST_MARGIN = 2.0**-11, 0.25
SAFETY = 8  # the margin is at least so many times the drift seen between the two passes
_PAGE = 64


def coding_model(engine: Engine) -> Decoder | None:
    """The float32 model that codes an engine's ids; None when there is none in float32 and no folder to load one from."""
    model, folder = (engine.target, engine.target_dir) if engine.draft_decoder is None else (engine.draft_decoder, engine.draft_dir)
    if model.dtype == torch.float32:
        return model
    return None if folder is None else Decoder.from_pretrained(folder, dtype=torch.float32, device=engine.device)


def encode_tokens(engine: Engine, token_ids: Sequence[int]) -> bytes:
    """A frame (`codec.token_ids`) of the ids, coded with the engine's model; without one where that is shorter, the model cannot be had or lacks the
    memory, or reading back fails."""
    counted = encode_ids(token_ids)
    try:
        model = coding_model(engine) if len(token_ids) > 1 else None
        if model is None or max(token_ids) >= model.config.vocab_size:
            return counted
        lanes = min(max(1, round(len(token_ids) / LANE_TOKENS)), MAX_LANES)
        return encode_with(model, token_ids, lanes, counted)
    except (ForetoldError, MemoryError, torch.OutOfMemoryError):
        return counted


def encode_with(model: Decoder, token_ids: Sequence[int], lanes: int, counted: bytes) -> bytes:
    """As `encode_tokens`; counted: the frame to fall back to."""
    vocab_size = model.config.vocab_size
    paths = record_paths(model, token_ids, lanes, lanes_at_once=1, chunks=(PASS_TOKENS,))
    with _fewer_threads():
        check = record_paths(model, token_ids, lanes, lanes_at_once=MAX_LANES, chunks=(*(1,) * CHECK_STEPS, CHECK_TOKENS))
    margin = max(SMALLEST_MARGIN, SAFETY * paths.drift(check))
    if margin > LARGEST_MARGIN:
        return counted
    data = encode_paths(token_ids, paths, vocab_size, lanes, margin)
    frame = write_frame(MODELLED, token_ids, data)
    return frame if len(frame) < len(counted) and reads_back(data, token_ids, check, vocab_size) else counted


def decode_tokens(engine: Engine, frame: bytes) -> list[int]:
    """The ids of a frame that `encode_tokens` coded with a model.

    Raises:
        CorruptedCode: never other ids than were coded.
        InvalidOption: the engine's model is not in float32, and has no folder to be loaded from.
    """
    model = coding_model(engine)
    if model is None:
        raise InvalidOption(
            "the session's token ids need their model in float32", "resume it with models loaded from folders, or in float32"
        )
    return decode_with(model, frame)


def decode_with(model: Decoder, frame: bytes) -> list[int]:
    """As `decode_tokens`, with the model at hand."""
    _, count, crc, data = read_frame(frame)
    lanes = _Lanes(model)
    ids = decode_paths(data, count, model.config.vocab_size, lambda previous: lanes.run([[token] for token in previous]))
    if checksum(ids) != crc:
        raise CorruptedCode("the checksum of the token ids does not match", "restore the file from a copy, or start a new session")
    return ids


class _Lanes:
    """The model's caches of lanes that start from nothing and step together; only the last lanes may end early."""

    def __init__(self, model: Decoder) -> None:
        self._model, self._pool = model, model.new_pool(1, _PAGE, max_pages=1 << 20)
        self._sequences: list[KvSequence] = []

    def run(self, tokens: list[list[int]]) -> Tensor:
        """Logits [sum, V] after each of the lanes' next tokens."""
        if not self._sequences:
            self._sequences = [self._pool.new_sequence() for _ in tokens]
        for ended in self._sequences[len(tokens) :]:
            ended.free()
        del self._sequences[len(tokens) :]
        flat = torch.tensor([token for lane in tokens for token in lane], device=self._model.device)
        logits = self._model.forward(flat, self._sequences, [len(lane) for lane in tokens]).logits
        for sequence, lane in zip(self._sequences, tokens, strict=True):
            sequence.advance(len(lane))
        assert logits is not None
        return logits


def record_paths(model: Decoder, token_ids: Sequence[int], lanes: int, lanes_at_once: int, chunks: Sequence[int]) -> Paths:
    """Paths of all tokens, the model being given the right ones before each; the row of a lane's first token says nothing.

    chunks: how many of each lane's tokens the first, the second... forward takes; the last number goes for the rest.
    """
    width, length = width_of(model.config.vocab_size), lane_length(len(token_ids), lanes)
    starts = range(0, len(token_ids), length)
    rows: list[Paths] = [Paths(np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 1 + width))) for _ in starts]
    places = [np.array([start]) for start in starts]
    for first in range(0, len(starts), lanes_at_once):
        open_lanes = [np.asarray(token_ids[start : start + length]) for start in starts[first : first + lanes_at_once]]
        cache, at, remaining = _Lanes(model), 0, list(chunks)
        while open_lanes := [lane for lane in open_lanes if len(lane) > at + 1]:
            size = min(remaining.pop(0) if len(remaining) > 1 else remaining[0], max(1, PASS_TOKENS // len(open_lanes)))
            following = [lane[at + 1 : at + 1 + size] for lane in open_lanes]
            logits = cache.run([lane[at : at + len(after)].tolist() for lane, after in zip(open_lanes, following, strict=True)])
            rows.append(Distribution(logits, width).paths(np.concatenate(following)))
            places += [start + at + 1 + np.arange(len(after)) for start, after in zip(starts[first:], following, strict=False)]
            at += size
    return Paths.joined(rows).at(np.argsort(np.concatenate(places)))


@contextmanager
def _fewer_threads() -> Iterator[None]:
    """Half as many CPU threads as now; never more, which on a busy machine can take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
