"""Checks what a client sent, before anything is kept. Says what is wrong and what would be right.

Decided here: control characters in a caption are refused (they have no meaning a model or a reader could use), line
breaks and tabs become spaces; emoji, right-to-left text and markup such as `<image>` are text like any other.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from services.runtime.errors import (
    CaptionCharactersInvalid,
    CaptionEmpty,
    CaptionTooLong,
    CharacterRepeated,
    FabulaError,
    ImageMissing,
    ImageTooLarge,
    PackUnknown,
    RequestIdInvalid,
    Unavailable,
    ValueOutOfRange,
)
from services.story.backends import CaptionBackend, FrameBackend
from services.story.plan import SEED_LIMIT
from services.story.records import DEFAULT_QUALITY, QUALITIES, Options, Quality

MOST_IMAGE_BYTES = 8 * 1024 * 1024
MOST_CAPTION_CHARACTERS = 1000
MOST_FRAMES = 20
MOST_CHARACTERS = 8
MOST_NAME_CHARACTERS = 100  # of a name or a version id
MOST_STEPS = 100
DEFAULT_FRAMES = 4
DEFAULT_TEMPERATURE = 0.2
PACK_MEMORY_S = 30.0
PACK_CHECK_TIMEOUT_S = 3.0
PACK_SILENCE_S = 2.0  # a service that did not answer is not asked again for so long
REQUEST_ID = re.compile(r"[\x20-\x7e]{1,255}")
PACK_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class StoryRequest:
    """CreateStory as it came, over either protocol. None means that the client did not say."""

    image: bytes
    caption: str
    request_id: str = ""
    frame_count: int | None = None
    seed: int | None = None
    pack: str = ""
    steps: int | None = None
    text_guidance: float | None = None
    image_guidance: float | None = None
    temperature: float | None = None
    quality: str = DEFAULT_QUALITY
    characters: tuple[str, ...] = ()  # names or version ids

    def body_sha256(self) -> str:
        """The same for the same request, however it came: what an idempotency key is compared by."""
        body = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("image", "request_id")}
        if self.quality == DEFAULT_QUALITY:
            del body["quality"]  # as in requests of before there was a choice, whose keys are still remembered
        if not self.characters:
            del body["characters"]  # the same
        body["image"] = hashlib.sha256(self.image).hexdigest()
        return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def check_request_id(request_id: str) -> None:
    """Raises RequestIdInvalid. An empty id is no id."""
    if request_id and not REQUEST_ID.fullmatch(request_id):
        raise RequestIdInvalid(field="request_id")


def check_seed(seed: int | None) -> None:
    """Raises ValueOutOfRange. None is no seed."""
    _integer("seed", seed, 0, SEED_LIMIT - 1)


def check_caption(caption: str, *, field: str = "caption") -> str:
    """The caption as it is kept: composed characters, single spaces, none around it. Raises Caption… errors.

    Other texts that are kept beside captions are checked alike; `field` names them.
    """
    if len(caption) > MOST_CAPTION_CHARACTERS * 2:  # before any work on it; what white space adds is not counted below
        raise _too_long(len(caption), field)
    for character in caption:
        category = unicodedata.category(character)
        if category == "Cs" or (category == "Cc" and character not in "\t\n\r"):
            raise CaptionCharactersInvalid(
                f"the {field} holds the control character U+{ord(character):04X}; remove it",
                field=field,
                metadata={"code_point": f"U+{ord(character):04X}"},
            )
    text = " ".join(unicodedata.normalize("NFC", caption).split())
    if not any(unicodedata.category(character)[0] not in "ZC" for character in text):
        raise CaptionEmpty(field=field)
    if len(text) > MOST_CAPTION_CHARACTERS:
        raise _too_long(len(text), field)
    return text


def _too_long(count: int, field: str) -> CaptionTooLong:
    return CaptionTooLong(
        f"the {field} has {count} characters; at most {MOST_CAPTION_CHARACTERS} are taken",
        field=field,
        metadata={"limit": str(MOST_CAPTION_CHARACTERS), "actual": str(count)},
    )


def check_characters(wanted: Sequence[str]) -> tuple[str, ...]:
    """Names and version ids as they are looked up. Raises ValueOutOfRange, CharacterRepeated."""
    if len(wanted) > MOST_CHARACTERS:
        raise ValueOutOfRange(
            f"{len(wanted)} characters are asked for; a story has at most {MOST_CHARACTERS}",
            field="characters",
            metadata={"value": str(len(wanted)), "most": str(MOST_CHARACTERS)},
        )
    tidy = tuple(each.strip() for each in wanted)
    for number, each in enumerate(tidy):
        field = f"characters[{number}]"
        if not 1 <= len(each) <= MOST_NAME_CHARACTERS or not each.isprintable():
            raise ValueOutOfRange(
                f"{field} is {each[:MOST_NAME_CHARACTERS]!r}; it must be a published character's name, or a version's "
                "id of 64 hex digits",
                field=field,
                metadata={"value": each[:MOST_NAME_CHARACTERS], "most": str(MOST_NAME_CHARACTERS)},
            )
        if each in tidy[:number]:
            raise CharacterRepeated(f"{field} is {each!r} a second time; ask once", field=field)
    return tidy


def check_image(image: bytes) -> None:
    """What can be said without decoding. Raises ImageMissing, ImageTooLarge."""
    if not image:
        raise ImageMissing(field="image")
    if len(image) > MOST_IMAGE_BYTES:
        raise ImageTooLarge(
            f"the picture has {len(image)} bytes; at most {MOST_IMAGE_BYTES} are taken",
            field="image",
            metadata={"limit_bytes": str(MOST_IMAGE_BYTES)},
        )


def check_options(request: StoryRequest, *, default_pack: str) -> Options:
    """The options, defaults filled in as far as they are known here. Raises ValueOutOfRange, PackUnknown."""
    pack = request.pack or default_pack
    if not PACK_NAME.fullmatch(pack):
        raise PackUnknown(f"no pack is called {pack[:100]!r}", field="pack")
    temperature = _number("temperature", request.temperature, 0.0, 2.0)
    frame_count = _integer("frame_count", request.frame_count, 1, MOST_FRAMES)
    seed = _integer("seed", request.seed, 0, SEED_LIMIT - 1)
    return Options(
        frame_count=DEFAULT_FRAMES if frame_count is None else frame_count,
        seed=secrets.randbelow(SEED_LIMIT) if seed is None else seed,
        pack=pack,
        temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
        steps=_integer("steps", request.steps, 1, MOST_STEPS),
        text_guidance=_number("text_guidance", request.text_guidance, 0.0, 30.0),
        image_guidance=_number("image_guidance", request.image_guidance, 0.0, 30.0),
        quality=_quality(request.quality),
    )


def _integer(field: str, value: int | None, least: int, most: int) -> int | None:
    if value is not None and not least <= value <= most:
        raise _out_of_range(field, value, least, most)
    return value


def _number(field: str, value: float | None, least: float, most: float) -> float | None:
    if value is not None and not (math.isfinite(value) and least <= value <= most):
        raise _out_of_range(field, value, least, most)
    return None if value is None else value + 0.0  # -0.0 becomes 0.0


def _quality(value: str) -> Quality:
    for known in QUALITIES:
        if value == known:
            return known
    raise ValueOutOfRange(
        f"quality is {value[:100]!r}; it must be {', '.join(QUALITIES[:-1])} or {QUALITIES[-1]}",
        field="quality",
        metadata={"value": value[:100], "known": ",".join(QUALITIES)},
    )


def _out_of_range(field: str, value: float, least: float, most: float) -> ValueOutOfRange:
    return ValueOutOfRange(
        f"{field} is {value}; it must be from {least:g} to {most:g}",
        field=field,
        metadata={"value": str(value), "least": f"{least:g}", "most": f"{most:g}"},
    )


class PackCheck:
    """Says whether the services have a pack, from an answer at most half a minute old.

    While a service does not answer, its last answer counts; with none, the default pack is taken on trust (the story
    then waits for the service, like any other), and any other name is refused as not checkable now.
    """

    def __init__(self, caption: CaptionBackend, frame: FrameBackend, *, default_pack: str) -> None:
        self._backends: dict[str, CaptionBackend | FrameBackend] = {"caption": caption, "frame": frame}
        self._default_pack = default_pack
        self._known: dict[str, tuple[float, tuple[str, ...]]] = {}

    async def check(self, pack: str, *, now_s: float) -> None:
        """Raises PackUnknown, or Unavailable for a name that cannot be checked."""
        for service, backend in self._backends.items():
            asked_s, names = self._known.get(service, (-math.inf, ()))
            if now_s - asked_s > PACK_MEMORY_S or (names and pack not in names):
                try:
                    names = await backend.packs(timeout_s=PACK_CHECK_TIMEOUT_S)
                    self._known[service] = (now_s, names)
                except FabulaError:
                    self._known[service] = (now_s - PACK_MEMORY_S + PACK_SILENCE_S, names)
            if not names and pack != self._default_pack:
                raise Unavailable(
                    f"the pack {pack!r} cannot be checked while the {service} service does not answer",
                    metadata={"service": service, "pack": pack},
                )
            if names and pack not in names:
                raise PackUnknown(
                    f"the {service} service has no pack {pack!r}; it has {', '.join(names)}",
                    field="pack",
                    metadata={"pack": pack, "known": ",".join(names)},
                )
