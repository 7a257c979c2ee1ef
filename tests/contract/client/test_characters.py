"""Characters through the Python client and through `fabula character`, over a real story process."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from fabula.customization.v1 import job_pb2
from fabula_cli import characters, exits, main
from fabula_client import (
    AsyncClient,
    CheckpointSaved,
    Client,
    ExampleFrame,
    FailedPrecondition,
    IdempotencyKeyReused,
    InvalidArgument,
    JobCancelled,
    JobFailed,
    JobHandle,
    JobPaused,
    JobState,
    JobStateChanged,
    NotFound,
    ProbeDrawn,
    QueueMoved,
    ResourceExhausted,
    RetryPolicy,
    StepsTaken,
    WaitTimedOut,
    read_archive,
)
from typer.testing import CliRunner

from services.runtime.errors import CharacterWeightsUnusable, QueueFull
from tests.contract.story.pictures import encoded, two_colours
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

OTTO: dict[str, Any] = {"name": "Otto", "phrase": "a black penguin with orange earmuffs"}


@pytest.fixture(scope="module")
def customization() -> Iterator[CustomizationServer]:
    running = CustomizationServer().start()
    yield running
    running.close()


@pytest.fixture(scope="module")
def process(customization: CustomizationServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoryProcess]:
    running = StoryProcess(
        tmp_path_factory.mktemp("story"), "127.0.0.1:1", STORY_CUSTOMIZATION_TARGET=customization.target
    ).start()
    yield running
    running.kill()


@pytest.fixture
def script(customization: CustomizationServer) -> CustomizationScript:
    customization.script.__init__()  # type: ignore[misc]  # the servicer holds on to this very object
    return customization.script


@pytest.fixture
def client(process: StoryProcess, script: CustomizationScript) -> Iterator[Client]:
    with Client(process.grpc_target, retry=RetryPolicy(first_pause_s=0.02, longest_pause_s=0.05)) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An example story as people keep it."""
    frames = []
    for number in range(1, 6):
        (tmp_path / f"{number}.png").write_bytes(encoded(two_colours(size=(64, 40 + number))))
        frames.append({"image": f"{number}.png", "caption": f"Otto runs, {number}.", "description": "Otto runs."})
    (tmp_path / "story.json").write_text(json.dumps({**OTTO, "frames": frames}))
    return tmp_path


@pytest.fixture
def frames(folder: Path) -> list[ExampleFrame]:
    return [ExampleFrame(image=folder / f"{number}.png", caption=f"Otto runs, {number}.") for number in range(1, 6)]


def trained(client: Client, frames: list[ExampleFrame], **more: Any) -> JobHandle:
    return client.characters.train(**OTTO, frames=frames, **more)


# -- the client --------------------------------------------------------------------------------------------------------


def test_somebody_is_taught_published_and_their_weights_are_read(
    client: Client, script: CustomizationScript, frames: list[ExampleFrame]
) -> None:
    job = trained(client, frames, noun="penguin", method="lora", learns="lora", budget_s=1.5, seed=7, workers=2)
    value = job.wait(timeout_s=60)
    assert (value.state, value.attempt, value.character.noun) == (JobState.SUCCEEDED, 1, "penguin")
    assert (value.settings.method, value.settings.learns, value.settings.budget_s) == ("lora", "lora", 1.5)
    assert value.settings.workers == 2
    assert value.progress is not None
    assert value.progress.losses["mse_new"] == 0.5
    (asked,) = script.requests("CreateCustomizationJob")
    assert asked.request_id, "retries are safe without being asked to"
    assert [frame.caption for frame in asked.frames] == [f"Otto runs, {number}." for number in range(1, 6)]
    assert [one.step for one in job.checkpoints()] == [50, 100], "page by page"
    suggested = next(one for one in job.checkpoints() if one.is_suggested)
    version = job.publish()
    assert (version.version_id, version.step) == (VERSION_ID, suggested.step)
    assert client.characters.read_weights(version) == WEIGHTS
    assert [one.version_id for one in client.characters.versions(name="Otto")] == [VERSION_ID]
    assert list(client.characters.versions(name="Rosa")) == []
    assert job.read_image(PROBE_SHA256) == PROBE
    assert job.read_report() == "<!doctype html>\nOtto"
    with pytest.raises(NotFound):
        job.read_image("0" * 64)


