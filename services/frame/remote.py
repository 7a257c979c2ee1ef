"""Frames from somebody else's server: a Triton, a KServe, or another installation of ours.

`RemoteFrames` draws with one model of the Open Inference Protocol, through tritonclient, and speaks the frame service's
own messages: the servicer passes a request for such a pack on to it, and the answers back. The model must take what our
own `frame/<pack>` takes (PROMPT, REFERENCE_IMAGES and REFERENCE_DESCRIPTIONS as BYTES; the parameters `seed`, `steps`,
`width`, `height`, guidance, `sampler`, `quality`, `preview_every`, `characters`) and give IMAGE as a PNG. Where its
metadata has EDIT_IMAGE it is given edits, with the parameter `strength`; where it has REFERENCE_DISTANCES, those; where
it has not, a request that needs them is refused here by name. A server that is away ends no process: its pack is not
listed until it is back.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import structlog
from fabula.frame.v1 import frame_service_pb2 as pb
from PIL import Image

from services.models.pack import Endpoint
from services.runtime.errors import FabulaError, RenderFailed, ReplicaLost, ValueOutOfRange
from services.runtime.inference import InferenceChannel, bytes_tensor, one_of_bytes, small_numbers_tensor

log = structlog.get_logger("fabula.frame")

PROMPT, REFERENCE_IMAGES, REFERENCE_DESCRIPTIONS, IMAGE = (
    "PROMPT",
    "REFERENCE_IMAGES",
    "REFERENCE_DESCRIPTIONS",
    "IMAGE",
)
REFERENCE_DISTANCES, EDIT_IMAGE = "REFERENCE_DISTANCES", "EDIT_IMAGE"
FARTHEST = 255  # what a tensor of distances can say
SEEDS = 2**53  # our own servers take seeds below it
LIST_WITHIN_S = 5.0
PIXELS_MAX = 8192 * 8192
_REFERENCE = re.compile(rf"({REFERENCE_IMAGES}|{REFERENCE_DESCRIPTIONS}|{REFERENCE_DISTANCES})\[(\d+)\]")
_PARTS = {REFERENCE_IMAGES: "image", REFERENCE_DESCRIPTIONS: "description", REFERENCE_DISTANCES: "distance"}
# Triton counts from 1, the highest.
_PRIORITIES = {pb.PRIORITY_INTERACTIVE: 1, pb.PRIORITY_STANDARD: 2, pb.PRIORITY_BATCH: 3}
_NUMBERS = (
    "width_px",
    "height_px",
    "default_steps",
    "max_references",
    "min_side_px",
    "side_multiple_px",
    "max_area_px",
    "max_steps",
)
_SCALES = ("default_text_guidance", "default_image_guidance")


class RemoteFrames:
    """One pack whose model is on a server."""

    def __init__(self, name: str, digest: str, architecture: str, endpoint: Endpoint) -> None:
        self._told = pb.Pack(name=name, digest=digest, architecture=architecture)
        self._endpoint = endpoint
        self._server = InferenceChannel(endpoint.address, endpoint.model, tls=endpoint.tls)
        self._pack: pb.Pack | None = None

    async def pack(self) -> pb.Pack | None:
        """The pack as the server tells of it; None while it does not answer, or where its model is none that draws."""
        if self._pack is None:
            try:
                inputs = await self._server.check(inputs={PROMPT}, outputs={IMAGE}, limit_s=LIST_WITHIN_S)
                facts = await self._server.facts(LIST_WITHIN_S)
            except FabulaError as error:
                log.warning("remote_pack_silent", pack=self._told.name, reason=error.reason, message=error.message)
                return None
            self._pack = _described(self._told, facts, inputs)
        return self._pack

    async def render(self, request: pb.RenderFrameRequest) -> AsyncIterator[pb.RenderFrameResponse]:
        """Previews, where they are asked for, and the picture. Closing it cancels the job on the server.

        Raises ValueOutOfRange for what the server's model has no input for, the server's own refusals, and RenderFailed
        for an answer that is no picture.
        """
        await self._refuse_the_unsayable(request)
        tensors = [bytes_tensor(PROMPT, [request.description.encode()])]
        if request.references:
            tensors += [
                bytes_tensor(REFERENCE_IMAGES, [each.image for each in request.references]),
                bytes_tensor(REFERENCE_DESCRIPTIONS, [each.description.encode() for each in request.references]),
            ]
        if any(each.distance for each in request.references):
            tensors.append(small_numbers_tensor(REFERENCE_DISTANCES, [each.distance for each in request.references]))
        if request.HasField("edit"):
            tensors.append(bytes_tensor(EDIT_IMAGE, [request.edit.image]))
        told: dict[str, Any] = {
            "limit_s": self._endpoint.timeout_s,
            "rename": _own_name,
            "priority": _PRIORITIES.get(request.priority, 0),
        }
        parameters = _parameters(request)
        yield pb.RenderFrameResponse(queued=pb.Queued(ahead_count=0))
        if not request.preview_every_steps:
            result = await self._server.infer(tensors, [IMAGE], parameters, **told)
            yield await asyncio.to_thread(self._frame, result, request)
            return
        drawn: Any = None
        async with aclosing(self._server.stream(tensors, [IMAGE], parameters, **told)) as results:  # type: ignore[type-var]
            async for result in results:
                values = result.get_response().parameters
                if "preview" in values and values["preview"].bool_param:
                    image = one_of_bytes(result, IMAGE) or b""
                    step = values["step"].int64_param if "step" in values else 0
                    yield pb.RenderFrameResponse(preview=pb.Preview(image=image, step=step))
                else:
                    drawn = result
        if drawn is None:
            raise ReplicaLost(f"{self._endpoint.model} ended its answer before the picture")
        yield await asyncio.to_thread(self._frame, drawn, request)

    async def close(self) -> None:
        """Closes the connection; calls in flight end with ShuttingDown."""
        await self._server.close()

    async def _refuse_the_unsayable(self, request: pb.RenderFrameRequest) -> None:
        """Asks the server what it takes each time: few requests need it, and a server may have learned since."""
        needed = {"edit": EDIT_IMAGE} if request.HasField("edit") else {}
        for number, each in enumerate(request.references):
            field = f"references[{number}].distance"
            if each.distance > FARTHEST:
                raise ValueOutOfRange(f"{field} is {each.distance}; it must be at most {FARTHEST}", field=field)
            if each.distance:
                needed[field] = REFERENCE_DISTANCES
        if not needed:
            return
        limit_s = min(LIST_WITHIN_S, self._endpoint.timeout_s)
        takes = await self._server.check(inputs={PROMPT}, outputs={IMAGE}, limit_s=limit_s)
        for field, name in needed.items():
            if name not in takes:
                raise ValueOutOfRange(f"{field}: the server's model {self._endpoint.model} has no {name}", field=field)

    def _frame(self, result: Any, request: pb.RenderFrameRequest) -> pb.RenderFrameResponse:
        """Raises RenderFailed for what is no PNG, ReplicaLost for one that was damaged on its way."""
        image = one_of_bytes(result, IMAGE) or b""
        values = result.get_response().parameters
        sha256 = hashlib.sha256(image).hexdigest()
        if "sha256" in values and values["sha256"].string_param != sha256:
            raise ReplicaLost(f"the picture of {self._endpoint.model} was damaged on its way")
        width_px, height_px = self._sides(image)

        def number(name: str, default: float) -> float:
            if name not in values:
                return default
            return float(getattr(values[name], str(values[name].WhichOneof("parameter_choice"))))

        return pb.RenderFrameResponse(
            frame=pb.RenderedFrame(
                image=image,
                sha256=sha256,
                width_px=width_px,
                height_px=height_px,
                seed=int(number("seed", request.seed)),
                steps=int(number("steps", request.steps)),
                text_guidance=number("text_guidance", request.text_guidance),
                image_guidance=number("image_guidance", request.image_guidance),
                sampler=values["sampler"].string_param if "sampler" in values else request.sampler,
                pack_digest=self._told.digest,
                fingerprint=values["fingerprint"].string_param if "fingerprint" in values else "",
                edit_strength=number("strength", request.edit.strength),
                queue_s=number("queue_s", 0.0),
                render_s=number("render_s", 0.0),
            )
        )

    def _sides(self, image: bytes) -> tuple[int, int]:
        try:
            with Image.open(io.BytesIO(image), formats=("PNG",)) as opened:
                if opened.width * opened.height > PIXELS_MAX:
                    raise RenderFailed(f"{self._endpoint.model} drew {opened.width}×{opened.height} pixels")
                opened.load()
                return opened.width, opened.height
        except RenderFailed:
            raise
        except Exception:  # noqa: BLE001 - decoders raise what they like for what is no picture
            raise RenderFailed(f"{self._endpoint.model} gave no PNG") from None


def _described(told: pb.Pack, facts: dict[str, str], inputs: frozenset[str]) -> pb.Pack:
    """What our own servers tell of their packs; a stranger's says less."""
    pack = pb.Pack()
    pack.CopyFrom(told)
    for name in (*_NUMBERS, *_SCALES):
        try:
            value = float(facts.get(name, "0"))
            setattr(pack, name, int(value) if name in _NUMBERS else value)
        except (ValueError, OverflowError):
            log.warning("remote_fact_unreadable", pack=told.name, fact=name)
    if pack.max_references:
        pack.features.append(pb.FEATURE_REFERENCES)
    if EDIT_IMAGE in inputs:
        pack.features.append(pb.FEATURE_EDIT)
    # A frame between two is drawn from neighbours that are both one frame away.
    if pack.max_references > 1 and REFERENCE_DISTANCES in inputs:
        pack.features.append(pb.FEATURE_INSERT)
    return pack


