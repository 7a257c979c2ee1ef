"""Customization jobs at the edge: the same over gRPC and HTTP, pictures decoded before they go on, the service away."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from fabula.customization.v1 import customization_service_pb2 as pb
from fabula.customization.v1 import customization_service_pb2_grpc as pb_grpc
from fabula.customization.v1 import job_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from PIL import Image

from services.runtime.errors import (
    CharacterVersionDeleted,
    CharacterWeightsUnusable,
    JobStateUnsuitable,
    QueueFull,
)
from tests.contract.story.pictures import encoded, plain, two_colours
from tests.contract.story.scripted_customization import (
    PROBE,
    PROBE_SHA256,
    SHA256,
    VERSION_ID,
    WEIGHTS,
    CustomizationScript,
    CustomizationServer,
    State,
)
from tests.contract.story.story_process import StoryProcess

JOBS = "/v1/customization-jobs"
VERSIONS = "/v1/character-versions"
IMPORT = f"{VERSIONS}:import"
OTTO = {"name": "Otto", "phrase": "a black penguin with orange earmuffs"}


@pytest.fixture(scope="module")
def customization() -> Iterator[CustomizationServer]:
    running = CustomizationServer().start()
    yield running
    running.close()


@pytest.fixture(scope="module")
def process(customization: CustomizationServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoryProcess]:
    """A story process that finds customization, and neither of the other services: they are not needed here."""
    running = StoryProcess(
        tmp_path_factory.mktemp("story"),
        "127.0.0.1:1",
        STORY_CUSTOMIZATION_TARGET=customization.target,
        STORY_HEARTBEAT_S="0.1",
    ).start()
    yield running
    assert running.terminate() == 0


@pytest.fixture
def script(customization: CustomizationServer) -> CustomizationScript:
    customization.script.__init__()  # type: ignore[misc]  # the servicer holds on to this very object
    return customization.script


@pytest.fixture
def story(process: StoryProcess, script: CustomizationScript) -> StoryProcess:
    return process


def stub(story: StoryProcess) -> pb_grpc.CustomizationServiceStub:
    return pb_grpc.CustomizationServiceStub(story.channel)


def body(count: int = 5, **changed: Any) -> dict[str, Any]:
    picture = base64.b64encode(plain()).decode()
    frames = [{"image": picture, "caption": f"Otto runs, {number}."} for number in range(count)]
    return {"character": OTTO, "frames": frames, **changed}


def created(story: StoryProcess, **changed: Any) -> dict[str, Any]:
    answer = story.http.post(JOBS, json=body(**changed))
    assert answer.status_code == 201, answer.text
    return dict(answer.json()["job"])


def request(count: int = 5, **changed: Any) -> pb.CreateCustomizationJobRequest:
    frames = [job_pb2.ExampleFrame(image=plain(), caption="Otto runs.") for _ in range(count)]
    return pb.CreateCustomizationJobRequest(character=job_pb2.NewCharacter(**OTTO), frames=frames, **changed)


def problem_of(answer: Any, status: int, reason: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document = dict(answer.json())
    assert document["reason"] == reason
    return document


def reason_of(error: grpc.RpcError) -> str:
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return str(info.reason)
    return ""


def events_of(text: str) -> list[tuple[str, str, dict[str, Any]]]:
    """id, event and data of every event in a stream."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            found.append((fields.get("id", ""), fields["event"], json.loads(fields["data"])))
    return found


# -- creating ----------------------------------------------------------------------------------------------------------


