"""Prefixes of another engine's texts in a store of ours: what is known of a text comes back into its pages, what is new is coded behind its work.

Runs are those of `engine.store.prefix_cache`: pages of 64 tokens under a root that names models, codec parameters, quality and namespace. The attention
sinks, which are never coded with loss, are kept as the engine computed them, once for all texts that begin with the same tokens.
"""

from __future__ import annotations

import itertools
import threading
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from codec.codec import Earlier
from codec.errors import CodecError, CorruptedCode
from codec.pages import Chunk, EntropyDecoded, LayerRows
from codec.references import Lent
from codec.residuals import Residuals
from codec.serialize import Features, KvSerializer
from codec.spec import NUM_SINKS, QUALITIES
from engine.connectors.pace import Pace, Yielding
from engine.connectors.passes import CodedModel, FeaturePasses, TextState
from engine.errors import ForetoldError, InvalidOption
from engine.inputs import Fields
from engine.sessions.kv_codec import product_dtype
from engine.store.borrowing import Loans, resolved
from engine.store.runs import LABEL, PAGE_TOKENS, RUN_PAGES, RUN_TOKENS, PageKeys, root_key, span_bounds
from engine.store.store import DEFAULT_LIMIT_BYTES, Borrowed, RunStore

Ready = Callable[[], None]
CHUNK_TOKENS = 16 * RUN_TOKENS
_TAIL_S = 1.0  # less than a run waits so long for more of its text
LOADS = ("auto", "within", "beside")
"""Where a restore runs: within the step that computes the rest, which other requests then wait for; or beside the steps of others, while its request
waits. "auto": beside where other requests run, and not at all where computing has been measured to be faster (`engine.connectors.rates`)."""
_MOST_LENT = 2  # tokens of other texts that a restore decodes for one of its own
_MAX_RESTORED = 200_000  # pages whose keys are remembered
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WORDS = (np.uint32, np.uint16, np.uint16)
_PACKED = 16  # the first byte of packed sinks, and above; below, a dtype's number before plain ones
_OTHER_SINKS, _REMEDY = "stored attention sinks have another size than the model's", "let the store be verified"


@dataclass(frozen=True)
class StoreOptions:
    """What a user says of the store and its codec.

    store: folder. store_bytes: its limit. draft, pack: as of `CodedModel.open`. quality: of `codec.spec.QUALITIES`. namespace: of requests without a
    cache salt. min_tokens: fewer are computed, not restored. save: whether new text is kept. save_share: of the time that coding may run for while the
    engine is at work. load: of `LOADS`, where a restore runs. queue_bytes: raw keys and values that wait to be coded.
    feature_tokens: tokens that the first layers' caches are kept of.
    """

    store: str
    store_bytes: int = DEFAULT_LIMIT_BYTES
    draft: str = "trunk"
    pack: str | None = None
    quality: str = "balanced"
    namespace: str = "default"
    min_tokens: int = 256
    save: bool = True
    save_share: float = 0.04
    load: str = "auto"
    queue_bytes: int = 1 << 30
    feature_tokens: int = 65_536

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> StoreOptions:
        """Raises InvalidOption for a name that is none of these, another type, or a number out of bounds."""
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        remedy = "see docs/vllm.md"
        if unknown:
            raise InvalidOption(f"unknown connector option {unknown[0]!r}", f"choose from {', '.join(cls.__dataclass_fields__)}")
        fields = Fields(dict(given), "the connector's options", InvalidOption, remedy)
        if not fields.text("store", ""):
            raise InvalidOption("the connector needs a store", 'give kv_connector_extra_config a "store", a folder')
        quality = fields.text("quality", cls.quality)
        if quality not in QUALITIES:
            raise InvalidOption(f"unknown quality {quality!r}", f"choose one of {', '.join(QUALITIES)}")
        load = fields.text("load", cls.load)
        if load not in LOADS:
            raise InvalidOption(f"unknown load {load!r}", f"choose one of {', '.join(LOADS)}")
        return cls(
            store=fields.text("store"),
            store_bytes=fields.integer("store_bytes", 0, 1 << 60, cls.store_bytes),
            draft=fields.text("draft", cls.draft),
            pack=fields.text("pack") if given.get("pack") is not None else None,
            quality=quality,
            namespace=fields.text("namespace", cls.namespace) or cls.namespace,
            min_tokens=fields.integer("min_tokens", 1, 1 << 30, cls.min_tokens),
            save=fields.boolean("save", cls.save),
            save_share=fields.number("save_share", 0.0, 1.0, cls.save_share),
            load=load,
            queue_bytes=fields.integer("queue_bytes", 0, 1 << 50, cls.queue_bytes),
            feature_tokens=fields.integer("feature_tokens", RUN_TOKENS, 1 << 30, cls.feature_tokens),
        )


