"""What Prometheus is told of the guards; the rest is tested with the real engine, in the contract tests."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from services.caption.metrics import GUARDED, PrometheusObserver, ServeObserver


def test_guarded_texts_are_counted_by_guard_and_outcome() -> None:
    registry = CollectorRegistry()
    observer = PrometheusObserver(registry)
    observer.text_guarded(guard="name_lock", outcome="repaired")
    observer.text_guarded(guard="name_lock", outcome="repaired")
    observer.text_guarded(guard="repetition", outcome="kept_faulty")

    def counted(guard: str, outcome: str) -> float | None:
        return registry.get_sample_value("caption_guarded_texts_total", {"guard": guard, "outcome": outcome})

    assert counted("name_lock", "repaired") == 2
    assert counted("repetition", "kept_faulty") == 1
    assert counted("repetition", "second_choice") is None


def test_a_replica_of_ray_counts_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = pytest.importorskip("ray.serve.metrics")
    counted: dict[str, list[dict[str, str]]] = {}

    class Metric:
        def __init__(self, name: str, *_: object) -> None:
            self.told = counted.setdefault(name, [])

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert value == 1
            self.told.append(tags)

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, Metric)
    ServeObserver().text_guarded(guard="repetition", outcome="second_choice")
    assert counted[GUARDED[0]] == [{"guard": "repetition", "outcome": "second_choice"}]