def test_a_job_reaches_the_service_as_it_was_asked_for(story: StoryProcess, script: CustomizationScript) -> None:
    answer = story.http.post(
        JOBS,
        json=body(
            pack="toon",
            method="lora",
            learns="lora",
            budget_s=90.25,
            rate=0.001,
            seed=2**53 - 1,
            workers=2,
            accepted_findings=["FRAME_BLURRED"],
        ),
        headers={"idempotency-key": "one"},
    )
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"{JOBS}/{answer.json()['job']['job_id']}"
    (asked,) = script.requests("CreateCustomizationJob")
    assert asked.request_id == "one"
    assert (asked.pack, asked.method, asked.learns) == ("toon", "lora", job_pb2.LEARNS_LORA)
    assert asked.budget == Duration(seconds=90, nanos=250_000_000)
    assert (asked.rate, asked.seed, asked.HasField("steps")) == (0.001, 2**53 - 1, False)
    assert (asked.workers, answer.json()["job"]["settings"]["workers"]) == (2, 2)
    assert list(asked.accepted_findings) == ["FRAME_BLURRED"]
    assert (asked.character.name, asked.character.phrase) == (OTTO["name"], OTTO["phrase"])
    assert [frame.caption for frame in asked.frames] == [f"Otto runs, {number}." for number in range(5)]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_pictures_go_on_as_plain_pngs_and_what_is_none_as_nothing(
    story: StoryProcess, script: CustomizationScript, protocol: str
) -> None:
    turned = two_colours()
    turned.getexif()[0x0112] = 6
    pictures = [
        encoded(two_colours("RGBA")),
        encoded(turned, "JPEG", exif=turned.getexif(), quality=95),
        encoded(two_colours(), "WEBP"),
        encoded(two_colours(size=(2048, 1024))),
        plain()[:40],
        b"",
    ]
    if protocol == "http":
        wanted = body(validate_only=True)
        wanted["frames"] = [{"image": base64.b64encode(each).decode(), "caption": "Otto."} for each in pictures]
        answer = story.http.post(JOBS, json=wanted)
        assert answer.status_code == 200, answer.text
        found = [(one["code"], one["frame_number"]) for one in answer.json()["findings"]]
    else:
        given = request(0, validate_only=True)
        given.frames.extend(job_pb2.ExampleFrame(image=each, caption="Otto.") for each in pictures)
        message = stub(story).CreateCustomizationJob(given, timeout=60)
        found = [(one.code, one.frame_number) for one in message.findings]
    assert found == [("FRAME_UNREADABLE", 5), ("FRAME_UNREADABLE", 6)], "what cannot be decoded is a finding"
    (asked,) = script.requests("CreateCustomizationJob")
    clean = [Image.open(io.BytesIO(frame.image)) for frame in asked.frames[:4]]
    assert [(each.format, each.mode, each.info) for each in clean] == [("PNG", "RGB", {})] * 4
    assert [each.size for each in clean] == [(64, 48), (48, 64), (64, 48), (1024, 512)]
    assert [frame.image for frame in asked.frames[4:]] == [b"", b""]


def test_checking_makes_nothing_and_tells_all(story: StoryProcess, script: CustomizationScript) -> None:
    script.blurred = True
    answer = story.http.post(JOBS, json=body(validate_only=True))
    assert answer.status_code == 200
    assert "location" not in answer.headers
    assert answer.json() == {
        "job": None,
        "findings": [
            {
                "code": "FRAME_BLURRED",
                "severity": "warning",
                "frame_number": 2,
                "message": "Frame 2 is blurred.",
                "mend": "Upload a sharper picture.",
            }
        ],
        "estimate": {
            "compute_s": 90.0,
            "is_gpu": False,
            "min_eta_s": 60.0,
            "max_eta_s": 120.5,
            "measured_count": 2,
        },
        "is_acceptable": False,
    }
    assert script.jobs == {}


def test_what_is_refused_says_which_frame_and_why_alike(story: StoryProcess, script: CustomizationScript) -> None:
    script.blurred = True
    document = problem_of(story.http.post(JOBS, json=body()), 400, "EXAMPLE_STORY_REFUSED")
    assert document["errors"] == [{"field": "frames[1]", "description": "FRAME_BLURRED: Frame 2 is blurred."}]
    with pytest.raises(grpc.RpcError) as raised:
        stub(story).CreateCustomizationJob(request(), timeout=60)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(raised.value) == "EXAMPLE_STORY_REFUSED"
    assert created(story, accepted_findings=["*"])["findings"][0]["code"] == "FRAME_BLURRED"


