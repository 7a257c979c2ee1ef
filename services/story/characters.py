"""Who was learned and is told of in a story: whom a request means, what is said of their looks, who is in a frame.

A version is chosen once, when the story is made, and kept with its options. Knows the digest of somebody's weights and
never the weights.
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
from services.story.backends import FrameBackend
from services.story.customization import Customizations
from services.story.intake import PACK_CHECK_TIMEOUT_S
from services.story.records import StoryCharacter, StoryWarning

MOST_IN_FRAME = 2  # whose weights a frame service takes
VERSION_ID = re.compile(r"[0-9a-f]{64}")
FEATURE = "characters"
# Somebody as descriptions introduce them: "Waiga, a blue elephant with a yellow crown,".
_INTRODUCED = re.compile(r"\b(?P<name>[^\W\d_a-z]\w*), (?P<look>an? [^,.;]{1,80})(?=[,.;])")
NAME_UNFAMILIAR = "NAME_UNFAMILIAR"  # as the caption service says it


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
            digest = await self._digest(pack)
        found: list[StoryCharacter] = []
        for number, each in enumerate(wanted):
            field = f"characters[{number}]"
            with _naming("customization"):
                character = _character(await self._version(each, pack, digest, field))
            if any(character.name.casefold() == other.name.casefold() for other in found):
                raise CharacterRepeated(f"{field} is a second {character.name}; a story has one of a name", field=field)
            found.append(character)
        return tuple(found)

    async def _digest(self, pack: str) -> str:
        """Of the pack as the frame service has it now."""
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
        return loaded[pack].digest

    async def _version(self, wanted: str, pack: str, digest: str, field: str) -> job_pb2.CharacterVersion:
        is_id = VERSION_ID.fullmatch(wanted) is not None
        learned_on = ""
        async with aclosing(self._customizations.versions(name="" if is_id else wanted)) as versions:
            async for version in versions:
                if is_id and version.version_id != wanted:
                    continue
                if version.pack_digest == digest:
                    return version
                learned_on = learned_on or version.pack
                if is_id:
                    break
        who = f"the version {wanted[:12]}…" if is_id else wanted
        if learned_on:
            raise _refused(
                CharacterOfAnotherPack,
                f"{field}: {who} was learned on the pack {learned_on!r}, and on another network than {pack!r} has now; "
                f"teach them to {pack!r}, or choose the pack they were learned on",
                field,
                {"character": wanted, "pack": pack, "learned_on": learned_on},
            )
        raise _refused(
            CharacterNotFound,
            f"{field}: no {'version ' + wanted if is_id else repr(wanted)} was published here; `fabula character "
            "versions` lists who was",
            field,
            {"character": wanted},
        )


def told(characters: Iterable[StoryCharacter]) -> tuple[str, ...]:
    """What they look like, as descriptions say it: the caption service takes looks from such sentences."""
    return tuple(f"{one.name}, {one.phrase}, stands there." for one in characters if one.phrase)


def completed(
    description: str, caption: str, earlier_captions: Iterable[str], characters: Sequence[StoryCharacter]
) -> str:
    """The description with those whom its caption names, at most as many as a frame has weights for.

    A small language model often loses a name that it has never read, or makes one up: whoever is introduced by a name
    that no caption has becomes somebody who is missing, and who is missing still gets a sentence, as a caption service
    does for the pack's own cast. Without the name a frame would be drawn without the weights.
    """
    wanted = _named(characters, caption)[:MOST_IN_FRAME]
    missing = [one for one in wanted if one not in _named(characters, description)]
    if not missing:
        return description
    captions = "\n".join((*earlier_captions, caption))
    renamed: dict[str, StoryCharacter] = {}

    def introduced(found: re.Match[str]) -> str:
        if not missing or re.search(rf"(?<!\w){re.escape(found['name'])}(?!\w)", captions):
            return found[0]
        one = missing.pop(0)
        renamed.setdefault(found["name"], one)
        return _introduction(one)

    description = _INTRODUCED.sub(introduced, description)
    for name, one in renamed.items():  # where it stands alone: "Waiga's ball"
        description = one.name.join(re.split(rf"(?<!\w){re.escape(name)}(?!\w)(?!, an? )", description))
    sentences = (f"{_introduction(one)}{',' if one.phrase else ''} stands nearby." for one in missing)
    return " ".join((description, *sentences))


def drawn_in(characters: Sequence[StoryCharacter], description: str) -> tuple[StoryCharacter, ...]:
    """Those whose weights a frame is drawn with: whom its description names by a whole word, the first ones first.

    Where a name begins another one (Rosa, Rosa Lee), the longer one is meant where it stands.
    """
    return _named(characters, description)[:MOST_IN_FRAME]


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


def _introduction(one: StoryCharacter) -> str:
    return f"{one.name}, {one.phrase}" if one.phrase else one.name


def _named(characters: Sequence[StoryCharacter], text: str) -> tuple[StoryCharacter, ...]:
    """Everybody whom a text names, in its order."""
    if not characters:
        return ()
    by_name = {one.name: one for one in characters}
    names = "|".join(re.escape(name) for name in sorted(by_name, key=len, reverse=True))
    found = re.findall(rf"(?<!\w)(?:{names})(?!\w)", unicodedata.normalize("NFC", text))
    return tuple(by_name[name] for name in dict.fromkeys(found))


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
