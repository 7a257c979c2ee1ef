"""What happens to a story when something around it fails, fills up, stops, or is doubled."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from fabula.story.v1 import story_pb2

from services.runtime.errors import (
    DescriptionTooLong,
    FabulaError,
    Internal,
    QueueFull,
    ResourceExhausted,
    Unavailable,
)
from tests.contract.story import pictures
from tests.contract.story.scripted_services import TOKEN, Script, ScriptedServices
from tests.contract.story.story_process import ROOT, StoryProcess, free_port_base
from tests.contract.story.test_input import refusal

State = story_pb2.Story.State
Start = Callable[..., StoryProcess]


def states(story: StoryProcess, story_id: str) -> list[str]:
    changes = [event.state_changed for event in story.events(story_id) if event.HasField("state_changed")]
    return [State.Name(change.state).removeprefix("STATE_") for change in changes]


def test_an_outage_makes_a_story_wait_and_its_end_makes_it_go_on(
    story: StoryProcess, services: ScriptedServices, script: Script
) -> None:
    script.step_s = 0.05
    made = story.create(pictures.plain(), frame_count=3)
    for message in story.watch(made.story_id):
        if message.event.HasField("frame_progress") and message.event.frame_progress.frame_index == 2:
            break
    services.stop()
    waiting = story.wait_state(made.story_id, State.STATE_WAITING)
    assert waiting.error.reason in ("UNAVAILABLE", "REPLICA_LOST")
    assert "goes on by itself" in waiting.error.message
    assert len([frame for frame in waiting.frames if frame.image_sha256]) == 2
    services.start()
    done = story.wait_state(made.story_id, State.STATE_SUCCEEDED)
    assert not done.error.reason
    assert done.frames[1] == waiting.frames[1]
    assert states(story, made.story_id) == ["QUEUED", "RUNNING", "WAITING", "RUNNING", "SUCCEEDED"]
    assert script.computed["RenderFrame", 1] == 1


def test_a_story_can_be_made_and_cancelled_during_an_outage(
    story: StoryProcess, services: ScriptedServices, script: Script
) -> None:
    services.stop()
    try:
        made = story.create(pictures.plain(), frame_count=1)
        story.wait_state(made.story_id, State.STATE_WAITING)
        assert story.cancel(made.story_id).state == State.STATE_CANCELLED
    finally:
        services.start()


@pytest.mark.parametrize("method", ["WriteCaption", "Describe", "RenderFrame"])
def test_passing_failures_are_waited_out(story: StoryProcess, script: Script, method: str) -> None:
    script.failures[method] = [Unavailable(), Internal("once"), QueueFull(retry_after_s=0.3), Unavailable()]
    started = time.monotonic()
    made = story.create(pictures.plain(), frame_count=2)
    done = story.wait_state(made.story_id, State.STATE_SUCCEEDED)
    assert len(done.frames) == 3
    assert time.monotonic() - started >= 0.3  # the service's own word on when to come back is kept
    assert script.count(method) == 2 + 4


PERMANENT: list[tuple[str, FabulaError]] = [
    ("RenderFrame", DescriptionTooLong("the description has 200 tokens; at most 96 fit")),
    ("WriteCaption", ResourceExhausted("your quota is spent")),
    ("Describe", DescriptionTooLong("no")),
]


@pytest.mark.parametrize(("method", "error"), PERMANENT)
def test_a_permanent_error_fails_the_story_and_keeps_its_frames(
    story: StoryProcess, script: Script, method: str, error: FabulaError
) -> None:
    async def at_frame_2(called: str, frame_index: int) -> None:
        if called == method and frame_index == 2:
            raise error

    script.before = at_frame_2
    made = story.create(pictures.plain(), frame_count=4)
    failed = story.wait_state(made.story_id, State.STATE_FAILED)
    assert (failed.error.reason, failed.error.message) == (error.reason, error.message)
    assert failed.frames[1].image_sha256
    assert story.image(made.story_id, failed.frames[1].image_sha256)
    assert states(story, made.story_id)[-1] == "FAILED"
    assert script.count(method) == 2


def test_a_request_that_keeps_killing_replicas_is_set_aside(story: StoryProcess, script: Script) -> None:
    script.replicas_die = True
    made = story.create(pictures.plain(), frame_count=1)
    failed = story.wait_state(made.story_id, State.STATE_FAILED)
    assert failed.error.reason == "POISON_REQUEST"
    assert script.count("RenderFrame") == 5


def test_a_full_disk_is_named_and_the_story_resumes_when_there_is_room(new_story: Start, script: Script) -> None:
    # The kernel refuses the write just as a full disk does; the limit is on files larger than what SQLite needs here.
    story = new_story()
    assert story.process is not None
    made_before = story.create(pictures.plain(), frame_count=1)
    story.wait_state(made_before.story_id, State.STATE_SUCCEEDED)
    script.picture_bytes = 6 << 20
    resource.prlimit(story.process.pid, resource.RLIMIT_FSIZE, (4 << 20, resource.RLIM_INFINITY))
    made = story.create(pictures.plain(), frame_count=2)
    waiting = story.wait_state(made.story_id, State.STATE_WAITING)
    assert waiting.error.reason == "OBJECT_STORE_FULL"
    assert not [
        path for path in (story.home / "objects").rglob("*") if path.is_file() and path.stat().st_size > 4 << 20
    ]
    resource.prlimit(story.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    done = story.wait_state(made.story_id, State.STATE_SUCCEEDED)
    assert script.computed["RenderFrame", 1] == 2  # once in each story: the picture was kept, not drawn again
    assert len(story.image(made.story_id, done.frames[2].image_sha256)) > 6 << 20


def test_a_full_disk_at_creation_is_a_clear_error(new_story: Start) -> None:
    story = new_story()
    assert story.process is not None
    noise = pictures.encoded(pictures.Image.effect_noise((900, 900), 90).convert("RGB"))
    resource.prlimit(story.process.pid, resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
    code, reason, _, _, _ = refusal(lambda: story.create(noise))
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OBJECT_STORE_FULL")
    answer = story.http.post("/v1/stories", files={"image": ("a.png", noise)}, data={"caption": "x"})
    assert (answer.status_code, answer.json()["reason"]) == (507, "OBJECT_STORE_FULL")
    resource.prlimit(story.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert story.wait_state(story.create(noise, frame_count=1).story_id, State.STATE_SUCCEEDED)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(new_story: Start, script: Script) -> None:
    script.step_s = 0.1
    story = new_story(STORY_MAX_RUNNING="1", STORY_MAX_QUEUED="2")
    running = story.create(pictures.plain(), frame_count=1, steps=50)
    story.wait_state(running.story_id, State.STATE_RUNNING)
    queued = [story.create(pictures.plain(), frame_count=1).story_id for _ in range(2)]
    code, reason, _, metadata, retry = refusal(lambda: story.create(pictures.plain()))
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert retry == 5.0
    assert metadata["queued_count"] == "2"
    answer = story.http.post("/v1/stories", files={"image": ("a.png", pictures.plain())}, data={"caption": "x"})
    assert (answer.status_code, answer.json()["reason"]) == (429, "QUEUE_FULL")
    assert int(answer.headers["retry-after"]) >= 1
    assert [story.get(story_id).state for story_id in queued] == [State.STATE_QUEUED] * 2  # one at a time
    story.cancel(running.story_id)
    for story_id in queued:
        story.wait_state(story_id, State.STATE_SUCCEEDED)


def test_a_damaged_picture_is_detected(new_story: Start) -> None:
    story = new_story()
    made = story.create(pictures.plain(), frame_count=1)
    done = story.wait_state(made.story_id, State.STATE_SUCCEEDED)
    sha256 = done.frames[1].image_sha256
    (path,) = [path for path in (story.home / "objects").rglob(sha256) if path.is_file()]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    code, reason, _, _, _ = refusal(lambda: story.image(made.story_id, sha256))
    assert (code, reason) == (grpc.StatusCode.DATA_LOSS, "OBJECT_CORRUPT")
    answer = story.http.get(f"/v1/stories/{made.story_id}/images/{sha256}")
    assert (answer.status_code, answer.json()["reason"]) == (500, "OBJECT_CORRUPT")


def test_a_stop_is_clean_and_a_start_goes_on(new_story: Start, script: Script) -> None:
    script.step_s = 0.05
    story = new_story()
    made = story.create(pictures.plain(), frame_count=3)
    endings: list[grpc.StatusCode] = []

    def follow() -> None:
        try:
            for _ in story.watch(made.story_id):
                pass
        except grpc.RpcError as error:
            endings.append(error.code())

    watcher = threading.Thread(target=follow)
    watcher.start()
    for message in story.watch(made.story_id):
        if message.event.HasField("frame_progress") and message.event.frame_progress.frame_index == 2:
            break
    assert story.process is not None
    family = psutil.Process(story.process.pid).children(recursive=True)
    assert story.terminate() == 0
    watcher.join(10)
    assert endings == [grpc.StatusCode.UNAVAILABLE]  # clients come back on this one
    assert not psutil.wait_procs(family, timeout=5)[1]
    again = new_story()
    done = again.wait_state(made.story_id, State.STATE_SUCCEEDED)
    assert len(done.frames) == 4
    assert script.computed["RenderFrame", 1] == 1
    sequences = [event.sequence for event in again.events(made.story_id) if event.sequence]
    assert sequences == list(range(1, len(sequences) + 1))


def test_two_processes_over_one_database_act_as_one(new_story: Start, script: Script) -> None:
    script.step_s = 0.05
    first = new_story(STORY_MAX_RUNNING="1")
    second = new_story(STORY_MAX_RUNNING="1")
    made = [first.create(pictures.plain(), frame_count=2, seed=seed).story_id for seed in range(4)]
    for story_id in made:  # whoever makes it, both can follow it
        logs = [[event.sequence for event in process.events(story_id) if event.sequence] for process in (first, second)]
        assert logs[0] == logs[1] == list(range(1, len(logs[0]) + 1))
        assert second.get(story_id).state == State.STATE_SUCCEEDED
    assert script.computed["RenderFrame", 1] == script.computed["RenderFrame", 2] == 4  # nothing was done twice
    before = script.steps_taken
    slow = first.create(pictures.plain(), frame_count=5, steps=100)
    for process in (first, second):
        process.wait_state(slow.story_id, State.STATE_RUNNING)
    while script.steps_taken == before:
        time.sleep(0.02)
    # Cancelled through both: one of them does not run it.
    assert second.cancel(slow.story_id).state == first.cancel(slow.story_id).state == State.STATE_CANCELLED
    deadline = time.monotonic() + 60
    while not script.cancelled and time.monotonic() < deadline:
        time.sleep(0.02)
    assert script.cancelled == 1


def test_pictures_nobody_has_are_swept_and_others_kept(new_story: Start) -> None:
    story = new_story(STORY_ORPHAN_AGE_S="0.01")
    kept = story.wait_state(story.create(pictures.plain(), frame_count=1).story_id, State.STATE_SUCCEEDED)
    gone = story.wait_state(story.create(pictures.animated_gif(), frame_count=1).story_id, State.STATE_SUCCEEDED)
    assert story.http.delete(f"/v1/stories/{gone.story_id}").status_code == 204
    story.terminate()
    again = new_story(STORY_ORPHAN_AGE_S="0.01")  # sweeps at start
    objects = again.home / "objects"
    orphans = [frame.image_sha256 for frame in gone.frames]
    deadline = time.monotonic() + 60
    while any(list(objects.rglob(sha256)) for sha256 in orphans) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(list(objects.rglob(sha256)) for sha256 in orphans)
    for frame in kept.frames:
        assert again.image(kept.story_id, frame.image_sha256)


def test_a_wrong_token_is_waited_out_not_fatal(services: ScriptedServices, script: Script, tmp_path: Path) -> None:
    story = StoryProcess(tmp_path, services.target)
    (tmp_path / "token").write_text("f" * 64)
    try:
        story.start()
        made = story.create(pictures.plain(), frame_count=1)
        waiting = story.wait_state(made.story_id, State.STATE_WAITING)
        assert waiting.error.reason == "INSTALLATION_TOKEN_INVALID"
        story.kill()
        (tmp_path / "token").write_text(TOKEN)
        story.start()
        story.wait_state(made.story_id, State.STATE_SUCCEEDED)
    finally:
        story.kill()


def run_story(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FABULA_")}
    return subprocess.run(
        [sys.executable, "-m", "services.story", *arguments],
        cwd=ROOT,
        env={**inherited, "FABULA_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"FABULA_STORY_MAX_RUNING": "2"}, "FABULA_STORY_MAX_RUNING"),
        ({"FABULA_HOEM": "/x"}, "FABULA_HOEM"),
        ({"FABULA_STORY_MAX_RUNNING": "0"}, "FABULA_STORY_MAX_RUNNING"),
        ({"FABULA_STORY_HOST": "0.0.0.0"}, "FABULA_STORY_ALLOWED_HOSTS"),
        ({"FABULA_DATABASE_URL": "mysql://x/y"}, "FABULA_DATABASE_URL"),
        ({"FABULA_STORY_MIGRATE": "false"}, "services.story migrate"),
    ],
)
def test_a_wrong_setting_stops_the_process_and_is_named(
    tmp_path: Path, environment: dict[str, str], named: str
) -> None:
    ended = run_story(tmp_path, **environment)
    assert ended.returncode == 2, ended.stderr
    assert named in ended.stderr


@pytest.mark.parametrize("offset", [0, 1], ids=["http", "grpc"])
def test_a_taken_port_stops_the_process_and_is_named(tmp_path: Path, offset: int) -> None:
    base = free_port_base()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", base + offset))
        taken.listen()
        ended = run_story(tmp_path, FABULA_PORT_BASE=str(base))
    assert ended.returncode == 2, ended.stderr
    told = ended.stderr.splitlines()[-1]
    assert "FABULA_PORT_BASE" in told
    assert f"port {base + offset} " in told


def test_the_process_stays_light(story: StoryProcess) -> None:
    heavy = "import sys, services.story.process; print(sorted({'torch','ray','vllm','diffusers'} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", heavy], cwd=ROOT, capture_output=True, text=True, timeout=180, check=True
    )
    assert found.stdout.strip() == "[]"
    assert story.process is not None
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in psutil.Process(story.process.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


POSTGRES = [
    *[Path(found).resolve() for found in [shutil.which("initdb")] if found],
    *sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")),
]


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server of this test alone, run by an unprivileged user because it refuses to run as root."""
    if not POSTGRES:
        pytest.skip("no PostgreSQL server is installed here (initdb not found)")
    binaries = POSTGRES[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="fabula-postgres-"))
    options: dict[str, object] = {}
    if os.getuid() == 0:
        os.chown(folder, 65534, 65534)
        options = {"user": 65534, "group": 65534, "extra_groups": []}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    subprocess.run(
        [
            binaries / "initdb",
            "-D",
            folder / "data",
            "-U",
            "fabula",
            "-A",
            "trust",
            "--no-sync",
            "-E",
            "UTF8",
            "--locale=C",
        ],
        check=True,
        capture_output=True,
        **options,  # type: ignore[call-overload]
    )
    server = subprocess.Popen(
        [
            binaries / "postgres",
            "-D",
            folder / "data",
            "-k",
            folder,
            "-h",
            "127.0.0.1",
            "-p",
            str(port),
            "-c",
            "fsync=off",
        ],
        stderr=subprocess.DEVNULL,
        **options,  # type: ignore[call-overload]
    )
    try:
        ready = [binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
        while subprocess.run(ready, capture_output=True, check=False).returncode:
            assert server.poll() is None
            time.sleep(0.05)
        subprocess.run(
            [binaries / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "fabula", "stories"], check=True
        )
        yield f"postgresql://fabula@127.0.0.1:{port}/stories"
    finally:
        server.send_signal(2)
        server.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def test_the_same_over_postgresql_by_one_setting(
    services: ScriptedServices, script: Script, tmp_path: Path, postgres_url: str
) -> None:
    refused = run_story(tmp_path / "home", FABULA_DATABASE_URL=postgres_url)
    assert refused.returncode == 2
    assert "services.story migrate" in refused.stderr
    for _ in range(2):  # doing it again is harmless
        migrated = run_story(tmp_path / "home", "migrate", FABULA_DATABASE_URL=postgres_url)
        assert migrated.returncode == 0, migrated.stderr
    story = StoryProcess(tmp_path / "home", services.target, DATABASE_URL=postgres_url).start()
    try:
        script.step_s = 0.05
        made = story.create(pictures.plain(), frame_count=3, request_id="k")
        assert story.create(pictures.plain(), frame_count=3, request_id="k").story_id == made.story_id
        _, reason, _, _, _ = refusal(lambda: story.create(pictures.plain(), frame_count=2, request_id="k"))
        assert reason == "IDEMPOTENCY_KEY_REUSED"
        for message in story.watch(made.story_id):
            if message.event.HasField("frame_progress") and message.event.frame_progress.frame_index == 2:
                break
        story.kill()
        story.start()
        done = story.wait_state(made.story_id, State.STATE_SUCCEEDED)
        assert len(done.frames) == 4
        assert script.computed["RenderFrame", 1] == 1
        sequences = [event.sequence for event in story.events(made.story_id) if event.sequence]
        assert sequences == list(range(1, done.last_sequence + 1))
        threads, ids = [], []
        for _ in range(8):
            create = lambda: ids.append(story.create(pictures.plain(), request_id="at-once", frame_count=1).story_id)  # noqa: E731
            threads.append(threading.Thread(target=create))
            threads[-1].start()
        for thread in threads:
            thread.join(30)
        assert (len(ids), len(set(ids))) == (8, 1)
        assert not re.search(r"\.db$", "\n".join(path.name for path in story.home.iterdir()))
    finally:
        story.kill()