def test_the_same_key_is_the_same_job_over_either_protocol(story: StoryProcess, script: CustomizationScript) -> None:
    wanted = body()
    wanted["frames"] = [{**frame, "caption": "Otto runs."} for frame in wanted["frames"]]
    headers = {"idempotency-key": "again"}
    first = story.http.post(JOBS, json=wanted, headers=headers).json()["job"]["job_id"]
    second = stub(story).CreateCustomizationJob(request(request_id="again"), timeout=60).job.job_id
    assert first == second
    assert len(script.jobs) == 1
    answer = story.http.post(JOBS, json={**wanted, "method": "lora"}, headers=headers)
    problem_of(answer, 422, "IDEMPOTENCY_KEY_REUSED")


@pytest.mark.parametrize(
    ("changed", "reason", "field"),
    [
        ({"frames": "none"}, "INVALID_ARGUMENT", "frames"),
        ({"surprise": 1}, "UNKNOWN_FIELD", "surprise"),
        ({"learns": "all"}, "INVALID_ARGUMENT", "learns"),
        ({"steps": -1}, "INVALID_ARGUMENT", "steps"),
        ({"seed": 2**53}, "INVALID_ARGUMENT", "seed"),
        ({"character": {"name": "Otto"}}, "INVALID_ARGUMENT", "character.phrase"),
        ({"frames": [{"image": "%%", "caption": "Otto."}]}, "IMAGE_UNREADABLE", "frames[0].image"),
    ],
)
def test_a_body_that_is_wrong_is_refused_by_name(
    story: StoryProcess, script: CustomizationScript, changed: dict[str, Any], reason: str, field: str
) -> None:
    document = problem_of(story.http.post(JOBS, json=body() | changed), 400, reason)
    assert field in [each["field"] for each in document["errors"]]
    assert script.calls == []


def test_too_much_is_refused_before_it_is_decoded(story: StoryProcess, script: CustomizationScript) -> None:
    assert problem_of(story.http.post(JOBS, json=body(21)), 400, "VALUE_OUT_OF_RANGE")["errors"][0]["field"] == "frames"
    large = base64.b64encode(bytes((8 << 20) + 1)).decode()
    wanted = body(4)
    wanted["frames"].append({"image": large, "caption": "Otto."})
    document = problem_of(story.http.post(JOBS, json=wanted), 413, "IMAGE_TOO_LARGE")
    assert document["errors"][0]["field"] == "frames[4].image"
    tiny = body()
    tiny["frames"][1]["image"] = base64.b64encode(encoded(two_colours(size=(8, 8)))).decode()
    assert problem_of(story.http.post(JOBS, json=tiny), 400, "IMAGE_TOO_SMALL")["errors"][0]["field"] == (
        "frames[1].image"
    )
    answer = story.http.post(JOBS, content=b"{}", headers={"content-type": "text/plain"})
    problem_of(answer, 400, "INVALID_ARGUMENT")
    assert script.calls == []


def test_a_whole_story_of_large_pictures_fits_through_both_doors(
    story: StoryProcess, script: CustomizationScript
) -> None:
    large = encoded(Image.new("RGB", (1600, 1600)), "PNG", compress_level=0)
    assert 7 << 20 < len(large) <= 8 << 20
    given = request(0)
    given.frames.extend(job_pb2.ExampleFrame(image=large, caption="Otto.") for _ in range(5))
    stub(story).CreateCustomizationJob(given, timeout=120)
    wanted = body()
    wanted["frames"] = [{"image": base64.b64encode(large).decode(), "caption": "Otto."}] * 5
    assert story.http.post(JOBS, json=wanted).status_code == 201
    assert [len(asked.frames) for asked in script.requests("CreateCustomizationJob")] == [5, 5]


