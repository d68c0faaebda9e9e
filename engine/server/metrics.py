"""What the server counts, in Prometheus' text form under the names that dashboards made for vLLM read, and for the page."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest

from engine.runtime.request import GenerationResult

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 320, 640)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
RATE_WINDOW_S = 5.0


class ServerMetrics:
    """Counters of all requests together; nothing in them tells one caller's from another's.

    Args:
        model: its name, a label of every figure.
        gauges: name -> a function of now, read when the metrics are: running and waiting requests, share of the KV pool that requests hold.
        preemptions: how often a request was interrupted for want of pages, so far.
        store: figures of the store of prefixes, where there is one; its numbers are `foretold:store_...`.
    """

    def __init__(
        self,
        model: str,
        gauges: dict[str, Callable[[], float]],
        preemptions: Callable[[], int],
        store: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._gauges, self._preemptions, self._store = gauges, preemptions, store
        self.registry.register(self)  # type: ignore[arg-type]  # a collector is whatever has collect()
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens processed")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated")
        self._queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self._hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self._drafts = self._counter("vllm:spec_decode_num_drafts", "Target steps of requests")
        self._draft_tokens = self._counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted")
        self._accepted = self._counter("vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were accepted")
        self._accepted_at = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted drafts by their position in the block",
            ("model_name", "position"),
            registry=self.registry,
        )
        self._success = Counter("vllm:request_success", "Requests finished", ("model_name", "finished_reason"), registry=self.registry)
        self._refused = self._counter("foretold:requests_refused", "Requests answered with 429")
        self._cancelled = self._counter("foretold:requests_cancelled", "Requests whose client went away")
        self._failed = self._counter("foretold:requests_failed", "Requests ended by an error")
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "From arrival to the first token", _SECONDS)
        self._per_token = self._histogram("vllm:time_per_output_token_seconds", "Mean time of a request's later tokens", _TOKEN_SECONDS)
        self._latency = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token", _SECONDS)
        self._request_prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request", _COUNTS)
        self._request_generation = self._histogram("vllm:request_generation_tokens", "Generated tokens of a request", _COUNTS)
        self._recent: deque[tuple[float, int]] = deque()
        self._proposed_at: list[int] = []
        self._kept_at: list[int] = []
        self._totals = {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0, "cancelled": 0, "failed": 0}

    def _counter(self, name: str, text: str) -> Counter:
        made = Counter(name, text, ("model_name",), registry=self.registry)
        return made.labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(name, text, ("model_name",), buckets=buckets, registry=self.registry)
        return made.labels(self._model)

    # --- counting -------------------------------------------------------------------------------------------------------

    def tokens(self, count: int) -> None:
        """Some tokens were generated just now."""
        now = time.monotonic()
        self._recent.append((now, count))
        while self._recent and now - self._recent[0][0] > RATE_WINDOW_S:
            self._recent.popleft()

    def refused(self) -> None:
        """A request was answered with 429."""
        self._refused.inc()

    def cancelled(self) -> None:
        """A request's client went away."""
        self._cancelled.inc()
        self._totals["cancelled"] += 1

    def finished(self, submitted_at: float, result: GenerationResult | None) -> None:
        """A request ended: with a result, or without by an error. submitted_at: of `time.perf_counter`."""
        self._totals["requests"] += 1
        if result is None:
            self._failed.inc()
            self._totals["failed"] += 1
            return
        self._prompt_tokens.inc(result.prompt_tokens)
        self._generation_tokens.inc(result.new_tokens)
        self._queries.inc(result.prompt_tokens)
        self._hits.inc(result.reused_tokens)
        self._totals["prompt_tokens"] += result.prompt_tokens
        self._totals["cached_tokens"] += result.reused_tokens
        self._totals["generated_tokens"] += result.new_tokens
        speculation = result.speculation
        self._drafts.inc(speculation.steps)
        self._draft_tokens.inc(speculation.proposed)
        self._accepted.inc(speculation.accepted)
        missing = len(speculation.accepted_at) - len(self._kept_at)
        self._kept_at += [0] * missing
        self._proposed_at += [0] * missing
        for position, (tried, kept) in enumerate(zip(speculation.proposed_at, speculation.accepted_at, strict=True)):
            self._accepted_at.labels(self._model, str(position)).inc(kept)
            self._proposed_at[position] += tried
            self._kept_at[position] += kept
        reason = "length" if result.finish_reason == "length" else "stop"
        self._success.labels(self._model, reason).inc()
        self._ttft.observe(result.ttft_s)
        if result.new_tokens > 1:
            self._per_token.observe(result.decode_s / (result.new_tokens - 1))
        self._latency.observe(time.perf_counter() - submitted_at)
        self._request_prompt.observe(result.prompt_tokens)
        self._request_generation.observe(result.new_tokens)

    # --- reading --------------------------------------------------------------------------------------------------------

    def collect(self) -> list[GaugeMetricFamily | CounterMetricFamily]:
        """What is read when it is asked for, for the registry."""
        values = {name: read() for name, read in self._gauges.items()}
        if self._store is not None:
            values |= {f"foretold:store_{name}": value for name, value in self._store().items() if isinstance(value, (int, float))}
        interrupted = CounterMetricFamily("vllm:num_preemptions", "Requests interrupted for want of pages", labels=("model_name",))
        interrupted.add_metric((self._model,), self._preemptions())
        found: list[GaugeMetricFamily | CounterMetricFamily] = [interrupted]
        for name, value in values.items():
            family = GaugeMetricFamily(name, name.split(":")[-1].replace("_", " "), labels=("model_name",))
            family.add_metric((self._model,), value)
            found.append(family)
        return found

    def exposition(self) -> bytes:
        """Everything in Prometheus' text form."""
        return generate_latest(self.registry)

    def summary(self) -> dict[str, Any]:
        """What the page shows: tokens_per_s over the last seconds, totals, acceptance by position, gauges."""
        now = time.monotonic()
        recent = sum(count for at, count in list(self._recent) if now - at <= RATE_WINDOW_S)
        pairs = zip(self._kept_at, self._proposed_at, strict=True)
        return {
            "tokens_per_s": recent / RATE_WINDOW_S,
            "totals": dict(self._totals),
            "accepted_by_position": [kept / tried if tried else 0.0 for kept, tried in pairs],
            "gauges": {name: read() for name, read in self._gauges.items()},
        }