def _parameters(request: pb.RenderFrameRequest) -> dict[str, Any]:
    digest = hashlib.sha256(f"frame {request.seed}".encode()).digest()
    parameters: dict[str, Any] = {
        "seed": request.seed if request.seed < SEEDS else int.from_bytes(digest[:8], "big") % SEEDS,
    }
    for ours, theirs in (
        ("width_px", "width"),
        ("height_px", "height"),
        ("steps", "steps"),
        ("sampler", "sampler"),
        ("preview_every_steps", "preview_every"),
    ):
        if value := getattr(request, ours):
            parameters[theirs] = value
    for name in ("text_guidance", "image_guidance"):
        if request.HasField(name):
            parameters[name] = float(getattr(request, name))
    if request.edit.HasField("strength"):
        parameters["strength"] = request.edit.strength
    if request.quality in (pb.QUALITY_DRAFT, pb.QUALITY_BEST):
        parameters["quality"] = pb.Quality.Name(request.quality).removeprefix("QUALITY_").lower()
    if request.characters:
        worn = (
            f"{each.digest}:{each.scale:g}" if each.HasField("scale") else each.digest for each in request.characters
        )
        parameters["characters"] = ",".join(worn)
    return parameters


def _own_name(name: str) -> str:
    """Our field of a server's tensor or parameter."""
    if found := _REFERENCE.fullmatch(name):
        return f"references[{found[2]}].{_PARTS[found[1]]}"
    return {
        PROMPT: "description",
        REFERENCE_IMAGES: "references",
        REFERENCE_DISTANCES: "references",
        EDIT_IMAGE: "edit.image",
        "strength": "edit.strength",
        "width": "width_px",
        "height": "height_px",
        "preview_every": "preview_every_steps",
    }.get(name, name)
