"""What the caption service counts and times, for Prometheus: in a process of its own, or inside a Ray Serve replica.

The names are the same in both (Ray adds its own prefix). Labels have few values; no id is ever a label.
"""

from __future__ import annotations

from typing import Any

from services.runtime.telemetry import DURATION_BUCKETS

REQUESTS = ("caption_requests_total", "Requests that left the engine, by adapter and outcome.", ("adapter", "outcome"))
TOKENS = ("caption_tokens_total", "Tokens written, by adapter.", ("adapter",))
RUNNING = ("caption_running_requests", "Requests in the engine, waiting ones included.", ())
WRITING = ("caption_write_seconds", "Time from a request's arrival to its text, by adapter.", ("adapter",))

GUARDED = (
    "caption_guarded_texts_total",
    "Texts whose first try a guard found wrong, by guard and what became of them.",
    ("guard", "outcome"),
)


class PrometheusObserver:
    """Tells prometheus-client, in a process of its own. One per registry."""

    def __init__(self, registry: Any = None) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        registry = registry or REGISTRY
        self._requests = Counter(*REQUESTS, registry=registry)
        self._tokens = Counter(*TOKENS, registry=registry)
        self._running = Gauge(*RUNNING, registry=registry)
        self._guarded = Counter(*GUARDED, registry=registry)
        self._writing = Histogram(*WRITING, registry=registry, buckets=DURATION_BUCKETS)

    def load_changed(self, *, running: int) -> None:
        self._running.set(running)

    def text_done(self, *, adapter: str, outcome: str, tokens: int, seconds: float) -> None:
        self._requests.labels(adapter=adapter, outcome=outcome).inc()
        self._tokens.labels(adapter=adapter).inc(tokens)
        if outcome == "written":
            self._writing.labels(adapter=adapter).observe(seconds)

    def text_guarded(self, *, guard: str, outcome: str) -> None:
        self._guarded.labels(guard=guard, outcome=outcome).inc()


class ServeObserver:
    """Tells Ray Serve, in a replica: the numbers come out of Ray's metrics export with the replica's labels."""

    def __init__(self) -> None:
        from ray.serve import metrics

        self._requests = metrics.Counter(*REQUESTS)
        self._tokens = metrics.Counter(*TOKENS)
        self._running = metrics.Gauge(*RUNNING)
        self._guarded = metrics.Counter(*GUARDED)
        name, description, labels = WRITING
        self._writing = metrics.Histogram(name, description, list(DURATION_BUCKETS), labels)

    def load_changed(self, *, running: int) -> None:
        self._running.set(running)

    def text_done(self, *, adapter: str, outcome: str, tokens: int, seconds: float) -> None:
        self._requests.inc(1, tags={"adapter": adapter, "outcome": outcome})
        if tokens > 0:  # Ray's counters refuse zero
            self._tokens.inc(tokens, tags={"adapter": adapter})
        if outcome == "written":
            self._writing.observe(seconds, tags={"adapter": adapter})

    def text_guarded(self, *, guard: str, outcome: str) -> None:
        self._guarded.inc(1, tags={"guard": guard, "outcome": outcome})
