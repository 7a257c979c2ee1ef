"""One story through all processes, started and stopped by the command, on an installation of its own."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from fabula.caption.v1 import caption_service_pb2, caption_service_pb2_grpc
from fabula.frame.v1 import frame_service_pb2, frame_service_pb2_grpc
from PIL import Image

from tests.e2e.local import LocalInstallation, first_frame
from training.evaluation.judge import load_judge
from training.new_story import NewStory, world_story
from training.toon.cast import MAIN, NEW
from training.toon.picture import save_png
from training.toon.render import render
from training.toon.scene import Actor, Character, Scene
from training.verdicts import Verdict

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

FRAMES = 2
SOMEBODY_NEW = "rosa"
DOINGS = ("waves happily", "jumps, laughing", "stands looking surprised", "cheers, laughing")


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalInstallation]:
    made = LocalInstallation(tmp_path_factory.mktemp("e2e"))
    try:
        assert made.up()["phase"] == "ready"
        yield made
    finally:
        made.run("down")


def alone(character: Character) -> Scene:
    """A picture of one who stands in the park."""
    actor = Actor(character=character, action="wave", mood="happy")
    return Scene(actors=(actor,), setting="park", time="day", side="left")


def written(story: NewStory, folder: Path) -> Path:
    """The story as a user has it: a folder with its pictures and `story.json`."""
    folder.mkdir()
    frames = []
    for number, frame in enumerate(story.frames):
        save_png(frame.pixels, folder / f"{number}.png")
        frames.append({"image": f"{number}.png", "caption": frame.caption, "description": frame.descriptions[0]})
    told = {"name": story.name, "phrase": story.phrase, "frames": frames}
    (folder / "story.json").write_text(json.dumps(told))
    return folder


def tell(installation: LocalInstallation, out: Path, seed: int = 7) -> dict[str, Any]:
    image, caption = first_frame()
    arguments = (
        "--image",
        str(image),
        "--caption",
        caption,
        "--frames",
        str(FRAMES),
        "--seed",
        str(seed),
        "--out",
        str(out),
    )
    return installation.answer("story", "continue", *arguments, timeout_s=1800)


def test_a_story_leaves_a_folder_and_the_same_seed_the_same_pictures(
    installation: LocalInstallation, tmp_path: Path
) -> None:
    first = tell(installation, tmp_path / "first")
    story = first["story"]
    assert story["state"] == "succeeded"
    assert [frame["index"] for frame in story["frames"]] == list(range(FRAMES + 1))
    for frame in story["frames"][1:]:
        assert frame["caption"]
        assert frame["description"]
        assert frame["timings"]["render_s"] > 0

    folder = tmp_path / "first"
    names = {path.name for path in folder.iterdir()}
    kept = {"story.html", "story.json", "story.gif", "contact_sheet.png"}
    assert names == kept | {f"frame-{n}.png" for n in range(FRAMES + 1)}
    assert json.loads((folder / "story.json").read_text())["story_id"] == story["story_id"]
    with Image.open(folder / "frame-1.png") as frame:
        assert frame.size == (story["frames"][1]["width_px"], story["frames"][1]["height_px"])

    again = tell(installation, tmp_path / "again")["story"]
    assert again["story_id"] != story["story_id"]
    for one, other in zip(story["frames"], again["frames"], strict=True):
        assert one["image_sha256"] == other["image_sha256"]
        assert one["caption"] == other["caption"]

    different = tell(installation, tmp_path / "different", seed=8)["story"]
    assert different["frames"][1]["image_sha256"] != story["frames"][1]["image_sha256"]


def test_status_reads_processes_replicas_and_metrics(installation: LocalInstallation) -> None:
    status = installation.answer("status")
    assert status["phase"] == "ready"
    assert {name: each["status"] for name, each in status["applications"].items()} == {
        "caption": "RUNNING",
        "customization": "RUNNING",
        "frame": "RUNNING",
    }
    assert status["memory_bytes"] == sum(each["memory_bytes"] for each in status["processes"])
    packs = {each["service"]: each for each in status["packs"]}
    assert set(packs) == {"caption", "frame"}
    assert packs["caption"]["digest"] == packs["frame"]["digest"]
    assert any(name.startswith("story_") for name in status["metrics"])
    assert any(name.startswith("ray_") for name in status["metrics"])


def test_a_second_up_finds_the_first(installation: LocalInstallation) -> None:
    before = installation.one("services.story")
    assert installation.up()["already_running"] is True
    assert installation.one("services.story") == before


def test_nothing_listens_beyond_this_machine(installation: LocalInstallation) -> None:
    listening = [
        (process.name, connection.laddr)
        for process in installation.sightings()
        for connection in psutil.Process(process.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 8
    assert [each for each in listening if each[1].ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")] == []


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_a_stranger_gets_no_answer_from_the_models(installation: LocalInstallation, token: str | None) -> None:
    extra = () if token is None else (("fabula-token", token),)
    with grpc.insecure_channel(f"127.0.0.1:{installation.port_base + 2}") as channel:
        caption = caption_service_pb2_grpc.CaptionServiceStub(channel).ListPacks
        frame = frame_service_pb2_grpc.FrameServiceStub(channel).ListPacks
        for name, call, request in (
            ("caption", caption, caption_service_pb2.ListPacksRequest()),
            ("frame", frame, frame_service_pb2.ListPacksRequest()),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call(request, metadata=(("application", name), *extra), timeout=60)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_bad_input_is_refused_with_a_reason(installation: LocalInstallation, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    answer = installation.answer("story", "continue", "--image", str(broken), "--caption", "Once.", status=4)
    assert answer["error"]["reason"] == "IMAGE_UNREADABLE"
    answer = installation.answer("story", "show", "no-such-story", status=4)
    assert answer["error"]["reason"] == "STORY_NOT_FOUND"


def test_doctor_finds_all_well_while_it_runs(installation: LocalInstallation) -> None:
    findings = {each["name"]: each for each in installation.answer("doctor", timeout_s=900)["findings"]}
    for service in ("story", "customization"):
        assert findings[f"database of {service}"]["detail"] == "reachable, migrations applied"
    assert any(name.startswith("pack ") for name in findings)


def test_somebody_new_is_taught_published_and_known_in_the_next_story(
    installation: LocalInstallation, tmp_path: Path
) -> None:
    """From one story to the cast, in services that run all the while; the world's judge says who is to be seen."""
    taught = world_story(SOMEBODY_NEW, 256)
    image = tmp_path / "pip.png"
    save_png(render(alone(MAIN[0]), 256), image)
    look = next(one.look for one in NEW if one.id == SOMEBODY_NEW)

    def recognised(name: str, *arguments: str) -> int:
        """In how many of four frames they are to be seen of whom nothing is said but their name."""
        called = ("--image", str(image), "--caption", "Pip waved in the park.", "--frames", "1", "--seed", "7")
        story = installation.answer("story", "continue", *called, *arguments, timeout_s=1800)["story"]
        for number, does in enumerate(DOINGS):
            words = ("--caption", f"{taught.name} {does}.", "--description", f"{taught.name} {does} in the park.")
            out = ("--seed", str(number), "--out", str(tmp_path / name))
            story = installation.answer("story", "insert", story["story_id"], "0", *words, *out, timeout_s=600)["story"]
        frames = [frame["index"] for frame in story["frames"] if frame["caption"].startswith(taught.name)]
        assert len(frames) == len(DOINGS)
        found = [np.asarray(Image.open(tmp_path / name / f"frame-{number}.png").convert("RGB")) for number in frames]
        return sum(map(seen, load_judge().verdicts(found)))

    def seen(verdict: Verdict) -> bool:
        wanted = (look.species, look.colour, look.accessory)
        return any((one.species, one.colour, one.accessory) == wanted for one in verdict.figures)

    by_chance = recognised("before")
    lesson = written(taught, tmp_path / SOMEBODY_NEW)
    trained = installation.answer(
        "character", "train", str(lesson), "--accept", "*", "--steps", "40", "--seed", "1", timeout_s=3000
    )
    assert trained["job"]["state"] == "succeeded", trained
    published = installation.answer("character", "publish", trained["job"]["job_id"])
    assert published["character"]["name"] == taught.name
    assert recognised("after", "--character", taught.name) >= by_chance + len(DOINGS) / 2

    # And they stay in a story that goes on by itself: the captioner, who never read the name, does not lose it.
    told = ("--caption", f"{taught.name} waved to Pip in the park.", "--frames", "4", "--seed", "7")
    story = installation.answer(
        "story", "continue", "--image", str(image), *told, "--character", taught.name, timeout_s=1800
    )["story"]
    assert any(taught.name in frame["description"] for frame in story["frames"][1:]), story["frames"]


def test_down_leaves_no_process_and_no_port(installation: LocalInstallation) -> None:
    seen = installation.sightings()
    assert len(seen) > 8
    assert installation.down() == {"was_running": True, "left_over_count": 0}
    assert [each for each in seen if each.alive] == []
    assert installation.strangers() == []
    for offset in range(14):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", installation.port_base + offset))
    answer = installation.answer("story", "list", status=3)
    assert "fabula up" in answer["error"]["message"]
    assert installation.answer("status", status=3)["phase"] == "stopped"
