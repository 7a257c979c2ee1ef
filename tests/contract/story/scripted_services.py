"""Deterministic caption and frame services: the real protos over real gRPC, with texts and pictures made from the seed.

Each answer depends only on what a real service's answer may depend on, so a story made twice is the same, and
everything that was asked for is written down, so a test can count what was computed. Tests switch on failures and
pauses.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from fabula.caption.v1 import caption_service_pb2 as caption_pb
from fabula.caption.v1 import caption_service_pb2_grpc as caption_grpc
from fabula.frame.v1 import frame_service_pb2 as frame_pb
from fabula.frame.v1 import frame_service_pb2_grpc as frame_grpc
from fabula.warning.v1 import warning_pb2
from PIL import Image

from services.runtime.call import current_call
from services.runtime.errors import FabulaError
from services.runtime.rpc import stream_method, unary_method

TOKEN = "0123456789abcdef" * 4
DIGEST = "sha256:scripted"
FINGERPRINT = "0123456789abcdef"
STEPS = 8


def frame_pack(name: str) -> frame_pb.Pack:
    """A pack as a frame service tells it; every number is another one."""
    return frame_pb.Pack(
        name=name,
        digest=f"{name}-drawn",
        base_digest=f"{name}-network",
        architecture="storygen",
        width_px=32,
        height_px=40,
        default_steps=STEPS,
        max_references=3,
        default_text_guidance=7.0,
        default_image_guidance=3.5,
        features=[
            frame_pb.FEATURE_REFERENCES,
            frame_pb.FEATURE_CHARACTERS,
            frame_pb.FEATURE_EDIT,
            frame_pb.FEATURE_INSERT,
        ],
        min_side_px=16,
        side_multiple_px=8,
        max_area_px=5120,
        max_steps=60,
        samplers=["ddim", "euler"],
        qualities=[
            frame_pb.QualitySettings(quality=quality, steps=steps, text_guidance=guidance, image_guidance=1.25)
            for quality, steps, guidance in (
                (frame_pb.QUALITY_DRAFT, 4, 1.0),
                (frame_pb.QUALITY_STANDARD, STEPS, 7.0),
                (frame_pb.QUALITY_BEST, 16, 7.5),
            )
        ],
    )


def picture(seed: int, description: str, references: list[tuple[bytes, str]], besides: bytes = b"") -> bytes:
    """A real PNG that depends on everything the frame service is given."""
    digest = hashlib.sha256(f"{seed}/{description}".encode() + besides)
    for image, text in references:
        digest.update(hashlib.sha256(image).digest() + text.encode())
    colours = digest.digest()
    image = Image.new("RGB", (32, 32), tuple(colours[:3]))
    image.paste(tuple(colours[3:6]), (8, 8, 8 + colours[6] % 16 + 4, 8 + colours[7] % 16 + 4))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


class Script:
    """What the services were asked, and how they shall behave. `before` is awaited with (method, frame_index)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Any]] = []  # method, request, the call's ids and deadline
        self.computed: Counter[tuple[str, int]] = Counter()  # (method, frame index): answers actually made
        self.failures: dict[str, list[FabulaError]] = defaultdict(list)  # method: errors to raise, first ones first
        self.before: Callable[[str, int], Awaitable[None]] | None = None
        self.step_s = 0.0
        self.steps_taken = 0  # denoising steps of every job, for the cancel test
        self.cancelled = 0
        self.packs = ["toon", "other"]
        self.writers_alone: list[str] = []  # packs that only the caption service has
        self.drawers_alone: list[str] = []  # packs that only the frame service has
        self.replicas_die = False
        self.strange: tuple[str, ...] = ()  # words the pack does not know, in whatever caption it is asked about
        self.warned: list[warning_pb2.Warning] = []  # what is said of every story's first caption
        self.strange_picture = False  # the given one is unlike what the pack draws
        self.features_missing: set[int] = set()  # of every pack
        self.max_references: int | None = None  # of every pack; None: what `frame_pack` says
        self.told: dict[int, str] = {}  # frame index: what its caption says besides
        self.named: dict[int, str] = {}  # frame index: what its description says besides
        self.picture_bytes = 0  # least size of a picture, for the full disk

    async def enter(self, method: str, request: Any, frame_index: int) -> None:
        self.calls.append((method, request, current_call()))
        if self.before is not None:
            await self.before(method, frame_index)
        if self.failures[method]:
            raise self.failures[method].pop(0)

    def count(self, method: str) -> int:
        return sum(1 for called, _, _ in self.calls if called == method)


