"""What a client refuses before anything is sent."""

from __future__ import annotations

from pathlib import Path

import pytest
from fabula_client import AsyncClient, InvalidArgument

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
