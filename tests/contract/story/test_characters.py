"""Learned characters in stories: who is meant, whose weights reach which frame, what is refused, over the real wire."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fabula.customization.v1 import job_pb2
from fabula.frame.v1 import frame_service_pb2 as frame_pb
from fabula.story.v1 import story_pb2
from fabula.story.v1 import story_service_pb2 as pb
from fabula.warning.v1 import warning_pb2
from fabula_cli.main import app
from fabula_client import AsyncClient, Client, FailedPrecondition, NotFound, StoryCharacter
from google.rpc import error_details_pb2, status_pb2
from typer.testing import CliRunner

from services.runtime.errors import Unavailable
from tests.contract.story.pictures import plain
from tests.contract.story.scripted_customization import CustomizationScript, CustomizationServer
from tests.contract.story.scripted_services import Script, ScriptedServices
from tests.contract.story.story_process import StoryProcess

State = story_pb2.Story.State
ROSA = "a pink pig with a teal top hat"
OTTO = "a black penguin with orange earmuffs"
LEARNED_ON = "toon-network"  # the digest of the network of the scripted frame service's pack


def version(name: str, phrase: str, mark: str, digest: str = LEARNED_ON, pack: str = "toon") -> Any:
    """A published one; `mark` makes its ids. Of its pack something besides the network is another one by now."""
    return job_pb2.CharacterVersion(
        version_id=mark * 64,
        weights_sha256=mark * 63 + "0",
        character=job_pb2.NewCharacter(name=name, phrase=phrase),
        pack=pack,
        pack_digest="toon-before",
        base_digest=digest,
    )


@pytest.fixture(scope="module")
def customization() -> Iterator[CustomizationServer]:
    running = CustomizationServer().start()
    yield running
    running.close()


@pytest.fixture(scope="module")
def process(
    services: ScriptedServices, customization: CustomizationServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StoryProcess]:
    running = StoryProcess(
        tmp_path_factory.mktemp("story"), services.target, STORY_CUSTOMIZATION_TARGET=customization.target
    ).start()
    yield running
    assert running.terminate() == 0


@pytest.fixture
def published(customization: CustomizationServer) -> CustomizationScript:
    """A customization service where Rosa was published twice, Otto once, and Zed on another network."""
    customization.script.__init__()  # type: ignore[misc]  # the servicer holds on to this very object
    customization.script.versions = [
        version("Rosa", ROSA, "a"),
        version("Otto", OTTO, "b"),
        version("Rosa", "a red pig with a blue hat", "c"),
        version("Zed", "a green frog with a red bow", "d", digest="toon-network-before"),
    ]
    return customization.script


@pytest.fixture
def story(process: StoryProcess, script: Script, published: CustomizationScript) -> StoryProcess:
    script.named = {1: "Rosa waves.", 2: "Otto and Rosa's hat.", 3: "Rosalind sleeps."}
    return process


def finished(story: StoryProcess, *characters: str, **fields: Any) -> story_pb2.Story:
    made = story.create(plain(), characters=characters, **fields)
    ended = story.wait_state(made.story_id, State.STATE_SUCCEEDED, State.STATE_FAILED)
    assert ended.state == State.STATE_SUCCEEDED, ended.error
    return ended


def asked(script: Script, method: str) -> list[Any]:
    return [request for called, request, _ in script.calls if called == method]


def weights(script: Script) -> list[list[str]]:
    """What each frame was drawn with."""
    return [[one.digest[0] for one in request.characters] for request in asked(script, "RenderFrame")]


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str, str, str]:
    """Code, reason, field and message of a refused call."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    details = dict(raised.value.trailing_metadata())["grpc-status-details-bin"]
    status, info = status_pb2.Status.FromString(details), error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    return raised.value.code(), info.reason, info.metadata.get("field", ""), status.message


# -- deleting ----------------------------------------------------------------------------------------------------------


def test_who_was_deleted_is_forgotten_by_the_frame_service_and_told_of_no_more(
    story: StoryProcess, script: Script, published: CustomizationScript
) -> None:
    newest, _, before, _ = published.versions
    answer = story.http.delete(f"/v1/character-versions/{newest.version_id}")
    assert answer.status_code == 200, answer.text
    assert [one.digest for one in asked(script, "UnloadCharacter")] == [newest.weights_sha256]
    told = finished(story, "Rosa")
    assert [one.version_id for one in told.characters] == [before.version_id], "the newest one that is left"
    story.http.delete(f"/v1/character-versions/{before.version_id}")
    for wanted in ("Rosa", newest.version_id):
        _, reason, field, _ = refusal(lambda wanted=wanted: story.create(plain(), characters=(wanted,)))
        assert (reason, field) == ("CHARACTER_NOT_FOUND", "characters[0]")
    assert story.http.post(f"/v1/character-versions/{newest.version_id}:undelete").status_code == 200
    assert [one.version_id for one in finished(story, "Rosa").characters] == [newest.version_id]
    assert len(asked(script, "UnloadCharacter")) == 2


