"""A character in one file: what comes back, and what is refused."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace

import pytest
from fabula_client import CharacterArchive, InvalidArgument, archives, read_archive, write_archive

OTTO = CharacterArchive(
    name="Otto",
    phrase="a black penguin with orange earmuffs",
    noun="penguin",
    pack="toon",
    base_digest="b" * 64,
    weights=b"weights" * 100,
    references=(b"one", b"two"),
)


def test_what_was_written_comes_back_and_is_the_same_file_twice() -> None:
    for archive in (OTTO, replace(OTTO, references=()), replace(OTTO, name="Zoë", references=(b"x",) * 8)):
        assert read_archive(write_archive(archive)) == archive
        assert write_archive(archive) == write_archive(archive)


def changed(change: Callable[[dict[str, bytes]], object]) -> bytes:
    """The archive with other files in it."""
    with zipfile.ZipFile(io.BytesIO(write_archive(OTTO))) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    change(entries)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, payload in entries.items():
            file.writestr(name, payload)
    return out.getvalue()


def carded(**changes: object) -> Callable[[dict[str, bytes]], object]:
    def change(entries: dict[str, bytes]) -> None:
        card = {**json.loads(entries["character.json"]), **changes}
        entries["character.json"] = json.dumps(card).encode()

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda entries: entries.pop("weights.safetensors"), "it has no weights.safetensors"),
        (lambda entries: entries.pop("character.json"), "it has no character.json"),
        (lambda entries: entries.update({"../../evil.py": b"x"}), "what is not of a character"),
        (lambda entries: entries.update({"weights.bin": b"x"}), "what is not of a character"),
        (lambda entries: entries.update({"reference-9.png": b"x"}), "what is not of a character"),
        (lambda entries: entries.update({"character.json": b"{"}), "no archive"),
        (lambda entries: entries.update({"character.json": b"[]"}), "not of format 1"),
        (carded(format=2), "a newer client"),
        (carded(name=7), "are texts"),
        (carded(surprise=1), "unknown keys: surprise"),
        (lambda entries: entries.update({"character.json": b" " * (65 << 10)}), "more than 65536 bytes"),
    ],
)
def test_what_is_no_archive_is_refused_and_says_why(change: Callable[[dict[str, bytes]], object], said: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        read_archive(changed(change))
    assert raised.value.reason == "ARCHIVE_UNREADABLE"
    assert said in raised.value.message


@pytest.mark.parametrize("payload", [b"", b"PK\x03\x04", b"no archive at all" * 9, write_archive(OTTO)[:-30]])
def test_bytes_that_are_no_zip_are_refused(payload: bytes) -> None:
    with pytest.raises(InvalidArgument) as raised:
        read_archive(payload)
    assert raised.value.reason == "ARCHIVE_UNREADABLE"


def test_what_unpacks_to_more_than_it_says_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = changed(lambda entries: entries.update({"weights.safetensors": bytes(4 << 20)}))
    assert len(bomb) < 64 << 10
    monkeypatch.setattr(archives, "MOST_EXAMPLE_BYTES", 1 << 20)
    with pytest.raises(InvalidArgument) as raised:
        read_archive(bomb)
    assert "more than 1048576 bytes" in raised.value.message


def test_damaged_bytes_are_noticed() -> None:
    payload = bytearray(write_archive(OTTO))
    payload[payload.index(b"weightsweights") + 3] ^= 1
    with pytest.raises(InvalidArgument) as raised:
        read_archive(bytes(payload))
    assert "CRC" in raised.value.message
