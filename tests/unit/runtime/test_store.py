"""The object store: whole or absent, idempotent, and honest about damage and full disks."""

from __future__ import annotations

import asyncio
import hashlib
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.exceptions import BaseError

from services.runtime import store as store_module
from services.runtime.errors import ObjectCorrupt, ObjectNotFound, StorageFull, Unavailable
from services.runtime.store import ObjectStore


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore.open("", tmp_path / "objects")


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def test_what_is_put_is_got(store: ObjectStore, tmp_path: Path) -> None:
    sha256 = await store.put(b"abc")
    assert sha256 == hashlib.sha256(b"abc").hexdigest()
    assert await store.put(b"abc") == sha256
    assert await store.get(sha256) == b"abc"
    assert [path.name for path in files(tmp_path)] == [sha256]
    assert [(item.sha256, item.size_bytes) async for item in store.every()] == [(sha256, 3)]
    await store.delete(sha256)
    await store.delete(sha256)
    with pytest.raises(ObjectNotFound):
        await store.get(sha256)


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 100, 101])
async def test_a_large_object_comes_in_chunks(store: ObjectStore, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PIECE_BYTES", 25)
    data = os.urandom(size)
    got = [chunk async for chunk in store.chunks(await store.put(data), 10)]
    assert b"".join(got) == data
    assert all(0 < len(chunk) <= 10 for chunk in got)


async def test_a_large_object_that_is_damaged_never_arrives_whole(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PIECE_BYTES", 25)
    sha256 = await store.put(os.urandom(100))
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    got: list[bytes] = []

    async def collect() -> None:
        async for chunk in store.chunks(sha256, 10):
            got.append(chunk)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(ObjectCorrupt):
        await collect()
    assert sum(map(len, got)) < 100
    for absent in ("0" * 64, "../x"):
        with pytest.raises(ObjectNotFound):
            await anext(store.chunks(absent, 10))


@given(st.binary(max_size=2000))
def test_any_bytes(data: bytes) -> None:
    memory = ObjectStore.open("memory://", Path("/nonexistent"))

    async def round_trip() -> bytes:
        return await memory.get(await memory.put(data))

    assert asyncio.run(round_trip()) == data


async def test_many_at_once(store: ObjectStore) -> None:
    data = [os.urandom(50_000) for _ in range(20)]
    shas = await asyncio.gather(*(store.put(item) for item in data * 3))
    assert len(set(shas)) == 20
    assert await asyncio.gather(*(store.get(sha256) for sha256 in shas)) == data * 3


async def test_damage_is_noticed_and_mended_by_putting_again(store: ObjectStore, tmp_path: Path) -> None:
    sha256 = await store.put(b"abc")
    (path,) = files(tmp_path)
    path.write_bytes(b"abd")
    with pytest.raises(ObjectCorrupt):
        await store.get(sha256)
    await store.put(b"abc")
    assert await store.get(sha256) == b"abc"


@pytest.mark.parametrize("name", ["", "..", "../../token", "A" * 64, "0" * 63])
async def test_what_is_no_hash_is_not_looked_up(store: ObjectStore, name: str) -> None:
    with pytest.raises(ObjectNotFound):
        await store.get(name)


async def test_foreign_files_are_not_listed(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "objects" / "sha256" / "ab").mkdir(parents=True)
    (tmp_path / "objects" / "sha256" / "ab" / "notes.txt").write_text("x")
    assert [item async for item in store.every()] == []


FULL = """
import asyncio, os, resource, sys
from pathlib import Path
from services.runtime.errors import StorageFull
from services.runtime.store import ObjectStore
store = ObjectStore.open("", Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
async def main():
    small = await store.put(b"x" * 9_000)
    try:
        await store.put(b"y" * 20_000)
    except StorageFull as error:
        print(error.reason)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(len(await store.get(small)), len(await store.get(await store.put(b"y" * 20_000))))
asyncio.run(main())
# A thread of the store that wakes while the interpreter ends would abort it; the story service ends like this too.
sys.stdout.flush()
os._exit(0)
"""


def test_a_refused_write_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    assert resource.RLIMIT_FSIZE is not None
    ran = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.split() == ["OBJECT_STORE_FULL", "9000", "20000"]
    assert sorted(path.stat().st_size for path in files(tmp_path)) == [9_000, 20_000]


@pytest.mark.parametrize(
    ("text", "cls"),
    [
        ("Unable to copy data to file: No space left on device (os error 28)", StorageFull),
        ("Generic LocalFileSystem error: Disk quota exceeded (os error 122)", StorageFull),
        ("Generic S3 error: 507 Insufficient Storage", StorageFull),
        ("error sending request for url: connection refused (os error 111)", Unavailable),
        ("Permission denied (os error 13)", Unavailable),
    ],
)
async def test_what_the_backend_says_gets_its_name(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, text: str, cls: type[Exception]
) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise BaseError(text)

    for name, call in (
        ("put_async", lambda: store.put(b"x")),
        ("get_async", lambda: store.get("0" * 64)),
        ("delete_async", lambda: store.delete("0" * 64)),
    ):
        monkeypatch.setattr(store_module.obstore, name, fail)
        with pytest.raises(cls) as caught:
            await call()
        assert "111" not in str(caught.value)
