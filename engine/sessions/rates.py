"""What coding, restoring and recomputing a session take on this machine: measured once for a pair, its codec parameters and the number of threads.

All are straight lines in the number of tokens, through two measured lengths. Longer contexts favour restoring (attention grows faster in the larger
model), so the lines ask too little of recomputing rather than too much.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256

import torch

from codec.references import own_components
from codec.spec import NUM_SINKS
from engine.calibrate.corpus import library_texts
from engine.errors import InvalidOption, PoolExhausted
from engine.hub.cache import CacheFolder
from engine.runtime.core import EngineCore
from engine.sessions.codec_params import pair_fingerprints
from engine.sessions.file import Span
from engine.sessions.kv_codec import SessionCodec
from engine.sessions.stages import Rates, StageClock
from engine.text.encoding import encode_text

_LENGTHS = {"cpu": (64, 256), "cuda": (1024, 8192)}
_QUALITY = "balanced"
_MOST_BYTES = 1 << 16
_VERSION = 6  # of what is measured and how, and of what a restore costs: rates of a slower one would keep it from being used
SHORTEST = 512
"""Tokens from which on measuring pays: fewer are recomputed before it would end."""


def rates_of(codec: SessionCodec, tokens: int, log: Callable[[str], None]) -> Rates | None:
    """The rates of a codec's engine: those known already (`known_rates`), or new ones, measured now. None where none are known and so few tokens are at
    stake that it is not worth a measurement, or where there is no room for one."""
    rates = known_rates(codec)
    if rates is None and tokens >= SHORTEST:
        for _ in measuring(codec, log):
            pass
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
    """Time the target's pass over tokens of a text, coding them, and their restore from coded spans, each after a pass that is not timed. None where
    the pool has no room for that.

    Takes as long as a prompt of a thousand tokens on a CPU, of some ten thousand on a GPU; scratch pages are given back. On a CPU the seconds are the
    process's own over its threads, so that other programs make no difference. Between two pieces, of one pass or one coding each, nothing is timed:
    other requests may run.
    """
    core = codec.core
    room = min(core.context, core.pool.num_free_tokens // 2)
    small, large = (min(length, room) for length in _LENGTHS.get(core.device.type, _LENGTHS["cpu"]))
    if large <= max(small, NUM_SINKS):
        return None
    ids = _text_ids(core, large)
    seconds: dict[str, dict[int, float]] = {"code": {}, "restore": {}, "recompute": {}}
    first = core.open_sequence_state()
    try:
        first.token_ids[:] = ids
        codec.run_target(first, large)
        yield
        codec.features(first, NUM_SINKS, large)  # what an answer leaves behind
        for length in (small, small, large):  # the first time pays for tables
            clock, began = StageClock(core.device), time.process_time()
            spans = codec.encode(first, NUM_SINKS, length, _QUALITY)
            clock.mark("code")
            seconds["code"][length] = _own_s(began) if core.device.type == "cpu" else clock.seconds()["code"]
            yield
    finally:
        core.close_sequence_state(first)
    first_s: dict[str, float] = {}
    # the first pass of a length pays for compiling, and for pages touched for the first time
    for length in (small, small, large) if core.device.type == "cpu" else (small, small, large, large):
        for kind in ("restore", "recompute"):
            found = seconds[kind]
            conversation = core.open_sequence_state()
            try:
                conversation.token_ids[:] = ids
                clock, began = StageClock(core.device), time.process_time()
                if kind == "restore":
                    codec.restore(conversation, [s for s in spans if s.end <= length] or spans[:1])
                else:
                    codec.run_target(conversation, length)
                clock.mark(kind)
                found[length] = _own_s(began) if core.device.type == "cpu" else clock.seconds()[kind]
                first_s.setdefault(kind, found[length])
            finally:
                core.close_sequence_state(conversation)
            yield
    lines: dict[str, float] = {}
    for kind, found in seconds.items():
        token_s = max(0.0, (found[large] - found[small]) / (large - small))
        # on a CPU every process makes its matrices anew, at its first restore; a GPU's are made while the session is opened
        at_small = first_s.get(kind, found[small]) if core.device.type == "cpu" else found[small]
        lines |= {f"{kind}_s": max(0.0, at_small - token_s * small), f"{kind}_token_s": token_s}
    return Rates(**lines, lend_token_s=_lend_token_s(codec, [s for s in spans if s.start >= small]))


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
