"""Weights from elsewhere become character versions, over real gRPC: which layouts, which refusals, what is kept."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import pickle
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import torch
from fabula.customization.v1 import customization_service_pb2 as pb
from fabula.customization.v1 import job_pb2
from fabula.frame.v1 import frame_service_pb2 as frame_pb
from fabula.frame.v1 import frame_service_pb2_grpc as frame_pb_grpc
from fabula.story.v1 import story_pb2
from fabula_client import AsyncClient
from google.rpc import error_details_pb2, status_pb2
from PIL import Image
from safetensors.torch import save

from services.customization import importing
from services.models.lora import Adapter, LowRank, adapted_layers, read_adapter, write_adapter
from services.models.pack import load_pack
from services.models.registry import FrameModel, load_frame_model
from services.runtime.store import ObjectStore
from tests.contract.customization.harness import TOKEN, Service, refused, running
from tests.contract.customization.test_training import drawing
from tests.contract.story.pictures import plain
from tests.contract.story.scripted_services import ScriptedServices
from tests.contract.story.story_process import StoryProcess

# One loop for all of them: they share a service.
pytestmark = [pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]
OTTO = {"name": "Otto", "phrase": "a black penguin with orange earmuffs"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory, tiny_packs: Path) -> AsyncIterator[Service]:
    async with running(tmp_path_factory.mktemp("home"), packs=tiny_packs, default_pack="tiny") as started:
        yield started


@pytest.fixture(scope="module")
def model(tiny_packs: Path) -> FrameModel:
    return load_frame_model(load_pack(tiny_packs / "tiny"))


@pytest.fixture
def own_process() -> None:
    """Asked for by tests that are about the process of its own."""


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads weights here, where torch is loaded already, except in the tests that are about the process of its own."""
    if "own_process" in request.fixturenames:
        return

    async def told(self: importing.Importer, pack_folder: Path, given: Path, out: Path) -> dict[str, Any]:
        return await asyncio.to_thread(importing.answer, pack_folder, given, out, self._rank_max)

    monkeypatch.setattr(importing.Importer, "_told", told)


def learned(model: FrameModel, rank: int = 2, seed: int = 1) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: LowRank(
            torch.randn(rank, layer.in_features, generator=generator),
            torch.randn(layer.out_features, rank, generator=generator),
            4.0,
        )
        for name, layer in adapted_layers(model.denoiser.unet).items()
        if isinstance(layer, torch.nn.Linear) and name.endswith("attn2.to_q")
    }
    assert factors
    return Adapter(digest="", factors=factors, deltas={}, size_bytes=0)


def picture(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, 90, 20)).save(out, "JPEG")
    return out.getvalue()


def asked(weights: bytes = b"", **fields: Any) -> pb.ImportCharacterVersionRequest:
    character = job_pb2.NewCharacter(**{**OTTO, **fields.pop("character", {})})
    given = {"weights": weights} if weights else {}
    return pb.ImportCharacterVersionRequest(character=character, **given, **fields)


async def imported(service: Service, *args: Any, **fields: Any) -> tuple[job_pb2.CharacterVersion, bool]:
    answer = await service.call("ImportCharacterVersion", asked(*args, **fields))
    return answer.version, answer.is_new


