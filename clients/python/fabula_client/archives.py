"""A character in one file, to be carried from one installation to another: a zip that holds what an import needs.

    character.json          format, name, phrase, noun, pack, and the digest of the network that the weights are for
    weights.safetensors     as `read_weights` gives them
    reference-1.png …       pictures, where there are any

Equal characters give equal bytes. Reading takes nothing but these names, up to the sizes that the service takes, and
runs nothing. Knows no connection.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

from fabula_client.calls import MOST_EXAMPLE_BYTES, MOST_IMAGE_BYTES
from fabula_client.errors import FieldViolation, InvalidArgument

FORMAT = 1
MOST_REFERENCES = 8
_CARD, _WEIGHTS = "character.json", "weights.safetensors"
_REFERENCE = re.compile(r"reference-([1-8])\.png")
_TEXTS = ("name", "phrase", "noun", "pack", "base_digest")
_MOST_CARD_BYTES = 64 << 10
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say


@dataclass(frozen=True, kw_only=True)
class CharacterArchive:
    """What an archive holds."""

    name: str
    phrase: str
    noun: str
    pack: str
    base_digest: str
    weights: bytes
    references: tuple[bytes, ...] = ()


def write_archive(archive: CharacterArchive) -> bytes:
    """The archive's bytes."""
    card = {"format": FORMAT, **{name: getattr(archive, name) for name in _TEXTS}}
    entries = [
        (_CARD, (json.dumps(card, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()),
        (_WEIGHTS, archive.weights),
        *((f"reference-{number}.png", picture) for number, picture in enumerate(archive.references, 1)),
    ]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:  # weights and PNGs would not get smaller
        for name, payload in entries:
            file.writestr(zipfile.ZipInfo(name, _EPOCH), payload)
    return out.getvalue()


def read_archive(payload: bytes) -> CharacterArchive:
    """What is in an archive. Raises InvalidArgument (ARCHIVE_UNREADABLE) for what is none."""
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as file:
            entries = {info.filename: info for info in file.infolist()}
            _check_entries(entries, len(file.infolist()))
            card = json.loads(_entry(file, entries[_CARD], _MOST_CARD_BYTES))
            weights = _entry(file, entries[_WEIGHTS], MOST_EXAMPLE_BYTES)
            pictures = sorted(name for name in entries if _REFERENCE.fullmatch(name))
            references = tuple(_entry(file, entries[name], MOST_IMAGE_BYTES) for name in pictures)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise _unreadable(f"it is no archive of a character: {error}") from None
    return CharacterArchive(**_texts(card), weights=weights, references=references)


def _check_entries(entries: dict[str, zipfile.ZipInfo], count: int) -> None:
    strange = sorted(name for name in entries if name not in (_CARD, _WEIGHTS) and not _REFERENCE.fullmatch(name))
    if strange:
        raise _unreadable(f"it holds what is not of a character: {strange[0][:80]!r}")
    if missing := [name for name in (_CARD, _WEIGHTS) if name not in entries]:
        raise _unreadable(f"it has no {missing[0]}")
    if count != len(entries):
        raise _unreadable("it holds a file twice")


def _entry(file: zipfile.ZipFile, info: zipfile.ZipInfo, most_bytes: int) -> bytes:
    """One file of it; what says that it is small and is not is read no further."""
    with file.open(info) as entry:
        payload = entry.read(most_bytes + 1)
    if len(payload) > most_bytes:
        raise _unreadable(f"{info.filename} has more than {most_bytes} bytes")
    return payload


def _texts(card: Any) -> dict[str, str]:
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise _unreadable(f"{_CARD} is not of format {FORMAT}; a newer client may read it")
    if unknown := sorted(card.keys() - {"format", *_TEXTS}):
        raise _unreadable(f"{_CARD} has unknown keys: {', '.join(map(str, unknown))[:80]}")
    if not all(isinstance(card.get(name), str) for name in _TEXTS):
        raise _unreadable(f"{', '.join(_TEXTS)} of {_CARD} are texts")
    return {name: card[name] for name in _TEXTS}


def _unreadable(message: str) -> InvalidArgument:
    return InvalidArgument(
        message,
        reason="ARCHIVE_UNREADABLE",
        metadata={"field": "archive"},
        field_violations=(FieldViolation("archive", message),),
    )
