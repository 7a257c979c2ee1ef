"""How answers are laid out: for a terminal as wide as it is, for a pipe whole."""

from __future__ import annotations

import io

import pytest
from fabula_cli.report import answers
from rich.table import Table


def shown(said: str, monkeypatch: pytest.MonkeyPatch, columns: str | None) -> str:
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", columns)
    table = Table()
    table.add_column(no_wrap=True)
    table.add_row(said)
    answers().print(table)
    return out.getvalue()


def test_a_pipe_gets_every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "a/path/of/many/parts" * 20
    assert long in shown(long, monkeypatch, None)
    assert "  \n" not in shown("short", monkeypatch, None), "and no line is wider than what it says"


def test_columns_says_where_the_edge_is(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown("word" * 30, monkeypatch, "60").splitlines()
    assert max(len(line) for line in lines) <= 60
    assert not any("word" * 30 in line for line in lines)
