"""Many requests of one stream, and the catalog of models: who is answered, who is asked, who is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from services.runtime.errors import ModelUnknown, Unavailable, ValueOutOfRange
from services.story.inference.catalog import MEMORY_S, SILENCE_S, Catalog, ModelName, parse
from services.story.inference.stream import MOST_UNSENT, answer_stream

DIGEST = "a" * 64


async def several(*requests: Any) -> AsyncIterator[Any]:
    for request in requests:
        yield request


async def test_each_request_is_answered_and_the_stream_ends() -> None:
    async def answer(request: int) -> AsyncGenerator[str, None]:
        for part in range(request):
            await asyncio.sleep(0)
            yield f"{request}.{part}"

    got = [each async for each in answer_stream(several(3, 0, 2), answer, most=8)]
    assert sorted(got) == ["2.0", "2.1", "3.0", "3.1", "3.2"]
    for request in "23":  # one request's answers keep their order
        own = [each for each in got if each.startswith(request)]
        assert own == sorted(own)


async def test_answers_come_as_they_are_made_not_in_the_order_of_requests() -> None:
    slow_may_go = asyncio.Event()

    async def answer(request: str) -> AsyncGenerator[str, None]:
        if request == "slow":
            await slow_may_go.wait()
        yield request

    stream = answer_stream(several("slow", "quick"), answer, most=8)
    assert await anext(stream) == "quick"
    slow_may_go.set()
    assert [each async for each in stream] == ["slow"]


async def test_no_more_than_allowed_are_read() -> None:
    read: list[int] = []
    go_on = asyncio.Event()

    async def requests() -> AsyncIterator[int]:
        for number in range(6):
            read.append(number)
            yield number

    async def answer(request: int) -> AsyncGenerator[int, None]:
        await go_on.wait()
        yield request

    stream = answer_stream(requests(), answer, most=2)
    first = asyncio.create_task(anext(stream))
    for _ in range(50):
        await asyncio.sleep(0)
    assert read == [0, 1]
    go_on.set()
    assert {await first, *[each async for each in stream]} == set(range(6))


async def test_a_slow_reader_holds_up_the_answering() -> None:
    made = 0

    async def answer(request: int) -> AsyncGenerator[int, None]:
        nonlocal made
        for number in range(100):
            made += 1
            yield number

    stream = answer_stream(several(0), answer, most=1)
    await anext(stream)
    for _ in range(300):
        await asyncio.sleep(0)
    assert made <= MOST_UNSENT + 3
    assert len([each async for each in stream]) == 99


async def test_closing_it_stops_what_is_in_progress() -> None:
    ended: list[int] = []

    async def requests() -> AsyncIterator[int]:
        yield 1
        yield 2
        await asyncio.Event().wait()

    async def answer(request: int) -> AsyncGenerator[int, None]:
        try:
            while True:
                yield request
                await asyncio.sleep(0)
        finally:
            ended.append(request)

    stream = answer_stream(requests(), answer, most=8)
    seen = {await anext(stream) for _ in range(20)}
    assert seen == {1, 2}
    await stream.aclose()
    assert sorted(ended) == [1, 2]
    assert len(asyncio.all_tasks()) == 1, "no task is left"


async def test_a_connection_that_breaks_is_no_end() -> None:
    async def requests() -> AsyncIterator[int]:
        yield 1
        raise ConnectionError("gone")

    async def answer(request: int) -> AsyncGenerator[int, None]:
        await asyncio.Event().wait()
        yield request

    with pytest.raises(ExceptionGroup, match="unhandled"):
        async for _ in answer_stream(requests(), answer, most=8):
            pass


# -- the catalog -------------------------------------------------------------------------------------------------------


class Services:
    """Two services, their packs, and how often they were asked."""

    def __init__(self) -> None:
        self.packs = {"frame": ["tiny"], "caption": ["tiny"]}
        self.silent: set[str] = set()
        self.asked: list[str] = []
        self.now_s = 0.0
        self.catalog = Catalog(
            {"frame": lambda: self._list("frame"), "caption": lambda: self._list("caption")}, lambda: self.now_s
        )

    async def _list(self, kind: str) -> tuple[Any, ...]:
        self.asked.append(kind)
        if kind in self.silent:
            raise Unavailable()
        return tuple(SimpleNamespace(name=name) for name in self.packs[kind])


def test_names_are_taken_apart() -> None:
    assert parse("frame/tiny") == ModelName("frame", "tiny")
    assert parse("caption/tiny") == ModelName("caption", "tiny")
    character = parse(f"frame/tiny/{DIGEST}")
    assert character == ModelName("frame", "tiny", DIGEST)
    assert str(character) == f"frame/tiny/{DIGEST}"
    for name in ("", "tiny", "story/tiny", "frame", "frame/", f"caption/tiny/{DIGEST}"):
        with pytest.raises(ModelUnknown):
            parse(name)
    for name in ("frame/tiny/Pip", f"frame/tiny/{DIGEST}/x", f"frame/tiny/{DIGEST.upper()}"):
        with pytest.raises(ValueOutOfRange):
            parse(name)


async def test_packs_are_asked_for_once_in_a_while() -> None:
    services = Services()
    assert (await services.catalog.find("frame/tiny", "1")).name == ModelName("frame", "tiny")
    await services.catalog.find("frame/tiny")
    assert services.asked == ["frame"]
    services.now_s = MEMORY_S + 1
    await services.catalog.find("frame/tiny")
    assert services.asked == ["frame", "frame"]


async def test_a_name_that_is_not_there_is_asked_for_at_once() -> None:
    services = Services()
    await services.catalog.find("frame/tiny")
    services.packs["frame"].append("new")
    assert (await services.catalog.find("frame/new")).pack.name == "new"
    with pytest.raises(ModelUnknown, match="there are frame/tiny, frame/new"):
        await services.catalog.find("frame/nowhere")
    with pytest.raises(ModelUnknown, match="version '2'"):
        await services.catalog.find("frame/tiny", "2")


async def test_a_silent_services_last_answer_counts() -> None:
    services = Services()
    services.silent = {"frame"}
    with pytest.raises(Unavailable, match="the frame service does not answer"):
        await services.catalog.find("frame/tiny")
    with pytest.raises(Unavailable):
        await services.catalog.find("frame/tiny")
    assert services.asked == ["frame"], "it is left alone for a while"
    services.silent = set()
    services.now_s += SILENCE_S + 0.1
    await services.catalog.find("frame/tiny")
    services.silent = {"frame"}
    services.now_s += MEMORY_S + 1
    assert (await services.catalog.find("frame/tiny")).pack.name == "tiny"
    with pytest.raises(Unavailable):
        await services.catalog.find("frame/other")
    assert not (await services.catalog.ask("frame")).answered