def test_weights_from_elsewhere_are_imported_once_and_their_pictures_read(
    client: Client, script: CustomizationScript
) -> None:
    picture = encoded(two_colours(), "JPEG")
    asked: dict[str, Any] = {**OTTO, "noun": "penguin", "weights": WEIGHTS, "references": [picture]}
    first = client.characters.import_version(**asked)
    assert (first.is_new, first.version.method, first.version.job_id) == (True, "import", "")
    assert first.version.weights_sha256 == SHA256
    again = client.characters.import_version(**asked)
    assert (again.is_new, again.version) == (False, first.version)
    (sha256,) = first.version.reference_sha256s
    assert client.characters.read_image(first.version, sha256).startswith(b"\x89PNG")
    stored = client.characters.import_version(**OTTO, weights_sha256=SHA256)
    assert stored.is_new
    script.failures["ImportCharacterVersion"].append(
        CharacterWeightsUnusable("of another network", metadata={"cause": "ADAPTER_WRONG_BASE"}, field="weights")
    )
    with pytest.raises(InvalidArgument) as raised:
        client.characters.import_version(**asked)
    assert (raised.value.reason, raised.value.metadata["cause"]) == ("CHARACTER_WEIGHTS_UNUSABLE", "ADAPTER_WRONG_BASE")


def test_weights_that_are_too_large_are_not_sent(client: Client, script: CustomizationScript) -> None:
    for given, field in (
        ({"weights": bytes((40 << 20) + 1)}, "weights"),
        ({"weights": b"w", "references": [bytes((8 << 20) + 1)]}, "references[0]"),
        ({"weights": bytes(40 << 20), "references": [bytes(8 << 20), b"x"]}, "references"),
    ):
        with pytest.raises(InvalidArgument) as raised:
            client.characters.import_version(**OTTO, **given)  # type: ignore[arg-type]  # mypy sees one dict type
        assert raised.value.field_violations[0].field == field
    with pytest.raises(FileNotFoundError):
        client.characters.import_version(**OTTO, weights="absent.safetensors")
    assert script.calls == []


def test_a_story_is_checked_without_a_job(
    client: Client, script: CustomizationScript, frames: list[ExampleFrame]
) -> None:
    script.blurred = True
    checked = client.characters.check(**OTTO, frames=frames)
    assert [(one.code, one.severity, one.frame_number) for one in checked.findings] == [("FRAME_BLURRED", "warning", 2)]
    assert not checked.is_acceptable
    assert checked.estimate is not None
    assert (checked.estimate.compute_s, checked.estimate.max_eta_s) == (90.0, 120.5)
    assert client.characters.check(**OTTO, frames=frames, accepted_findings=["*"]).is_acceptable
    assert script.jobs == {}
    with pytest.raises(InvalidArgument) as raised:
        trained(client, frames)
    assert raised.value.reason == "EXAMPLE_STORY_REFUSED"
    assert [one.field for one in raised.value.field_violations] == ["frames[1]"]


def test_a_watch_survives_broken_streams_without_gaps(
    client: Client, script: CustomizationScript, frames: list[ExampleFrame]
) -> None:
    script.watches_break_after = 2
    events = list(trained(client, frames).watch())
    assert [event.sequence for event in events] == list(range(1, 10))
    assert len(script.requests("WatchCustomizationJob")) == 5
    assert [type(event) for event in events[2:5]] == [StepsTaken, ProbeDrawn, CheckpointSaved]


def test_waiting_ends_with_what_became_of_the_job(
    client: Client, script: CustomizationScript, frames: list[ExampleFrame]
) -> None:
    script.held = True
    job = trained(client, frames)
    with pytest.raises(WaitTimedOut):
        job.wait(timeout_s=0.3)
    assert job.pause().state is JobState.PAUSED
    with pytest.raises(JobPaused):
        job.wait(timeout_s=30)
    assert job.resume().state is JobState.QUEUED
    later = threading.Timer(0.3, script.move, (job.job_id, State.STATE_PAUSED))
    later.start()
    assert job.wait(timeout_s=30, check=False).state is JobState.PAUSED, "paused while it was waited for"
    assert job.cancel().state is JobState.CANCELLED
    with pytest.raises(JobCancelled):
        job.wait(timeout_s=30)
    failed = trained(client, frames)
    script.move(failed.job_id, State.STATE_FAILED, error=job_pb2.JobError(reason="DISK_FULL", message="No room."))
    with pytest.raises(JobFailed) as raised:
        failed.wait(timeout_s=30)
    assert raised.value.reason == "DISK_FULL"


