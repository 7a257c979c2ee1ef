"""What `fabula doctor` is told of the databases."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from services.checkup import check_databases
from services.customization.database import FILE_NAME, database_url, upgrade


def test_each_service_s_database_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABULA_HOME", str(tmp_path))
    assert [(one.name, one.ok) for one in check_databases()] == [
        ("database of story", True),
        ("database of customization", True),
    ], "made at the first start"
    upgrade(database_url("", tmp_path))
    assert all(one.ok for one in check_databases())
    (tmp_path / FILE_NAME).unlink()
    sqlite3.connect(tmp_path / FILE_NAME).close()
    sqlite3.connect(tmp_path / "fabula.db").close()
    found = list(check_databases())
    assert [one.ok for one in found] == [False, False]
    assert ["services.story migrate" in found[0].mend, "services.customization migrate" in found[1].mend] == [True] * 2
    (tmp_path / FILE_NAME).write_bytes(b"no database" * 1000)
    assert "DatabaseError" in list(check_databases())[1].detail


def test_where_training_keeps_its_files_is_no_unknown_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FABULA_HOME", str(tmp_path))
    monkeypatch.setenv("FABULA_TRAINING_DIR", str(tmp_path))
    assert len(list(check_databases())) == 2
