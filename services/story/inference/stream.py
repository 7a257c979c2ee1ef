"""Many requests on one stream: they are answered side by side, and their answers come as they are made.

Knows nothing of what is asked. Backpressure both ways: of a client that sends much, what is beyond `most` stays unread;
for one that reads slowly, answering pauses.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")
MOST_UNSENT = 8  # answers that wait for a slow reader; each may hold a picture


async def answer_stream(
    requests: AsyncIterator[Request], answer: Callable[[Request], AsyncGenerator[Answer, None]], *, most: int
) -> AsyncGenerator[Answer, None]:
    """The answers to all requests, until there are no more of them and each is answered.

    Closing it cancels what is in progress. `answer` must not raise: that ends the stream for everybody on it.
    """
    unsent: asyncio.Queue[Answer | None] = asyncio.Queue(MOST_UNSENT)
    room = asyncio.Semaphore(most)

    async def one(request: Request) -> None:
        try:
            async with aclosing(answer(request)) as answers:
                async for each in answers:
                    await unsent.put(each)
        finally:
            room.release()

    async def every() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    await room.acquire()
                    try:
                        request = await anext(requests)
                    except StopAsyncIteration:
                        break
                    group.create_task(one(request))
        except Exception:
            await unsent.put(None)  # not when cancelled: then nobody is left who would take it
            raise
        await unsent.put(None)

    working = asyncio.create_task(every())
    try:
        while (message := await unsent.get()) is not None:
            yield message
        await working
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