def test_a_version_is_deleted_though_the_frame_service_does_not_answer(
    story: StoryProcess, script: Script, published: CustomizationScript
) -> None:
    script.failures["UnloadCharacter"].append(Unavailable("away"))
    answer = story.http.delete(f"/v1/character-versions/{'a' * 64}")
    assert (answer.status_code, len(asked(script, "UnloadCharacter"))) == (200, 1)
    assert published.versions[0].HasField("delete_time")


# -- telling -----------------------------------------------------------------------------------------------------------


def test_the_weights_reach_the_frames_that_name_somebody_and_no_others(story: StoryProcess, script: Script) -> None:
    made = finished(story, "Rosa", "Otto")
    assert weights(script) == [["a"], ["b", "a"], []]
    assert [one.digest for one in asked(script, "RenderFrame")[0].characters] == ["a" * 63 + "0"]
    assert not asked(script, "RenderFrame")[0].characters[0].HasField("scale")
    assert [(one.name, one.phrase, one.version_id) for one in made.characters] == [
        ("Rosa", ROSA, "a" * 64),
        ("Otto", OTTO, "b" * 64),
    ]
    assert story.get(made.story_id) == made


def test_the_caption_service_is_told_who_they_are(story: StoryProcess, script: Script) -> None:
    made = finished(story, "Rosa", "Otto")
    told = [[(one.name, one.phrase) for one in call.characters] for call in asked(script, "WriteCaption")]
    assert told == [[("Rosa", ROSA), ("Otto", OTTO)]] * 3
    for number, described in enumerate(asked(script, "Describe"), 1):
        assert [(one.name, one.phrase) for one in described.characters] == [("Rosa", ROSA), ("Otto", OTTO)]
        assert list(described.earlier_descriptions) == [frame.description for frame in made.frames[:number]]


def test_a_story_without_them_asks_nobody_and_is_told_as_before(
    story: StoryProcess, script: Script, published: CustomizationScript
) -> None:
    made = finished(story)
    assert not published.calls
    assert weights(script) == [[], [], []]
    assert [len(one.earlier_descriptions) for one in asked(script, "Describe")] == [1, 2, 3]
    assert not any(one.characters for call in ("WriteCaption", "Describe") for one in asked(script, call))
    assert not made.characters
    with_rosa = finished(story, "Rosa")
    assert with_rosa.frames[1].description == made.frames[1].description
    assert with_rosa.frames[1].image_sha256 != made.frames[1].image_sha256


def test_a_version_stays_for_its_story_whatever_is_published_later(
    story: StoryProcess, script: Script, published: CustomizationScript
) -> None:
    failures = script.failures["WriteCaption"]
    failures.extend([Unavailable("away")] * 3)
    made = story.create(plain(), characters=["Rosa"])
    published.versions.insert(0, version("Rosa", "a blue pig with a red hat", "e"))
    assert story.wait_state(made.story_id, State.STATE_SUCCEEDED).characters[0].version_id == "a" * 64
    assert weights(script) == [["a"], ["a"], []]


def test_a_version_can_be_named_itself_however_long_the_list(
    story: StoryProcess, script: Script, published: CustomizationScript
) -> None:
    published.versions_a_page = 1
    made = finished(story, "c" * 64, frame_count=1)
    assert [(one.name, one.phrase) for one in made.characters] == [("Rosa", "a red pig with a blue hat")]
    assert weights(script) == [["c"]]


def test_of_a_name_the_newest_version_on_the_present_network_is_taken(
    story: StoryProcess, published: CustomizationScript
) -> None:
    published.versions.insert(0, version("Rosa", ROSA, "e", digest="other-network", pack="other"))
    assert finished(story, "Rosa", frame_count=1).characters[0].version_id == "a" * 64
    assert finished(story, "Rosa", frame_count=1, pack="other").characters[0].version_id == "e" * 64


def test_nobody_is_called_unfamiliar_who_was_taught(story: StoryProcess, script: Script) -> None:
    script.warned = [
        warning_pb2.Warning(reason="NAME_UNFAMILIAR", message="m", field="captions[0]", metadata={"names": "Rosa"}),
    ]
    assert not finished(story, "Rosa", frame_count=1).warnings
    assert [one.reason for one in finished(story, "Otto", frame_count=1).warnings] == ["NAME_UNFAMILIAR"]