# -- a job's life ------------------------------------------------------------------------------------------------------


def test_a_job_is_read_as_it_stands(story: StoryProcess, script: CustomizationScript) -> None:
    job_id = created(story, budget_s=60.0)["job_id"]
    document = story.http.get(f"{JOBS}/{job_id}").json()
    assert document["state"] == "STATE_SUCCEEDED"
    assert document["character"] == {**OTTO, "noun": ""}
    assert document["progress"] == {
        "step": 100,
        "step_count": 100,
        "losses": {"total": 0.01, "mse_new": 0.5},
        "eta_s": 0.0,
    }
    assert document["settings"]["budget_s"] == 60.0
    assert document["create_time"] == "2023-11-14T22:13:20.500000Z"
    assert document["delete_time"] is None
    assert document["last_sequence"] == 9
    assert document["error"] is None
    assert stub(story).GetCustomizationJob(pb.GetCustomizationJobRequest(job_id=job_id)).job.job_id == job_id
    problem_of(story.http.get(f"{JOBS}/nobody"), 404, "CUSTOMIZATION_JOB_NOT_FOUND")


def test_jobs_are_listed_page_by_page(story: StoryProcess, script: CustomizationScript) -> None:
    for _ in range(3):
        created(story)
    first = story.http.get(JOBS, params={"page_size": 2}).json()
    assert [job["job_id"] for job in first["jobs"]] == ["job-3", "job-2"]
    second = story.http.get(JOBS, params={"page_size": 2, "page_token": first["next_page_token"]}).json()
    assert [job["job_id"] for job in second["jobs"]] == ["job-1"]
    assert second["next_page_token"] == ""
    problem_of(story.http.get(JOBS, params={"page_size": -1}), 400, "INVALID_ARGUMENT")


def test_a_job_is_paused_resumed_and_cancelled(story: StoryProcess, script: CustomizationScript) -> None:
    script.held = True
    job_id = created(story)["job_id"]
    for verb, state in (("pause", "PAUSED"), ("resume", "QUEUED"), ("cancel", "CANCELLED")):
        answer = story.http.post(f"{JOBS}/{job_id}:{verb}")
        assert answer.status_code == 200, answer.text
        assert answer.json()["state"] == f"STATE_{state}"
    assert [method for method, _ in script.calls][1:] == [
        "PauseCustomizationJob",
        "ResumeCustomizationJob",
        "CancelCustomizationJob",
    ]


def test_what_a_state_does_not_allow_is_refused_alike(story: StoryProcess, script: CustomizationScript) -> None:
    job_id = created(story)["job_id"]
    document = problem_of(
        story.http.post(f"{JOBS}/{job_id}:pause"), JobStateUnsuitable("").http_status, ("JOB_STATE_UNSUITABLE")
    )
    assert document["metadata"]["job_id"] == job_id
    with pytest.raises(grpc.RpcError) as raised:
        stub(story).PauseCustomizationJob(pb.PauseCustomizationJobRequest(job_id=job_id), timeout=30)
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason_of(raised.value) == "JOB_STATE_UNSUITABLE"


def test_a_deleted_job_can_be_taken_back(story: StoryProcess, script: CustomizationScript) -> None:
    job_id = created(story)["job_id"]
    deleted = story.http.delete(f"{JOBS}/{job_id}")
    assert deleted.status_code == 200
    assert deleted.json()["purge_time"] == "2023-11-15T22:13:20Z"
    assert story.http.get(JOBS).json()["jobs"] == []
    assert len(story.http.get(JOBS, params={"show_deleted": True}).json()["jobs"]) == 1
    assert story.http.post(f"{JOBS}/{job_id}:undelete").json()["delete_time"] is None
    assert len(story.http.get(JOBS).json()["jobs"]) == 1