async def refusal(service: Service, request: pb.ImportCharacterVersionRequest) -> tuple[str, str, list[str]]:
    """Reason, cause and fields of a refused import."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await service.call("ImportCharacterVersion", request)
    status = status_pb2.Status.FromString(dict(raised.value.trailing_metadata())["grpc-status-details-bin"])
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    return info.reason, info.metadata.get("cause", ""), [one.field for one in bad.field_violations]


async def listed(service: Service, name: str = "") -> list[job_pb2.CharacterVersion]:
    answer = await service.call("ListCharacterVersions", pb.ListCharacterVersionsRequest(name=name))
    return list(answer.versions)


async def test_every_layout_becomes_the_same_version_which_frame_services_wear(
    service: Service, model: FrameModel
) -> None:
    adapter = learned(model)
    found = [
        await imported(service, write_adapter(adapter, form, base_digest=model.base_digest))
        for form in ("diffusers", "peft", "kohya")
    ]
    assert [is_new for _, is_new in found] == [True, False, False]
    version = found[0][0]
    assert [one for one, _ in found] == [version] * 3
    assert (version.character.name, version.character.phrase, version.character.noun) == (*OTTO.values(), "penguin")
    assert (version.pack, version.base_digest, version.method) == ("tiny", model.base_digest, "import")
    assert (version.rank, version.step, version.job_id) == (2, 0, "")
    assert await listed(service, "Otto") == [version]
    weights = await service.bytes_of("ReadWeights", pb.ReadWeightsRequest(version_id=version.version_id))
    assert len(weights) == version.size_bytes
    assert weights == await ObjectStore.open("", service.home / "characters").get(version.weights_sha256)
    worn = read_adapter(weights, model.denoiser.unet, base_digest=model.base_digest)
    assert worn.factors.keys() == adapter.factors.keys()
    for name, factors in adapter.factors.items():
        torch.testing.assert_close(
            worn.factors[name].scaled_up @ worn.factors[name].down, factors.scaled_up @ factors.down
        )


@pytest.mark.usefixtures("own_process")
async def test_weights_are_read_in_a_process_of_its_own_which_says_what_it_found(
    service: Service, model: FrameModel
) -> None:
    weights = write_adapter(learned(model, seed=6), "kohya")
    version, is_new = await imported(service, weights, character={"name": "Ada"})
    assert is_new
    assert (version.rank, version.base_digest) == (2, model.base_digest)
    assert not list((service.home / "customization").glob("import-*"))
    told = await refusal(service, asked(write_adapter(learned(model), base_digest="f" * 64), character={"name": "Eve"}))
    assert told == ("CHARACTER_WEIGHTS_UNUSABLE", "ADAPTER_WRONG_BASE", ["weights"])


async def test_the_manifest_lies_beside_the_weights_under_the_versions_name(
    service: Service, model: FrameModel
) -> None:
    version, _ = await imported(service, write_adapter(learned(model, seed=2)), character={"name": "Manny"})
    manifest = json.loads(await ObjectStore.open("", service.home / "characters").get(version.version_id))
    assert manifest["weights"]["sha256"] == version.weights_sha256
    assert (manifest["base"], manifest["character"]["name"]) == (
        {"name": "tiny", "base_digest": model.base_digest},
        "Manny",
    )


async def test_other_words_or_pictures_make_another_version_whose_pictures_can_be_read(
    service: Service, model: FrameModel
) -> None:
    weights = write_adapter(learned(model, seed=3))
    plain, _ = await imported(service, weights, character={"name": "Rosa"})
    shown, is_new = await imported(service, weights, character={"name": "Rosa"}, references=[picture(1), picture(200)])
    assert is_new
    assert (plain.weights_sha256, len(plain.reference_sha256s)) == (shown.weights_sha256, 0)
    assert plain.version_id != shown.version_id
    for sha256 in shown.reference_sha256s:
        message = pb.ReadImageRequest(version_id=shown.version_id, sha256=sha256)
        with Image.open(io.BytesIO(await service.bytes_of("ReadImage", message))) as opened:
            assert (opened.format, opened.size) == ("PNG", (64, 64))
    of_another = pb.ReadImageRequest(version_id=plain.version_id, sha256=shown.reference_sha256s[0])
    assert (await service.refusal(service.bytes_of("ReadImage", of_another)))[1] == "IMAGE_NOT_FOUND"
    of_two = pb.ReadImageRequest(version_id=shown.version_id, job_id="a", sha256=shown.reference_sha256s[0])
    assert (await service.refusal(service.bytes_of("ReadImage", of_two)))[1] == "INVALID_ARGUMENT"


async def test_importing_a_deleted_version_again_has_it_back(service: Service, model: FrameModel) -> None:
    weights = write_adapter(learned(model, seed=8))
    given: dict[str, Any] = {"character": {"name": "Berta"}, "references": [picture(77)]}
    version, _ = await imported(service, weights, **given)
    message = pb.DeleteCharacterVersionRequest(version_id=version.version_id)
    await service.call("DeleteCharacterVersion", message)
    assert not await listed(service, "Berta")
    stored = asked(weights_sha256=version.weights_sha256, **given)
    assert (await refusal(service, stored))[0] == "CHARACTER_WEIGHTS_UNKNOWN", "they are out of the store"
    assert await imported(service, weights, **given) == (version, False)
    assert await listed(service, "Berta") == [version]
    shown = pb.ReadImageRequest(version_id=version.version_id, sha256=version.reference_sha256s[0])
    assert await service.bytes_of("ReadImage", shown)


async def test_the_strength_beside_pefts_file_counts(service: Service, model: FrameModel) -> None:
    adapter = learned(model, seed=4)
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": value
        for name, low in adapter.factors.items()
        for side, value in (("A", low.down), ("B", low.up))
    }
    bare = save(tensors)
    config = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["to_q"]})
    weak, _ = await imported(service, bare, character={"name": "Weak"})
    strong, _ = await imported(service, bare, character={"name": "Strong"}, adapter_config=config)
    name = next(iter(adapter.factors))
    strengths = []
    for version in (weak, strong):
        weights = await service.bytes_of("ReadWeights", pb.ReadWeightsRequest(version_id=version.version_id))
        low = read_adapter(weights, model.denoiser.unet).factors[name]
        strengths.append(float((low.scaled_up @ low.down).norm() / (low.up @ low.down).norm()))
    assert strengths[1] / strengths[0] == pytest.approx(4.0), "alpha / rank is 4, and 1 where nothing is said"


async def test_what_the_store_has_already_needs_no_upload(service: Service, model: FrameModel) -> None:
    sha256 = await ObjectStore.open("", service.home / "characters").put(write_adapter(learned(model, seed=5)))
    version, is_new = await imported(service, weights_sha256=sha256, character={"name": "Lena"})
    assert is_new
    assert version.rank == 2
    unknown = await refusal(service, asked(weights_sha256="0" * 64))
    assert unknown[:2] == ("CHARACTER_WEIGHTS_UNKNOWN", "")


async def drawn(target: str, digest: str) -> bytes:
    """A picture that the frame service draws with somebody's weights."""
    request = frame_pb.RenderFrameRequest(
        pack="tiny", description="Zoe runs.", seed=1, characters=[frame_pb.CharacterWeights(digest=digest)]
    )
    async with grpc.aio.insecure_channel(target) as channel:
        call = frame_pb_grpc.FrameServiceStub(channel).RenderFrame(
            request, metadata=[("fabula-token", TOKEN)], timeout=600
        )
        return [event async for event in call][-1].frame.image


