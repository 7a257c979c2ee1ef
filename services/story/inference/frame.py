"""The models `frame/<pack>`: a description becomes a picture.

Inputs   PROMPT                  BYTES [1]             what to draw, literally
         REFERENCE_IMAGES        BYTES [N]             up to four earlier frames, oldest first: picture files
                                 or UINT8 [N, H, W, 3] the same as RGB pixels
         REFERENCE_DESCRIPTIONS  BYTES [N]             what each of them shows; may be empty, may be left out
         REFERENCE_DISTANCES     UINT8 [N]             how many frames each is from the one that is drawn; 0, and left
                                                       out, is by its place
         EDIT_IMAGE              BYTES [1]             what the frame is made of instead of noise alone: a picture file
                                 or UINT8 [1, H, W, 3] the same as RGB pixels; the parameter `strength`, above 0 and at
                                                       most 1, says how much of it is drawn anew
Outputs  IMAGE                   BYTES [1]             a PNG file; of a preview a small WebP
         PIXELS                  UINT8 [H, W, 3]       the same as RGB pixels; only when asked for

The protocol would send all outputs when none is named. Here that is IMAGE alone: the pixels say nothing more, and are
ten times as large. The last two inputs are there where the model's pack does what they ask for; its metadata says so.

Clients' pictures are decoded in the sandbox only, pixels too (there they meet the same limits). What is decoded here,
for PIXELS, was made by our own frame service.
"""

from __future__ import annotations

import hashlib
import io
import secrets
from collections.abc import Awaitable, Callable

from fabula.frame.v1 import frame_service_pb2 as frame_pb
from PIL import Image
from tritonclient.grpc import service_pb2 as pb

from services.runtime.errors import ReplicaLost, TensorInvalid, ValueOutOfRange
from services.story.inference.catalog import Model, check_digest
from services.story.inference.parameters import Parameters, put_parameters
from services.story.inference.refusals import naming
from services.story.inference.tensors import ANY, BYTES, UINT8, Tensor, TensorSpec, add_output
from services.story.inference.texts import checked_caption, checked_description, warnings_text
from services.story.intake import check_image
from services.story.plan import MAX_REFERENCES, SEED_LIMIT
from services.story.records import DEFAULT_QUALITY, QUALITIES

MOST_REFERENCES = MAX_REFERENCES  # of any pack; the frame service knows how many each looks at
IMAGE, PIXELS = "IMAGE", "PIXELS"
REFERENCE_DISTANCES, EDIT_IMAGE = "REFERENCE_DISTANCES", "EDIT_IMAGE"
INPUTS = (
    TensorSpec(name="PROMPT", datatype=BYTES, shape=(1,)),
    TensorSpec(
        name="REFERENCE_IMAGES",
        datatype=BYTES,
        shape=(ANY,),
        optional=True,
        most=MOST_REFERENCES,
        others={UINT8: (ANY, ANY, ANY, 3)},
    ),
    TensorSpec(name="REFERENCE_DESCRIPTIONS", datatype=BYTES, shape=(ANY,), optional=True, most=MOST_REFERENCES),
)
DISTANCES = TensorSpec(name=REFERENCE_DISTANCES, datatype=UINT8, shape=(ANY,), optional=True, most=MOST_REFERENCES)
EDIT = TensorSpec(name=EDIT_IMAGE, datatype=BYTES, shape=(1,), optional=True, others={UINT8: (1, ANY, ANY, 3)})
OUTPUTS = (
    TensorSpec(name=IMAGE, datatype=BYTES, shape=(1,)),
    TensorSpec(name=PIXELS, datatype=UINT8, shape=(ANY, ANY, 3)),
)
NAMES = {  # the frame service's fields
    r"description": "PROMPT",
    r"references": "REFERENCE_IMAGES",
    r"references\[(\d+)\]\.image": r"REFERENCE_IMAGES[\1]",
    r"references\[(\d+)\]\.description": r"REFERENCE_DESCRIPTIONS[\1]",
    r"references\[(\d+)\]\.distance": r"REFERENCE_DISTANCES[\1]",
    r"edit(\.image)?": "EDIT_IMAGE",
    r"edit\.strength": "strength",
    r"(width|height)_px": r"\1",
    r"preview_every_steps": "preview_every",
    r"characters\[(\d+)\]\..*": r"characters[\1]",
}
# Triton counts from 1, the highest; 0, and what is beyond the last, is the default. ModelConfig says the same.
PRIORITIES = {1: frame_pb.PRIORITY_INTERACTIVE, 2: frame_pb.PRIORITY_STANDARD, 3: frame_pb.PRIORITY_BATCH}
DEFAULT_PRIORITY = 2
MOST_STEPS = 100
MOST_GUIDANCE = 30.0
MOST_SIDE_PX = 8192  # far above any pack; the frame service knows what each draws
MOST_CHARACTERS_TEXT = 1000  # of the parameter `characters`; how many may be worn the frame service knows

