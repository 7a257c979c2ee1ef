"""Changing a finished story with both clients and the command line, against the real story service."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import pytest
from fabula_cli.main import app
from fabula_client import AsyncClient, Client, FailedPrecondition, FrameEdited, FrameInserted, NotFound, Story
from typer.testing import CliRunner

from tests.contract.story.scripted_services import Script
from tests.contract.story.story_process import StoryProcess


async def finished(client: AsyncClient, picture: bytes) -> Story:
    story = await client.stories.create(image=picture, caption="Once upon a time.", frame_count=2, seed=7)
    return await story.wait()


async def test_a_frame_is_edited_and_one_inserted(process: StoryProcess, script: Script, first_picture: bytes) -> None:
    async with AsyncClient(process.grpc_target) as client:
        before = await finished(client, first_picture)
        story = await client.stories.get(before.story_id)
        edited = await story.edit_frame(1, strength=0.3, caption="Then frame 1 changed.", idempotency_key="one")
        assert edited is story.value
        frame = edited.frames[1]
        assert (frame.version, frame.edit_strength, frame.caption) == (2, 0.3, "Then frame 1 changed.")
        assert [each.stale for each in edited.frames] == [False, False, True]
        (old,) = edited.earlier_versions
        assert old == before.frames[1]
        assert hashlib.sha256(await story.read_image(old)).hexdigest() == old.image_sha256
        assert await story.edit_frame(1, strength=0.3, caption="Then frame 1 changed.", idempotency_key="one") == edited
        longer = await story.insert_frame(0, caption="Frame 1 a.", description="Drawn frame 1 .", seed=3)
        assert [each.caption for each in longer.frames][1:3] == ["Frame 1 a.", "Then frame 1 changed."]
        assert (longer.frames[1].image_seed, longer.frames[1].description) == (3, "Drawn frame 1 .")
        events = [event async for event in story.watch(after_sequence=before.last_sequence)]
        assert [type(event) for event in events] == [FrameEdited, FrameInserted]
        assert isinstance(events[0], FrameEdited)
        assert (events[0].frame, events[0].stale_frame_indexes) == (frame, (2,))
        with pytest.raises(NotFound) as missing:
            await story.edit_frame(9)
        assert missing.value.reason == "FRAME_NOT_FOUND"


async def test_the_sync_client_does_the_same(process: StoryProcess, script: Script, first_picture: bytes) -> None:
    async with AsyncClient(process.grpc_target) as client:
        before = await finished(client, first_picture)

    def change() -> tuple[Story, Story]:
        with Client(process.grpc_target) as client:
            story = client.stories.get(before.story_id)
            return story.edit_frame(2), story.insert_frame(1, caption="Frame 2 a.")

    edited, longer = await asyncio.to_thread(change)
    assert (edited.frames[2].version, edited.frames[2].edit_strength) == (2, 0.5)
    assert [frame.index for frame in longer.frames] == [0, 1, 2, 3]
    script.step_s = 0.2
    async with AsyncClient(process.grpc_target) as client:
        running = await client.stories.create(image=first_picture, caption="Once.", frame_count=20)
        with pytest.raises(FailedPrecondition) as refused:
            await running.edit_frame(0)
        assert refused.value.reason == "STORY_NOT_ENDED"
        await running.cancel()


async def test_the_command_line_edits_and_inserts(
    process: StoryProcess, script: Script, first_picture: bytes, tmp_path: Path
) -> None:
    async with AsyncClient(process.grpc_target) as client:
        before = await finished(client, first_picture)

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["story", *words, "--target", process.grpc_target])
        return done.exit_code, done.output

    name = before.story_id
    code, said = await asyncio.to_thread(run, "edit", name, "1", "--strength", "0.7", "--out", str(tmp_path / "out"))
    assert code == 0, said
    assert "version 2" in said
    assert "stale" in said
    assert (tmp_path / "out").is_dir()
    code, said = await asyncio.to_thread(run, "insert", name, "0", "--caption", "Frame 1 a.", "--json")
    assert code == 0, said
    story = json.loads(said)["story"]
    assert [frame["caption"] for frame in story["frames"]][1] == "Frame 1 a."
    assert [frame["version"] for frame in story["frames"]] == [1, 1, 2, 1]
    assert [frame["version"] for frame in story["earlier_versions"]] == [1]
    code, said = await asyncio.to_thread(run, "edit", name, "1", "--strength", "3", "--json")
    assert code != 0
    assert "VALUE_OUT_OF_RANGE" in said