async def unfit(case: str, model: FrameModel) -> bytes:
    adapter = learned(model)
    if case == "another network":
        return write_adapter(adapter, base_digest="f" * 64)
    if case == "another shape":
        return save({"unet.mid_block.nowhere.lora_A.weight": torch.ones(2, 4)})
    if case == "too high a rank":
        return write_adapter(learned(model, rank=17))
    return write_adapter(adapter)[:-5]  # cut off


@pytest.mark.parametrize(
    ("case", "cause"),
    [
        ("another network", "ADAPTER_WRONG_BASE"),
        ("another shape", "ADAPTER_WRONG_SHAPE"),
        ("too high a rank", "ADAPTER_WRONG_SHAPE"),
        ("cut off", "ADAPTER_DAMAGED"),
    ],
)
async def test_what_does_not_fit_is_refused_by_name_and_leaves_nothing(
    case: str, cause: str, service: Service, model: FrameModel
) -> None:
    before = {one.sha256 async for one in ObjectStore.open("", service.home / "characters").every()}
    told = await refusal(service, asked(await unfit(case, model), character={"name": "Nobody"}))
    assert told == ("CHARACTER_WEIGHTS_UNUSABLE", cause, ["weights"])
    assert {one.sha256 async for one in ObjectStore.open("", service.home / "characters").every()} == before
    assert not await listed(service, "Nobody")
    assert not list((service.home / "customization").glob("import-*"))


