"""What a client sends, and what it refuses before anything is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fabula.story.v1 import story_pb2
from fabula.story.v1 import story_service_pb2 as pb
from fabula_client import AsyncClient, Client, InvalidArgument, Quality
from fabula_client.calls import Connection

LIMIT = 8 << 20


@pytest.mark.parametrize("as_file", [True, False])
async def test_a_picture_over_the_limit_is_refused_with_the_limit(tmp_path: Path, as_file: bool) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(LIMIT + 1)
    # Nobody listens at port 1, so an answer can only be the client's own.
    async with AsyncClient("127.0.0.1:1", timeout_s=5.0) as client:
        with pytest.raises(InvalidArgument) as refused:
            await client.stories.create(image=path if as_file else path.read_bytes(), caption="Once.")
    assert refused.value.reason == "IMAGE_TOO_LARGE"
    assert [each.field for each in refused.value.field_violations] == ["image"]
    assert str(LIMIT) in refused.value.message


async def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(1 << 42)  # sparse: 4 TiB that would not fit into memory
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(InvalidArgument, match=str(1 << 42)):
            await client.stories.create(image=path, caption="Once.")


async def test_a_quality_that_the_wire_has_no_word_for_is_refused_by_the_fields_name() -> None:
    async with AsyncClient("127.0.0.1:1", timeout_s=5.0) as client:
        with pytest.raises(InvalidArgument) as refused:
            await client.stories.create(image=b"p", caption="Once.", quality="ultra")  # type: ignore[arg-type]
    assert refused.value.reason == "VALUE_OUT_OF_RANGE"
    assert [each.field for each in refused.value.field_violations] == ["quality"]
    assert "draft, standard or best" in refused.value.message


@pytest.mark.parametrize("quality", ["draft", "standard", "best"])
@pytest.mark.parametrize("kind", [AsyncClient, Client])
async def test_the_quality_goes_along(
    monkeypatch: pytest.MonkeyPatch, kind: type[AsyncClient | Client], quality: Quality
) -> None:
    sent: list[pb.CreateStoryRequest] = []

    async def call(_connection: Connection, _method: Any, request: pb.CreateStoryRequest, **_: Any) -> Any:
        sent.append(request)
        return pb.CreateStoryResponse()

    monkeypatch.setattr(Connection, "call", call)
    if kind is AsyncClient:
        async with AsyncClient("127.0.0.1:1") as client:
            await client.stories.create(image=b"p", caption="Once.", quality=quality)
    else:
        with Client("127.0.0.1:1") as waiting:
            waiting.stories.create(image=b"p", caption="Once.", quality=quality)
    assert [story_pb2.Quality.Name(each.quality) for each in sent] == [f"QUALITY_{quality.upper()}"]
