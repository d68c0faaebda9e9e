"""An engine's prefixes in a store: what is known of a prompt comes back before it runs, what is new is coded and kept behind the answer."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from codec.errors import CodecError
from codec.spec import NUM_SINKS
from engine.errors import ForetoldError, InvalidOption
from engine.inputs import is_whole, shown
from engine.kv.shared_prefixes import SharedPrefixes
from engine.runtime.core import EngineCore
from engine.runtime.request import Request, SequenceState
from engine.sessions.codec_params import pair_fingerprints
from engine.sessions.file import Span
from engine.sessions.fitting import PackFitting, fitting_beside
from engine.sessions.kv_codec import SessionCodec, known_codec, session_codec
from engine.sessions.rates import SHORTEST, known_rates, measuring, rates_of
from engine.sessions.restore import SpanRestore
from engine.sessions.session import AUTO, AUTO_QUALITY, SESSION_QUALITIES, TOKENS
from engine.sessions.stages import Rates
from engine.store.borrowing import Loans, resolved
from engine.store.host_tier import HitMetrics, HostTier
from engine.store.restoring import TROUBLE, StoredRestore
from engine.store.runs import LABEL, PAGE_TOKENS, RUN_PAGES, root_key, span_bounds
from engine.store.store import RunStore, StoredPrefix

DEFAULT_NAMESPACE = "default"
PIECE_PAGES = {"cpu": 1, "cuda": 16 * RUN_PAGES}
"""Pages coded at a time, by device, between which requests are served: less than a tenth of a second's work."""

_PATIENCE_S = 0.5  # how long a busy engine is waited for before a piece is coded between two of its steps
# the same for a piece of measuring rates, of up to a second, and how long the fitting of codec parameters waits: both are made once for a pair
_ONCE_PATIENCE_S = 60.0
_POLL_S = 0.01
_MAX_TOLD = 1 << 14
_EXIT_S = 60.0  # for what is left to be coded when the process ends
# where codec parameters are being fitted still: broken off, they would never be there for a process that takes no longer
_EXIT_FITTING_S = 300.0


@dataclass
class PrefixMetrics:
    """What the store did for this engine's requests.

    lookups, hits: requests that asked, and that got something. hit_tokens: restored. lookup_s, restore_s: seconds before first tokens. saved_s: what
    computing them was measured to take, less restore_s. lent_tokens: of other stored texts, decoded because restored ones refer to them. kept_*: stored
    behind answers (kept_referring: runs that refer to other texts), and the seconds that took. evicted_runs: to make room for them.
    skipped: requests whose known prefix was not worth restoring, or must be exact.
    """

    lookups: int = 0
    hits: int = 0
    hit_tokens: int = 0
    lookup_s: float = 0.0
    restore_s: float = 0.0
    saved_s: float = 0.0
    skipped: int = 0
    lent_tokens: int = 0
    kept_runs: int = 0
    kept_referring: int = 0
    kept_tokens: int = 0
    kept_bytes: int = 0
    evicted_runs: int = 0
    keep_s: float = 0.0


@dataclass(eq=False)
class _Job:
    """A conversation to be kept. page: those before it are stored. tail: spans of pages [page, page + len(tail)), coded, or stored in a shorter run."""

    conversation: SequenceState
    namespace: str
    since: float
    page: int | None = None
    tail: list[bytes | None] = field(default_factory=list)
    quality: str = TOKENS
    saved_token_s: float = 0.0
    owned: bool = False  # it is closed here once it is kept
    loans: Loans | None = None