def test_a_deleted_version_can_be_taken_back(story: StoryProcess, script: CustomizationScript) -> None:
    made = story.http.post(IMPORT, json=importing()).json()
    assert (made["delete_time"], made["purge_time"]) == (None, None)
    url = f"{VERSIONS}/{made['version_id']}"
    deleted = story.http.delete(url)
    assert deleted.status_code == 200, "though no frame service is there to forget it"
    assert deleted.json() == {
        **made,
        "delete_time": "2023-11-14T22:13:20.500000Z",
        "purge_time": "2023-11-15T22:13:20Z",
    }
    assert story.http.delete(url).json() == deleted.json()
    assert story.http.get(VERSIONS).json()["versions"] == []
    assert story.http.get(VERSIONS, params={"show_deleted": True}).json()["versions"] == [deleted.json()]
    assert story.http.post(f"{url}:undelete").json() == made
    assert story.http.get(VERSIONS).json()["versions"] == [made]
    asked = pb.DeleteCharacterVersionRequest(version_id=made["version_id"])
    over_grpc = stub(story).DeleteCharacterVersion(asked, timeout=20).version
    assert over_grpc.purge_time.ToSeconds() == over_grpc.delete_time.ToSeconds() + 86_400
    back = stub(story).UndeleteCharacterVersion(
        pb.UndeleteCharacterVersionRequest(version_id=made["version_id"]), timeout=20
    )
    assert not back.version.HasField("delete_time")
    problem_of(story.http.delete(f"{VERSIONS}/nobody"), 404, "CHARACTER_VERSION_NOT_FOUND")
    problem_of(story.http.post(f"{VERSIONS}/nobody:undelete"), 404, "CHARACTER_VERSION_NOT_FOUND")
    script.failures["ReadWeights"].append(CharacterVersionDeleted(metadata={"version_id": made["version_id"]}))
    problem_of(story.http.get(made["weights_url"]), 409, "CHARACTER_VERSION_DELETED")


def test_a_checkpoint_is_published_and_its_weights_are_read(story: StoryProcess, script: CustomizationScript) -> None:
    job_id = created(story)["job_id"]
    found = story.http.get(f"{JOBS}/{job_id}/checkpoints", params={"page_size": 50}).json()["checkpoints"]
    assert [(one["step"], one["is_suggested"], one["figures"]["recognised"]) for one in found] == [
        (50, False, 0.5),
        (100, True, 1.0),
    ]
    version = story.http.post(f"{JOBS}/{job_id}:publish", json={"step": 50}).json()
    assert (version["version_id"], version["step"], version["weights_sha256"]) == (VERSION_ID, 50, SHA256)
    assert story.http.post(f"{JOBS}/{job_id}:publish").json()["step"] == 100, "without a body the suggested one"
    assert [each.step for each in script.requests("PublishCheckpoint")] == [50, 0]
    problem_of(story.http.post(f"{JOBS}/{job_id}:publish", json={"stop": 1}), 400, "UNKNOWN_FIELD")
    listed = story.http.get("/v1/character-versions", params={"name": "Otto"}).json()["versions"]
    assert [each["step"] for each in listed] == [50, 100]
    weights = story.http.get(version["weights_url"])
    assert weights.content == WEIGHTS
    assert weights.headers["x-content-type-options"] == "nosniff"
    over_grpc = stub(story).ReadWeights(pb.ReadWeightsRequest(version_id=VERSION_ID), timeout=30)
    assert b"".join(part.chunk for part in over_grpc) == WEIGHTS
    problem_of(story.http.get("/v1/character-versions/none/weights"), 404, "CHARACTER_VERSION_NOT_FOUND")


def test_pictures_of_a_job_can_be_read(story: StoryProcess, script: CustomizationScript) -> None:
    job_id = created(story)["job_id"]
    answer = story.http.get(f"{JOBS}/{job_id}/images/{PROBE_SHA256}")
    assert (answer.content, answer.headers["content-type"]) == (PROBE, "image/png")
    assert answer.headers["etag"] == f'"{PROBE_SHA256}"'
    problem_of(story.http.get(f"{JOBS}/{job_id}/images/{'0' * 64}"), 404, "IMAGE_NOT_FOUND")


