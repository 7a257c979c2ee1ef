"""The weights store: read once, kept within a budget, never taken from who wears it."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.frame.adapters import AdapterStore, NetworkPlaces, SlotTable
from services.models.lora import Adapter


def adapter(digest: str, size_bytes: int = 10) -> Adapter:
    return Adapter(digest=digest, factors={}, deltas={"a": torch.zeros(1)}, size_bytes=size_bytes)


def test_an_adapter_is_read_once_however_many_want_it() -> None:
    store, started, release = AdapterStore(100), threading.Barrier(5), threading.Event()
    reads: list[str] = []

    def read() -> Adapter:
        reads.append("a")
        assert release.wait(10)
        return adapter("a")

    found: list[Adapter] = []

    def want() -> None:
        started.wait(10)
        found.append(store.get("toon", "a", read))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    started.wait(10)
    other = store.get("toon", "b", lambda: adapter("b"))  # nobody waits for another one's file
    assert other.digest == "b"
    release.set()
    for thread in threads:
        thread.join(10)
    assert reads == ["a"]
    assert len({id(one) for one in found}) == 1
    assert store.loads_count == 2


def test_a_failed_read_is_tried_again_by_the_next() -> None:
    store = AdapterStore(100)

    def fails() -> Adapter:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        store.get("toon", "a", fails)
    assert store.get("toon", "a", lambda: adapter("a")).digest == "a"


def test_the_least_recently_used_leave_first() -> None:
    store = AdapterStore(25)
    for digest in ("a", "b", "a", "c"):
        store.get("toon", digest, lambda d=digest: adapter(d))  # type: ignore[misc]
    assert store.kept_bytes == 20
    assert store.loads_count == 3
    store.get("toon", "a", lambda: pytest.fail("it was used last"))
    store.get("toon", "b", lambda: adapter("b"))
    assert store.loads_count == 4
    huge = store.get("toon", "huge", lambda: adapter("huge", 99))
    assert huge.size_bytes == 99, "what is wanted now is read, whatever it weighs"
    assert store.kept_bytes == 119, "one such is kept beside what the budget holds"


def test_packs_do_not_share_what_was_checked_against_one_of_them() -> None:
    store = AdapterStore(100)
    store.get("toon", "a", lambda: adapter("a"))
    with pytest.raises(ValueError, match="other"):
        store.get("sd15", "a", lambda: (_ for _ in ()).throw(ValueError("other")))


def test_a_slot_is_shared_and_freed_by_the_last_wearer() -> None:
    table = SlotTable(2)
    assert table.wear("a") == (1, True)
    assert table.wear("a") == (1, False)
    assert table.wear("b") == (2, True)
    assert table.wear("c") is None, "both are worn"
    table.take_off(["a"])
    assert table.wear("c") is None, "one wearer is left"
    table.take_off(["a"])
    assert table.wear("c") == (1, True)
    assert table.resident == ("b", "c")
    with pytest.raises(ValueError, match="nobody"):
        table.take_off(["a"])


def test_the_one_worn_longest_ago_makes_room() -> None:
    table = SlotTable(2)
    for digest in ("a", "b", "a"):
        table.wear(digest)
        table.take_off([digest])
    assert table.wear("c") == (2, True)
    assert table.resident == ("a", "c")


def test_a_slot_that_could_not_be_filled_is_free_again() -> None:
    table = SlotTable(1)
    table.wear("a")
    table.forget("a")
    assert table.wear("b") == (1, True)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef")), max_size=80), st.integers(1, 4))
def test_whatever_is_worn_keeps_its_slot(moves: list[tuple[bool, str]], count: int) -> None:
    table, worn, places = SlotTable(count), Counter[str](), {}
    for puts_on, digest in moves:
        if puts_on:
            place = table.wear(digest)
            if place is None:
                assert len(+worn) == count
                continue
            if worn[digest]:
                assert place == (places[digest], False)
            worn[digest] += 1
            places[digest] = place[0]
        elif worn[digest]:
            table.take_off([digest])
            worn[digest] -= 1
        now = [places[name] for name in +worn]
        assert len(set(now)) == len(now)
        assert all(1 <= slot <= count for slot in now)


def test_of_what_is_larger_than_the_budget_the_newest_is_kept_and_puts_nobody_out() -> None:
    store = AdapterStore(100)
    small, large = adapter("a", 60), adapter("b", 101)
    store.get("toon", "a", lambda: small)
    assert store.get("toon", "b", lambda: large) is large
    assert store.kept_bytes == 161
    store.get("toon", "c", lambda: adapter("c", 200))
    assert store.kept_bytes == 260
    assert store.get("toon", "a", lambda: pytest.fail("it was put out")) is small


def test_what_somebody_still_holds_is_not_read_again() -> None:
    """Two that are larger than the budget, asked for in turn, while both are worn."""
    store, reads = AdapterStore(5), Counter[str]()

    def get(digest: str) -> Adapter:
        def read() -> Adapter:
            reads[digest] += 1
            return adapter(digest)

        return store.get("toon", digest, read)

    worn = {digest: get(digest) for digest in "ab"}
    assert [get(digest) is worn[digest] for digest in "abab"] == [True] * 4
    assert reads == {"a": 1, "b": 1}
    assert store.has("toon", "a")
    worn.clear()
    get("b")
    assert not store.has("toon", "a")
    assert store.drop("b")
    assert not store.has("toon", "b")


def test_a_network_that_is_put_out_is_read_again_though_somebody_holds_it() -> None:
    store = AdapterStore(100)
    old = store.get("toon", "a", lambda: adapter("a"))
    store.drop("a")
    assert store.get("toon", "a", lambda: adapter("a")) is not old


def test_networks_have_so_many_places() -> None:
    places = NetworkPlaces(2)
    assert [places.enter(key, 0.0) for key in "abac"] == [True, True, True, False]
    places.leave("a")
    assert not places.enter("c", 1.0), "somebody uses it still"
    places.leave("a")
    assert places.enter("c", 1.0)
    with pytest.raises(ValueError, match="nobody"):
        places.leave("a")


def test_networks_that_everybody_asks_for_starve_nobody() -> None:
    """Both hot ones always have a user, the next one before the last has left; two others go on asking."""
    places, came = NetworkPlaces(2, patience_s=5.0), dict[str, int]()
    used = {key for key in "ab" if places.enter(key, 0.0)}
    for second in range(1, 60):
        for cold in sorted({"c", "d"} - came.keys()):
            if places.enter(cold, float(second)):
                came[cold] = second
                places.leave(cold)  # drawn before the next one asks
        for hot in "ab":
            has_entered = places.enter(hot, float(second))
            if hot in used:
                places.leave(hot)
                used.discard(hot)
            if has_entered:
                used.add(hot)
    assert list(came) == ["c", "d"]
    assert used, "and the hot ones are drawn as well"


def test_who_asks_no_more_holds_up_nobody() -> None:
    places = NetworkPlaces(1, patience_s=5.0, forgotten_s=30.0)
    assert places.enter("a", 0.0)
    assert not places.enter("b", 1.0)
    assert not places.enter("a", 7.0), "b's turn comes first"
    assert places.enter("a", 40.0)


def test_nobody_is_held_up_for_one_in_line_while_a_place_is_free() -> None:
    places = NetworkPlaces(2, patience_s=5.0)
    assert [places.enter(key, 0.0) for key in "abc"] == [True, True, False]
    places.leave("b")
    assert places.enter("a", 7.0), "c may come at any time"
    assert places.enter("c", 8.0)
