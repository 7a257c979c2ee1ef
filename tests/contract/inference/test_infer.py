"""The unmodified tritonclient against the edge: what it is told, and what it is drawn."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
import pytest
from fabula.frame.v1 import frame_service_pb2 as frame_pb
from PIL import Image
from tritonclient.grpc import InferenceServerClient, InferRequestedOutput, InferResult
from tritonclient.grpc import aio as stock_aio

from services.story.inference import frame
from tests.contract.inference.edge import Edge
from tests.contract.inference.requests import caption_inputs, file, frame_inputs, noise, pixels, strings


def parameters(result: InferResult) -> dict[str, Any]:
    """A response's parameters as plain values."""
    found = result.get_response().parameters
    return {name: getattr(found[name], found[name].WhichOneof("parameter_choice")) for name in found}


def test_it_is_live_and_ready(client: InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("frame/tiny")
    assert client.is_model_ready("caption/tiny", "1")
    assert not client.is_model_ready("frame/nowhere")
    assert not client.is_model_ready("frame/tiny", "2")
    assert not client.is_model_ready("tiny")


def test_it_says_what_it_is(client: InferenceServerClient) -> None:
    server = client.get_server_metadata()
    assert server.name == "fabula"
    assert server.version
    assert "model_repository" in server.extensions
    metadata = client.get_model_metadata("frame/tiny")
    assert (metadata.name, list(metadata.versions)) == ("frame/tiny", ["1"])
    assert {(tensor.name, tensor.datatype, *tensor.shape) for tensor in metadata.inputs} == {
        ("PROMPT", "BYTES", 1),
        ("REFERENCE_IMAGES", "BYTES", -1),
        ("REFERENCE_DESCRIPTIONS", "BYTES", -1),
        ("REFERENCE_DISTANCES", "UINT8", -1),
        ("EDIT_IMAGE", "BYTES", 1),
    }
    assert [(tensor.name, tensor.datatype, *tensor.shape) for tensor in metadata.outputs] == [
        ("IMAGE", "BYTES", 1),
        ("PIXELS", "UINT8", -1, -1, 3),
    ]
    assert [tensor.name for tensor in client.get_model_metadata("caption/tiny").outputs] == ["TEXT"]


def test_the_config_tells_of_previews_priorities_and_defaults(client: InferenceServerClient, edge: Edge) -> None:
    config = client.get_model_config("frame/tiny").config
    assert (config.name, config.max_batch_size) == ("frame/tiny", 0)
    assert config.model_transaction_policy.decoupled
    assert (config.dynamic_batching.priority_levels, config.dynamic_batching.default_priority_level) == (3, 2)
    assert {tensor.name: tensor.optional for tensor in config.input} == {
        "PROMPT": False,
        "REFERENCE_IMAGES": True,
        "REFERENCE_DESCRIPTIONS": True,
        "REFERENCE_DISTANCES": True,
        "EDIT_IMAGE": True,
    }
    manifest = edge.model.manifest
    facts = {name: value.string_value for name, value in config.parameters.items()}
    assert (facts["digest"], facts["width_px"]) == (manifest.digest, str(manifest.width_px))
    assert facts["base_digest"] == edge.model.base_digest
    assert facts["default_steps"] == str(manifest.sampling.default_steps)
    assert (facts["min_side_px"], facts["side_multiple_px"], facts["max_steps"]) == ("32", "8", "200")
    assert facts["max_area_px"] == str(4 * manifest.width_px * manifest.height_px)
    assert not client.get_model_config("caption/tiny").config.model_transaction_policy.decoupled


def test_a_frame_is_drawn_and_tells_how(client: InferenceServerClient, edge: Edge) -> None:
    asked = {"seed": 11, "steps": 2, "text_guidance": 3, "sampler": "ddim", "width": 64, "height": 64}
    result = client.infer("frame/tiny", frame_inputs(), request_id="fox", parameters=asked)
    image = result.as_numpy("IMAGE")
    assert image.shape == (1,)
    picture = Image.open(io.BytesIO(image[0]))
    assert (picture.format, picture.size) == ("PNG", (64, 64))
    told = parameters(result)
    assert told["sha256"] == hashlib.sha256(image[0]).hexdigest()
    assert {name: told[name] for name in asked} == asked
    assert told["pack_digest"] == edge.model.manifest.digest
    assert told["fingerprint"] == edge.engine.fingerprint(edge.model)
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == ("frame/tiny", "1", "fox")
    assert edge.steps.jobs[11].description == "a fox and a lamp"


def test_the_same_seed_gives_the_same_picture_and_no_seed_a_new_one(client: InferenceServerClient) -> None:
    def draw(**chosen: Any) -> InferResult:
        return client.infer("frame/tiny", frame_inputs(), parameters={"steps": 1, **chosen})

    first, again, fresh, other = draw(seed=5), draw(seed=5), draw(), draw()
    assert parameters(first)["sha256"] == parameters(again)["sha256"]
    assert len({parameters(each)["seed"] for each in (first, fresh, other)}) == 3


def test_pixels_are_those_of_the_picture(client: InferenceServerClient) -> None:
    outputs = [InferRequestedOutput("PIXELS"), InferRequestedOutput("IMAGE")]
    result = client.infer("frame/tiny", frame_inputs(), outputs=outputs, parameters={"steps": 1})
    picture = np.asarray(Image.open(io.BytesIO(result.as_numpy("IMAGE")[0])))
    assert np.array_equal(result.as_numpy("PIXELS"), picture)
    assert [output.name for output in result.get_response().outputs] == ["PIXELS", "IMAGE"]


def test_references_come_as_files_or_as_pixels(client: InferenceServerClient, edge: Edge) -> None:
    arrays = noise(3, count=2)
    described = strings("REFERENCE_DESCRIPTIONS", "a fox", "")
    asked: dict[str, Any] = {"steps": 1}
    client.infer("frame/tiny", frame_inputs(), parameters={**asked, "seed": 20})
    files = [*frame_inputs(references=[file(arrays[0]), file(arrays[1], "WEBP")]), described]
    client.infer("frame/tiny", files, parameters={**asked, "seed": 21})
    raw = [*frame_inputs(), pixels("REFERENCE_IMAGES", arrays), described]
    client.infer("frame/tiny", raw, parameters={**asked, "seed": 22})
    assert edge.steps.jobs[20].references == ()
    seen = {seed: edge.steps.jobs[seed].references for seed in (21, 22)}
    assert [reference.description for reference in seen[21]] == ["a fox", ""]
    assert np.array_equal(seen[21][0].pixels, seen[22][0].pixels)
    assert len(seen[22]) == 2


def test_an_edit_comes_as_a_file_or_as_pixels(client: InferenceServerClient, edge: Edge) -> None:
    array = noise(4)
    for seed, given, chosen in (
        (30, strings("EDIT_IMAGE", file(array[0])), {}),
        (31, pixels("EDIT_IMAGE", array), {"strength": 0.75}),
        (32, strings("EDIT_IMAGE", file(array[0], "WEBP")), {"strength": 1}),
    ):
        asked: dict[str, Any] = {"steps": 4, "seed": seed, **chosen}
        result = client.infer("frame/tiny", [*frame_inputs(), given], parameters=asked)
        edit: Any = edge.steps.jobs[seed].edit
        assert edit.strength == parameters(result)["strength"] == chosen.get("strength", 0.5)
        if seed < 32:
            assert np.array_equal(edit.pixels, array[0])
        assert edge.steps.count[seed] == 4 * edit.strength
    plain = client.infer("frame/tiny", frame_inputs(), parameters={"steps": 1, "seed": 33})
    assert "strength" not in parameters(plain)
    assert edge.steps.jobs[33].edit is None


def test_references_say_how_far_away_they_are(client: InferenceServerClient, edge: Edge) -> None:
    arrays = noise(3, count=2)
    asked: dict[str, Any] = {"steps": 1, "seed": 40}
    far = [*frame_inputs(), pixels("REFERENCE_IMAGES", arrays), pixels("REFERENCE_DISTANCES", np.uint8([3, 0]))]
    client.infer("frame/tiny", far, parameters=asked)
    assert edge.steps.jobs[40].distances == (3, 1)


def test_a_pack_offers_what_it_does() -> None:
    """Metadata and requests of one that reads its history, of one that only draws, and of one that edits."""

    def names(*features: Any) -> list[str]:
        return [spec.name for spec in frame.inputs(frame_pb.Pack(features=features))][3:]

    assert names() == []
    assert names(frame_pb.FEATURE_EDIT) == ["EDIT_IMAGE"]
    assert names(frame_pb.FEATURE_REFERENCES) == ["REFERENCE_DISTANCES"]
    assert names(frame_pb.FEATURE_REFERENCES, frame_pb.FEATURE_HISTORY, frame_pb.FEATURE_EDIT) == ["EDIT_IMAGE"]


@pytest.mark.parametrize(
    ("triton", "ours"), [(0, "STANDARD"), (1, "INTERACTIVE"), (2, "STANDARD"), (3, "BATCH"), (9, "STANDARD")]
)
def test_priorities_are_the_frame_services(
    client: InferenceServerClient, edge: Edge, monkeypatch: pytest.MonkeyPatch, triton: int, ours: str
) -> None:
    jobs: list[Any] = []
    submit = edge.engine.submit
    monkeypatch.setattr(edge.engine, "submit", lambda job, deliver: (jobs.append(job), submit(job, deliver))[1])
    client.infer("frame/tiny", frame_inputs(), priority=triton, parameters={"steps": 1, "quality": "draft"})
    assert [(job.priority.name, job.quality.name) for job in jobs] == [(ours, "DRAFT")]


def test_a_caption_follows_a_story(client: InferenceServerClient, edge: Edge) -> None:
    edge.script.calls.clear()
    asked = {"seed": 4, "temperature": 0.5, "max_tokens": 20}
    result = client.infer("caption/tiny", caption_inputs("Pip woke.", "Pip found a kite."), parameters=asked)
    method, request, _ = edge.script.calls[-1]
    assert method == "WriteCaption"
    assert list(request.captions) == ["Pip woke.", "Pip found a kite."]
    assert (request.pack, request.sampling.seed, request.sampling.temperature) == ("tiny", 4, 0.5)
    assert request.sampling.max_tokens == 20
    assert not request.sampling.HasField("top_p")
    text = result.as_numpy("TEXT")
    assert text.shape == (1,)
    assert text[0].decode()
    assert {**parameters(result)}["adapter"] == "story"
    assert parameters(result)["seed"] == 4


def test_a_description_is_of_the_last_caption(client: InferenceServerClient, edge: Edge) -> None:
    inputs = [
        *caption_inputs("Pip woke.", "Pip found a kite.", "It flew higher than ever!"),
        strings("EARLIER_DESCRIPTIONS", "Pip, an orange cat, in bed."),
    ]
    result = client.infer("caption/tiny", inputs, parameters={"adapter": "descriptive"})
    method, request, _ = edge.script.calls[-1]
    assert method == "Describe"
    assert list(request.earlier_captions) == ["Pip woke."]
    assert (request.previous_caption, request.caption) == ("Pip found a kite.", "It flew higher than ever!")
    assert list(request.earlier_descriptions) == ["Pip, an orange cat, in bed."]
    assert result.as_numpy("TEXT")[0].decode().startswith("A drawing")
    assert parameters(result)["adapter"] == "descriptive"


def test_what_a_pack_does_not_know_is_told(client: InferenceServerClient, edge: Edge) -> None:
    edge.script.strange = ("spaceship",)
    try:
        story = client.infer("caption/tiny", caption_inputs("Pip woke.", "A spaceship!"))
        two = caption_inputs("Pip woke.", "Pip ran.", "A spaceship!")
        described = client.infer("caption/tiny", two, parameters={"adapter": "descriptive"})
    finally:
        edge.script.strange = ()
    assert parameters(story)["warnings"].startswith("WORDS_UNFAMILIAR: CAPTIONS[1]: ")
    assert parameters(described)["warnings"].startswith("WORDS_UNFAMILIAR: CAPTIONS[2]: ")
    assert "warnings" not in parameters(client.infer("caption/tiny", caption_inputs("Pip woke.")))


async def test_the_asyncio_client_gets_the_same(edge: Edge) -> None:
    async with stock_aio.InferenceServerClient(edge.target) as client:
        assert await client.is_server_ready()
        result = await client.infer("frame/tiny", frame_inputs(), parameters={"steps": 1, "seed": 5})
        assert parameters(result)["sha256"] == hashlib.sha256(result.as_numpy("IMAGE")[0]).hexdigest()
        text = await client.infer("caption/tiny", caption_inputs())
        assert text.as_numpy("TEXT")[0]
