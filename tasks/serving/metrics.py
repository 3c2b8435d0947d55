"""What the server counts, in the text format of Prometheus. Labels are names of budgets, never content of requests."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """Counters of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self):
        self._registry = registry = CollectorRegistry()
        by_budget = {"labelnames": ("budget",), "registry": registry}
        outcomes = {"labelnames": ("budget", "outcome"), "registry": registry}
        self._texts = Counter("elastic_texts", "Texts by how they ended: stop, length or an error", **outcomes)
        self._prompt = Counter("elastic_prompt_tokens", "Tokens of prompts", **by_budget)
        self._cached = Counter("elastic_cached_tokens", "Of these, those of texts that were read before", **by_budget)
        self._generated = Counter("elastic_generated_tokens", "Tokens that were generated", **by_budget)
        self._refused = Counter("elastic_refused", "Requests that found the queue full", registry=registry)
        spans = by_budget | {"buckets": SECONDS}
        self._first = Histogram("elastic_first_token_seconds", "Time from a request to its first token", **spans)
        self._whole = Histogram("elastic_text_seconds", "Time from a request to the end of its text", **spans)
        self._waiting = Gauge("elastic_waiting", "Texts in the queue", registry=registry)
        self._running = Gauge("elastic_running", "Texts that are being continued", registry=registry)

    def watch(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Take the two gauges from these functions."""
        self._waiting.set_function(waiting)
        self._running.set_function(running)

    def refused(self) -> None:
        self._refused.inc()

    def first_token(self, budget: str, seconds: float) -> None:
        self._first.labels(budget).observe(seconds)

    def ended(self, budget: str, outcome: str, seconds: float, prompt: int, cached: int, generated: int) -> None:
        self._texts.labels(budget, outcome).inc()
        self._whole.labels(budget).observe(seconds)
        for counter, number in ((self._prompt, prompt), (self._cached, cached), (self._generated, generated)):
            counter.labels(budget).inc(number)

    def text(self) -> bytes:
        return generate_latest(self._registry)