class PrefixIndex:
    """Which prefixes a store holds of a model's texts: the side that schedules.

    Args:
        options: the user's. model: opened with them.

    Raises:
        BadStore, CacheNotWritable, DiskFull: as of `RunStore`.
    """

    def __init__(self, options: StoreOptions, model: CodedModel) -> None:
        self.options, self.model = options, model
        self.store = RunStore(options.store, options.store_bytes)

    def identity(self, namespace: str) -> dict[str, str]:
        """What the root of a namespace's texts stands for: the same as of an engine of ours with these models and this quality."""
        return {
            **self.model.prints,
            "pack": self.model.pack.digest,
            "quality": self.options.quality,
            "namespace": namespace,
            LABEL: self.model.folder.name,
        }

    def sink_identity(self, namespace: str) -> dict[str, str]:
        """What the root of a namespace's attention sinks stands for: those of the layers that are not run."""
        return self._all_sinks_identity(namespace) | {"first_layer": str(self.model.pack.layout.first_layer)}

    def _all_sinks_identity(self, namespace: str) -> dict[str, str]:
        """The same, of stores that keep all layers' sinks, as they were kept before."""
        return self.identity(namespace) | {"part": "sinks", "pack": "any", "quality": "exact", "draft": "any"}

    def namespace(self, salt: str | None) -> str:
        """Of requests with a cache salt: nothing of other salts is found under it."""
        return self.options.namespace if not salt else f"{self.options.namespace[:64]}/{sha256(salt.encode()).hexdigest()}"

    def matched(self, token_ids: Sequence[int], namespace: str, start: int) -> int:
        """How many tokens after the first `start` can be restored: what is stored, but a text's last token, whose logits are wanted."""
        wanted = max(self.options.min_tokens, 1)
        if len(token_ids) - 1 - start < wanted:
            return 0
        found = self.store.lookup(root_key(self.identity(namespace)), token_ids, start // PAGE_TOKENS, referring=True)
        end = min(found.num_tokens, len(token_ids) - 1)
        if end - start < wanted or (start < NUM_SINKS and self.sinks(token_ids, namespace) is None):
            return 0
        return end - start

    def sinks(self, token_ids: Sequence[int], namespace: str) -> bytes | None:
        """The stored sinks of a text, for `sinks_from_bytes`."""
        for identity in (self.sink_identity(namespace), self._all_sinks_identity(namespace)):
            if spans := self.store.lookup(root_key(identity), sink_ids(token_ids)).spans:
                return spans[0]
        return None

    def close(self) -> None:
        """Give the store's index back."""
        self.store.close()


def sink_ids(token_ids: Sequence[int]) -> list[int]:
    """The page of tokens that sinks are stored under: the first ones, filled up."""
    return [*token_ids[:NUM_SINKS], *[0] * (PAGE_TOKENS - NUM_SINKS)]


def sinks_to_bytes(kv: torch.Tensor) -> bytes:
    """Of kv [NUM_SINKS, L, 2, G, d] in float32, bfloat16 or float16, to the bit: exponents repeat, so their bytes are coded apart from the others."""
    kind = _DTYPES.index(kv.dtype)
    numbers: np.ndarray = kv.contiguous().cpu().view(torch.uint8).numpy().view(_WORDS[kind]).reshape(-1)
    turned = (numbers << 1) | (numbers >> (8 * numbers.itemsize - 1))  # the sign goes behind the mantissa
    planes = turned.view(np.uint8).reshape(len(numbers), -1).T
    parts = [bytes([_PACKED + kind])]
    for plane in planes:
        packer = zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)
        parts += packer.compress(plane.tobytes()), packer.flush()
    return b"".join(parts)