Clean = Callable[[bytes], Awaitable[bytes]]
"""Decodes an untrusted picture in the sandbox and gives a clean PNG. Raises FabulaError about the field `image`."""


def inputs(pack: frame_pb.Pack) -> tuple[TensorSpec, ...]:
    """What a pack's model takes. A history is read in its order, so distances say nothing to a pack that reads one."""
    looks = frame_pb.FEATURE_REFERENCES in pack.features and frame_pb.FEATURE_HISTORY not in pack.features
    offered = ((DISTANCES, looks), (EDIT, frame_pb.FEATURE_EDIT in pack.features))
    return (*INPUTS, *(spec for spec, is_offered in offered if is_offered))


async def frame_request(
    model: Model, tensors: dict[str, Tensor], parameters: Parameters, *, priority: int, streaming: bool, clean: Clean
) -> frame_pb.RenderFrameRequest:
    """What the frame service is asked. All else is checked before a picture is decoded. Raises FabulaError."""
    seed = parameters.integer("seed", 0, SEED_LIMIT - 1)
    preview_every = parameters.integer("preview_every", 0, MOST_STEPS)
    worn = parameters.text("characters", MOST_CHARACTERS_TEXT)
    strength = parameters.number("strength", 0.0, 1.0)
    request = frame_pb.RenderFrameRequest(
        pack=model.name.pack,
        seed=secrets.randbelow(SEED_LIMIT) if seed is None else seed,
        width_px=parameters.integer("width", 1, MOST_SIDE_PX),
        height_px=parameters.integer("height", 1, MOST_SIDE_PX),
        steps=parameters.integer("steps", 1, MOST_STEPS),
        text_guidance=parameters.number("text_guidance", 0.0, MOST_GUIDANCE),
        image_guidance=parameters.number("image_guidance", 0.0, MOST_GUIDANCE),
        sampler=parameters.text("sampler"),
        quality=f"QUALITY_{(parameters.word('quality', QUALITIES) or DEFAULT_QUALITY).upper()}",
        preview_every_steps=preview_every,
        priority=PRIORITIES.get(priority, PRIORITIES[DEFAULT_PRIORITY]),
    )
    parameters.finish()
    if preview_every and not streaming:
        raise ValueOutOfRange("preview_every: previews are sent on ModelStreamInfer only", field="preview_every")
    edited = tensors.get(EDIT_IMAGE)
    if strength is not None and edited is None:
        raise ValueOutOfRange(f"strength: it is of an edit, and there is no {EDIT_IMAGE}", field="strength")
    if strength == 0.0:
        raise ValueOutOfRange("strength: it is 0; it must be above 0 and at most 1", field="strength")
    if model.name.character:
        request.characters.add(digest=model.name.character)
    request.characters.extend(read_characters(worn or ""))
    request.description = checked_description("PROMPT", tensors["PROMPT"].texts()[0])
    pictures = _pictures(tensors.get("REFERENCE_IMAGES"))
    descriptions = _descriptions(tensors.get("REFERENCE_DESCRIPTIONS"), len(pictures))
    distances = _distances(tensors.get(REFERENCE_DISTANCES), len(pictures))
    before = _pictures(edited)
    for number, (picture, description, distance) in enumerate(zip(pictures, descriptions, distances, strict=True)):
        with naming({"image": f"REFERENCE_IMAGES[{number}]"}):
            request.references.add(image=await clean(picture), description=description, distance=distance)
    for picture in before:
        with naming({"image": EDIT_IMAGE}):
            request.edit.CopyFrom(frame_pb.EditedImage(image=await clean(picture), strength=strength))
    return request


