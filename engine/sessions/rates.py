"""What coding, restoring and recomputing a session take on this machine: measured once for a pair, its codec parameters and the number of threads.

Straight lines in the number of tokens, through two measured lengths, and a square for attention: a pass far behind other tokens tells what the target's
takes, and a restore's follows from the layers that it runs. Those of a draft head count, though a session leaves them until drafts are asked for.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from typing import TypeVar

import numpy as np
import torch

from codec.references import own_components
from codec.spec import NUM_SINKS, SPAN_TOKENS
from engine.calibrate.corpus import library_texts
from engine.calibrate.restore_cost import draft_layers_run
from engine.errors import InvalidOption, PoolExhausted
from engine.hub.cache import CacheFolder
from engine.model.config import DecoderConfig
from engine.runtime.core import EngineCore
from engine.runtime.request import SequenceState
from engine.sessions.codec_params import pair_fingerprints
from engine.sessions.file import Span
from engine.sessions.kv_codec import SessionCodec
from engine.sessions.pieces import at_once
from engine.sessions.restore import SpanRestore
from engine.sessions.stages import Rates, StageClock
from engine.text.encoding import encode_text
from kernels.upload import upload

T = TypeVar("T")

_LENGTHS = {"cpu": (64, 512), "cuda": (1024, 8192)}
_FAR = {"cpu": (128, 2048), "cuda": (1024, 16_384)}  # tokens of a pass, and tokens before them
_QUALITY = "balanced"
_MOST_BYTES = 1 << 16
_VERSION = 7  # of what is measured and how, and of what a restore costs: rates of a slower one would keep it from being used
SHORTEST = 512
"""Tokens from which on measuring pays: fewer are recomputed before it would end."""


def rates_of(codec: SessionCodec, tokens: int, log: Callable[[str], None]) -> Rates | None:
    """The rates of a codec's engine: those known already (`known_rates`), or new ones, measured now. None where none are known and so few tokens are at
    stake that it is not worth a measurement, or where there is no room for one."""
    return at_once(finding(codec, tokens, log))


def finding(codec: SessionCodec, tokens: int, log: Callable[[str], None]) -> Generator[None, None, Rates | None]:
    """The same, in pieces (`measure`)."""
    rates = known_rates(codec)
    if rates is None and tokens >= SHORTEST:
        yield from measuring(codec, log)
        rates = codec.rates
    return rates


def known_rates(codec: SessionCodec) -> Rates | None:
    """Of this process, or remembered in the cache; None: they were never measured."""
    if codec.rates is None:
        with suppress(ValueError, TypeError, AttributeError, RecursionError):
            kept = json.loads(CacheFolder("rates").read(f"{_key(codec)}.json", _MOST_BYTES) or b"")
            codec.rates = Rates(**{field: float(value) for field, value in kept.items()})
    return codec.rates


def measuring(codec: SessionCodec, log: Callable[[str], None]) -> Generator[None, None, None]:
    """Measure, and remember what was found, in the cache where it can be written; in pieces (`measure`). Where the pool is too full for it now, nothing
    is known afterwards."""
    found = None
    with suppress(PoolExhausted):  # requests took the pages between two pieces
        found = yield from measure(codec)
    if found is None:
        return
    codec.rates = found
    log(f"measured once for this machine and pair: {codec.rates.reason(4096)}")
    CacheFolder("rates").write(f"{_key(codec)}.json", (json.dumps(asdict(codec.rates)) + "\n").encode())


def _key(codec: SessionCodec) -> str:
    core = codec.core
    device = torch.cuda.get_device_name(core.device) if core.device.type == "cuda" else f"{platform.processor()} {platform.machine()}"
    parts = [_VERSION, device, platform.node(), torch.get_num_threads(), torch.__version__, str(core.dtype), core.deterministic]
    return sha256(repr([*parts, codec.pack.digest, sorted(pair_fingerprints(core).items())]).encode()).hexdigest()[:24]


@torch.inference_mode()
def measure(codec: SessionCodec) -> Generator[None, None, Rates | None]:
    """Time the target's pass over tokens of a text, a pass over a few tokens far behind others, coding, and restores from coded spans, each after one
    that is not timed. None where the pool has no room for that.

    Takes as long as a prompt of two thousand tokens on a CPU, of some ten thousand on a GPU; scratch pages are given back. On a CPU the seconds are the
    process's own over its threads, so that other programs make no difference. Between two pieces, of one pass or one coding each, nothing is timed:
    other requests may run.
    """
    core, on_cpu = codec.core, codec.core.device.type == "cpu"
    room = min(core.context, core.pool.num_free_tokens // (3 if on_cpu else 2))
    small, large = (min(length, room) for length in (_LENGTHS["cpu"] if on_cpu else _LENGTHS["cuda"]))
    if large <= max(small, NUM_SINKS):
        return None
    ids = _text_ids(core, large)
    computed: dict[int, float] = {}
    first = core.open_sequence_state()
    try:
        # the first pass of a length pays for compiling, and for pages touched for the first time
        for length in (small, small, large) if on_cpu else (small, small, large, large):
            core.close_sequence_state(first)
            first = core.open_sequence_state()
            first.token_ids[:] = ids
            computed[length], _ = _timed(core, partial(codec.run_target, first, length))
            yield
        far = _far_pass(core, first)
        yield
        codec.features(first, NUM_SINKS, large)  # what an answer leaves behind
        coded: dict[int, float] = {}
        for length in (small, small, large):  # the first time pays for tables
            coded[length], spans = _timed(core, partial(codec.encode, first, NUM_SINKS, length, _QUALITY))
            yield
    finally:
        core.close_sequence_state(first)
    start_s, token_s, pair_s = _parabola(computed, far)
    target, own, head = _attention_widths(codec)
    restore = {"restore_pair_s": pair_s * (own + head) / target}
    restoring = _restored_by_piece if on_cpu else _restored_at_once
    restore["restore_s"], restore["restore_token_s"] = yield from restoring(codec, ids, spans, (small, large), restore["restore_pair_s"])
    code_s, code_token_s = _line(coded)
    return Rates(
        **restore,
        recompute_s=start_s,
        recompute_token_s=token_s,
        recompute_pair_s=pair_s * (target + head) / target,
        code_s=code_s,
        code_token_s=code_token_s,
        lend_token_s=_lend_token_s(codec, [s for s in spans if s.start >= small]),
    )


def _timed(core: EngineCore, run: Callable[[], T]) -> tuple[float, T]:
    """Seconds that something takes, and what it returns."""
    clock, began = StageClock(core.device), time.process_time()
    result = run()
    clock.mark("run")
    return _own_s(began) if core.device.type == "cpu" else clock.seconds()["run"], result


def _restored_by_piece(
    codec: SessionCodec, ids: list[int], spans: list[Span], lengths: tuple[int, int], pair_s: float
) -> Generator[None, None, tuple[float, float]]:
    """Seconds to begin a restore, and of one more token, on a CPU: the first piece pays for matrices that every process makes anew, a second one of as
    many tokens for nothing but these. Products are of whole blocks of rows, and a draft head runs many at once, so shorter pieces would not do."""
    core, (_, length) = codec.core, lengths
    whole = [span for span in spans if span.end - span.start == SPAN_TOKENS] or spans
    text = list(spans)
    while text[-1].end < 2 * length:
        again = whole[(len(text) - len(spans)) % len(whole)]
        text.append(replace(again, start=text[-1].end, end=text[-1].end + again.end - again.start))
    conversation = core.open_sequence_state()
    try:
        conversation.token_ids[:] = (ids * 3)[: text[-1].end]
        restore = SpanRestore(codec, conversation, text)
        first_s, _ = _timed(core, partial(restore.piece, length))
        start = conversation.sequence.length
        yield
        more_s, _ = _timed(core, partial(restore.piece, length))
        end = conversation.sequence.length
    finally:
        core.close_sequence_state(conversation)
    yield
    token_s = max(0.0, (more_s - pair_s * (end * end - start * start) / 2) / (end - start))
    return max(0.0, first_s - start * (token_s + start / 2 * pair_s)), token_s


def _restored_at_once(
    codec: SessionCodec, ids: list[int], spans: list[Span], lengths: tuple[int, int], pair_s: float
) -> Generator[None, None, tuple[float, float]]:
    """The same on a GPU, from restores of two lengths; its matrices are made while the session is opened."""
    core, found = codec.core, {}
    for length in (length for length in lengths for _ in range(2)):
        some = [s for s in spans if s.end <= length] or spans[:1]
        conversation = core.open_sequence_state()
        try:
            conversation.token_ids[:] = ids
            found[length], _ = _timed(core, partial(codec.restore, conversation, some))
        finally:
            core.close_sequence_state(conversation)
        yield
    return _line({length: max(0.0, took - length * length / 2 * pair_s) for length, took in found.items()})


def _far_pass(core: EngineCore, first: SequenceState) -> tuple[int, int, float] | None:
    """Tokens of one pass of the target, tokens before them, and its seconds: what attention takes, which shorter texts do not tell. What lies before is
    the first tokens' KV again and again. None where no pool has room, or layers with a window attend to no more."""
    count, start = _FAR["cpu" if core.device.type == "cpu" else "cuda"]
    size, pool = core.pool.page_size, core.pool
    count = min(count, first.sequence.length)
    start = min(start, core.context - count, pool.num_free_tokens // 2 - count) // size * size
    if not pool.is_plain or first.sequence.windows or start < 2 * first.sequence.length:
        return None
    sequence = pool.new_sequence()
    try:
        sequence.ensure(start + count)
        pages, sources = sequence.pages[: start // size], first.sequence.pages[: first.sequence.length // size]
        for at in range(0, len(pages), len(sources)):
            own = pages[at : at + len(sources)]
            pool.copy_pages(sources[: len(own)], own)
        sequence.advance(start)
        ids, model = upload(first.token_ids[:count], core.device), core.target if core.deterministic else core.runner

        run = partial(model.forward, ids, [sequence], [count], logits="none", deterministic=core.deterministic)
        if core.device.type != "cpu":
            run()
        took, _ = _timed(core, run)
        return count, start, took
    finally:
        sequence.free()


def _line(found: dict[int, float]) -> tuple[float, float]:
    """Seconds at no token, and a token, through two lengths; neither below 0."""
    (small, at_small), (large, at_large) = sorted(found.items())
    token_s = max(0.0, (at_large - at_small) / (large - small))
    return max(0.0, at_small - small * token_s), token_s


def _parabola(found: dict[int, float], far: tuple[int, int, float] | None) -> tuple[float, float, float]:
    """Seconds at no token, a token, and a pair of tokens, through two lengths and a pass far behind; none below 0."""
    (small, at_small), (large, at_large) = sorted(found.items())
    if far is not None:
        count, start, took = far
        rows = [(1, n, n * n / 2) for n in (small, large)] + [(1, count, count * (start + count / 2))]
        start_s, token_s, pair_s = np.linalg.solve(np.array(rows), np.array([at_small, at_large, took])).tolist()
        if token_s > 0 and pair_s > 0:
            return max(0.0, start_s), token_s, pair_s
    return *_line(found), 0.0


def _attention_widths(codec: SessionCodec) -> tuple[int, int, int]:
    """Numbers that seconds of attention go with, layers times width: of the target; of the layers that a restore runs of it and of a draft model; of a
    draft head."""
    core, spec = codec.core, codec.predictor.spec

    def width(config: DecoderConfig, layers: int) -> int:
        return layers * config.num_heads * config.head_dim

    target = core.target.config
    own = width(target, max(core.exit_layer, spec.recomputed_layers))
    if core.draft_model is not None:
        draft = core.draft_model.config
        own += width(draft, draft_layers_run(spec.taps, draft.num_layers))
    head = None if core.source is None else core.source.head_layers
    return width(target, target.num_layers), own, 0 if head is None else width(head.config, head.config.num_layers)


def _lend_token_s(codec: SessionCodec, spans: Sequence[Span]) -> float:
    """Seconds a token of entropy-decoding spans to components, which is all that a restore does with what its spans refer to in other texts."""
    tokens = sum(span.end - span.start for span in spans)
    if not tokens:
        return 0.0
    took = 0.0
    for _ in range(2):  # the first time pays for compiling
        clock, began = StageClock(codec.core.device), time.process_time()
        parts = codec.pages.start([span.data for span in spans], beside=False)
        own_components(codec.codec, [(part.starts, part.decoded) for part in parts], tokens, tokens)
        clock.mark("lend")
        took = _own_s(began) if codec.core.device.type == "cpu" else clock.seconds()["lend"]
    return took / tokens


def _own_s(began: float) -> float:
    """Seconds of the process since `began`, over its threads."""
    return (time.process_time() - began) / torch.get_num_threads()


def _text_ids(core: EngineCore, count: int) -> list[int]:
    """Tokens of the interpreter's own library, which code as a text does; random ones without a tokenizer."""
    ids: list[int] = []
    with suppress(InvalidOption):  # an interpreter without its sources
        for text in library_texts() if core.tokenizer is not None else ():
            ids += encode_text(core.tokenizer, text[: 8 * count], add_special_tokens=False, most=8 * count)
            if len(ids) >= count:
                return ids[:count]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(core.target.config.vocab_size, (count,), generator=generator).tolist()
