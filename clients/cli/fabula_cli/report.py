"""How a command answers: one JSON document on standard output with `--json`, text for people without. Progress never
mixes in."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import unicodedata
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

_PIPED_COLUMNS = 1000  # so many that nothing is cut short for whoever reads a file or a pipe


def answers() -> Console:
    """As wide as the terminal or as `COLUMNS` says; what is no terminal has no edge."""
    edge = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(highlight=False, width=None if edge else _PIPED_COLUMNS)


people = answers()
aside = Console(stderr=True, highlight=False)  # progress and errors


def plain(value: Any) -> Any:
    """A value as JSON knows it: dataclasses as objects, times in ISO 8601, bytes left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        return {name: plain(each) for name, each in named.items() if not isinstance(each, bytes)}
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    return value


def clean(text: str) -> str:
    """A model's or a stranger's text, safe to show: control characters could steer a terminal or break a page."""
    steering = ("Cc", "Cs")  # control characters and lone surrogates
    return "".join(" " if unicodedata.category(each) in steering and each != "\n" else each for each in text)


def say_json(value: Any, *, indent: int | None = 1) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(plain(value), indent=indent, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def fail(message: str, *, status: int, as_json: bool = False, reason: str = "FAILED", **more: Any) -> NoReturn:
    """Says what is wrong and ends the command with `status`."""
    if as_json:
        say_json({"error": {"reason": reason, "message": message, **more}})
    else:
        aside.print(f"[bold red]✗[/] {escape(clean(message))}")
    raise typer.Exit(status)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