def _word_warnings(script: Script, texts: dict[str, str]) -> list[warning_pb2.Warning]:
    """As the caption service says them: one for each text that has such words."""
    found = {field: [word for word in script.strange if word in text] for field, text in texts.items()}
    return [
        warning_pb2.Warning(
            reason="WORDS_UNFAMILIAR",
            message=f"This pack has never drawn: {', '.join(words)}.",
            field=field,
            metadata={"words": ",".join(words)},
        )
        for field, words in found.items()
        if words
    ]


def _frame_index_of(text: str) -> int:
    """Scripted texts say which frame they belong to."""
    return int(text.split("frame ", 1)[1].split(" ", 1)[0].rstrip(".:,")) if "frame " in text else 0


class ScriptedCaption(caption_grpc.CaptionServiceServicer):
    def __init__(self, script: Script, token: str = TOKEN) -> None:
        self.script = script
        self.token = token

    @unary_method(caption_pb.WriteCaptionResponse)
    async def WriteCaption(self, request: Any, context: Any) -> Any:
        index = len(request.captions)
        await self.script.enter("WriteCaption", request, index)
        self.script.computed["WriteCaption", index] += 1
        mark = hashlib.sha256(
            repr((list(request.captions), request.sampling.seed)).encode() + request.image
        ).hexdigest()[:8]
        return caption_pb.WriteCaptionResponse(
            caption=" ".join(
                filter(None, (f"Then came frame {index} of the story ({mark}).", self.script.told.get(index)))
            ),
            pack_digest=DIGEST,
            warnings=[
                *_word_warnings(self.script, {f"captions[{index - 1}]": request.captions[-1]}),
                *(self.script.warned if index == 1 else ()),
            ],
        )

    @unary_method(caption_pb.DescribeResponse)
    async def Describe(self, request: Any, context: Any) -> Any:
        index = _frame_index_of(request.caption)
        await self.script.enter("Describe", request, index)
        self.script.computed["Describe", index] += 1
        mark = hashlib.sha256(
            repr((request.previous_caption, request.caption, request.sampling.seed)).encode() + request.image
        ).hexdigest()[:8]
        texts = {"previous_caption": request.previous_caption, "caption": request.caption}
        return caption_pb.DescribeResponse(
            description=" ".join(filter(None, (f"A drawing of frame {index} : {mark}.", self.script.named.get(index)))),
            pack_digest=DIGEST,
            warnings=_word_warnings(self.script, texts),
        )

    @unary_method(caption_pb.ListPacksResponse)
    async def ListPacks(self, request: Any, context: Any) -> Any:
        names = [*self.script.packs, *self.script.writers_alone]
        return caption_pb.ListPacksResponse(
            packs=[caption_pb.Pack(name=name, digest=f"{name}-written", architecture="llava") for name in names]
        )


