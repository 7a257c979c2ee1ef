"""Has untrusted pictures decoded in a child process. The child serves one picture at a time and lives on; one that dies
or takes too long is replaced, and only the picture that killed it is refused.
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from services.runtime.errors import (
    ImageTooLarge,
    ImageTooSmall,
    ImageUnreadable,
    InvalidArgument,
    QueueFull,
    Unavailable,
)
from services.story.metrics import DECODE_SECONDS

DECODER = Path(__file__).with_name("decoder.py")
DECODE_TIMEOUT_S = 15.0
START_TIMEOUT_S = 20.0
MOST_CALLERS = 32  # at once, the one being served included; each holds a picture in memory and waits for all before it

log = structlog.get_logger("fabula.story.sandbox")


@dataclass(frozen=True)
class CleanImage:
    """A plain RGB PNG without metadata."""

    png: bytes
    width_px: int
    height_px: int


class Sandbox:
    """The decoding child. `close` ends it; it also ends when this process does, because its input ends."""

    def __init__(self) -> None:
        self._child: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._callers = 0
        self._asked = 0  # requests so far; each one's number comes back with its answer

    async def start(self) -> None:
        """Starts the child, so that the first picture need not wait for it."""
        async with self._turn:
            await self._ready_child()

    async def decode(self, data: bytes) -> CleanImage:
        """A clean copy of an untrusted picture.

        Raises ImageUnreadable, ImageTooLarge, ImageTooSmall, QueueFull, Unavailable.
        """
        if self._callers >= MOST_CALLERS:
            raise QueueFull(f"{MOST_CALLERS} pictures wait to be decoded; try again after a pause", retry_after_s=2.0)
        self._callers += 1
        try:
            async with self._turn:
                header, png = await self._decode(data)
        finally:
            self._callers -= 1
        if "reason" in header:
            kinds: dict[str, type[InvalidArgument]] = {
                kind.reason: kind for kind in (ImageUnreadable, ImageTooLarge, ImageTooSmall)
            }
            raise kinds[header["reason"]](header["message"], field="image")
        return CleanImage(png, header["width_px"], header["height_px"])

    async def _decode(self, data: bytes) -> tuple[dict[str, Any], bytes]:
        with DECODE_SECONDS.time():
            try:
                return await self._ask_child(data)
            except (asyncio.IncompleteReadError, ConnectionError):
                # The child may have died before this picture came. Only one that dies of it twice is to blame.
                log.warning("decoder_lost", cause="died")
            except TimeoutError:
                log.warning("decoder_lost", cause="slow")
                raise ImageUnreadable("decoding this picture took too much time", field="image") from None
            try:
                return await self._ask_child(data)
            except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
                raise ImageUnreadable("this picture cannot be decoded within limits", field="image") from None

    async def _ask_child(self, data: bytes) -> tuple[dict[str, Any], bytes]:
        """The child's answer. Whatever else ends the asking ends the child too, also a caller that went away: it would
        answer the next picture with this one's result. Raises ConnectionError when it did that all the same."""
        child = await self._ready_child()
        try:
            async with asyncio.timeout(DECODE_TIMEOUT_S):
                self._asked += 1
                return await _ask(child, self._asked, data)
        except BaseException:
            await self._kill()
            raise

    async def close(self) -> None:
        """Ends the child."""
        await self._kill()

    async def _ready_child(self) -> asyncio.subprocess.Process:
        if self._child is not None and self._child.returncode is None:
            return self._child
        # Isolated mode, and an environment with nothing of ours in it: no token, no database password.
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            str(DECODER),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={"LC_ALL": "C.UTF-8"},
            cwd="/",
            limit=1 << 20,
            start_new_session=True,  # a Ctrl-C for the terminal is for us to handle
        )
        self._child = child
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await _receive(child)
        except (TimeoutError, asyncio.IncompleteReadError) as error:
            await self._kill()
            raise Unavailable("the picture decoder does not start", metadata={"service": "decoder"}) from error
        except BaseException:
            # A caller that went away leaves an unread "ready": the next one would take it for its own answer.
            await self._kill()
            raise
        return child

    async def _kill(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if child.returncode is None:
            try:
                child.kill()
            except ProcessLookupError:
                return
        await child.wait()


async def _ask(child: asyncio.subprocess.Process, number: int, data: bytes) -> tuple[dict[str, Any], bytes]:
    assert child.stdin is not None
    child.stdin.write(struct.pack(">QI", number, len(data)) + data)
    await child.stdin.drain()
    header, payload = await _receive(child)
    if header.get("request") != number:
        raise ConnectionError("the decoder answered another request")
    return header, payload


async def _receive(child: asyncio.subprocess.Process) -> tuple[dict[str, Any], bytes]:
    assert child.stdout is not None
    head_size, payload_size = struct.unpack(">II", await child.stdout.readexactly(8))
    header: dict[str, Any] = json.loads(await child.stdout.readexactly(head_size))
    return header, await child.stdout.readexactly(payload_size)
