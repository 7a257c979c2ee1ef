"""Packs without weights: a model on somebody else's server, by its address.

    triton://host:port/model       gRPC as it is
    tritons://host:port/model      with TLS

Adding one asks the server nothing; the service that uses it does, when it starts. Knows no transport.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from pydantic import ValidationError

from services.models.errors import PackSourceInvalid
from services.models.library import PackPlan
from services.models.pack import Endpoint, RemoteSettings
from services.models.published import Told, pack_name
from services.models.source import SourceFile

REMOTE_CAPTIONER = "remote-captioner"
REMOTE_FRAMES = "remote-frames"
ARCHITECTURES = (REMOTE_CAPTIONER, REMOTE_FRAMES)
_DRAWING = "frame/"  # what our own servers' models that draw are called
_PLACE = re.compile(r"triton(?P<tls>s?)://(?P<address>[^/]+)/(?P<model>.+)")


class EndpointSource:
    """A server as a source: it has no files. See `Source`."""

    def __init__(self, place: str) -> None:
        """Raises PackSourceInvalid when `place` is no address of a model."""
        found = _PLACE.fullmatch(place)
        if found is None:
            raise PackSourceInvalid(f"{place!r} is no model on a server: write triton://host:port/model")
        self.name = place
        try:
            self.endpoint = Endpoint(address=found["address"], model=found["model"], tls=bool(found["tls"]))
        except ValidationError as error:
            raise PackSourceInvalid(f"{place!r}: {error.errors()[0]['msg']}") from None

    @staticmethod
    def is_one(place: str) -> bool:
        """Whether a place is meant to be one."""
        return place.startswith(("triton://", "tritons://"))

    def files(self) -> Mapping[str, SourceFile]:
        """See `Source`."""
        return {}

    def blocks(self, path: str, start: int) -> Iterator[bytes]:
        """See `Source`."""
        raise PackSourceInvalid(f"{self.name} has no files")


def plan_remote(source: EndpointSource, told: Told) -> PackPlan:
    """How to add a model on a server: one whose name begins with `frame/` draws, or whose told family says so.

    Raises PackSourceInvalid.
    """
    if not told.licence:
        raise PackSourceInvalid(
            f"say under which terms {source.name} may be used, for example --licence LicenseRef-name"
        )
    if told.reference_range or (told.steps, told.text_guidance, told.image_guidance) != (None,) * 3:
        raise PackSourceInvalid(f"{source.name} is set up where it is: steps, guidance and ranges are not told here")
    guessed = REMOTE_FRAMES if source.endpoint.model.startswith(_DRAWING) else REMOTE_CAPTIONER
    architecture = told.family or guessed
    if architecture not in ARCHITECTURES:
        raise PackSourceInvalid(f"no family {architecture!r} of models on servers; known: {', '.join(ARCHITECTURES)}")
    try:
        settings = RemoteSettings(
            name=told.name or pack_name(source.endpoint.model),
            architecture=architecture,
            base=told.base or source.endpoint.model,
            licence=told.licence,
            made_by=told.made_by,
            endpoint=source.endpoint,
        )
    except ValidationError as error:
        raise PackSourceInvalid(f"{source.name}: {error.errors()[0]['msg']}") from None
    return PackPlan(name=settings.name, architecture=settings.architecture, files=(), settings=settings)
