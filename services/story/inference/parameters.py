"""Parameters of an inference request, read by name, kind and range.

Pure. What nobody asked about is unknown, and unknown parameters are refused: a misspelt one would else be left out in
silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from services.runtime.errors import UnknownField, ValueOutOfRange

INTEGERS = ("int64_param", "uint64_param")


class Parameters:
    """Those of one request. Read each that is known, then `finish`."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._parameters = parameters
        self._known: set[str] = set()

    def integer(self, name: str, least: int, most: int) -> int | None:
        """A whole number from `least` to `most`, or None when it is absent. Raises ValueOutOfRange."""
        kind, value = self._take(name)
        if kind is None:
            return None
        if kind not in INTEGERS:
            raise _refused(name, "a whole number is needed")
        if not least <= value <= most:
            raise _refused(name, f"it is {value}; it must be from {least} to {most}")
        return int(value)

    def number(self, name: str, least: float, most: float) -> float | None:
        """A number from `least` to `most`, or None when it is absent. Raises ValueOutOfRange."""
        kind, value = self._take(name)
        if kind is None:
            return None
        if kind not in (*INTEGERS, "double_param"):
            raise _refused(name, "a number is needed")
        if not (math.isfinite(value) and least <= value <= most):
            raise _refused(name, f"it is {value:g}; it must be from {least:g} to {most:g}")
        return float(value) + 0.0  # -0.0 becomes 0.0

    def text(self, name: str, most: int = 255) -> str | None:
        """A text of at most `most` characters, or None when it is absent. Raises ValueOutOfRange."""
        kind, value = self._take(name)
        if kind is None:
            return None
        if kind != "string_param":
            raise _refused(name, "a text is needed")
        if len(value) > most:
            raise _refused(name, f"it has {len(value)} characters; at most {most} are taken")
        return str(value)

    def word(self, name: str, words: tuple[str, ...]) -> str | None:
        """One of `words`, or None when it is absent. Raises ValueOutOfRange."""
        value = self.text(name)
        if value is not None and value not in words:
            raise _refused(name, f"it is {value!r}; it must be {' or '.join(words)}")
        return value

    def flag(self, name: str) -> bool:
        """True or false; false when it is absent. Raises ValueOutOfRange."""
        kind, value = self._take(name)
        if kind not in (None, "bool_param"):
            raise _refused(name, "true or false is needed")
        return bool(value)

    def finish(self) -> None:
        """Raises UnknownField for a parameter that was not read."""
        for name in self._parameters:
            if name not in self._known:
                raise UnknownField(
                    f"parameters: none is called {name[:100]!r}; known here: {', '.join(sorted(self._known))}",
                    field=name[:100],
                )

    def _take(self, name: str) -> tuple[str | None, Any]:
        self._known.add(name)
        if name not in self._parameters:
            return None, None
        kind = self._parameters[name].WhichOneof("parameter_choice")
        if kind is None:
            raise _refused(name, "it has no value")
        return kind, getattr(self._parameters[name], kind)


def put_parameters(parameters: Any, values: Mapping[str, bool | int | float | str]) -> None:
    """Writes the parameters of a response, each in the field of its kind."""
    for name, value in values.items():
        match value:
            case bool():
                parameters[name].bool_param = value
            case int():
                parameters[name].int64_param = value
            case float():
                parameters[name].double_param = value
            case str():
                parameters[name].string_param = value


def _refused(name: str, why: str) -> ValueOutOfRange:
    return ValueOutOfRange(f"{name}: {why}", field=name)