# -- watching ----------------------------------------------------------------------------------------------------------


def test_the_page_on_a_job_can_be_read_and_runs_nothing(story: StoryProcess, script: CustomizationScript) -> None:
    job = created(story)
    answer = story.http.get(f"{JOBS}/{job['job_id']}/report")
    assert (answer.status_code, answer.text) == (200, "<!doctype html>\nOtto")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "script-src" not in answer.headers["content-security-policy"]
    pages = stub(story).ReadReport(pb.ReadReportRequest(job_id=job["job_id"]), timeout=20)
    assert b"".join(part.chunk for part in pages).decode() == answer.text
    problem_of(story.http.get(f"{JOBS}/nobody/report"), 404, "CUSTOMIZATION_JOB_NOT_FOUND")


# -- importing ---------------------------------------------------------------------------------------------------------


def importing(**changed: Any) -> dict[str, Any]:
    return {"character": OTTO, "weights": base64.b64encode(b"weights").decode(), **changed}


def test_weights_reach_the_service_with_their_pictures_cleaned(
    story: StoryProcess, script: CustomizationScript
) -> None:
    picture = base64.b64encode(encoded(two_colours(), "JPEG")).decode()
    asked = importing(pack="toon", adapter_config='{"r": 4}', references=[picture])
    answer = story.http.post(IMPORT, json=asked)
    assert answer.status_code == 201, answer.text
    (received,) = script.requests("ImportCharacterVersion")
    assert (received.weights, received.pack, received.adapter_config) == (b"weights", "toon", '{"r": 4}')
    assert (received.character.name, received.character.phrase) == tuple(OTTO.values())
    with Image.open(io.BytesIO(received.references[0])) as cleaned:
        assert cleaned.format == "PNG"
    version = answer.json()
    assert (version["method"], version["job_id"], version["step"]) == ("import", "", 0)
    again = story.http.post(IMPORT, json=asked)
    assert (again.status_code, again.json()) == (200, version)
    listed = story.http.get(VERSIONS, params={"name": "Otto"}).json()["versions"]
    assert listed == [version]
    url = f"{VERSIONS}/{version['version_id']}/images/{version['reference_sha256s'][0]}"
    read = story.http.get(url)
    assert (read.headers["content-type"], read.content) == ("image/png", received.references[0])
    problem_of(story.http.get(f"{VERSIONS}/{version['version_id']}/images/{'0' * 64}"), 404, "IMAGE_NOT_FOUND")


def test_an_import_over_grpc_is_the_one_over_http(story: StoryProcess, script: CustomizationScript) -> None:
    over_http = story.http.post(IMPORT, json=importing()).json()
    request = pb.ImportCharacterVersionRequest(character=job_pb2.NewCharacter(**OTTO), weights=b"weights")
    over_grpc = stub(story).ImportCharacterVersion(request, timeout=20)
    assert not over_grpc.is_new
    assert over_grpc.version.version_id == over_http["version_id"]
    stored = story.http.post(IMPORT, json=importing(weights="", weights_sha256=SHA256))
    assert stored.status_code == 201
    last = script.requests("ImportCharacterVersion")[-1]
    assert (last.WhichOneof("source"), last.weights_sha256) == ("weights_sha256", SHA256)


