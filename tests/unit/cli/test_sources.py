"""Packs from elsewhere: an object store and the hub give the same bytes from any byte on, or a named error."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from obstore.store import LocalStore, MemoryStore

from services import sources
from services.models.errors import PackError, PackFetchNotAllowed, PackSourceInvalid, PackSourceUnreadable
from services.models.source import FolderSource
from services.sources import HubSource, PrefixSource, open_source

DATA = {"pack.json": b"{}", "unet/w.safetensors": bytes(range(256)) * 20_000, ".git/config": b"x", "empty.txt": b""}
COMMIT = "c" * 40


def write(folder: Path) -> Path:
    for name, data in DATA.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_a_prefix_gives_files_from_any_byte_on(tmp_path: Path) -> None:
    source = PrefixSource(LocalStore(prefix=write(tmp_path / "models")), "s3://bucket/models")
    files = source.files()
    assert set(files) == {"pack.json", "unet/w.safetensors", "empty.txt"}
    wanted = DATA["unet/w.safetensors"]
    assert files["unet/w.safetensors"].size_bytes == len(wanted)
    for start in (0, 1, 2_000_000, len(wanted) - 1):
        assert b"".join(source.blocks("unet/w.safetensors", start)) == wanted[start:]
    before = files["pack.json"].version
    (tmp_path / "models/pack.json").write_bytes(b"{ }")
    assert source.files()["pack.json"].version != before


def test_a_prefix_that_holds_nothing_and_a_file_that_is_gone_are_named() -> None:
    source = PrefixSource(MemoryStore(), "s3://bucket/empty")
    with pytest.raises(PackSourceInvalid, match="nothing lies below s3://bucket/empty"):
        source.files()
    with pytest.raises(PackSourceUnreadable, match="s3://bucket/empty"):
        list(source.blocks("absent", 0))


@pytest.mark.parametrize(
    ("place", "error", "said"),
    [
        ("hub:owner/name", PackFetchNotAllowed, "--fetch"),
        ("hub:owner", PackSourceInvalid, "hub:owner/name"),
        ("hub:../name", PackSourceInvalid, "hub:owner/name"),
        ("hub:owner/name@../main?x", PackSourceInvalid, "hub:owner/name"),
        ("https://example.org/pack", PackSourceInvalid, "file://"),
        ("file:///absent/folder", PackSourceInvalid, "no folder"),
        ("/absent/folder", PackSourceInvalid, "no folder"),
        ("az://container/pack", PackSourceInvalid, "cannot be opened"),
    ],
)
def test_a_place_that_cannot_be_opened_is_named(
    place: str, error: type[PackError], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(error, match=said):
        open_source(place)


def test_folders_and_prefixes_are_opened_by_their_place(tmp_path: Path) -> None:
    folder = write(tmp_path / "a pack")
    for place in (str(folder), folder.as_uri()):
        source = open_source(place)
        assert isinstance(source, FolderSource)
        assert source.name == "a pack"
    assert open_source("s3://bucket/a/pack/").name == "s3://bucket/a/pack"


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that a download needs, as its own library asks for them."""

    protocol_version = "HTTP/1.1"
    asked: list[str] = []  # noqa: RUF012 - one server a test

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        paths = json.loads(body)["paths"] if body.startswith(b"{") else []
        self.answer([self.told(path) for path in paths if path in DATA])

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{path} {self.headers.get('Range', '')}".strip())
        if path.startswith("/api/models/owner/name/tree/"):
            self.answer([self.told(name) for name in DATA])
        elif path in ("/api/models/owner/name", *(f"/api/models/owner/name/revision/{r}" for r in ("main", COMMIT))):
            siblings = [{"rfilename": name, **self.told(name)} for name in DATA]
            self.answer({"id": "owner/name", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        elif path.startswith(f"/owner/name/resolve/{COMMIT}/"):
            data = DATA[path.removeprefix(f"/owner/name/resolve/{COMMIT}/")]
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            self.bytes_answer(data[int(first) : int(last) + 1 if last else None], 206)
        else:
            self.bytes_answer(b'{"error": "Repository not found"}', 404, {"X-Error-Code": "RepoNotFound"})

    def told(self, name: str) -> dict[str, Any]:
        sha256 = hashlib.sha256(DATA[name]).hexdigest()
        told: dict[str, Any] = {"type": "file", "path": name, "size": len(DATA[name]), "oid": sha256[:40]}
        told["blobId"] = told["oid"]
        if name.endswith(".safetensors"):
            told["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(DATA[name]), "pointerSize": 134}
        return told

    def answer(self, document: Any) -> None:
        self.bytes_answer(json.dumps(document).encode(), 200)

    def bytes_answer(self, data: bytes, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


FETCH = """
import hashlib, json, sys
from services.models.errors import PackError
from services.sources import open_source
try:
    source = open_source(sys.argv[1], fetch=True)
    files = source.files()
    found = {name: [file.size_bytes, file.sha256, file.version] for name, file in files.items()}
    data = b"".join(source.blocks("unet/w.safetensors", 1_000_000))
    print(json.dumps({"name": source.name, "files": found, "rest": hashlib.sha256(data).hexdigest()}))
except PackError as error:
    print(json.dumps({"reason": error.reason, "message": str(error)}))
"""


def fetch(place: str, hub: str, tmp_path: Path, **environment: str) -> dict[str, Any]:
    """Opens a place of the hub in a process of its own: the library reads which hub that is when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", FETCH, place],
        env={
            **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
            "HF_ENDPOINT": hub,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


def test_a_repository_of_the_hub_is_read_at_one_commit(hub: str, tmp_path: Path) -> None:
    found = fetch("hub:owner/name", hub, tmp_path)
    wanted = DATA["unet/w.safetensors"]
    assert found["name"] == f"hub:owner/name@{COMMIT}"
    assert set(found["files"]) == {"pack.json", "unet/w.safetensors", "empty.txt"}
    size, sha256, version = found["files"]["unet/w.safetensors"]
    assert (size, sha256) == (len(wanted), hashlib.sha256(wanted).hexdigest())
    assert version
    assert found["rest"] == hashlib.sha256(wanted[1_000_000:]).hexdigest()
    ranges = [asked for asked in Hub.asked if "/resolve/" in asked]
    assert ranges
    assert all(COMMIT in asked for asked in ranges), "the revision may move meanwhile; the commit does not"


def test_a_hub_that_has_no_such_repository_or_may_not_be_asked_is_named(hub: str, tmp_path: Path) -> None:
    found = fetch("hub:owner/absent", hub, tmp_path)
    assert found["reason"] == "PACK_SOURCE_UNREADABLE"
    assert "owner/absent" in found["message"]
    offline = fetch("hub:owner/name", hub, tmp_path, HF_HUB_OFFLINE="1")
    assert offline["reason"] == "PACK_SOURCE_UNREADABLE"
    assert "HF_HUB_OFFLINE is set" in offline["message"]


def test_a_line_that_breaks_is_a_source_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def open(self, *_: Any, **__: Any) -> Any:
            raise ConnectionResetError("gone")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(PackSourceUnreadable, match="ConnectionResetError: gone"):
        list(HubSource("owner/name", COMMIT, {}, Broken()).blocks("w", 0))
    assert sources.HUB == "hub:"
