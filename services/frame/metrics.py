"""What the frame service counts and times, for Prometheus: in a process of its own, or inside a Ray Serve replica.

The names are the same in both (Ray adds its own prefix). Labels have few values; no id is ever a label.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from services.runtime.telemetry import DURATION_BUCKETS

if TYPE_CHECKING:  # torch comes with it
    from services.models.step import StepRows

COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "frame_jobs_total": ("Jobs that left the engine, by outcome.", ("outcome",)),
    "frame_refused_jobs_total": ("Jobs that were not taken, by reason.", ("reason",)),
    "frame_steps_total": ("Denoising steps of the engine.", ()),
    "frame_job_steps_total": ("Steps of jobs: divided by frame_steps_total, how many jobs share a step.", ()),
    "frame_rows_total": ("Network rows computed in denoising steps, by kind.", ("kind",)),
    "frame_reference_rows_found_total": ("Reference rows that a step needed and the cache held.", ()),
    "frame_flops_total": ("Floating-point operations of denoising steps, from rows; two a multiply-add.", ()),
    "frame_adapter_loads_total": ("Characters' weights that were read from the store.", ()),
}
GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "frame_queued_jobs": ("Jobs that wait for room.", ()),
    "frame_running_jobs": ("Jobs being denoised.", ()),
    "frame_adapters_resident": ("Characters' weights that lie in the networks.", ()),
    "frame_adapters_kept_bytes": ("Characters' weights that are kept in memory.", ()),
    "frame_peak_flops": ("Operations a second that this machine does at best, measured at start.", ()),
}
HISTOGRAMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "frame_step_seconds": ("Time of one denoising step.", ()),
    "frame_queue_seconds": ("Time a job waited for room.", ()),
    "frame_render_seconds": ("Time from a job's start to its picture.", ()),
}


class Meters(Protocol):
    """The three things a metrics library does."""

    def add(self, name: str, value: float, labels: Mapping[str, str]) -> None: ...
    def put(self, name: str, value: float) -> None: ...
    def observe(self, name: str, value: float) -> None: ...


class PrometheusMeters:
    """prometheus-client's, for a process of its own. One per registry."""

    def __init__(self, registry: Any = None) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        registry = registry or REGISTRY
        self._counters = {n: Counter(n, doc, labels, registry=registry) for n, (doc, labels) in COUNTERS.items()}
        self._gauges = {n: Gauge(n, doc, labels, registry=registry) for n, (doc, labels) in GAUGES.items()}
        self._histograms = {
            n: Histogram(n, doc, labels, registry=registry, buckets=DURATION_BUCKETS)
            for n, (doc, labels) in HISTOGRAMS.items()
        }

    def add(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        counter = self._counters[name]
        (counter.labels(**labels) if labels else counter).inc(value)

    def put(self, name: str, value: float) -> None:
        self._gauges[name].set(value)

    def observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)


class ServeMeters:
    """Ray Serve's, for a replica: they come out of Ray's metrics export with the replica's labels."""

    def __init__(self) -> None:
        from ray.serve import metrics

        self._counters = {n: metrics.Counter(n, doc, labels) for n, (doc, labels) in COUNTERS.items()}
        self._gauges = {n: metrics.Gauge(n, doc, labels) for n, (doc, labels) in GAUGES.items()}
        self._histograms = {
            n: metrics.Histogram(n, doc, list(DURATION_BUCKETS), labels) for n, (doc, labels) in HISTOGRAMS.items()
        }

    def add(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        if value > 0:  # Ray's counters refuse zero
            self._counters[name].inc(value, tags=dict(labels))

    def put(self, name: str, value: float) -> None:
        self._gauges[name].set(value)

    def observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)


class MeteredObserver:
    """Tells a metrics library what the engine does."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters
        self._load = (-1, -1)

    def step_done(self, *, jobs: int, rows: StepRows, seconds: float, flops: float) -> None:
        self._meters.add("frame_steps_total", 1.0, {})
        self._meters.add("frame_job_steps_total", float(jobs), {})
        self._meters.add("frame_rows_total", float(rows.main - rows.shallow), {"kind": "frame"})
        self._meters.add("frame_rows_total", float(rows.shallow), {"kind": "shallow"})
        self._meters.add("frame_rows_total", float(rows.computed), {"kind": "reference"})
        self._meters.add("frame_reference_rows_found_total", float(rows.found), {})
        self._meters.add("frame_flops_total", flops, {})
        self._meters.observe("frame_step_seconds", seconds)

    def job_done(self, *, outcome: str, queue_s: float, render_s: float) -> None:
        self._meters.add("frame_jobs_total", 1.0, {"outcome": outcome})
        self._meters.observe("frame_queue_seconds", queue_s)
        if outcome == "rendered":
            self._meters.observe("frame_render_seconds", render_s)

    def job_refused(self, *, reason: str) -> None:
        self._meters.add("frame_refused_jobs_total", 1.0, {"reason": reason})

    def load_changed(self, *, queued: int, running: int) -> None:
        if (queued, running) != self._load:
            self._load = (queued, running)
            self._meters.put("frame_queued_jobs", float(queued))
            self._meters.put("frame_running_jobs", float(running))

    def adapters_changed(self, *, resident: int, kept_bytes: int, loads: int) -> None:
        self._meters.put("frame_adapters_resident", float(resident))
        self._meters.put("frame_adapters_kept_bytes", float(kept_bytes))
        self._meters.add("frame_adapter_loads_total", float(loads), {})

    def peak_measured(self, *, flops_per_s: float) -> None:
        self._meters.put("frame_peak_flops", flops_per_s)
