"""Lists page by page: how large a page is, and the token that leads to the next. Pure; knows no list.

A token is a place in a list, told so that nobody takes it for more: whatever a client sends back is checked against the
form that the list's own places have. A list is asked for one more than a page has, so that an empty token is its end
and nothing else is.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from services.runtime.errors import PageTokenInvalid

DEFAULT_PAGE = 50
MOST_PAGE = 200

Item = TypeVar("Item")


def page_size(asked: int) -> int:
    """How many a page has; zero asks for the usual number."""
    return min(asked or DEFAULT_PAGE, MOST_PAGE)


def place_after(token: str, form: re.Pattern[str]) -> re.Match[str] | None:
    """The place that a token tells of; None at a list's beginning. Raises PageTokenInvalid."""
    if not token:
        return None
    try:
        padded = token + "=" * (-len(token) % 4)
        told = base64.b64decode(padded, altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        raise PageTokenInvalid(field="page_token") from None
    if (place := form.fullmatch(told)) is None:
        raise PageTokenInvalid(field="page_token")
    return place


def cut(found: Sequence[Item], size: int, place: Callable[[Item], str]) -> tuple[tuple[Item, ...], str]:
    """A page of at most `size`, and the token of the next one: empty when nothing was found beyond it."""
    page = tuple(found[:size])
    if len(found) <= size:
        return page, ""
    return page, base64.urlsafe_b64encode(place(page[-1]).encode()).decode().rstrip("=")