class ScriptedFrame(frame_grpc.FrameServiceServicer):
    def __init__(self, script: Script, token: str = TOKEN) -> None:
        self.script = script
        self.token = token

    async def RenderFrame(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if self.script.replicas_die:
            self.script.calls.append(("RenderFrame", request, None))
            # What Ray Serve's proxy answers for a replica that died with the call in flight.
            await context.abort(grpc.StatusCode.INTERNAL, "The actor died unexpectedly before finishing this task.")
        async for message in self._render(request, context):
            yield message

    @stream_method(frame_pb.RenderFrameResponse)
    async def _render(self, request: Any, context: Any) -> AsyncIterator[Any]:
        index = _frame_index_of(request.description)
        yield frame_pb.RenderFrameResponse(queued=frame_pb.Queued(ahead_count=0))
        await self.script.enter("RenderFrame", request, index)
        try:
            steps = request.steps or STEPS
            for step in range(1, steps + 1):
                await asyncio.sleep(self.script.step_s)
                self.script.steps_taken += 1
                yield frame_pb.RenderFrameResponse(
                    progress=frame_pb.Progress(step=step, step_count=steps, eta_s=(steps - step) * self.script.step_s)
                )
                if request.preview_every_steps and step % request.preview_every_steps == 0 and step < steps:
                    yield frame_pb.RenderFrameResponse(preview=frame_pb.Preview(image=b"RIFFpreview", step=step))
        except (asyncio.CancelledError, GeneratorExit):
            self.script.cancelled += 1
            raise
        self.script.computed["RenderFrame", index] += 1
        references = [(ref.image, ref.description) for ref in request.references]
        besides = b"" if not request.HasField("edit") else request.edit.SerializeToString(deterministic=True)
        besides += b"".join(one.SerializeToString(deterministic=True) for one in request.characters)
        image = picture(request.seed, request.description, references, besides) + bytes(self.script.picture_bytes)
        warnings = [
            warning_pb2.Warning(
                reason="PICTURE_UNFAMILIAR",
                message="It is unlike what this pack draws.",
                field=f"references[{k}].image",
            )
            for k, reference in enumerate(request.references)
            if reference.given and self.script.strange_picture
        ]
        yield frame_pb.RenderFrameResponse(
            frame=frame_pb.RenderedFrame(
                image=image,
                sha256=hashlib.sha256(image).hexdigest(),
                width_px=32,
                height_px=32,
                seed=request.seed,
                steps=steps,
                text_guidance=request.text_guidance if request.HasField("text_guidance") else 7.0,
                image_guidance=request.image_guidance if request.HasField("image_guidance") else 3.5,
                pack_digest=DIGEST,
                fingerprint=FINGERPRINT,
                queue_s=0.25,
                render_s=0.5,
                warnings=warnings,
            )
        )

    @unary_method(frame_pb.UnloadCharacterResponse)
    async def UnloadCharacter(self, request: Any, context: Any) -> Any:
        await self.script.enter("UnloadCharacter", request, 0)
        return frame_pb.UnloadCharacterResponse(was_loaded=True)

    @unary_method(frame_pb.ListPacksResponse)
    async def ListPacks(self, request: Any, context: Any) -> Any:
        names = [*self.script.packs, *self.script.drawers_alone]
        packs = [frame_pack(name) for name in names]
        for pack in packs:
            kept = [feature for feature in pack.features if feature not in self.script.features_missing]
            del pack.features[:]
            pack.features.extend(kept)
            if self.script.max_references is not None:
                pack.max_references = self.script.max_references
        return frame_pb.ListPacksResponse(packs=packs)


class ScriptedServices:
    """Both services on one port, as behind the ingress, in a thread of their own. `stop` and `start` make an outage."""

    def __init__(self, token: str = TOKEN) -> None:
        self.script = Script()
        self.port = 0
        self._token = token
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: grpc.aio.Server | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(20)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(20)

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _start(self) -> None:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 64 << 20)])
        caption_grpc.add_CaptionServiceServicer_to_server(ScriptedCaption(self.script, self._token), server)
        frame_grpc.add_FrameServiceServicer_to_server(ScriptedFrame(self.script, self._token), server)
        self.port = server.add_insecure_port(f"127.0.0.1:{self.port}")
        await server.start()
        self._server = server

    async def _stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None