def test_jobs_are_listed_deleted_and_taken_back(
    client: Client, script: CustomizationScript, frames: list[ExampleFrame]
) -> None:
    jobs = [trained(client, frames) for _ in range(3)]
    assert [job.job_id for job in client.characters.jobs(page_size=2)] == ["job-3", "job-2", "job-1"]
    assert jobs[0].delete().purged is not None
    assert len(list(client.characters.jobs())) == 2
    assert len(list(client.characters.jobs(show_deleted=True))) == 3
    assert jobs[0].undelete().deleted is None
    assert client.characters.get("job-1").state is JobState.SUCCEEDED
    with pytest.raises(NotFound):
        client.characters.get("nobody")
    with pytest.raises(FailedPrecondition):
        jobs[0].pause()


def test_a_key_names_a_request_and_only_safe_calls_are_tried_again(
    client: Client, script: CustomizationScript, frames: list[ExampleFrame]
) -> None:
    script.failures["CreateCustomizationJob"].append(QueueFull("20 jobs wait", retry_after_s=0.01))
    first = trained(client, frames, idempotency_key="one")
    assert len(script.requests("CreateCustomizationJob")) == 2, "the service said when to come back"
    assert trained(client, frames, idempotency_key="one").job_id == first.job_id
    with pytest.raises(IdempotencyKeyReused):
        trained(client, frames, idempotency_key="one", method="lora")
    script.failures["CreateCustomizationJob"] += [QueueFull("full", retry_after_s=3600.0)]
    with pytest.raises(ResourceExhausted):
        trained(client, frames, idempotency_key="two")


def test_what_is_too_large_is_not_sent(client: Client, script: CustomizationScript, frames: list[ExampleFrame]) -> None:
    for given, field in (
        ([*frames[:4], ExampleFrame(image=bytes((8 << 20) + 1), caption="Otto.")], "frames[4].image"),
        ([ExampleFrame(image=bytes(8 << 20), caption="Otto.")] * 7, "frames"),
    ):
        with pytest.raises(InvalidArgument) as raised:
            client.characters.check(**OTTO, frames=given)
        assert (raised.value.reason, raised.value.field_violations[0].field) == ("IMAGE_TOO_LARGE", field)
    with pytest.raises(FileNotFoundError):
        client.characters.check(**OTTO, frames=[ExampleFrame(image="absent.png", caption="Otto.")])
    assert script.calls == []


