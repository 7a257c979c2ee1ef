"""Everybody gets their own picture, also when others give up, and too many at once are told to come back."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest
from PIL import Image

from services.runtime.errors import QueueFull
from services.story import sandbox as sandbox_module
from services.story.sandbox import CleanImage, Sandbox

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)

# Answers its first request as if it were the one before, and in red; started again it is the real decoder.
OUT_OF_STEP = """
import json, os, runpy, struct, sys
if os.path.exists({marker!r}):
    runpy.run_path({decoder!r}, run_name="__main__")
open({marker!r}, "w").close()
def answer(header, payload=b""):
    head = json.dumps(header).encode()
    sys.stdout.buffer.write(struct.pack(">II", len(head), len(payload)) + head + payload)
    sys.stdout.buffer.flush()
answer({{"ready": []}})
number, size = struct.unpack(">QI", sys.stdin.buffer.read(12))
sys.stdin.buffer.read(size)
answer({{"request": number - 1, "width_px": 32, "height_px": 32}}, {red!r})
sys.stdin.buffer.read()
"""


def png(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(out, "PNG")
    return out.getvalue()


def colour_of(image: CleanImage) -> object:
    return Image.open(io.BytesIO(image.png)).getpixel((0, 0))


async def test_a_caller_that_leaves_while_the_decoder_starts_leaves_nothing_to_the_next() -> None:
    sandbox = Sandbox()
    try:
        first = asyncio.create_task(sandbox.decode(png(RED)))
        while sandbox._child is None:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.001)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        for colour in (GREEN, BLUE):
            assert colour_of(await sandbox.decode(png(colour))) == colour
    finally:
        await sandbox.close()


async def test_a_caller_that_leaves_while_its_picture_is_decoded_leaves_nothing_to_the_next() -> None:
    sandbox = Sandbox()
    try:
        await sandbox.start()
        first = asyncio.create_task(sandbox.decode(png(RED)))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert colour_of(await sandbox.decode(png(GREEN))) == GREEN
    finally:
        await sandbox.close()


async def test_a_decoder_out_of_step_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "decoder.py"
    marker, decoder = str(tmp_path / "seen"), str(sandbox_module.DECODER)
    script.write_text(OUT_OF_STEP.format(marker=marker, decoder=decoder, red=png(RED)))
    monkeypatch.setattr(sandbox_module, "DECODER", script)
    sandbox = Sandbox()
    try:
        assert colour_of(await sandbox.decode(png(GREEN))) == GREEN
    finally:
        await sandbox.close()


async def test_too_many_at_once_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "MOST_CALLERS", 3)
    sandbox = Sandbox()
    try:
        callers = [asyncio.create_task(sandbox.decode(png(GREEN))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as caught:
            await sandbox.decode(png(RED))
        assert caught.value.retry_after_s
        callers[1].cancel()  # its place is free again
        await asyncio.gather(*callers, return_exceptions=True)
        assert colour_of(await sandbox.decode(png(BLUE))) == BLUE
    finally:
        await sandbox.close()