@pytest.mark.parametrize(
    ("changed", "status", "reason", "field"),
    [
        ({"weights": "no base64!"}, 400, "INVALID_ARGUMENT", "weights"),
        ({"weights_sha256": SHA256}, 400, "INVALID_ARGUMENT", "weights"),
        ({"references": ["no base64!"]}, 400, "IMAGE_UNREADABLE", "references[0]"),
        ({"references": [base64.b64encode(b"no picture").decode()]}, 400, "IMAGE_UNREADABLE", "references[0]"),
        ({"references": [base64.b64encode(plain()).decode()] * 9}, 400, "VALUE_OUT_OF_RANGE", "references"),
        ({"surprise": 1}, 400, "UNKNOWN_FIELD", "surprise"),
    ],
)
def test_an_import_that_is_wrong_is_refused_by_name(
    story: StoryProcess, script: CustomizationScript, changed: dict[str, Any], status: int, reason: str, field: str
) -> None:
    document = problem_of(story.http.post(IMPORT, json=importing(**changed)), status, reason)
    assert document["errors"][0]["field"] == field
    assert not script.requests("ImportCharacterVersion")


def test_an_import_may_be_as_large_as_is_said_and_no_larger(story: StoryProcess, script: CustomizationScript) -> None:
    character = job_pb2.NewCharacter(**OTTO)
    most = pb.ImportCharacterVersionRequest(character=character, weights=bytes(40 << 20))
    assert stub(story).ImportCharacterVersion(most, timeout=60).version.size_bytes == 40 << 20
    over = pb.ImportCharacterVersionRequest(character=character, weights=bytes((40 << 20) + 1))
    with pytest.raises(grpc.RpcError) as refused:
        stub(story).ImportCharacterVersion(over, timeout=60)
    assert reason_of(refused.value) == "VALUE_OUT_OF_RANGE"
    large = base64.b64encode(bytes((40 << 20) + 3)).decode()
    problem_of(story.http.post(IMPORT, json=importing(weights=large)), 400, "VALUE_OUT_OF_RANGE")
    assert len(script.requests("ImportCharacterVersion")) == 1


def test_what_does_not_fit_keeps_its_reason_and_its_cause(story: StoryProcess, script: CustomizationScript) -> None:
    script.failures["ImportCharacterVersion"].append(
        CharacterWeightsUnusable("trained elsewhere", metadata={"cause": "ADAPTER_WRONG_BASE"}, field="weights")
    )
    document = problem_of(story.http.post(IMPORT, json=importing()), 400, "CHARACTER_WEIGHTS_UNUSABLE")
    assert document["metadata"]["cause"] == "ADAPTER_WRONG_BASE"