async def test_the_same_without_blocking(
    process: StoryProcess, script: CustomizationScript, frames: list[ExampleFrame]
) -> None:
    script.held = True
    async with AsyncClient(process.grpc_target) as client:
        job = await client.characters.train(**OTTO, frames=frames)
        seen: list[Any] = []
        async with asyncio.timeout(60):
            async for event in job.watch():
                seen.append(event)
                if isinstance(event, QueueMoved):
                    script.train(job.job_id)
        assert [event.sequence for event in seen if event.sequence] == list(range(1, 10))
        assert isinstance(seen[-1], JobStateChanged)
        assert (await job.wait()).state is JobState.SUCCEEDED
        assert [one.job_id async for one in client.characters.jobs()] == [job.job_id]
        assert await job.read_report() == "<!doctype html>\nOtto"
        assert (await client.characters.import_version(**OTTO, weights=WEIGHTS)).is_new


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The scripted service logs in this process, where a command's answer is read from standard output."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.fixture
def fabula(process: StoryProcess, script: CustomizationScript, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `fabula character …` against the story process; gives status and standard output."""
    monkeypatch.setenv("FABULA_CLI_TARGET", process.grpc_target)
    monkeypatch.setenv("FABULA_HOME", str(process.home))

    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(main.app, ["character", *words])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout

    return run


def told(output: str) -> Any:
    return json.loads(output)


def test_a_folder_becomes_a_character(fabula: Any, script: CustomizationScript, folder: Path, tmp_path: Path) -> None:
    status, output = fabula("train", str(folder), "--steps", "100", "--seed", "5", "--workers", "0", "--json")
    assert status == exits.OK, output
    job_id = told(output)["job"]["job_id"]
    assert told(output)["job"]["state"] == "succeeded"
    (asked,) = script.requests("CreateCustomizationJob")
    assert (asked.steps, asked.seed, asked.character.name) == (100, 5, "Otto")
    assert (asked.HasField("workers"), asked.workers) == (True, 0), "one process, whatever the service would choose"
    assert [(frame.caption, frame.description) for frame in asked.frames] == [
        (f"Otto runs, {number}.", "Otto runs.") for number in range(1, 6)
    ]
    status, output = fabula("compare", job_id, "--json")
    assert [(one["step"], one["is_suggested"]) for one in told(output)["checkpoints"]] == [(50, False), (100, True)]
    status, output = fabula("publish", job_id, "--json")
    assert (status, told(output)["version_id"], told(output)["weights_sha256"]) == (exits.OK, VERSION_ID, SHA256)
    assert [one["version_id"] for one in told(fabula("versions", "--json")[1])["versions"]] == [VERSION_ID]
    assert [one["job_id"] for one in told(fabula("list", "--json")[1])["jobs"]] == [job_id]
    assert told(fabula("show", job_id, "--json")[1])["job"]["versions"][0]["step"] == 100


def test_checking_tells_findings_and_makes_nothing(fabula: Any, script: CustomizationScript, folder: Path) -> None:
    script.blurred = True
    status, output = fabula("train", str(folder), "--check", "--json")
    assert (status, told(output)["is_acceptable"]) == (exits.FAULTS_FOUND, False)
    assert told(output)["findings"][0]["mend"] == "Upload a sharper picture."
    status, output = fabula("train", str(folder), "--check")
    assert "Frame 2 is blurred." in output
    assert "FRAME_BLURRED" in output
    assert fabula("train", str(folder), "--check", "--accept", "FRAME_BLURRED")[0] == exits.OK
    assert script.jobs == {}
    status, output = fabula("train", str(folder), "--json")
    assert (status, told(output)["error"]["reason"]) == (exits.REFUSED, "EXAMPLE_STORY_REFUSED")
    assert told(output)["error"]["field_violations"][0]["field"] == "frames[1]"
    assert fabula("train", str(folder), "--accept", "*", "--json")[0] == exits.OK


def test_a_job_is_followed_a_line_an_event(fabula: Any, script: CustomizationScript, folder: Path) -> None:
    script.held = True
    status, output = fabula("train", str(folder), "--no-wait", "--json")
    job_id = told(output)["job"]["job_id"]
    assert (status, told(output)["job"]["state"]) == (exits.OK, "queued")
    threading.Timer(0.5, script.train, (job_id,)).start()
    status, output = fabula("watch", job_id, "--json")
    assert status == exits.OK
    events = [told(line) for line in output.splitlines()]
    assert [one["sequence"] for one in events if one["sequence"]] == list(range(1, 10))
    steps = [(one["step"], one["losses"]["total"]) for one in events if one["event"] == "progress"]
    assert steps == [(50, 0.02), (100, 0.01)]
    again = fabula("watch", job_id, "--after", "8", "--json")[1].splitlines()
    assert [told(line)["sequence"] for line in again] == [9]


def test_a_job_that_ends_badly_says_so_by_its_status(fabula: Any, script: CustomizationScript, folder: Path) -> None:
    script.held = True
    job_id = told(fabula("train", str(folder), "--no-wait", "--json")[1])["job"]["job_id"]
    assert told(fabula("pause", job_id, "--json")[1])["job"]["state"] == "paused"
    assert told(fabula("resume", job_id, "--json")[1])["job"]["state"] == "queued"
    script.move(job_id, State.STATE_FAILED, error=job_pb2.JobError(reason="LOSS_NOT_FINITE", message="No number."))
    status, output = fabula("watch", job_id)
    assert status == exits.STORY_ENDED_BADLY
    assert "No number. (LOSS_NOT_FINITE)" in output
    other = told(fabula("train", str(folder), "--no-wait", "--json")[1])["job"]["job_id"]
    assert told(fabula("cancel", other, "--json")[1])["job"]["state"] == "cancelled"
    assert told(fabula("delete", other, "--json")[1])["job"]["purged"]
    assert len(told(fabula("list", "--json")[1])["jobs"]) == 1
    assert len(told(fabula("list", "--deleted", "--json")[1])["jobs"]) == 2
    assert told(fabula("undelete", other, "--json")[1])["job"]["purged"] is None
    status, output = fabula("show", "nobody", "--json")
    assert (status, told(output)["error"]["reason"]) == (exits.REFUSED, "CUSTOMIZATION_JOB_NOT_FOUND")


@pytest.mark.parametrize(
    ("story", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "is no object"),
        ('{"name": "Otto", "frames": [{"caption": "x"}]}', "frame 1 is no object"),
        ('{"name": "Otto", "frames": [], "colour": 1}', "unknown keys: colour"),
        ('{"name": "Otto", "frames": [{"image": "../1.png"}]}', "leads out of the folder"),
        ('{"name": "Otto", "frames": [{"image": "9.png"}]}', "there is no picture 9.png"),
        ('{"name": 7, "frames": []}', "name, phrase and noun are texts"),
        ('{"frames": [{"image": "1.png", "caption": 7}]}', "caption and description are texts"),
    ],
)
def test_a_folder_that_is_no_story_is_refused_here(
    fabula: Any, script: CustomizationScript, folder: Path, story: str, said: str
) -> None:
    (folder / "story.json").write_text(story)
    status, output = fabula("train", str(folder), "--json")
    assert (status, told(output)["error"]["reason"]) == (exits.USAGE, "STORY_UNREADABLE")
    assert said in told(output)["error"]["message"]
    assert script.calls == []


def test_the_page_on_a_job_is_the_services(
    fabula: Any, script: CustomizationScript, folder: Path, tmp_path: Path
) -> None:
    job_id = told(fabula("train", str(folder), "--json")[1])["job"]["job_id"]
    page = tmp_path / "page" / "otto.html"
    status, output = fabula("compare", job_id, "--out", str(page), "--json")
    assert (status, told(output)["page"]) == (exits.OK, str(page))
    assert page.read_text() == "<!doctype html>\nOtto"
    (tmp_path / "taken").mkdir()
    status, output = fabula("compare", job_id, "--out", str(tmp_path / "taken"), "--json")
    assert status == exits.USAGE


def test_a_file_from_elsewhere_becomes_a_character(fabula: Any, script: CustomizationScript, tmp_path: Path) -> None:
    file = tmp_path / "otto.safetensors"
    file.write_bytes(WEIGHTS)
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    picture = tmp_path / "otto.png"
    picture.write_bytes(encoded(two_colours()))
    words = (str(file), "--name", "Otto", "--phrase", OTTO["phrase"], "--pack", "toon", "--reference", str(picture))
    status, output = fabula("import", *words, "--json")
    assert (status, told(output)["is_new"]) == (exits.OK, True)
    version = told(output)["version"]
    (asked,) = script.requests("ImportCharacterVersion")
    assert (asked.weights, asked.pack, asked.adapter_config) == (WEIGHTS, "toon", '{"r": 4}')
    assert len(asked.references) == 1
    assert told(fabula("import", *words, "--json")[1]) == {"version": version, "is_new": False}
    assert version["version_id"] in fabula("import", *words)[1].replace("\n", "")
    assert told(fabula("versions", "Otto", "--json")[1])["versions"] == [version]


def test_an_archive_carries_a_character_from_one_installation_to_another(
    fabula: Any, client: Client, script: CustomizationScript, tmp_path: Path
) -> None:
    picture = encoded(two_colours())
    given: dict[str, Any] = {**OTTO, "noun": "penguin", "pack": "toon", "weights": WEIGHTS}
    made = client.characters.import_version(**given, references=[picture]).version
    published = script.versions[0]
    published.version_id = VERSION_ID  # whose weights the scripted service has
    out = tmp_path / "away" / "otto.zip"
    status, output = fabula("export", "Otto", str(out), "--form", "archive", "--json")
    assert (status, told(output)["files"]) == (exits.OK, [str(out)])
    held = read_archive(out.read_bytes())
    assert (held.name, held.phrase, held.noun, held.pack) == (*OTTO.values(), "penguin", "toon")
    assert held.weights == WEIGHTS
    script.versions.clear()
    status, output = fabula("import", str(out), "--json")
    assert (status, told(output)["is_new"]) == (exits.OK, True)
    first, again = script.requests("ImportCharacterVersion")
    assert again == first
    assert told(output)["version"]["version_id"] == made.version_id
    for words, reason in ((("--name", "Rosa"), "CHARACTER_NAMED_TWICE"), (("--noun", "pig"), "CHARACTER_NAMED_TWICE")):
        status, output = fabula("import", str(out), *words, "--json")
        assert (status, told(output)["error"]["reason"]) == (exits.USAGE, reason)
    out.write_bytes(b"PK no archive")
    status, output = fabula("import", str(out), "--json")
    assert (status, told(output)["error"]["reason"]) == (exits.REFUSED, "ARCHIVE_UNREADABLE")


def test_a_version_is_deleted_and_comes_back(
    fabula: Any, client: Client, script: CustomizationScript, folder: Path
) -> None:
    job_id = told(fabula("train", str(folder), "--json")[1])["job"]["job_id"]
    made = client.characters.get(job_id).publish()
    assert (made.deleted, made.purged) == (None, None)
    deleted = client.characters.delete_version(made.version_id)
    assert deleted.deleted is not None
    assert deleted.purged is not None
    assert deleted.purged > deleted.deleted
    assert list(client.characters.versions(name="Otto")) == []
    assert list(client.characters.versions(show_deleted=True)) == [deleted]
    assert client.characters.undelete_version(made.version_id) == made
    with pytest.raises(NotFound):
        client.characters.delete_version("0" * 64)

    status, output = fabula("delete-version", "Otto", "--json")
    assert (status, told(output)["purged"] is not None) == (exits.OK, True)
    assert fabula("delete-version", VERSION_ID)[0] == exits.OK, "twice is well, by its id"
    status, output = fabula("delete-version", "Otto", "--json")
    assert (status, told(output)["error"]["reason"]) == (exits.REFUSED, "VERSION_UNKNOWN")
    assert "No characters yet." in fabula("versions")[1]
    assert told(fabula("versions", "--json")[1])["versions"] == []
    assert len(told(fabula("versions", "--deleted", "--json")[1])["versions"]) == 1
    assert "deleted" in fabula("versions", "--deleted")[1]
    assert VERSION_ID in fabula("delete-version", VERSION_ID)[1].replace("\n", ""), "it says how to have it back"
    for name in ("Otto", VERSION_ID[:8]):
        status, output = fabula("undelete-version", name, "--json")
        assert (status, told(output)["version_id"], told(output)["deleted"]) == (exits.OK, VERSION_ID, None)
        fabula("delete-version", VERSION_ID)
    status, output = fabula("undelete-version", "Rosa", "--json")
    assert (status, told(output)["error"]["reason"]) == (exits.REFUSED, "VERSION_UNKNOWN")
    assert "versions --deleted" in told(output)["error"]["message"]
    status, output = fabula("delete-version", "0" * 64, "--json")
    assert (status, told(output)["error"]["reason"]) == (exits.REFUSED, "CHARACTER_VERSION_NOT_FOUND")


def test_weights_without_a_name_are_not_sent(fabula: Any, script: CustomizationScript, tmp_path: Path) -> None:
    file = tmp_path / "otto.safetensors"
    file.write_bytes(WEIGHTS)
    status, output = fabula("import", str(file), "--name", "Otto", "--json")
    assert (status, told(output)["error"]["reason"]) == (exits.USAGE, "CHARACTER_UNNAMED")
    assert script.calls == []


def test_a_file_that_is_too_large_for_one_call_goes_through_this_machines_store(
    fabula: Any, script: CustomizationScript, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "otto.safetensors"
    file.write_bytes(WEIGHTS)
    monkeypatch.setattr(characters, "MOST_WEIGHTS_BYTES", len(WEIGHTS) - 1)
    asked: list[tuple[str, ...]] = []

    def kept(_installation: Any, module: str, *words: str) -> dict[str, Any]:
        asked.append((module, *words))
        return {"weights_sha256": SHA256}

    monkeypatch.setattr(characters, "ask_module", kept)
    status, _ = fabula("import", str(file), "--name", "Otto", "--phrase", OTTO["phrase"], "--json")
    assert status == exits.OK
    assert asked == [("services.characters", "import", "--pack=toon", "--", str(file))]
    (request,) = script.requests("ImportCharacterVersion")
    assert (request.WhichOneof("source"), request.weights_sha256) == ("weights_sha256", SHA256)


def test_a_version_is_chosen_by_name_by_id_or_by_its_beginning(
    fabula: Any, script: CustomizationScript, folder: Path, tmp_path: Path
) -> None:
    job_id = told(fabula("train", str(folder), "--json")[1])["job"]["job_id"]
    fabula("publish", job_id)
    out = str(tmp_path / "otto.safetensors")
    assert told(fabula("export", "Nobody", out, "--json")[1])["error"]["reason"] == "VERSION_UNKNOWN"
    assert told(fabula("export", VERSION_ID[:5], out, "--json")[1])["error"]["reason"] == "VERSION_UNKNOWN"
    asked = len(script.requests("ReadWeights"))
    for name in ("Otto", VERSION_ID, VERSION_ID[:6]):
        # They were fetched and checked, and laid before the pack's networks: as weights these bytes are none.
        status, output = fabula("export", name, out, "--json")
        assert (status, told(output)["error"]["reason"]) == (exits.REFUSED, "ADAPTER_DAMAGED"), output
    assert len(script.requests("ReadWeights")) == asked + 3
    assert not Path(out).exists()