@pytest.mark.parametrize("payload", [pickle.dumps({"a": 1}), b"PK\x03\x04 a zip archive", b"{}", b"\xff" * 64])
async def test_nothing_but_safetensors_is_even_opened(
    payload: bytes, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: Any) -> Any:
        raise AssertionError("a process was started for it")

    monkeypatch.setattr(importing.Importer, "fit", never)
    assert await refusal(service, asked(payload)) == ("CHARACTER_WEIGHTS_UNUSABLE", "ADAPTER_DAMAGED", ["weights"])


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"character": {"name": "Pip"}}, "VALUE_OUT_OF_RANGE", "character.name"),
        ({"character": {"name": "<otto>"}}, "VALUE_OUT_OF_RANGE", "character.name"),
        ({"character": {"phrase": ""}}, "VALUE_OUT_OF_RANGE", "character.phrase"),
        ({"pack": "nobody's"}, "PACK_UNKNOWN", "pack"),
        ({"references": [b"x"] * 9}, "VALUE_OUT_OF_RANGE", "references"),
        ({"references": [b"no picture"]}, "IMAGE_UNREADABLE", "references[0]"),
        ({"adapter_config": "x" * (1 << 17)}, "VALUE_OUT_OF_RANGE", "adapter_config"),
    ],
)
async def test_what_is_wrong_with_the_rest_names_its_field(
    fields: dict[str, Any], reason: str, field: str, service: Service, model: FrameModel
) -> None:
    told = await refusal(service, asked(write_adapter(learned(model)), **fields))
    assert (told[0], told[2]) == (reason, [field])


async def test_weights_come_once_and_not_too_many_of_them(service: Service) -> None:
    assert (await refusal(service, asked()))[0] == "INVALID_ARGUMENT"
    assert (await refusal(service, asked(bytes((40 << 20) + 1))))[2] == ["weights"]
    assert (await refusal(service, asked(weights_sha256="../x")))[2] == ["weights_sha256"]


@pytest.mark.usefixtures("own_process")
async def test_a_process_that_takes_too_long_is_ended_and_named(
    service: Service, model: FrameModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "MOST_S", 0.05)
    told = await refusal(service, asked(write_adapter(learned(model)), character={"name": "Late"}))
    assert told[0] == "FAILED_PRECONDITION"
    assert not list((service.home / "customization").glob("import-*"))


@pytest.mark.usefixtures("own_process")
async def test_a_process_that_dies_is_named_and_the_next_one_is_started(
    service: Service, model: FrameModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: importing.Importer, *_: Path) -> tuple[str, ...]:
        return (sys.executable, "-c", "import os; print('{'); os.abort()")

    with monkeypatch.context() as patch:
        patch.setattr(importing.Importer, "_command", dies)
        told = await refusal(service, asked(write_adapter(learned(model)), character={"name": "Gone"}))
    assert told[0] == "FAILED_PRECONDITION"
    assert not service.process.api._importer._turn.locked()


async def test_what_a_killed_service_left_is_removed_by_the_next_import(service: Service, model: FrameModel) -> None:
    left, recent = service.home / "customization" / "import-left", service.home / "customization" / "import-recent"
    for folder in (left, recent):
        folder.mkdir()
        (folder / "weights.safetensors").touch()
    os.utime(left, (0, 0))
    await imported(service, write_adapter(learned(model, seed=7)), character={"name": "Iris"})
    assert not left.exists()
    assert recent.exists(), "another service may be reading it now"
    shutil.rmtree(recent)


