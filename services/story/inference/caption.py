"""The models `caption/<pack>`: a picture and the captions so far become the next text.

Inputs   IMAGE                 BYTES [1]  a picture file
         CAPTIONS              BYTES [N]  captions of the story, oldest first
         EARLIER_DESCRIPTIONS  BYTES [M]  what its frames so far were described as; with `descriptive` only
Outputs  TEXT                  BYTES [1]

The parameter `adapter` says which text is written:

`story` (the default)  the caption after CAPTIONS, of which the last belongs to IMAGE
`descriptive`          a literal description of the last of CAPTIONS; the one before it belongs to IMAGE
"""

from __future__ import annotations

import secrets

from fabula.caption.v1 import caption_service_pb2 as caption_pb
from tritonclient.grpc import service_pb2 as pb

from services.runtime.errors import TensorInvalid
from services.story.inference.catalog import Model
from services.story.inference.frame import IMAGE, Clean
from services.story.inference.parameters import Parameters, put_parameters
from services.story.inference.refusals import Names, naming
from services.story.inference.tensors import ANY, BYTES, Tensor, TensorSpec, add_output
from services.story.inference.texts import checked_caption, checked_description, warnings_text
from services.story.intake import MOST_FRAMES, check_image
from services.story.plan import SEED_LIMIT

TEXT = "TEXT"
STORY, DESCRIPTIVE = "story", "descriptive"
MOST_CAPTIONS = MOST_FRAMES + 1  # of the longest story, the given one included
MOST_TOKENS = 2**31 - 1  # what the field holds; the caption service knows how many it writes
INPUTS = (
    TensorSpec(name=IMAGE, datatype=BYTES, shape=(1,)),
    TensorSpec(name="CAPTIONS", datatype=BYTES, shape=(ANY,), most=MOST_CAPTIONS),
    TensorSpec(name="EARLIER_DESCRIPTIONS", datatype=BYTES, shape=(ANY,), optional=True, most=MOST_CAPTIONS),
)
OUTPUTS = (TensorSpec(name=TEXT, datatype=BYTES, shape=(1,)),)

CaptionRequest = caption_pb.WriteCaptionRequest | caption_pb.DescribeRequest
CaptionResponse = caption_pb.WriteCaptionResponse | caption_pb.DescribeResponse


def names(request: CaptionRequest) -> Names:
    """The caption service's fields by tensors and parameters."""
    earlier = len(request.earlier_captions) if isinstance(request, caption_pb.DescribeRequest) else 0
    return {
        r"image": IMAGE,
        r"(?:earlier_)?captions": "CAPTIONS",
        r"(?:earlier_)?captions\[(\d+)\]": r"CAPTIONS[\1]",
        r"previous_caption": f"CAPTIONS[{earlier}]",
        r"caption": f"CAPTIONS[{earlier + 1}]",
        r"earlier_descriptions(.*)": r"EARLIER_DESCRIPTIONS\1",
        r"sampling\.(.*)": r"\1",
    }


async def caption_request(
    model: Model, tensors: dict[str, Tensor], parameters: Parameters, *, clean: Clean
) -> CaptionRequest:
    """What the caption service is asked. All else is checked before the picture is decoded. Raises FabulaError."""
    adapter = parameters.word("adapter", (STORY, DESCRIPTIVE)) or STORY
    seed = parameters.integer("seed", 0, SEED_LIMIT - 1)
    sampling = caption_pb.Sampling(
        temperature=parameters.number("temperature", 0.0, 2.0),
        top_p=parameters.number("top_p", 0.0, 1.0),
        seed=secrets.randbelow(SEED_LIMIT) if seed is None else seed,
        max_tokens=parameters.integer("max_tokens", 1, MOST_TOKENS),
    )
    parameters.finish()
    captions = [checked_caption(f"CAPTIONS[{n}]", text) for n, text in enumerate(tensors["CAPTIONS"].texts())]
    least = 1 if adapter == STORY else 2
    if len(captions) < least:
        raise TensorInvalid(f"CAPTIONS: {adapter} needs at least {least}, and {len(captions)} came", field="CAPTIONS")
    described = tensors.get("EARLIER_DESCRIPTIONS")
    if described is not None and adapter == STORY:
        raise TensorInvalid(
            f"EARLIER_DESCRIPTIONS: only the adapter {DESCRIPTIVE!r} reads it", field="EARLIER_DESCRIPTIONS"
        )
    descriptions = [
        checked_description(f"EARLIER_DESCRIPTIONS[{n}]", text)
        for n, text in enumerate(described.texts() if described is not None else ())
    ]
    with naming({"image": IMAGE}):
        picture = tensors[IMAGE].rows()[0]
        check_image(picture)
        image = await clean(picture)
    if adapter == STORY:
        return caption_pb.WriteCaptionRequest(pack=model.name.pack, image=image, captions=captions, sampling=sampling)
    return caption_pb.DescribeRequest(
        pack=model.name.pack,
        image=image,
        previous_caption=captions[-2],
        caption=captions[-1],
        earlier_captions=captions[:-2],
        earlier_descriptions=descriptions,
        sampling=sampling,
    )


def caption_response(request: CaptionRequest, written: CaptionResponse) -> pb.ModelInferResponse:
    """The text and what it cost."""
    is_story = isinstance(written, caption_pb.WriteCaptionResponse)
    text: str = getattr(written, "caption" if is_story else "description")
    response = pb.ModelInferResponse()
    add_output(response, TEXT, BYTES, (1,), (text.encode(),))
    put_parameters(
        response.parameters,
        {
            "adapter": STORY if is_story else DESCRIPTIVE,
            "seed": request.sampling.seed,
            "finish_reason": "length" if written.finish_reason == caption_pb.FINISH_REASON_LENGTH else "stop",
            "prompt_tokens": written.usage.prompt_tokens,
            "completion_tokens": written.usage.completion_tokens,
            "pack_digest": written.pack_digest,
        },
    )
    if written.warnings:
        put_parameters(response.parameters, {"warnings": warnings_text(written.warnings, names(request))})
    return response