def test_all_that_happens_to_a_job_is_told_in_order(story: StoryProcess, script: CustomizationScript) -> None:
    job_id = created(story)["job_id"]
    answer = story.http.get(f"{JOBS}/{job_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events_of(answer.text)
    assert [int(identity) for identity, _, _ in found] == list(range(1, 10))
    kinds = [kind for _, kind, _ in found]
    assert kinds == [
        *["state_changed"] * 2,
        *["progress", "probe_drawn", "checkpoint_saved"] * 2,
        "state_changed",
    ]
    assert found[2][2]["progress"]["losses"] == {"total": 0.02, "mse_new": 0.5}
    probe = found[3][2]["probe_drawn"]
    assert story.http.get(probe["image_url"]).content == PROBE
    assert found[4][2]["checkpoint_saved"]["checkpoint"]["step"] == 50
    assert found[-1][2]["state_changed"] == {"state": "STATE_SUCCEEDED", "attempt": 1, "error": None}
    over_grpc = stub(story).WatchCustomizationJob(pb.WatchCustomizationJobRequest(job_id=job_id), timeout=60)
    assert [message.event.sequence for message in over_grpc] == list(range(1, 10))


def test_a_watch_goes_on_after_the_last_event_that_was_seen(story: StoryProcess, script: CustomizationScript) -> None:
    job_id = created(story)["job_id"]
    path = f"{JOBS}/{job_id}/events"
    assert [each[0] for each in events_of(story.http.get(path, params={"after_sequence": 7}).text)] == ["8", "9"]
    assert [each[0] for each in events_of(story.http.get(path, headers={"last-event-id": "8"}).text)] == ["9"]
    assert story.http.get(path, params={"after_sequence": 9}).status_code == 204, "there is nothing to come back for"
    problem_of(story.http.get(path, headers={"last-event-id": "x"}), 400, "INVALID_ARGUMENT")
    problem_of(story.http.get(f"{JOBS}/nobody/events"), 404, "CUSTOMIZATION_JOB_NOT_FOUND")


def test_a_silent_job_is_kept_open_and_passing_events_have_no_id(
    story: StoryProcess, script: CustomizationScript
) -> None:
    script.held = True
    job_id = created(story)["job_id"]
    seen = ""
    with story.http.stream("GET", f"{JOBS}/{job_id}/events") as answer:
        for text in answer.iter_text():
            seen += text
            if seen.count(": heartbeat") == 2 and script.jobs[job_id].state == State.STATE_QUEUED:
                script.train(job_id)
    found = events_of(seen)
    assert found[0] == ("", "queue_moved", {**found[0][2], "sequence": 0, "queue_moved": {"ahead_count": 3}})
    assert [each[0] for each in found[1:]] == [str(number) for number in range(1, 10)]


def test_a_failed_job_says_why(story: StoryProcess, script: CustomizationScript) -> None:
    script.held = True
    job_id = created(story)["job_id"]
    error = job_pb2.JobError(reason="LOSS_NOT_FINITE", message="The loss was no number.")
    script.move(job_id, State.STATE_FAILED, error=error)
    told = {"reason": "LOSS_NOT_FINITE", "message": "The loss was no number."}
    assert story.http.get(f"{JOBS}/{job_id}").json()["error"] == told
    assert events_of(story.http.get(f"{JOBS}/{job_id}/events").text)[-1][2]["state_changed"]["error"] == told


# -- the service away --------------------------------------------------------------------------------------------------


def test_what_the_service_refuses_keeps_its_reason_and_its_advice(
    story: StoryProcess, script: CustomizationScript
) -> None:
    script.failures["CreateCustomizationJob"].append(QueueFull("20 jobs wait", retry_after_s=7.0))
    answer = story.http.post(JOBS, json=body())
    assert problem_of(answer, 429, "QUEUE_FULL")["retry_after_s"] == 7.0
    assert answer.headers["retry-after"] == "7"


def test_while_the_service_is_away_jobs_are_and_the_edge_is_not(
    story: StoryProcess, script: CustomizationScript, customization: CustomizationServer
) -> None:
    job_id = created(story)["job_id"]
    customization.stop()
    try:
        document = problem_of(story.http.get(f"{JOBS}/{job_id}"), 503, "UNAVAILABLE")
        assert document["metadata"]["service"] == "customization"
        assert story.http.get("/readyz").status_code == 200
        assert story.http.get("/v1/stories").status_code == 200
    finally:
        customization.start()
    for _ in range(200):
        with contextlib.suppress(Exception):
            if story.http.get(f"{JOBS}/{job_id}").status_code == 200:
                return
    raise AssertionError("it was never found again")


def test_the_contract_is_written_down(story: StoryProcess) -> None:
    schema = story.http.get("/openapi.json").json()
    paths = {path for path in schema["paths"] if path.startswith((JOBS, "/v1/character-versions"))}
    assert paths == {
        JOBS,
        f"{JOBS}/{{job_id}}",
        f"{JOBS}/{{job_id}}/checkpoints",
        f"{JOBS}/{{job_id}}/events",
        f"{JOBS}/{{job_id}}/images/{{sha256}}",
        *(f"{JOBS}/{{job_id}}:{verb}" for verb in ("cancel", "pause", "resume", "undelete", "publish")),
        f"{JOBS}/{{job_id}}/report",
        VERSIONS,
        IMPORT,
        f"{VERSIONS}/{{version_id}}",
        f"{VERSIONS}/{{version_id}}:undelete",
        f"{VERSIONS}/{{version_id}}/images/{{sha256}}",
        f"{VERSIONS}/{{version_id}}/weights",
    }
    text = json.dumps(schema)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schema["components"]["schemas"], name