def test_edits_and_insertions_keep_the_characters(story: StoryProcess, script: Script) -> None:
    made = finished(story, "Rosa", "Otto")
    script.calls.clear()
    edit = pb.EditFrameRequest(story_id=made.story_id, frame_index=2, description="Otto runs.")
    story.stub.EditFrame(edit, timeout=60)
    edit = pb.EditFrameRequest(story_id=made.story_id, frame_index=3, caption="Then frame 1 came again.")
    story.stub.EditFrame(edit, timeout=60)
    insert = pb.InsertFrameRequest(story_id=made.story_id, after_frame_index=1, caption="In between, frame 2 came.")
    longer = story.stub.InsertFrame(insert, timeout=60).story
    assert weights(script) == [["b"], ["a"], ["b", "a"]]
    for described in asked(script, "Describe"):
        assert [(one.name, one.phrase) for one in described.characters] == [("Rosa", ROSA), ("Otto", OTTO)]
    assert longer.characters == made.characters


def test_a_process_that_dies_goes_on_with_the_same_characters(
    services: ScriptedServices,
    script: Script,
    customization: CustomizationServer,
    published: CustomizationScript,
    new_story: Callable[..., StoryProcess],
) -> None:
    script.named = {1: "Rosa waves.", 2: "Rosa runs."}
    script.step_s = 0.05
    first = new_story(STORY_CUSTOMIZATION_TARGET=customization.target)
    made = first.create(plain(), characters=["Rosa"], frame_count=2)
    next(event for event in first.watch(made.story_id) if event.event.WhichOneof("event") == "frame_progress")
    first.kill()
    published.versions.clear()
    script.step_s = 0.0
    again = new_story(STORY_CUSTOMIZATION_TARGET="127.0.0.1:1")
    ended = again.wait_state(made.story_id, State.STATE_SUCCEEDED, State.STATE_FAILED)
    assert ended.state == State.STATE_SUCCEEDED, ended.error
    assert ended.characters == made.characters
    assert set(map(tuple, weights(script))) == {("a",)}


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("characters", "code", "reason", "field", "says"),
    [
        (["Rosa", "Nobody"], "NOT_FOUND", "CHARACTER_NOT_FOUND", "characters[1]", "`fabula character versions`"),
        (["rosa"], "NOT_FOUND", "CHARACTER_NOT_FOUND", "characters[0]", "'rosa'"),
        (["e" * 64], "NOT_FOUND", "CHARACTER_NOT_FOUND", "characters[0]", "e" * 64),
        (["Zed"], "FAILED_PRECONDITION", "CHARACTER_OF_ANOTHER_PACK", "characters[0]", "teach them to 'toon'"),
        (["d" * 64], "FAILED_PRECONDITION", "CHARACTER_OF_ANOTHER_PACK", "characters[0]", "dddd"),
        (["Rosa", "c" * 64], "INVALID_ARGUMENT", "CHARACTER_REPEATED", "characters[1]", "second Rosa"),
        (["Rosa", " Rosa "], "INVALID_ARGUMENT", "CHARACTER_REPEATED", "characters[1]", "second time"),
        ([""], "INVALID_ARGUMENT", "VALUE_OUT_OF_RANGE", "characters[0]", "64 hex digits"),
        (["R" * 101], "INVALID_ARGUMENT", "VALUE_OUT_OF_RANGE", "characters[0]", "64 hex digits"),
        (["Ro\x00sa"], "INVALID_ARGUMENT", "VALUE_OUT_OF_RANGE", "characters[0]", "64 hex digits"),
        ([f"R{n}" for n in range(9)], "INVALID_ARGUMENT", "VALUE_OUT_OF_RANGE", "characters", "at most 8"),
    ],
)
def test_whoever_cannot_be_told_of_is_refused_by_field(
    story: StoryProcess, characters: list[str], code: str, reason: str, field: str, says: str
) -> None:
    refused = refusal(lambda: story.create(plain(), characters=characters))
    assert (refused[0].name, *refused[1:3]) == (code, reason, field)
    assert says in refused[3]


def test_a_pack_that_draws_nobody_learned_says_so(story: StoryProcess, script: Script) -> None:
    script.features_missing = {frame_pb.FEATURE_CHARACTERS}
    refused = refusal(lambda: story.create(plain(), characters=["Rosa"]))
    assert (refused[0], refused[1]) == (grpc.StatusCode.FAILED_PRECONDITION, "FEATURE_MISSING")
    finished(story, frame_count=1)


def test_with_the_customization_service_away_only_stories_with_characters_wait(
    story: StoryProcess, customization: CustomizationServer
) -> None:
    customization.stop()
    try:
        refused = refusal(lambda: story.create(plain(), characters=["Rosa"]))
        assert (refused[0], refused[1]) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
        assert "customization service" in refused[3]
        finished(story, frame_count=1)
    finally:
        customization.start()
    with Client(story.grpc_target, timeout_s=60) as client:  # it tries again while the connection comes back
        client.stories.create(image=plain(), caption="Once.", frame_count=1, characters=["Rosa"]).wait(timeout_s=60)


