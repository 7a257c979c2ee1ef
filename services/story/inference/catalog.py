"""Which models there are: `frame/<pack>` and `caption/<pack>`, one for each pack that a service has loaded.

A character that has weights of its own is a model too, `frame/<pack>/<digest>`: the pack wearing it. Stock clients name
a model when they load and unload and can say nothing else, so a character needs a name of that kind. Characters are not
listed: the frame service knows those that it was asked for, not all that are stored.

Packs are asked for at most every `MEMORY_S` seconds, and again at once for a name that is not among them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from services.runtime.errors import FabulaError, ModelUnknown, Unavailable, ValueOutOfRange
from services.runtime.store import SHA256

VERSION = "1"  # of every model: what a pack answers for is its digest
MEMORY_S = 30.0
SILENCE_S = 2.0  # a service that did not answer is not asked again for so long

Kind = Literal["frame", "caption"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class ModelName:
    """A name taken apart."""

    kind: Kind
    pack: str
    character: str = ""  # digest of the weights that the pack wears

    def __str__(self) -> str:
        return "/".join((self.kind, self.pack, *([self.character] if self.character else [])))


@dataclass(frozen=True)
class Model:
    """A model that is there. `pack` is what its service says of the pack."""

    name: ModelName
    pack: Any


@dataclass(frozen=True)
class Listing:
    """What one service had when it was asked last."""

    kind: Kind
    packs: tuple[Any, ...] = ()
    answered: bool = False  # to the last question


class Catalog:
    """The models of both services."""

    def __init__(
        self,
        list_packs: dict[Kind, Callable[[], Awaitable[tuple[Any, ...]]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`list_packs` asks a service for its packs, and raises FabulaError when it does not answer."""
        self._list_packs = list_packs
        self._clock = clock
        self._listings: dict[Kind, Listing] = {kind: Listing(kind) for kind in KINDS}
        self._asked_s: dict[Kind, float] = dict.fromkeys(KINDS, -math.inf)

    async def find(self, name: str, version: str = "") -> Model:
        """The model of a request. Raises ModelUnknown, or Unavailable while nobody can say."""
        parsed = parse(name)
        if version not in ("", VERSION):
            raise ModelUnknown(
                f"Request for unknown model: '{name[:200]}' version {version[:40]!r} is not found; there is {VERSION}",
                metadata={"model": name[:200], "version": version[:40]},
            )
        listing = self._listings[parsed.kind]
        age_s = self._clock() - self._asked_s[parsed.kind]
        is_there = any(pack.name == parsed.pack for pack in listing.packs)
        if age_s > (MEMORY_S if listing.answered else SILENCE_S) or (listing.answered and not is_there):
            listing = await self.ask(parsed.kind)
        for pack in listing.packs:
            if pack.name == parsed.pack:
                return Model(parsed, pack)
        if not listing.answered:
            raise Unavailable(
                f"the {parsed.kind} service does not answer, so nobody can say whether there is a model {name[:200]!r}",
                metadata={"service": parsed.kind},
            )
        known = ", ".join(f"{parsed.kind}/{pack.name}" for pack in listing.packs)
        raise ModelUnknown(
            f"Request for unknown model: '{name[:200]}' is not found; there are {known}", metadata={"model": name[:200]}
        )

    async def ask(self, kind: Kind) -> Listing:
        """What a service has now; while it is silent, what it had when it last answered."""
        try:
            listing = Listing(kind, await self._list_packs[kind](), answered=True)
        except FabulaError:
            listing = Listing(kind, self._listings[kind].packs)
        self._listings[kind] = listing
        self._asked_s[kind] = self._clock()
        return listing


def parse(name: str) -> ModelName:
    """A name's parts. Raises ModelUnknown for what cannot be a model, ValueOutOfRange for what cannot be a digest."""
    kind, _, rest = name.partition("/")
    pack, _, character = rest.partition("/")
    if kind not in KINDS or not pack or (character and kind != "frame"):
        raise ModelUnknown(
            f"Request for unknown model: '{name[:200]}' is not found; there are frame/<pack> and caption/<pack>",
            metadata={"model": name[:200]},
        )
    if character:
        check_digest(character, "model_name")
    return ModelName(kind, pack, character)


def check_digest(digest: str, field: str) -> str:
    """The digest of a character's weights. Raises ValueOutOfRange."""
    if not SHA256.fullmatch(digest):
        raise ValueOutOfRange(f"{field}: a character is named by 64 lower-case hex digits", field=field)
    return digest
