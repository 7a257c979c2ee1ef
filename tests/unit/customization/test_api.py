"""What a caller is told of a version that goes between two looks at it, and of a story that training would refuse."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.customization.api import CustomizationApi
from services.customization.checks import GivenFrame
from services.customization.config import CustomizationSettings
from services.customization.events import Broadcaster
from services.customization.intake import JobRequest
from services.models.tiny import build_tiny_pack
from services.runtime.database import now_us
from services.runtime.errors import CharacterVersionDeleted, CharacterVersionNotFound, ObjectNotFound
from tests.unit.customization.test_shelf import Bench, Store, bench, sha

__all__ = ["bench"]  # a fixture


def api_of(bench: Bench, **settings: Any) -> CustomizationApi:
    return CustomizationApi(
        repository=bench.repository,
        objects=bench.objects,
        characters=bench.characters,
        shelf=bench.shelf,
        broadcaster=Broadcaster(),
        settings=CustomizationSettings(**settings),
        folder=bench.folder,
        pack_folders=(bench.folder / "packs",),
        eyes=lambda _: None,
    )


@pytest.mark.parametrize("kind", ["weights", "image"])
@pytest.mark.parametrize("purged", [True, False])
async def test_a_version_that_goes_while_it_is_read_is_told_of_as_gone(
    bench: Bench, kind: str, purged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    otto = await bench.publish("Otto", pictures=(b"1",))
    api = api_of(bench)
    get, pieces = Store.get, Store._pieces

    async def goes() -> None:
        monkeypatch.setattr(Store, "get", get)
        monkeypatch.setattr(Store, "_pieces", pieces)
        await bench.delete(otto, purge_us=now_us() if purged else now_us() + 10**12)
        await bench.look()
        if not purged:
            await bench.objects.delete(sha(b"1"))

    async def late(store: Store, sha256: str) -> bytes:
        await goes()
        return await get(store, sha256)

    async def late_pieces(store: Store, sha256: str) -> AsyncIterator[bytes]:
        await goes()
        async for piece in pieces(store, sha256):
            yield piece

    monkeypatch.setattr(Store, "get", late)
    monkeypatch.setattr(Store, "_pieces", late_pieces)

    async def read() -> bytes:
        if kind == "image":
            return await api.read_image("", sha(b"1"), otto.version_id)
        return b"".join([chunk async for chunk in api.read_weights(otto.version_id, 10)])

    with pytest.raises(CharacterVersionNotFound if purged else CharacterVersionDeleted):
        await read()


async def test_a_picture_that_is_lost_is_not_a_version_that_is(bench: Bench) -> None:
    otto = await bench.publish("Otto", pictures=(b"1",))
    await bench.objects.delete(sha(b"1"))
    with pytest.raises(ObjectNotFound):
        await api_of(bench).read_image("", sha(b"1"), otto.version_id)


async def codes_of(api: CustomizationApi, name: str, description: str = "") -> set[tuple[str, int | None]]:
    frames = [GivenFrame(image=b"", caption=f"{name} runs.", description=description)] * 3
    request = JobRequest(
        validate_only=True, name=name, phrase="a black penguin", noun="penguin", frames=frames, method="lora", steps=3
    )
    return {(one.code, one.frame_number) for one in (await api.create(request)).findings}


async def test_whom_the_stories_beside_a_pack_show_it_knows(bench: Bench, tmp_path: Path) -> None:
    """Training takes nobody else of their names; without this a job would wait, and then be refused."""
    build_tiny_pack(bench.folder / "packs" / "tiny", captions=False)
    for number, told in enumerate(({"frames": [{"characters": ["Fred", " Wilma "]}]}, {"frames": 3}, [])):
        (tmp_path / "known" / "tiny" / str(number)).mkdir(parents=True)
        (tmp_path / "known" / "tiny" / str(number) / "story.json").write_text(json.dumps(told))
    beside = api_of(bench, default_pack="tiny", known_folder=tmp_path / "known")
    for name in ("Fred", "Wilma"):
        assert ("NAME_TAKEN", None) in await codes_of(beside, name)
        assert ("NAME_TAKEN", None) not in await codes_of(api_of(bench, default_pack="tiny"), name)
    assert ("NAME_TAKEN", None) not in await codes_of(beside, "Otto")


async def test_a_description_that_does_not_fit_the_pack_is_found_before_a_job_waits_for_it(bench: Bench) -> None:
    # A token is a byte, and the name is learned as the 16 of " a black penguin".
    build_tiny_pack(bench.folder / "packs" / "tiny", captions=False, positions=66)
    api = api_of(bench, default_pack="tiny")
    for letters, wanted in ((48, set()), (49, {("DESCRIPTION_TOO_LONG", number) for number in (1, 2, 3)})):
        found = await codes_of(api, "Otto", f"Otto {'o' * (letters - 1)}")
        assert {one for one in found if one[0] == "DESCRIPTION_TOO_LONG"} == wanted