async def test_imports_are_read_one_at_a_time_and_too_many_are_told_when_to_come_back(
    service: Service, model: FrameModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_, reading = asyncio.Event(), []

    async def slow(self: importing.Importer, *_: Any) -> dict[str, Any]:
        reading.append(1)
        assert len(reading) == 1, "two at a time"
        await open_.wait()
        reading.pop()
        return {"error": {"of": "weights", "reason": "ADAPTER_DAMAGED", "message": "it was read"}}

    monkeypatch.setattr(importing.Importer, "_told", slow)
    weights = write_adapter(learned(model))
    calls = [asyncio.create_task(refusal(service, asked(weights))) for _ in range(importing.MOST_WAITING + 3)]
    for early in itertools.islice(asyncio.as_completed(calls), 2):  # all others have come by then, and wait
        assert (await early)[0] == "QUEUE_FULL"
    open_.set()
    reasons = sorted([(await one)[0] for one in calls])
    assert reasons == ["CHARACTER_WEIGHTS_UNUSABLE"] * (importing.MOST_WAITING + 1) + ["QUEUE_FULL"] * 2


async def test_a_pack_that_cannot_be_read_is_not_the_weights_fault(
    service: Service, model: FrameModel, tiny_packs: Path
) -> None:
    broken = tiny_packs / "broken"
    broken.mkdir()
    document = json.loads((tiny_packs / "tiny" / "pack.json").read_text())
    (broken / "pack.json").write_text(json.dumps({**document, "name": "broken"}))
    told = await refusal(service, asked(write_adapter(learned(model)), pack="broken"))
    assert (told[0], told[1]) == ("FAILED_PRECONDITION", "")


@pytest.mark.slow
async def test_what_comes_through_the_edge_is_told_of_in_a_story_and_carried_on(
    service: Service, model: FrameModel, tiny_packs: Path, tmp_path: Path
) -> None:
    """The story process, the frame service and the customization service are real; captions are scripted."""
    writing = ScriptedServices(TOKEN)
    writing.start()
    writing.script.packs = ["tiny"]
    writing.script.named = {1: "Zoe runs."}
    try:
        async with drawing(service.home, tiny_packs) as target:
            edge = StoryProcess(
                tmp_path / "story",
                writing.target,
                STORY_FRAME_TARGET=target,
                STORY_CUSTOMIZATION_TARGET=f"127.0.0.1:{service.port}",
            )
            (edge.home / "token").write_text(TOKEN)

            def told(*characters: str) -> story_pb2.Story:
                made = edge.create(plain(), pack="tiny", frame_count=1, seed=5, characters=characters)
                return edge.wait_state(
                    made.story_id, story_pb2.Story.STATE_SUCCEEDED, story_pb2.Story.STATE_FAILED, timeout_s=900
                )

            await asyncio.to_thread(edge.start)  # the services it asks answer on this loop
            try:
                async with AsyncClient(edge.grpc_target) as client:
                    weights = write_adapter(learned(model, seed=9), "diffusers")
                    zoe = await client.characters.import_version(
                        name="Zoe", phrase="a grey cat", weights=weights, references=[picture(3)]
                    )
                    archive = await client.characters.archive(zoe.version)
                    again = await client.characters.import_archive(archive)
                alone = await asyncio.to_thread(told)
                named = await asyncio.to_thread(told, "Zoe")
                async with AsyncClient(edge.grpc_target) as client:
                    worn = await drawn(target, zoe.version.weights_sha256)
                    deleted = await client.characters.delete_version(zoe.version.version_id)
                    with pytest.raises(grpc.aio.AioRpcError) as unknown:
                        await drawn(target, zoe.version.weights_sha256)
                    with pytest.raises(grpc.RpcError) as nobody:
                        await asyncio.to_thread(told, "Zoe")
                    back = await client.characters.undelete_version(zoe.version.version_id)
                    assert await drawn(target, zoe.version.weights_sha256) == worn
            finally:
                assert await asyncio.to_thread(edge.terminate) == 0
    finally:
        writing.close()
    assert zoe.is_new
    assert (again.is_new, again.version) == (False, zoe.version), "the same content, so the same version"
    assert [one.version_id for one in named.characters] == [zoe.version.version_id]
    assert named.frames[1].image_sha256 != alone.frames[1].image_sha256, "it is drawn with what was imported"
    assert (deleted.deleted is not None, back) == (True, zoe.version)
    assert refused(unknown.value)[1] == "CHARACTER_WEIGHTS_UNKNOWN", "the running replica has forgotten them"
    assert refused(nobody.value)[1] == "CHARACTER_NOT_FOUND"