class PrefixCache:
    """Keeps an engine's conversations in a store, and restores prefixes from there. `attach` it to the engine.

    A prefix that was coded comes back with the codec's loss, so requests whose text is promised to the bit, seeded ones and all of a deterministic
    engine, are not restored; they are kept like all others.

    Args:
        core: the engine. store: opened; `close` closes it.
        namespace: whose prefixes a request sees, unless it names another.
        quality: as of sessions: "auto" codes at "balanced" where restoring is faster on this machine than computing, and keeps ids alone elsewhere.
        pack: the codec parameters' file; default: the pair's own. Where there are none they are fitted by a process of their own, on a CPU, and nothing
            is restored or kept before they are there (`fitting_beside`); else now.
        memory_bytes: of coded pages that stay in host memory, so that a hit reads no file; 0: none.
        log: told once of each kind of trouble, which costs no request its answer.

    Raises:
        InvalidOption: an unknown quality, an empty namespace. PackMismatch: the pack is another pair's.
    """

    def __init__(
        self,
        core: EngineCore,
        store: RunStore,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        quality: str = AUTO,
        pack: str | Path | None = None,
        log: Callable[[str], None] = print,
        memory_bytes: int = 0,
    ) -> None:
        if not is_whole(memory_bytes) or memory_bytes < 0:
            raise InvalidOption(f"a store cannot hold {shown(memory_bytes)} bytes in memory", "give a whole number, 0 for none")
        if quality not in SESSION_QUALITIES:
            raise InvalidOption(f"unknown quality {quality!r}", f"choose one of {', '.join(SESSION_QUALITIES)}")
        if not isinstance(namespace, str):
            raise InvalidOption(f"a namespace cannot be {shown(namespace)}", "give a text of 1 to 256 characters")
        if not namespace or len(namespace) > 256:
            raise InvalidOption(f"a namespace of {len(namespace)} characters", "give 1 to 256")
        self.core, self.store, self.namespace, self.quality = core, store, namespace, quality
        self.metrics = PrefixMetrics()
        self._log = log
        self._jobs: deque[_Job] = deque()
        self._said: set[str] = set()
        self._wake, self._keeping, self._closing = threading.Event(), threading.Lock(), False
        self._num_threads = torch.get_num_threads()
        self._worker: threading.Thread | None = None
        # now, so that features are kept for it from the first request on
        self.codec: SessionCodec | None = None
        self._fitting: PackFitting | None = None
        self._busy_since: float | None = None  # since when requests have kept it from running
        if quality != TOKENS:
            self.codec = known_codec(core, pack, log)
            if self.codec is None and (fitting := fitting_beside(core)) is not None:
                self._fitting = fitting
                log(
                    "no codec parameters for this pair yet: they are fitted beside what is served, and the store keeps nothing before they are there"
                )
            elif self.codec is None:
                self.codec = session_codec(core, pack, log)
        if self.codec is not None:
            self.codec.make_ready()
        self._prints = pair_fingerprints(core)
        self._shared: SharedPrefixes | None = None
        self.memory_bytes, self.disk = memory_bytes, HitMetrics()
        self.host: HostTier | None = None  # made when it is known what restoring takes here
        self._measuring: Generator[None, None, None] | None = None
        self._told: set[bytes] = set()  # runs whose tokens requests may have as drafts already

    def attach(self) -> PrefixCache:
        """Serve the engine from now on, until `close`. On a CPU layers with a window then hold all of a text, as any beginning of it may be stored."""
        self.core.prefix_store, self._shared = self, self.core.share_restored()
        self.core.hold_whole_texts(self.quality != TOKENS)
        if self._fitting is not None:
            self._start_worker()
        reference = weakref.ref(self)

        def leave() -> None:
            cache = reference()
            if cache is not None:
                cache.close(_EXIT_S if cache._fitting is None else _EXIT_FITTING_S)

        self._at_exit = leave
        atexit.register(leave)
        return self

    # --- before a request -----------------------------------------------------------------------------------------------

    def restore(self, request: Request) -> StoredRestore | None:
        """See `PrefixStore.restore`."""
        if (fitting := self._fitting) is not None:
            self._busy_since = self._busy_since or time.monotonic()
            fitting.pause(True)
        try:
            self._foretell(request)
            return self._restore(request)
        except TROUBLE as error:
            self._not_restored(error)
            return None

    def _not_restored(self, error: Exception) -> None:
        self._once("restore", f"a stored prefix could not be restored: {error}")

    def _foretell(self, request: Request) -> None:
        """Let the request's drafts come from what followed its prompt in stored texts of its namespace, other processes' included."""
        seen, ids = request.drafting.seen, request.token_ids
        if seen is None:
            return
        for known in self.store.continuations(root_key(self._identity(request.namespace)), ids):
            if known.key not in self._told:
                self._told.add(known.key)
                seen.add([*ids, *known.token_ids], len(ids), round(known.uses))
        if len(self._told) > _MAX_TOLD:
            self._told.clear()

    def _restore(self, request: Request) -> StoredRestore | None:
        began = time.perf_counter()
        have = request.sequence.length
        codec = self.codec
        if codec is None or have % PAGE_TOKENS or len(request.token_ids) - 1 - have < PAGE_TOKENS:
            return None
        self.metrics.lookups += 1
        # at least one token is left to run, for its logits
        root = root_key(self._identity(request.namespace))
        found, in_memory = self._found(root, request.token_ids[:-1], have // PAGE_TOKENS)
        self.metrics.lookup_s += time.perf_counter() - began
        tokens = found.num_tokens - have
        if tokens <= 0:
            return None
        lent, datas, borrows = resolved(codec.codec, found)
        num_lent = 0 if lent is None else lent.num_lent_tokens
        rates = rates_of(codec, 0, self._log)
        spoken = request.params.greedy and request.own_pages is not None  # from numbers that a code would not give back
        promised = self.core.deterministic or request.params.seed is not None or spoken
        if promised or (rates is not None and not rates.pays(tokens, num_lent)):
            self.metrics.skipped += 1
            return None
        spans = [
            Span(*span_bounds(page), data, borrows=needs)
            for page, data, needs in zip(range(found.start_page, found.end_page), datas, borrows, strict=True)
        ]

        def ended(came: int, took_s: float, whole: bool) -> None:
            if not came:
                return
            self.metrics.hits += 1
            self.metrics.hit_tokens += came
            self.metrics.lent_tokens += num_lent
            self.metrics.restore_s += took_s
            saved_s = 0.0 if rates is None else rates.recomputing(came) - took_s
            self.metrics.saved_s += saved_s
            from_host = min(came, max(0, in_memory * PAGE_TOKENS - have))
            self.disk.add(came - from_host, saved_s * (came - from_host) / came)
            if self.host is not None:
                self.host.metrics.add(from_host, saved_s * from_host / came)
                if whole:
                    with self._trouble("memory", "a restored prefix could not be kept in memory"):
                        self.host.insert(root, request.token_ids, found)

        restore = SpanRestore(codec, request.conversation, spans, lent)
        return StoredRestore(
            self.core,
            request,
            restore,
            time.perf_counter() - began,
            came=partial(self._came, request, spans),
            ended=ended,
            failed=self._not_restored,
        )

    def _came(self, request: Request, spans: list[Span], before: int, count: int) -> None:
        """The next `count` spans are back in a request's caches, which held `before` tokens: the next request that begins so needs no decoding."""
        conversation, state = request.conversation, request.draft_state
        if before != (conversation.restored_spans[-1].end if conversation.restored_spans else 0):
            return
        end = conversation.sequence.length
        came = [span for span in spans if before < span.end <= end]
        assert len(came) == count, "a piece is whole spans"
        conversation.restored_spans = [*conversation.restored_spans, *came]
        if self._shared is not None:
            draft = None if state is None or self.core.draft_pool is None or not state.shareable else state.cache
            ids, namespace = request.token_ids[:end], request.namespace or ""
            with self._trouble("share", "a restored prefix could not be shared"):
                self._shared.insert_restored(ids, namespace, conversation.sequence, draft, conversation.restored_spans)

    def _found(self, root: bytes, token_ids: list[int], start_page: int) -> tuple[StoredPrefix, int]:
        """What is stored of a text, in memory or in files, and the page up to which it lay in memory."""
        if self.host is None:
            return self.store.lookup(root, token_ids, start_page, referring=True), 0
        near = self.host.lookup(root, token_ids, start_page)
        if near.end_page == len(token_ids) // PAGE_TOKENS:
            return near, near.end_page
        middle = max(start_page, near.end_page - near.end_page % RUN_PAGES)  # files are read by whole runs
        far = self.store.lookup(root, token_ids, middle, referring=True)
        if far.end_page <= near.end_page:
            return near, near.end_page
        borrowed = {at: own for at, own in near.borrowed.items() if at < middle} | dict(far.borrowed)
        spans = near.spans[: middle - start_page] + far.spans
        return StoredPrefix(start_page, far.end_page, spans, far.keys, borrowed, far.first_pages), middle

    # --- behind an answer -----------------------------------------------------------------------------------------------

    def finished(self, request: Request) -> None:
        """See `PrefixStore.finished`."""
        if self._closing or request.error is not None or request.sequence.length < PAGE_TOKENS:
            return
        # a shorter beginning of this text would read what is not there
        if request.conversation.windows_from or not request.sequence.sees(0):
            return
        if self._job_of(request.conversation) is None:
            self._jobs.append(_Job(request.conversation, request.namespace or self.namespace, time.monotonic()))
        self._start_worker()
        self._wake.set()

    def _start_worker(self) -> None:
        if self._worker is None:
            self._worker = threading.Thread(
                target=_work, args=(weakref.ref(self), self._wake, self._num_threads), name="foretold-store", daemon=True
            )
            self._worker.start()

    def take_over(self, conversation: SequenceState) -> bool:
        """See `PrefixStore.take_over`."""
        job = self._job_of(conversation)
        if job is None:
            return False
        job.owned = True
        return True

    def yield_pages(self) -> bool:
        """See `PrefixStore.yield_pages`."""
        if self._end_measuring():  # which can be done anew
            return True
        owned = [job for job in self._jobs if job.owned]
        for job in owned:
            self._end(job)
        return bool(owned)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Keep now what waits to be kept, once codec parameters that are being fitted are there; False when the time was too short. Any thread may call
        it; interrupted, it leaves the rest unkept."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while self._jobs:
                if until is not None and time.monotonic() > until:
                    return False
                if self._awaits_codec():
                    self._once("awaits", "waiting for codec parameters to be fitted, to keep what was generated")
                    time.sleep(_POLL_S)
                else:
                    self._keep_some()
        except KeyboardInterrupt:
            with self.core.lock:
                for job in list(self._jobs):
                    self._end(job)
            raise
        return True

    def close(self, timeout_s: float | None = None) -> bool:
        """`flush`, detach from the engine and close the store. Requests go on without it."""
        if self._closing:
            return True
        done = self.flush(timeout_s)
        self._closing = True
        self._wake.set()
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join(timeout=5.0)
        with self.core.lock:
            for job in list(self._jobs):
                self._end(job)
            self._end_measuring()
            if self._fitting is not None:
                self._fitting.end()
            if self.core.prefix_store is self:
                self.core.prefix_store = None
                self.core.hold_whole_texts(False)
        atexit.unregister(self._at_exit)
        self.store.close()
        return done

    def report(self) -> dict[str, Any]:
        """Metrics of this engine's requests, and the store's totals, for JSON."""
        runs, num_bytes = self.store.totals
        return asdict(self.metrics) | {
            "folder": str(self.store.folder),
            "namespace": self.namespace,
            "runs": runs,
            "bytes": num_bytes,
            "limit_bytes": self.store.limit_bytes,
            "damaged": self.store.damaged,
            "tiers": self._tiers(num_bytes),
            "shared_hits": 0 if self._shared is None else self._shared.metrics.restored_hits,
            "shared_tokens": 0 if self._shared is None else self._shared.metrics.restored_tokens,
        }

    def _tiers(self, disk_bytes: int) -> dict[str, dict[str, Any]]:
        """Bytes, hits and seconds saved of what lies in the pools, in memory and in files."""
        codec, hot = self.codec, {"bytes": 0, "hits": 0, "hit_tokens": 0, "saved_s": 0.0}
        if self._shared is not None:
            shared, rates = self._shared.metrics, None if codec is None else codec.rates
            hot["bytes"] = self._shared.num_pages * self.core.pool.page_bytes
            hot["hits"], hot["hit_tokens"] = shared.hits, shared.hit_tokens
            if rates is not None and shared.hits:  # of hits alike: unlike ones saved more
                hot["saved_s"] = shared.hits * rates.recomputing(shared.hit_tokens // shared.hits)
        tiers = {"hot": hot, "disk": {"budget_bytes": self.store.limit_bytes, "bytes": disk_bytes} | asdict(self.disk)}
        if self.host is not None:
            tiers["host"] = self.host.report()
        return tiers

    def _job_of(self, conversation: SequenceState) -> _Job | None:
        return next((job for job in self._jobs if job.conversation is conversation), None)

    def _end(self, job: _Job) -> None:
        """Forget a job, and close its conversation if that was left to it; under the engine's lock."""
        if job in self._jobs:
            self._jobs.remove(job)
            if job.owned:
                self.core.discard(job.conversation)
        if not self._jobs:
            self._end_measuring()

    def work_once(self) -> bool:
        """Code a piece if the engine is idle, or has been busy for long; False when there is nothing to do or not yet."""
        if not self._jobs or self._closing:
            return False
        try:
            job = self._jobs[0]
        except IndexError:
            return False
        if not self.core.scheduler.idle:
            waited_s = time.monotonic() - job.since
            if waited_s < _PATIENCE_S or (waited_s < _ONCE_PATIENCE_S and self._lacks_rates(job)):
                return False
        self._keep_some()
        return True

    def _awaits_codec(self) -> bool:
        """Whether codec parameters are being fitted still. Those that are there now are taken; without, ids alone are kept."""
        with self._keeping:
            fitting = self._fitting
            if fitting is None:
                return False
            if fitting.running:
                self._give_way(fitting)
                return True
            why, self._fitting = fitting.failure(), None
            fitting.end()
            codec: SessionCodec | None = None
            try:
                with self.core.lock:
                    codec = known_codec(self.core, None, self._log)
                if codec is not None:
                    codec.make_ready()
            except (ForetoldError, CodecError, OSError, MemoryError) as error:
                codec, why = None, str(error)
            if codec is None:
                self._once(
                    "fit", f"the store keeps ids alone, as no codec parameters could be fitted: {why or 'they are not in the cache'}"
                )
                with self.core.lock:
                    self.core.hold_whole_texts(False)
            else:
                self._log("codec parameters are fitted: texts are kept from now on, those that waited for it, too")
            self.codec = codec
            return False

    def _give_way(self, fitting: PackFitting) -> None:
        """Let the fitting of codec parameters run while no request does, or when some have for long."""
        if self.core.scheduler.idle:
            self._busy_since = None
        elif self._busy_since is None:
            self._busy_since = time.monotonic()
        fitting.pause(self._busy_since is not None and time.monotonic() - self._busy_since < _ONCE_PATIENCE_S)

    def _keep_some(self) -> None:
        """Code a piece of the oldest job, and store it where it completes a run or the text."""
        with self._keeping:  # one piece after the other, as each continues the one before
            self._keep_piece()

    def _keep_piece(self) -> None:
        began = time.perf_counter()
        with self.core.lock, torch.inference_mode():
            if not self._jobs:
                return
            job = self._jobs[0]
            done = True
            try:
                if self._measures(job):
                    job.since = time.monotonic()
                    return
                done = self._code_piece(job)
            except (ForetoldError, CodecError, MemoryError) as error:
                self._once("code", f"a conversation could not be coded for the store: {error}")
            except BaseException:
                self._end(job)
                raise
            if job not in self._jobs:
                return
            chunk = self._complete(job, done)
            if done and chunk is None:
                self._end(job)
            job.since = time.monotonic()
        if chunk is None:
            self.metrics.keep_s += time.perf_counter() - began
            return
        # written without the lock: syncs take milliseconds
        identity, ids, spans, first, saved_token_s = chunk
        borrowed = None if job.loans is None else job.loans.borrowed()
        kept = False
        try:
            report = self.store.insert(identity, ids, spans, first, saved_token_s, borrowed)
            kept = report.whole
            self.metrics.kept_runs += report.runs
            self.metrics.kept_referring += report.referring
            self.metrics.kept_tokens += report.tokens
            self.metrics.kept_bytes += report.bytes
            self.metrics.evicted_runs += report.evicted
        except (ForetoldError, OSError) as error:
            self._once("write", f"nothing can be kept in the store: {error}")
        self.metrics.keep_s += time.perf_counter() - began
        if self.host is not None:
            self._keep_in_memory(root_key(identity), ids, first, spans, {} if borrowed is None else borrowed)
        if done or not kept:
            with self.core.lock:
                self._end(job)

    def _keep_in_memory(
        self, root: bytes, ids: list[int], first: int, spans: list[bytes | None], borrowed: Mapping[int, tuple[Any, tuple[int, ...]]]
    ) -> None:
        """Keep what was coded in memory, too; from a span on that refers to other runs not before it is read with them."""
        alone: list[bytes] = []
        for page, span in enumerate(spans, first):
            at = page - page % RUN_PAGES
            if span is None or (at in borrowed and borrowed[at][1][page - at]):
                break
            alone.append(span)
        assert self.host is not None
        have = self.host.known_pages(root, ids)
        if have < first:  # read behind the answer
            before = self.store.lookup(root, ids[: first * PAGE_TOKENS], have, referring=True)
            if before.end_page < first or not self.host.insert(root, ids, before):
                return
        self.host.insert(root, ids, StoredPrefix(first, first + len(alone), alone, []))

    def _lacks_rates(self, job: _Job) -> bool:
        """Whether a job needs rates, and they are not known yet."""
        if self.codec is None or job.page is not None or known_rates(self.codec) is not None:
            return False
        return min(job.conversation.sequence.length, len(job.conversation.token_ids)) >= SHORTEST

    def _measures(self, job: _Job) -> bool:
        """Take the next step of measuring rates, where a job lacks them; False where there is nothing to measure."""
        if self.codec is None or not self._lacks_rates(job):
            return False
        if self._measuring is None:
            self._measuring = measuring(self.codec, self._log)
        try:
            next(self._measuring)
        except StopIteration:
            self._measuring = None
            return self.codec.rates is not None  # the pool may have no room for it: the job is done without
        except BaseException:
            self._measuring = None
            raise
        return True

    def _end_measuring(self) -> bool:
        """Give back the pages that rates are being measured in; they are measured from the beginning, later. Whether there were any."""
        if self._measuring is None:
            return False
        self._measuring.close()
        self._measuring = None
        return True

    def _code_piece(self, job: _Job) -> bool:
        """Code the next pages of a job into its tail; True when none is left."""
        conversation = job.conversation
        pages = min(conversation.sequence.length, len(conversation.token_ids)) // PAGE_TOKENS
        ids = conversation.token_ids[: pages * PAGE_TOKENS]
        if job.page is None:
            self._begin(job, ids)
        assert job.page is not None
        start, codec = job.page + len(job.tail), self.codec
        if start >= pages:
            job.tail = []  # all of it is stored
            return True
        if job.quality == TOKENS or codec is None:
            job.tail += [None] * (pages - start)
            return True
        end = min(pages, start + PIECE_PAGES[self.core.device.type])
        if not _has_features(conversation, codec, start * PAGE_TOKENS, end * PAGE_TOKENS):
            end = pages  # one pass over all of the text gives them back
        if job.loans is not None:
            job.loans.go_on(ids)
        made = codec.encode(conversation, max(NUM_SINKS, start * PAGE_TOKENS), end * PAGE_TOKENS, job.quality, sources=job.loans)
        assert [(s.start, s.end) for s in made] == [span_bounds(page) for page in range(start, end)]
        job.tail += [bytes(s.data) for s in made]
        return end == pages

    def _begin(self, job: _Job, ids: list[int]) -> None:
        """Find out what of a text is stored already, and count its use."""
        job.quality, rates = self._coding(len(ids))
        if self.memory_bytes and self.host is None and rates is not None:
            self.host = HostTier(self.memory_bytes, rates)
        job.saved_token_s = 0.0 if rates is None else rates.saved_token_s(len(ids))
        root = root_key(self._identity(job.namespace))
        job.page = self.store.known_pages(root, ids, coded=job.quality != TOKENS)
        found = self.store.lookup(root, ids, job.page, referring=True)
        job.tail = list(found.spans)
        if job.quality != TOKENS and self.codec is not None:
            pays = (lambda tokens, lent: True) if rates is None else rates.lending_pays
            job.loans = Loans(self.codec.codec, self.store, root, ids, pays)
            for start, borrowed in found.borrowed.items():
                job.loans.adopt(start, borrowed)
        self.store.touch(self.store.keys_of(root, ids[: job.page * PAGE_TOKENS]) + found.keys)

    def _complete(self, job: _Job, done: bool) -> tuple[dict[str, str], list[int], list[bytes | None], int, float] | None:
        """Take whole runs off a job's tail, and with `done` all of it: what `RunStore.insert` takes. None where that is nothing."""
        count = len(job.tail) if done else len(job.tail) - len(job.tail) % RUN_PAGES
        if not count or job.page is None:
            return None
        spans, first = job.tail[:count], job.page
        job.tail, job.page = job.tail[count:], job.page + count
        ids = job.conversation.token_ids[: job.page * PAGE_TOKENS]
        return self._identity(job.namespace), ids, spans, first, job.saved_token_s

    # --- models ---------------------------------------------------------------------------------------------------------

    def _coding(self, tokens: int) -> tuple[str, Rates | None]:
        """At which quality a conversation of so many tokens is coded; "tokens" where restoring it would not pay."""
        if self.codec is None:
            return TOKENS, None
        rates = rates_of(self.codec, tokens, self._log)
        if self.quality != AUTO:
            return self.quality, rates
        return (AUTO_QUALITY if rates is not None and rates.pays(tokens) else TOKENS), rates

    def _identity(self, namespace: str | None) -> dict[str, str]:
        """What the root of a namespace's texts stands for, with this engine's models."""
        config = self.core.config
        return {
            **self._prints,
            "pack": "none" if self.codec is None else self.codec.pack.digest,
            "quality": AUTO_QUALITY if self.quality == AUTO else self.quality,
            "namespace": namespace or self.namespace,
            LABEL: config.pair or (config.target_dir.name if config.target_dir is not None else ""),
        }

    @contextmanager
    def _trouble(self, kind: str, message: str) -> Iterator[None]:
        """Say what goes wrong, once; whoever is served goes on."""
        try:
            yield
        except TROUBLE as error:
            self._once(kind, f"{message}: {error}")

    def _once(self, kind: str, message: str) -> None:
        """Say something, if nothing of its kind was said before."""
        if kind not in self._said:
            self._said.add(kind)
            self._log(message)


def _work(reference: weakref.ref[PrefixCache], wake: threading.Event, num_threads: int) -> None:
    """The worker's loop: it ends with its cache."""
    torch.set_num_threads(num_threads)  # a new thread begins with another number, and rounds otherwise
    pause_s = 1.0
    while True:
        wake.wait(pause_s)
        wake.clear()
        cache = reference()
        if cache is None or cache._closing:
            return
        while not cache._closing:  # held meanwhile: an engine that is dropped is kept first
            try:
                if cache._awaits_codec() or not cache._jobs:
                    break
                worked = cache.work_once()
            except Exception as error:  # whatever it is, the engine goes on
                cache._once("worker", f"the store's worker failed: {type(error).__name__}: {error}")
                worked = False
            if not worked:
                time.sleep(_POLL_S)
        pause_s = 1.0 if cache._fitting is None else _POLL_S
        del cache


def _has_features(conversation: SequenceState, codec: SessionCodec, start: int, end: int) -> bool:
    """Whether coding tokens [start, end) takes no pass over what comes before: features were kept, or the draft has yet to run these tokens."""
    state = conversation.draft_state
    if not codec.predictor.spec.taps:
        return True
    if state is None or state.features is None:
        return False
    held = min(end, state.features.length)
    return held <= start or state.features.take(start, held) is not None  # type: ignore[attr-defined]
