"""Errors as clients of the inference protocol see them.

Such a client shows one line: the status message. So it begins with our stable reason and names the tensor or parameter
that is wrong, by the client's word for it; `google.rpc.Status` carries the same for programs, as everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from services.runtime.errors import FabulaError, FieldViolation, ModelUnknown, PackUnknown

Names = Mapping[str, str]
"""What another service's name for a field (a whole one, as a regular expression) is here, with its groups."""


@contextmanager
def naming(names: Names) -> Iterator[None]:
    """Errors that leave the block speak of tensors and parameters."""
    try:
        yield
    except FabulaError as error:
        raise _renamed(error, names) from None


def renamed(field: str, names: Names) -> str:
    """A field by its name here; one that has none keeps its own."""
    for pattern, name in names.items():
        if match := re.fullmatch(pattern, field):
            return match.expand(name)
    return field


def with_reason(error: FabulaError) -> FabulaError:
    """The same error, its reason in its message too."""
    if not error.message.startswith(f"{error.reason}: "):
        error.message = f"{error.reason}: {error.message}"
    return error


def _renamed(error: FabulaError, names: Names) -> FabulaError:
    if isinstance(error, PackUnknown):  # unloaded since we asked what is loaded
        return ModelUnknown(error.message, metadata=error.metadata)
    error.field_violations = tuple(
        FieldViolation(renamed(each.field, names), each.description) for each in error.field_violations
    )
    if "field" in error.metadata:
        error.metadata["field"] = renamed(error.metadata["field"], names)
    if error.field_violations and error.field_violations[0].field not in error.message:
        error.message = f"{error.field_violations[0].field}: {error.message}"
    return error
