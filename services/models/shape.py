"""Reads a network's `config.json` into the frozen dataclass of its shape, refusing what it does not know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any


def config_values(shape: type[Any], values: Mapping[str, Any], network: str) -> dict[str, Any]:
    """Keyword arguments for `shape`. Keys that start with `_` are notes of the library that wrote the file.

    Raises ValueError naming a key that is unknown or missing.
    """
    kept = {name: value for name, value in values.items() if not name.startswith("_")}
    known = {f.name for f in fields(shape)}
    needed = {f.name for f in fields(shape) if f.default is MISSING and f.default_factory is MISSING}
    if unknown := sorted(set(kept) - known):
        raise ValueError(f"unknown keys in the config of the {network}: {', '.join(unknown)}")
    if missing := sorted(needed - set(kept)):
        raise ValueError(f"missing keys in the config of the {network}: {', '.join(missing)}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
