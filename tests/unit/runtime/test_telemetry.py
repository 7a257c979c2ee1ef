"""Log lines are JSON, carry the call's ids, and speak up for libraries only when something is wrong."""

from __future__ import annotations

import json
import logging

import pytest
import structlog

from services.runtime.call import Call, calling
from services.runtime.telemetry import configure_logging, metrics_page


def test_lines_are_json_with_the_calls_ids(capsys: pytest.CaptureFixture[str]) -> None:
    handlers, level = logging.getLogger().handlers, logging.getLogger().level
    try:
        configure_logging("story", "info")
        with calling(Call(request_id="r", traceparent=f"00-{'a' * 32}-{'b' * 16}-01")):
            structlog.get_logger("fabula.x").info("something", count=3)
        logging.getLogger("alembic").info("chatter")
        logging.getLogger("alembic").warning("trouble")
        try:
            raise ValueError("why")
        except ValueError as error:
            structlog.get_logger("fabula.x").error("broken", exc_info=error)
    finally:
        logging.getLogger().handlers, logging.getLogger().level = handlers, level
        structlog.reset_defaults()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["something", "trouble", "broken"]
    assert lines[0]["service"] == "story"
    assert lines[0]["count"] == 3
    assert (lines[0]["request_id"], lines[0]["trace_id"]) == ("r", "a" * 32)
    assert "ValueError: why" in lines[2]["exception"]


def test_the_metrics_page_is_prometheus_text() -> None:
    page, kind = metrics_page()
    assert b"# HELP" in page
    assert kind.startswith("text/plain")
