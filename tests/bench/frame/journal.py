"""Keeps what a long bench has measured, round by round, so that it can be stopped and gone on with.

A journal is a file of JSON lines. The first says what was measured (`Journal.of`): figures of other code, another pack
or another machine do not mix. The others are rounds of a part of the bench, each complete or not there, and what else
that part found out. Ratios are taken within a round, so it does not matter that hours lie between two of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SOURCES = ("services/models", "services/frame", "tests/bench/frame")
_ROOT = Path(__file__).resolve().parents[3]


class OtherJournal(Exception):
    """The file tells of other code, another pack or another machine. Remove it or choose another."""


def sources_digest() -> str:
    """16 hex digits of the code that is measured."""
    found = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((_ROOT / folder).rglob("*.py")):
            found.update(str(path.relative_to(_ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


class Journal:
    """Rounds by part. With a path, every one of them is in the file before the next begins."""

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        """Goes on with what is at `path`. Raises OtherJournal."""
        self._path = path
        self._rounds: dict[str, list[dict[str, float]]] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        lines = [] if path is None or not path.exists() else path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
            except ValueError:
                if number == len(lines) - 1:  # whoever wrote it was killed
                    break
                raise
            if "about" in entry:
                if entry["about"] != json.loads(json.dumps(about)):
                    raise OtherJournal(
                        f"{path} is of {entry['about']}, this is {dict(about)}; remove it, or another file"
                    )
            elif "round" in entry:
                self._rounds.setdefault(entry["part"], []).append(entry["round"])
            else:
                self._facts.setdefault(entry["part"], {}).update(entry["facts"])
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept: list[dict[str, Any]] = [{"about": dict(about)}]
            kept += [{"part": part, "facts": facts} for part, facts in self._facts.items()]
            kept += [{"part": part, "round": one} for part, rounds in self._rounds.items() for one in rounds]
            path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def rounds(self, part: str) -> Sequence[Mapping[str, float]]:
        """Those that are there."""
        return tuple(self._rounds.get(part, ()))

    def columns(self, part: str) -> dict[str, list[float]]:
        """The same by what was measured."""
        rounds = self.rounds(part)
        return {name: [one[name] for one in rounds] for name in (rounds[0] if rounds else ())}

    def facts(self, part: str) -> Mapping[str, Any]:
        """What else is known."""
        return dict(self._facts.get(part, {}))

    def add(self, part: str, measured: Mapping[str, float]) -> None:
        """One more round."""
        self._rounds.setdefault(part, []).append(dict(measured))
        self._write({"part": part, "round": dict(measured)})

    def note(self, part: str, facts: Mapping[str, Any]) -> None:
        """Something that needs no second look."""
        self._facts.setdefault(part, {}).update(facts)
        self._write({"part": part, "facts": dict(facts)})

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