def sinks_from_bytes(data: bytes, shape: Sequence[int], first_layer: int) -> torch.Tensor:
    """Sinks [NUM_SINKS, L - first_layer, 2, G, d] of layers from `first_layer` on, which `sinks_to_bytes` was given; or of those of all layers as they
    are, which stores kept before.

    shape: [NUM_SINKS, L, 2, G, d]. Raises CorruptedCode for bytes of another shape.
    """
    kind = data[0] if data else len(_DTYPES)
    if _PACKED <= kind < _PACKED + len(_DTYPES):
        wanted = [shape[0], shape[1] - first_layer, *shape[2:]]
        return _unpacked(data[1:], _DTYPES[kind - _PACKED], _WORDS[kind - _PACKED], int(np.prod(wanted))).view(*wanted)
    if kind >= len(_DTYPES) or len(data) != 1 + _DTYPES[kind].itemsize * int(np.prod(shape)):
        raise CorruptedCode(_OTHER_SINKS, _REMEDY)
    return torch.frombuffer(bytearray(data[1:]), dtype=_DTYPES[kind]).view(*shape)[:, first_layer:]


def _unpacked(data: bytes, dtype: torch.dtype, word: type, count: int) -> torch.Tensor:
    """Inverse of `sinks_to_bytes` behind its first byte: `count` numbers."""
    planes = []
    try:
        for _ in range(dtype.itemsize):
            unpacker = zlib.decompressobj()
            planes.append(np.frombuffer(unpacker.decompress(data, count + 1), np.uint8))
            data = unpacker.unused_data
            if len(planes[-1]) != count or not unpacker.eof:
                raise CorruptedCode(_OTHER_SINKS, _REMEDY)
    except zlib.error as error:
        raise CorruptedCode(f"stored attention sinks do not decode: {error}", _REMEDY) from None
    if data:
        raise CorruptedCode(_OTHER_SINKS, _REMEDY)
    turned: np.ndarray = np.stack(planes, 1).view(word)[:, 0]
    numbers = (turned >> 1) | (turned << (8 * turned.itemsize - 1))
    return torch.from_numpy(numbers.view(np.uint8)).view(dtype)


@dataclass(eq=False)
class _Text:
    """A request's text.

    run: the page that the next stored run begins with. spans: coded pages from there on; borrowed: what those of them refer to that were stored; loans:
    what those that are coded may refer to. raw:
    pages that wait to be coded, as [64, L, 2, G, d], each with what waits until it is there. sinks: attention sinks that wait to be stored, in the same
    way; sinks_known: they are stored, or were handed over. handed: pages that are stored or were handed on, None before the store was asked. kept: some
    were handed over. held: a restore of it is under way beside the engine's steps. done: nothing more will come. lost: nothing more is kept of it.
    """

    namespace: str
    token_ids: list[int] = field(default_factory=list)
    run: int = 0
    spans: list[bytes] = field(default_factory=list)
    borrowed: Borrowed | None = None
    loans: Loans | None = None
    raw: deque[tuple[torch.Tensor, Ready]] = field(default_factory=deque)
    since: float = 0.0
    state: TextState | None = None
    handed: int | None = None
    sinks: tuple[torch.Tensor, Ready] | None = None
    sinks_known: bool = False
    kept: bool = False
    held: bool = False
    done: bool = False
    lost: bool = False

    @property
    def waits(self) -> bool:
        """Whether anything is to be stored."""
        return bool(self.raw) or self.sinks is not None

    @property
    def is_due(self) -> bool:
        """Whether there is no use in waiting for more: a run is full, or nothing more will come."""
        return self.done or not self.raw or len(self.spans) + len(self.raw) >= RUN_PAGES


