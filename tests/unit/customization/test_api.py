"""What a caller is told of a version that goes between two looks at it."""

from __future__ import annotations

import pytest

from services.customization.api import CustomizationApi
from services.customization.config import CustomizationSettings
from services.customization.events import Broadcaster
from services.runtime.database import now_us
from services.runtime.errors import CharacterVersionDeleted, CharacterVersionNotFound, ObjectNotFound
from tests.unit.customization.test_shelf import Bench, Store, bench, sha

__all__ = ["bench"]  # a fixture


def api_of(bench: Bench) -> CustomizationApi:
    return CustomizationApi(
        repository=bench.repository,
        objects=bench.objects,
        characters=bench.characters,
        shelf=bench.shelf,
        broadcaster=Broadcaster(),
        settings=CustomizationSettings(),
        folder=bench.folder,
        pack_folders=(),
        eyes=lambda _: None,
    )


@pytest.mark.parametrize("kind", ["weights", "image"])
@pytest.mark.parametrize("purged", [True, False])
async def test_a_version_that_goes_while_it_is_read_is_told_of_as_gone(
    bench: Bench, kind: str, purged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    otto = await bench.publish("Otto", pictures=(b"1",))
    api = api_of(bench)
    real = Store.get

    async def late(store: Store, sha256: str) -> bytes:
        monkeypatch.setattr(Store, "get", real)
        await bench.delete(otto, purge_us=now_us() if purged else now_us() + 10**12)
        await bench.look()
        if not purged:
            await bench.objects.delete(sha(b"1"))
        return await real(store, sha256)

    monkeypatch.setattr(Store, "get", late)
    reading = api.read_weights(otto.version_id) if kind == "weights" else api.read_image("", sha(b"1"), otto.version_id)
    with pytest.raises(CharacterVersionNotFound if purged else CharacterVersionDeleted):
        await reading


async def test_a_picture_that_is_lost_is_not_a_version_that_is(bench: Bench) -> None:
    otto = await bench.publish("Otto", pictures=(b"1",))
    await bench.objects.delete(sha(b"1"))
    with pytest.raises(ObjectNotFound):
        await api_of(bench).read_image("", sha(b"1"), otto.version_id)