# -- once each ---------------------------------------------------------------------------------------------------------


def test_the_characters_are_part_of_what_a_key_names(
    story: StoryProcess, script: Script, published: CustomizationScript
) -> None:
    first = finished(story, "Rosa", request_id="told-once", frame_count=1)
    published.versions.clear()
    again = story.create(plain(), characters=["Rosa"], request_id="told-once", frame_count=1)
    assert again == first, "nobody is looked up again"
    for other in ([], ["Otto"], ["Rosa", "Otto"]):
        refused = refusal(
            lambda other=other: story.create(plain(), characters=other, request_id="told-once", frame_count=1)
        )
        assert refused[1] == "IDEMPOTENCY_KEY_REUSED"
    assert script.count("RenderFrame") == 1


def test_the_same_over_http_as_json_and_as_a_form(story: StoryProcess, script: Script) -> None:
    fields = {"caption": "Once.", "frame_count": 1, "seed": 7}
    body = {**fields, "image": base64.b64encode(plain()).decode(), "characters": ["Rosa", "Otto"]}
    made = story.http.post("/v1/stories", json=body)
    assert made.status_code == 201, made.text
    rosa = {"name": "Rosa", "phrase": ROSA, "version_id": "a" * 64}
    otto = {"name": "Otto", "phrase": OTTO, "version_id": "b" * 64}
    assert made.json()["characters"] == [rosa, otto]
    form = {**fields, "characters": ["Rosa", "Otto"]}
    as_form = story.http.post("/v1/stories", data=form, files={"image": ("first.png", plain())})
    assert as_form.status_code == 201, as_form.text
    assert as_form.json()["characters"] == [rosa, otto]
    for each in (made, as_form):
        story.wait_state(each.json()["story_id"], State.STATE_SUCCEEDED)
    assert weights(script) == [["a"], ["a"]]
    refused = story.http.post("/v1/stories", json={**body, "characters": ["Nobody"]})
    assert (refused.status_code, refused.json()["reason"]) == (404, "CHARACTER_NOT_FOUND")
    assert [each["field"] for each in refused.json()["errors"]] == ["characters[0]"]
    twice = story.http.post(
        "/v1/stories", data={"caption": ["Once.", "Twice."]}, files={"image": ("first.png", plain())}
    )
    assert twice.status_code == 400, "nothing else may be said more than once"


async def test_both_clients_ask_for_them(story: StoryProcess, script: Script) -> None:
    async with AsyncClient(story.grpc_target) as client:
        made = await client.stories.create(image=plain(), caption="Once.", frame_count=1, characters=["Rosa"])
        assert made.value.characters == (StoryCharacter(name="Rosa", phrase=ROSA, version_id="a" * 64),)
        await made.wait(timeout_s=60)
        with pytest.raises(NotFound) as missing:
            await client.stories.create(image=plain(), caption="Once.", characters=["Nobody"])
        assert missing.value.reason == "CHARACTER_NOT_FOUND"
        assert [each.field for each in missing.value.field_violations] == ["characters[0]"]
    assert weights(script) == [["a"]]


def test_the_waiting_client_takes_one_name_too(story: StoryProcess) -> None:
    with Client(story.grpc_target) as client:
        made = client.stories.create(image=plain(), caption="Once.", frame_count=1, characters="Otto")
        assert [one.name for one in made.value.characters] == ["Otto"]
        made.wait(timeout_s=60)
        with pytest.raises(FailedPrecondition) as other:
            client.stories.create(image=plain(), caption="Once.", characters=["Zed"])
        assert other.value.reason == "CHARACTER_OF_ANOTHER_PACK"


def test_the_command_asks_for_them_and_says_who_is_told_of(story: StoryProcess, script: Script, tmp_path: Path) -> None:
    path = tmp_path / "first.png"
    path.write_bytes(plain())
    words = ["story", "continue", "--image", str(path), "--caption", "Once.", "--frames", "1"]
    words += ["--target", story.grpc_target]
    done = CliRunner().invoke(app, [*words, "--character", "Rosa", "--character", "Otto"])
    assert done.exit_code == 0, done.output
    assert f"with Rosa, {ROSA}" in done.output
    assert f"with Otto, {OTTO}" in done.output
    assert weights(script) == [["a"]]
    done = CliRunner().invoke(app, [*words, "--character", "c" * 12, "--json"])
    assert done.exit_code == 0, done.output
    assert [one["version_id"] for one in json.loads(done.stdout)["story"]["characters"]] == ["c" * 64]
    done = CliRunner().invoke(app, [*words, "--character", "Nobody", "--json"])
    assert done.exit_code == 4
    assert json.loads(done.stdout)["error"]["reason"] == "CHARACTER_NOT_FOUND"