@dataclass
class WorkerMetrics:
    """restored_tokens, restore_s: into pages. saved_tokens, saved_bytes, save_s: coded and stored. failures: restores that were given up. stages_s:
    what the parts of all restores took the thread that asked for them."""

    restored_tokens: int = 0
    restore_s: float = 0.0
    stages_s: dict[str, float] = field(default_factory=dict)
    saved_tokens: int = 0
    saved_bytes: int = 0
    save_s: float = 0.0
    failures: int = 0


@dataclass(frozen=True)
class Restored:
    """Tokens [start, end) of a text, all but multiplied out.

    origin: the first token of the pages that were decoded. skipped: their tokens that no code says. first: keys (rotated) and values of the layers that
    were run, [m, 2, T, G, d] of all decoded tokens. rows: of the layers behind them. sinks: [NUM_SINKS, L - m, 2, G, d] of these as the engine computed
    them, where the text's beginning is among the tokens. angles: cos, sin float32 [T, d/2] of all decoded tokens.
    """

    start: int
    end: int
    origin: int
    skipped: int
    first: torch.Tensor
    rows: LayerRows
    sinks: torch.Tensor | None
    angles: tuple[torch.Tensor, torch.Tensor]

    @property
    def num_layers(self) -> int:
        return self.first.shape[0] + self.rows.num_layers

    @torch.inference_mode()
    def layer(self, n: int, first_head: int = 0, last_head: int | None = None) -> torch.Tensor:
        """Keys (rotated) and values of a layer, [end - start, 2, heads, d], of KV heads [first_head, last_head), in the first layers' dtype."""
        m, _, tokens, heads, d = self.first.shape
        own = range(heads)[first_head:last_head]
        if n < m:
            kv = self.first[n, :, :, first_head:last_head].transpose(0, 1).contiguous()
        else:
            kv = self.first.new_empty(tokens, 2, len(own), d)
            kv[: self.skipped] = 0
            self.rows.rotated(n - m, self._coded_angles, kv[self.skipped :], first_head, last_head)
        kv = kv[self.start - self.origin : self.end - self.origin]
        if n >= m and self.sinks is not None and self.start < NUM_SINKS:
            kv[: NUM_SINKS - self.start] = self.sinks[self.start : self.end, n - m, :, first_head:last_head].to(kv.dtype)
        return kv

    @property
    def _coded_angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the tokens that codes say."""
        cos, sin = self.angles
        return cos[self.skipped :], sin[self.skipped :]


class PrefixWorker:
    """Restores and keeps prefixes: the side that holds pages. Everything but `wait` may be called by one thread; coding has a thread of its own.

    Args:
        index: opened. dtype: of the engine's model; float16 runs as float32 here. device: of its pages.
        log: told once of each kind of trouble.
    """

    def __init__(self, index: PrefixIndex, *, dtype: torch.dtype, device: torch.device | str, log: Callable[[str], None] = print) -> None:
        self.index, self.model, self.options, self._log = index, index.model, index.options, log
        own = torch.float32 if dtype == torch.float16 else dtype
        self.device = torch.device(device)
        self.passes = FeaturePasses(self.model, dtype=own, device=device, max_tokens=self.options.feature_tokens)
        rotation = self.model.rotation
        rotation = type(rotation)(rotation.frequencies.to(self.device), rotation.factor)
        self.serializer = KvSerializer(self.model.pack, rotation, device=device, dtype=product_dtype(own, self.device))
        self.rotation, self.first_layer = rotation, self.passes.first_layer
        self.serializer.pages.prepare()
        self.metrics = WorkerMetrics()
        config = self.model.config
        self.token_shape = (config.num_layers, 2, config.num_kv_heads, config.head_dim)
        self._texts: OrderedDict[str, _Text] = OrderedDict()
        self._restored: OrderedDict[bytes, None] = OrderedDict()
        self._said: set[str] = set()
        self._models, self._queue = threading.RLock(), threading.Condition()
        self.pace = Pace(self.options.save_share)
        self._waiting_bytes, self._closing, self._working = 0, False, False
        self._thread: threading.Thread | None = None
        on_gpu = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device, priority=-1) if on_gpu else None
        self._coding_stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._reader = ThreadPoolExecutor(1, "foretold-reader")  # entropy decoding, beside the passes that make features

    # --- texts ----------------------------------------------------------------------------------------------------------

    def extend(self, name: str, namespace: str, token_ids: Sequence[int]) -> None:
        """A request's next tokens; the first call makes it known."""
        with self._queue:
            text = self._texts.setdefault(name, _Text(namespace))
        text.token_ids += token_ids

    def end(self, name: str) -> None:
        """A request has ended: what waits is coded, then it is forgotten; one that is held, when it is released."""
        with self._queue:
            if (text := self._texts.get(name)) is not None and text.held:
                text.done = True
                return
            text = self._texts.pop(name, None)
            if text is not None:
                text.done = True
                if text.waits:
                    self._texts[f"{name}\0{id(text)}"] = text  # out of the way of a new request of this name
                    self._queue.notify_all()
        if text is not None and not text.waits:
            self._drop(text)

    def hold(self, name: str) -> None:
        """A known text is being restored in another thread."""
        with self._queue:
            self._texts[name].held = True

    def release(self, name: str) -> None:
        """Inverse of `hold`."""
        with self._queue:
            text = self._texts[name]
            text.held = False
        if text.done:
            self.end(name)

    def give_up(self, name: str) -> None:
        """Keep nothing more of a request."""
        text = self._texts.get(name)
        if text is not None:
            text.lost = True

    def _on_stream(self) -> AbstractContextManager[Any]:
        """Work goes to the stream of this worker, not to the engine's; nothing on a CPU."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @contextmanager
    def streaming(self, after: torch.cuda.Event | None = None) -> Iterator[None]:
        """Work goes to the stream of this worker, after what the engine's has begun and before what it begins next.

        after: from a thread of its own; only what was before this event is waited for, and the thread waits until the work is done.
        """
        if self._stream is None:
            yield
            return
        outer = torch.cuda.current_stream(self.device)
        if after is None:
            self._stream.wait_stream(outer)
        else:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            yield
        if after is None:
            outer.wait_stream(self._stream)
        else:
            self._stream.synchronize()

    # --- before a forward pass ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def restore(self, name: str, start: int, end: int) -> Restored | None:
        """Tokens [start, end) of a known text, ready to be multiplied out layer by layer; fewer where the store has fewer, None where it has none.

        What is stored was checked when this returns. Raises the codec's errors and the engine's.
        """
        text, began = self._texts[name], time.perf_counter()
        marks = [("", began)]
        page, last = start // PAGE_TOKENS, -(-end // PAGE_TOKENS)
        root, known = root_key(self.index.identity(text.namespace)), text.token_ids[: last * PAGE_TOKENS]
        found = self.index.store.lookup(root, known, page, referring=True)
        end = min(end, found.num_tokens)
        if end <= start:
            return None
        last = -(-end // PAGE_TOKENS)
        sinks = None
        if start < NUM_SINKS:
            data = self.index.sinks(text.token_ids, text.namespace)
            if data is None:
                return None
            sinks = sinks_from_bytes(data, (NUM_SINKS, *self.token_shape), self.first_layer).to(self.device)
        marks.append(("look up", time.perf_counter()))
        lent = resolved(self.serializer.codec, found).lent
        reading = self._reader.submit(self._entropy_decoded, found.spans, lent) if self.device.type == "cpu" else None
        parts, chunks = ([] if reading is not None else self._begun(found.spans, lent)), None
        marks.append(("begin to decode", time.perf_counter()))
        skipped = span_bounds(page)[0] - page * PAGE_TOKENS
        try:
            features, first = self._features(text, page, last, skipped)
        finally:
            if reading is not None:
                parts, chunks = reading.result()
        marks.append(("features", time.perf_counter()))
        rows = self.serializer.decode_layers(parts, features, chunks)
        marks.append(("components", time.perf_counter()))
        positions = torch.arange(page * PAGE_TOKENS, last * PAGE_TOKENS, device=self.device)
        self._remember(PageKeys(root, known)[page:last])
        self.index.store.touch(found.keys)
        self.metrics.restored_tokens += end - start
        marks.append(("remember", time.perf_counter()))
        for (_, before), (stage, after) in itertools.pairwise(marks):
            self.metrics.stages_s[stage] = self.metrics.stages_s.get(stage, 0.0) + after - before
        self.metrics.restore_s += time.perf_counter() - began
        angles = self.rotation.angles(positions)
        return Restored(start, end, page * PAGE_TOKENS, skipped, first, rows, sinks, angles)

    @torch.inference_mode()
    def _entropy_decoded(self, spans: Sequence[bytes], lent: Lent | None) -> tuple[list[EntropyDecoded], list[Chunk]]:
        """In the reader's thread: what was read of the spans, and their components."""
        torch.set_num_threads(1)
        parts = self._begun(spans, lent)
        return parts, self.serializer.pages.chunks(parts)

    def _begun(self, spans: Sequence[bytes], lent: Lent | None) -> list[EntropyDecoded]:
        """The spans, read; lent: what they refer to in other texts, if anything."""
        pages = self.serializer.pages
        return pages.start(spans) if lent is None else pages.begin(lent.codes, lent.lent)

    def _features(self, text: _Text, page: int, last: int, skipped: int) -> tuple[list[Features], torch.Tensor]:
        """Of a text's pages, in parts, without the first `skipped` tokens; and what `first_rows` gives of all."""
        with self._models:
            state = self._run_to(text, page * PAGE_TOKENS)
            features = []
            for at in range(page * PAGE_TOKENS, last * PAGE_TOKENS, CHUNK_TOKENS):
                end = min(at + CHUNK_TOKENS, last * PAGE_TOKENS)
                part = self.passes.run(state, text.token_ids[at:end])
                features.append(part.part(skipped, end - at) if at == page * PAGE_TOKENS else part)
            return features, self.passes.first_rows(state, page * PAGE_TOKENS, last * PAGE_TOKENS)

    def _run_to(self, text: _Text, length: int) -> TextState:
        """The caches of a text's first tokens; under the lock of the models."""
        self._make_room(len(text.token_ids), text)
        state = text.state = text.state or self.passes.open()
        if state.length > length:
            self.passes.close(state)
            state = text.state = self.passes.open()
        if state.length < length:
            self.passes.run(state, text.token_ids[state.length : length])
        return state

    def _remember(self, keys: Sequence[bytes]) -> None:
        """Pages with these keys hold what was decoded: they are never coded again."""
        for key in keys:
            self._restored[key] = None
        while len(self._restored) > _MAX_RESTORED:
            self._restored.popitem(last=False)

    # --- behind a forward pass ------------------------------------------------------------------------------------------

    def wanted(self, name: str, end: int) -> range:
        """Pages of a text, of which the engine has computed `end` tokens, that are worth keeping."""
        text = self._texts.get(name)
        none = range(0)
        if text is None or text.lost or text.done or not self.options.save:
            return none
        end = min(end, len(text.token_ids)) // PAGE_TOKENS
        if end <= (text.handed or 0):
            return none
        root, ids = root_key(self.index.identity(text.namespace)), text.token_ids[: end * PAGE_TOKENS]
        if not text.kept:  # what others have stored of it may go on behind what was computed when the store was asked last
            text.run = self.index.store.known_pages(root, ids)
            found = self.index.store.lookup(root, ids, text.run, referring=True)
            text.spans, text.borrowed = found.spans, found.borrowed.get(text.run)
            text.handed = text.run + len(text.spans)
        keys = PageKeys(root, ids) if self._restored else []
        first = text.handed or 0
        for page in range(first, end):
            if keys and keys[page] in self._restored:
                text.lost = True  # it was evicted from the store after it came from there: coded again it would lose twice
                return range(first, page)
        return range(first, end)

    def lacks_sinks(self, name: str) -> bool:
        """Whether a text's sinks have to be kept; asked once a text."""
        text = self._texts[name]
        if text.lost or text.sinks_known or text.handed is None or not self.options.save:
            return False
        text.sinks_known = True
        return self.index.sinks(text.token_ids, text.namespace) is None

    def keep_sinks(self, name: str, kv: torch.Tensor, ready: Ready = lambda: None) -> None:
        """A text's first tokens, kv [NUM_SINKS, L, 2, G, d] with rotated keys, not written to after `ready`, which waits for that."""
        with self._queue:
            self._texts[name].sinks = kv, ready
            self._start()

    def keep(self, name: str, kv: torch.Tensor, ready: Ready = lambda: None) -> None:
        """The next pages of a text: kv [64 n, L, 2, G, d] with rotated keys, on the host; ready: as for `keep_sinks`.

        The thread is woken once for all of them: each time it takes the interpreter's lock from whoever hands them over.
        """
        text = self._texts[name]
        with self._queue:
            for page in kv.split(PAGE_TOKENS):
                if self._waiting_bytes + page.nbytes > self.options.queue_bytes:
                    text.lost = True
                    self._once("queue", "more text is computed than can be coded behind it: some is not kept")
                    break
                if not text.raw:
                    text.since = time.monotonic()
                text.raw.append((page, ready))
                text.kept = True
                text.handed = (text.handed or 0) + 1
                self._waiting_bytes += page.nbytes
            if text.kept:
                self._start()

    def _start(self) -> None:
        """Have the thread look at what waits; under the queue's lock."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="foretold-connector", daemon=True)
            self._thread.start()
        self._queue.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Until all that was handed over is stored; False when the time was too short."""
        until = time.monotonic() + timeout_s
        try:
            return self._waited(until)
        finally:
            self.pace.rush(False)

    def _waited(self, until: float) -> bool:
        while time.monotonic() < until:
            with self._queue:
                if not self._working and not any(text.waits for text in self._texts.values()):
                    return True
                self.pace.rush()
                self._queue.notify_all()
            time.sleep(0.01)
        return False

    def close(self, timeout_s: float = 60.0) -> bool:
        """`wait`, end the thread and close the store."""
        done = self.wait(timeout_s) if self._thread is not None else True
        self.pace.rush()
        with self._queue:
            self._closing = True
            self._queue.notify_all()
        if self._thread is not None:
            self._thread.join(5.0)
        self._reader.shutdown(wait=False)
        self.index.close()
        return done

    def _work(self) -> None:
        torch.set_num_threads(1)
        while True:
            with self._queue:
                if self._closing:
                    return
                now = time.monotonic()
                waiting = (t for t in self._texts.values() if t.waits)
                text = next((t for t in waiting if t.is_due or now - t.since > _TAIL_S or self.pace.is_rushed), None)
                if text is None:
                    self._queue.wait(0.2)
                    continue
                self._working = True
                sinks, text.sinks = text.sinks, None
                pages = [text.raw[n] for n in range(min(len(text.raw), RUN_PAGES - len(text.spans) % RUN_PAGES))]
            try:
                if sinks is not None:
                    kv, ready = sinks
                    ready()
                    self.index.store.insert(
                        self.index.sink_identity(text.namespace), sink_ids(text.token_ids), [sinks_to_bytes(kv[:, self.first_layer :])]
                    )
                for _, ready in pages:
                    ready()
                if pages:
                    self._keep_run(text, [kv for kv, _ in pages])
            except (ForetoldError, CodecError, OSError, MemoryError) as error:
                text.lost = True
                self._once("save", f"a text could not be kept in the store: {error}")
            except Exception as error:  # whatever it is, the engine goes on
                text.lost = True
                self._once("worker", f"the connector's worker failed: {type(error).__name__}: {error}")
            finally:
                with self._queue:
                    used = len(text.raw) if text.lost else len(pages)
                    for _ in range(used):
                        self._waiting_bytes -= text.raw.popleft()[0].nbytes
                    text.since, self._working = time.monotonic(), False
                    ended = text.done and not text.waits
                    if ended:
                        self._texts = OrderedDict((n, t) for n, t in self._texts.items() if t is not text)
                if ended:
                    self._drop(text)

    @torch.inference_mode()
    def _keep_run(self, text: _Text, pages: Sequence[torch.Tensor]) -> None:
        """Code and store pages that follow what is stored or coded of a text; a whole run closes, and the next one begins."""
        began = time.perf_counter()
        first = text.run + len(text.spans)
        start, end = first * PAGE_TOKENS, (first + len(pages)) * PAGE_TOKENS
        store = self.index.store
        self.pace.wait()
        whole = not text.spans and len(pages) == RUN_PAGES
        if whole and store.known_pages(root_key(self.index.identity(text.namespace)), text.token_ids[:end]) * PAGE_TOKENS >= end:
            text.run += RUN_PAGES  # the same text was coded while this one waited
            return
        with self._models, self._on_stream():  # not while it is coded, which takes longer than a request should wait
            features = self.passes.run(self._run_to(text, start), text.token_ids[start:end])
        skipped = span_bounds(first)[0] - start
        sizes = [b - a for a, b in map(span_bounds, range(first, first + len(pages)))]
        with self._beside_steps(features):
            positions = torch.arange(start, end, device=self.device)[skipped:]
            rows = self.serializer.join(torch.cat(list(pages))[skipped:, self.first_layer :], positions)
            loans, bounds = self._loans(text, end), [span_bounds(page) for page in range(first, first + len(pages))]
            quality = self.options.quality

            def earlier(residuals: Residuals) -> list[Earlier | None]:
                return loans.before(bounds, residuals, range(len(bounds)), quality)

            spans = self.serializer.encode(rows, features.part(skipped, end - start), sizes, quality, earlier)
        text.spans += spans
        identity = self.index.identity(text.namespace)
        report = store.insert(identity, text.token_ids[:end], text.spans, text.run, borrowed=loans.borrowed())
        if not report.whole:
            text.lost = True
        if len(text.spans) == RUN_PAGES:
            text.run, text.spans, text.borrowed, text.loans = text.run + RUN_PAGES, [], None, None
        self.metrics.saved_tokens += end - start
        self.metrics.saved_bytes += sum(map(len, spans))
        self.metrics.save_s += time.perf_counter() - began

    def _loans(self, text: _Text, end: int) -> Loans:
        """What the pages of a text's run up to token `end` may refer to. Pages that were stored go on referring to what they did."""
        if text.loans is None:
            root = root_key(self.index.identity(text.namespace))
            text.loans = Loans(
                self.serializer.codec, self.index.store, root, text.token_ids[:end], lambda tokens, lent: lent <= _MOST_LENT * tokens
            )
            if text.borrowed is not None:
                text.loans.adopt(text.run, text.borrowed)
        text.loans.go_on(text.token_ids[:end])
        return text.loans

    @contextmanager
    def _beside_steps(self, features: Features) -> Iterator[None]:
        """Coding yields to steps, and on a GPU goes to a stream of its own, after what made the features; under no lock."""
        stream = self._coding_stream
        if stream is not None and self._stream is not None:
            stream.wait_stream(self._stream)
            for rows in features:
                if rows is not None:
                    rows.record_stream(stream)
        with nullcontext() if stream is None else torch.cuda.stream(stream), Yielding(self.pace):
            yield

    def _make_room(self, tokens: int, text: _Text) -> None:
        """Free the caches of other texts, the oldest first, until so many tokens fit; under the lock of the models."""
        with self._queue:
            texts = list(self._texts.values())
        held = sum(t.state.length for t in texts if t.state is not None and t is not text)
        for other in texts:
            if held + tokens + RUN_TOKENS <= self.options.feature_tokens:
                return
            if other is not text and other.state is not None:
                held -= other.state.length
                self._drop(other)

    def _drop(self, text: _Text) -> None:
        with self._models:
            if text.state is not None:
                self.passes.close(text.state)
                text.state = None

    def _once(self, kind: str, message: str) -> None:
        """Say something, if nothing of its kind was said before."""
        if kind not in self._said:
            self._said.add(kind)
            self._log(message)


__all__ = ["PrefixIndex", "PrefixWorker", "StoreOptions", "WorkerMetrics"]
