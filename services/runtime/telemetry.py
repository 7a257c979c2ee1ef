"""Logs and metrics: JSON lines that carry the request and trace id, Prometheus metrics with few-valued labels.

User texts (captions, descriptions) are never logged; ids are log fields and never metric labels.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest

from services.runtime.call import current_call

# Seconds. From an edge call of a millisecond to a frame of minutes on a slow machine.
DURATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


def configure_logging(service: str, level: str = "info") -> None:
    """Sends every log line of this process, libraries' included, to standard error as JSON. Call once, at the start."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        _call_ids,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )

    def name_service(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["service"] = service
        return event

    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            name_service,
            structlog.processors.JSONRenderer(),
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    # Libraries tell of themselves only when something is wrong, or when somebody is looking.
    root.setLevel(level.upper() if level in ("debug", "error") else "WARNING")
    logging.getLogger("fabula").setLevel(level.upper())


def _call_ids(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    call = current_call()
    if call is not None:
        event.setdefault("request_id", call.request_id)
        event.setdefault("trace_id", call.trace_id)
    return event


def metrics_page(registry: CollectorRegistry = REGISTRY) -> tuple[bytes, str]:
    """What `/metrics` answers: the text and its content type."""
    return generate_latest(registry), CONTENT_TYPE_LATEST