def read_characters(text: str) -> list[frame_pb.CharacterWeights]:
    """Characters as a parameter names them: `digest,digest:scale`. Raises ValueOutOfRange."""
    found: list[frame_pb.CharacterWeights] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        digest, colon, scale = part.partition(":")
        try:
            weight = float(scale) if colon else None
        except ValueError:
            raise ValueOutOfRange(
                f"characters: {scale[:20]!r} is no number; write digest:scale", field="characters"
            ) from None
        found.append(frame_pb.CharacterWeights(digest=check_digest(digest, "characters"), scale=weight))
    return found


def frame_response(frame: frame_pb.RenderedFrame, outputs: tuple[str, ...]) -> pb.ModelInferResponse:
    """The picture and how it came to be. Raises ReplicaLost for a picture that was damaged on its way."""
    if hashlib.sha256(frame.image).hexdigest() != frame.sha256:
        raise ReplicaLost("the picture was damaged on its way")
    response = pb.ModelInferResponse()
    _add_picture(response, frame.image, outputs)
    put_parameters(
        response.parameters,
        {
            "seed": frame.seed,
            "steps": frame.steps,
            "text_guidance": frame.text_guidance,
            "image_guidance": frame.image_guidance,
            "sampler": frame.sampler,
            "width": frame.width_px,
            "height": frame.height_px,
            "sha256": frame.sha256,
            "pack_digest": frame.pack_digest,
            "fingerprint": frame.fingerprint,
            "queue_s": frame.queue_s,
            "render_s": frame.render_s,
        },
    )
    if frame.edit_strength:
        put_parameters(response.parameters, {"strength": frame.edit_strength})
    if frame.warnings:
        put_parameters(response.parameters, {"warnings": warnings_text(frame.warnings, NAMES)})
    return response


def preview_response(preview: frame_pb.Preview, outputs: tuple[str, ...]) -> pb.ModelInferResponse:
    """How the picture looks so far: the same outputs, smaller."""
    response = pb.ModelInferResponse()
    _add_picture(response, preview.image, outputs)
    put_parameters(response.parameters, {"preview": True, "step": preview.step})
    return response


def _add_picture(response: pb.ModelInferResponse, image: bytes, outputs: tuple[str, ...]) -> None:
    for name in outputs:
        if name == IMAGE:
            add_output(response, IMAGE, BYTES, (1,), (image,))
        else:
            with Image.open(io.BytesIO(image), formats=("PNG", "WEBP")) as opened:
                pixels = opened.convert("RGB")
            add_output(response, PIXELS, UINT8, (pixels.height, pixels.width, 3), (pixels.tobytes(),))


def _pictures(tensor: Tensor | None) -> list[bytes]:
    """Pictures as files that the sandbox reads; their number and size are checked, their content is not."""
    if tensor is None:
        return []
    if tensor.datatype == BYTES:
        for number, picture in enumerate(tensor.rows()):
            with naming({"image": tensor.name if tensor.name == EDIT_IMAGE else f"{tensor.name}[{number}]"}):
                check_image(picture)
        return list(tensor.rows())
    _, height_px, width_px, _ = tensor.shape
    if not height_px or not width_px:
        raise TensorInvalid(f"{tensor.name}: a picture of no pixels", field=tensor.name)
    return [_tiff(row, width_px, height_px) for row in tensor.rows()]


def _tiff(pixels: bytes, width_px: int, height_px: int) -> bytes:
    """RGB pixels as a file without compression: a header and the bytes as they are."""
    out = io.BytesIO()
    Image.frombytes("RGB", (width_px, height_px), pixels).save(out, "TIFF")
    return out.getvalue()


def _descriptions(tensor: Tensor | None, count: int) -> list[str]:
    if tensor is None:
        return [""] * count
    texts = tensor.texts()
    if len(texts) != count:
        raise TensorInvalid(f"{tensor.name}: {len(texts)} descriptions of {count} pictures", field=tensor.name)
    # Often a story's captions: people write them, and no frame should fail for an empty one.
    return [checked_caption(f"{tensor.name}[{n}]", text) if text.strip() else "" for n, text in enumerate(texts)]


def _distances(tensor: Tensor | None, count: int) -> list[int]:
    if tensor is None:
        return [0] * count
    distances = list(tensor.elements[0])
    if len(distances) != count:
        raise TensorInvalid(f"{tensor.name}: {len(distances)} distances of {count} pictures", field=tensor.name)
    return distances
