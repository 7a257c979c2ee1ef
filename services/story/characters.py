"""Who was learned and is told of in a story: whom a request means, and who is in a frame.

A version is chosen once, when the story is made, and kept with its options. Knows the digest of somebody's weights and
never the weights. That a caption's characters are in its description is the caption service's business.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager

from fabula.customization.v1 import job_pb2

from services.runtime.errors import (
    CharacterNotFound,
    CharacterOfAnotherPack,
    CharacterRepeated,
    FeatureMissing,
    FieldViolation,
    PackUnknown,
    Unavailable,
)
from services.runtime.names import MOST_IN_FRAME, named
from services.runtime.reasons import NAME_UNFAMILIAR
from services.story.backends import FrameBackend, LoadedPack
from services.story.customization import Customizations
from services.story.intake import PACK_CHECK_TIMEOUT_S
from services.story.records import StoryCharacter, StoryWarning

VERSION_ID = re.compile(r"[0-9a-f]{64}")
FEATURE = "characters"


class CharacterLookup:
    """Finds published characters. Every method raises FabulaError."""

    def __init__(self, customizations: Customizations, frame: FrameBackend) -> None:
        self._customizations = customizations
        self._frame = frame

    async def find(self, wanted: Sequence[str], *, pack: str) -> tuple[StoryCharacter, ...]:
        """The versions that are meant, in the order asked for; nobody is asked when nobody is wanted.

        Raises CharacterNotFound, CharacterOfAnotherPack, CharacterRepeated, FeatureMissing, PackUnknown, and
        Unavailable while a service that has to say so is away.
        """
        if not wanted:
            return ()
        with _naming("frame"):
            loaded = await self._loaded(pack)
        found: list[StoryCharacter] = []
        for number, each in enumerate(wanted):
            field = f"characters[{number}]"
            with _naming("customization"):
                character = _character(await self._version(each, loaded, field))
            if any(character.name.casefold() == other.name.casefold() for other in found):
                raise CharacterRepeated(f"{field} is a second {character.name}; a story has one of a name", field=field)
            found.append(character)
        return tuple(found)

    async def _loaded(self, pack: str) -> LoadedPack:
        """The pack as the frame service has it now."""
        loaded = {each.name: each for each in await self._frame.loaded(timeout_s=PACK_CHECK_TIMEOUT_S)}
        if pack not in loaded:
            raise PackUnknown(
                f"the frame service has no pack {pack!r}; it has {', '.join(loaded)}",
                field="pack",
                metadata={"pack": pack, "known": ",".join(loaded)},
            )
        drawing = loaded[pack].drawing
        if drawing is None or FEATURE not in drawing.features:
            raise FeatureMissing(
                f"the pack {pack!r} does not draw learned characters here", metadata={"pack": pack, "feature": FEATURE}
            )
        return loaded[pack]

    async def _version(self, wanted: str, pack: LoadedPack, field: str) -> job_pb2.CharacterVersion:
        is_id = VERSION_ID.fullmatch(wanted) is not None
        learned_on = ""
        async with aclosing(self._customizations.versions(name="" if is_id else wanted)) as versions:
            async for version in versions:
                if is_id and version.version_id != wanted:
                    continue
                if _is_of(version, pack):
                    return version
                learned_on = learned_on or version.pack
                if is_id:
                    break
        who = f"the version {wanted[:12]}…" if is_id else wanted
        if learned_on:
            raise _refused(
                CharacterOfAnotherPack,
                f"{field}: {who} was learned on the pack {learned_on!r}, and on another network than {pack.name!r} has "
                f"now; teach them to {pack.name!r}, or choose the pack they were learned on",
                field,
                {"character": wanted, "pack": pack.name, "learned_on": learned_on},
            )
        raise _refused(
            CharacterNotFound,
            f"{field}: no {'version ' + wanted if is_id else repr(wanted)} was published here; `fabula character "
            "versions` lists who was",
            field,
            {"character": wanted},
        )


def _is_of(version: job_pb2.CharacterVersion, pack: LoadedPack) -> bool:
    """Whether the weights belong to the network that the pack has: a new captioner alone does not make them another's.

    A frame service that does not tell the network's digest is taken at the whole pack's.
    """
    if pack.base_digest:
        return version.base_digest == pack.base_digest
    return version.pack_digest == pack.digest


def drawn_in(characters: Sequence[StoryCharacter], description: str) -> tuple[StoryCharacter, ...]:
    """Those whose weights a frame is drawn with: whom its description names, the first ones first."""
    by_name = {one.name: one for one in characters}
    return tuple(by_name[name] for name in named(by_name, description)[:MOST_IN_FRAME])


def unfamiliar(warnings: Iterable[StoryWarning], characters: Iterable[StoryCharacter]) -> tuple[StoryWarning, ...]:
    """The warnings without those about names that the pack was taught."""
    names = {
        word for one in characters for word in one.name.split()
    }  # each is a name of its own to the caption service
    return tuple(
        each
        for each in warnings
        if each.reason != NAME_UNFAMILIAR or not set(each.metadata.get("names", "").split(",")) <= names
    )


@contextmanager
def _naming(service: str) -> Iterator[None]:
    """Says which service is away, and that only the characters need it now."""
    try:
        yield
    except Unavailable as error:
        raise Unavailable(
            f"the characters cannot be looked up while the {service} service does not answer",
            metadata={"service": service},
            retry_after_s=error.retry_after_s,
        ) from error


def _character(version: job_pb2.CharacterVersion) -> StoryCharacter:
    return StoryCharacter(
        name=_tidy(version.character.name),
        phrase=_tidy(version.character.phrase).rstrip(" .,;:!?"),
        version_id=version.version_id,
        weights_sha256=version.weights_sha256,
    )


def _tidy(text: str) -> str:
    """Composed as captions and descriptions are, or a name would not be found in them."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _refused(
    kind: type[CharacterNotFound | CharacterOfAnotherPack], message: str, field: str, metadata: dict[str, str]
) -> CharacterNotFound | CharacterOfAnotherPack:
    return kind(message, metadata={"field": field, **metadata}, field_violations=(FieldViolation(field, message),))
