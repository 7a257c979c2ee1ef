"""Pages: every item once, in order, and tokens that cannot be made up."""

from __future__ import annotations

import base64
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.errors import PageTokenInvalid
from services.runtime.paging import DEFAULT_PAGE, MOST_PAGE, cut, page_size, place_after

NUMBER = re.compile(r"\d{1,9}")


@given(count=st.integers(0, 60), size=st.integers(1, 20))
def test_pages_hold_every_item_once_and_an_empty_token_is_the_end(count: int, size: int) -> None:
    listed, seen, token = list(range(count)), [], ""
    while True:
        last = place_after(token, NUMBER)
        found = [one for one in listed if last is None or one > int(last[0])][: size + 1]
        page, token = cut(found, size, str)
        assert len(page) <= size
        seen += page
        if not token:
            break
        assert len(page) == size
    assert seen == listed


@pytest.mark.parametrize(("asked", "size"), [(0, DEFAULT_PAGE), (1, 1), (200, 200), (201, MOST_PAGE), (10**9, 200)])
def test_a_page_is_as_large_as_is_asked_for_within_bounds(asked: int, size: int) -> None:
    assert page_size(asked) == size


@pytest.mark.parametrize("told", ["", "x", "12 ", "1" * 10, "12\n", "-1"])
def test_a_place_that_no_list_has_is_refused(told: str) -> None:
    token = base64.urlsafe_b64encode(told.encode()).decode() or "===="
    with pytest.raises(PageTokenInvalid) as raised:
        place_after(token, NUMBER)
    assert raised.value.field_violations[0].field == "page_token"


@given(st.text(min_size=1))
def test_no_text_makes_it_fail_otherwise(token: str) -> None:
    try:
        place = place_after(token, NUMBER)
    except PageTokenInvalid:
        return
    assert place is not None
    assert NUMBER.fullmatch(place[0])
