"""What the evaluation says, and how it says it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.models.drawing import Pixels
from services.models.registry import FrameModel
from services.models.tiny import build_tiny_pack
from training.evaluation import toon
from training.evaluation.judge import Judge, Verdict, agreement, load_judge, save_judge, targets, truth
from training.evaluation.toon import Figure, Told, report, story_tasks, table, text_figures
from training.toon.world import sample_frame


def verdict(**changes: object) -> Verdict:
    said: dict[str, object] = {
        "characters": frozenset({"pip"}),
        "somebody_else": False,
        "setting": "park",
        "time": "day",
        "actions": frozenset({"run"}),
        "moods": frozenset({"happy"}),
        "props": frozenset(),
    }
    return Verdict(**{**said, **changes})  # type: ignore[arg-type]


def test_a_frame_counts_only_when_all_of_its_answer_is_right() -> None:
    true = [verdict(characters=frozenset({"pip", "mina"})), verdict()]
    said = [verdict(characters=frozenset({"pip"}), time="night"), verdict()]
    shares = agreement(said, true)
    assert shares["characters"] == 0.5
    assert shares["named_characters"] == pytest.approx(2 / 3)
    assert shares["time"] == 0.5
    assert shares["setting"] == 1.0


def test_the_truth_of_a_scene_is_what_its_labels_say() -> None:
    for seed in range(20):
        scene = sample_frame(seed, split="test").scene
        labels, said = scene.labels(), truth(scene)
        assert said.setting == labels["setting"]
        assert said.actions == set(labels["actions"])
        known = {c for c in labels["characters"] if not c.startswith("side")}
        assert said.characters == known
        assert said.somebody_else == (len(known) < len(labels["characters"]))
        wanted = targets([scene])
        assert int(wanted["characters"].sum()) == len(known) + said.somebody_else


def test_a_judge_comes_back_as_it_was_shipped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = Judge().half().float()
    save_judge(judge, {"accuracy": {}}, tmp_path)
    pixels = torch.zeros(1, 3, 64, 64)
    again = load_judge(tmp_path)
    with torch.no_grad():
        assert torch.allclose(judge(pixels)["time"], again(pixels)["time"], atol=1e-5)
    assert (tmp_path / "judge.safetensors").stat().st_size <= 2_000_000


def test_references_are_the_true_frames_before() -> None:
    (story,) = toon.held_out_stories(1)
    tasks = story_tasks([story], 4, 32)
    assert [len(task.references) for task in tasks] == [1, 2, 3, 3]
    assert [task.description for task in tasks] == [frame.description for frame in story.frames[1:]]
    assert tasks[3].references[-1].description == story.frames[3].description


def test_a_description_must_parse_and_name_whom_the_caption_names() -> None:
    from training.toon.cast import MAIN

    frame = next(
        sample_frame(seed).scene
        for seed in range(200)
        if len(sample_frame(seed).scene.actors) == 1 and sample_frame(seed).scene.actors[0].character in MAIN
    )
    import random

    from training.toon.grammar import describe

    description = describe(frame, random.Random(0))
    name = frame.actors[0].character.name
    other = next(c.name for c in MAIN if c.name != name)
    figures = {
        f.name: f.value
        for f in text_figures(
            [
                Told("", f"{name} laughed.", description),
                Told("", f"{other} laughed.", description),
                Told("", f"{name} laughed.", "mumble"),
            ]
        )
    }
    assert figures["description_parses"] == pytest.approx(2 / 3)
    assert figures["description_parses_and_names"] == pytest.approx(1 / 3)
    assert figures["description_names_nobody_else"] == pytest.approx(1 / 3)


def test_a_missed_target_is_said() -> None:
    low, high = (
        Figure(name="a", value=0.7, n=10, target=0.8),
        Figure(name="b", value=3.0, n=10, target=2.0, at_most=True),
    )
    assert not low.passed
    assert not high.passed
    assert Figure(name="c", value=0.1, n=10).passed
    assert "MISSED" in table([low])


def test_the_last_line_is_one_json_object_with_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_tiny_pack(tmp_path / "tiny", captions=False)
    torch.manual_seed(0)
    monkeypatch.setattr(toon, "load_judge", Judge)
    draw_all = toon.draw_all

    def with_short_texts(model: FrameModel, tasks: Sequence[toon.Task]) -> list[Pixels]:
        """The tiny pack has a token a letter, so a whole description does not fit its window."""
        short = [
            replace(
                task,
                description=task.description[:30],
                references=tuple(replace(seen, description=seen.description[:30]) for seen in task.references),
            )
            for task in tasks
        ]
        return draw_all(model, short)

    monkeypatch.setattr(toon, "draw_all", with_short_texts)
    arguments = ["toon", "--pack", str(tmp_path / "tiny"), "--frames", "4", "--descriptions", "0", "--threads", "1"]
    monkeypatch.setattr("sys.argv", arguments)
    toon.main()
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    names = {figure["name"] for figure in said["figures"]}
    assert {"vae_psnr_db_known", "vae_psnr_db_new", "frame_characters", "frame_setting", "frame_time"} <= names
    assert {"judge_characters", "first_characters", "reference_jump_on", "frame_seconds"} <= names
    assert all({"value", "target", "n", "passed"} <= figure.keys() for figure in said["figures"])
    assert said["passed"] is False


def test_a_report_says_which_pack_it_is_about(tmp_path: Path) -> None:
    pack = build_tiny_pack(tmp_path / "tiny", captions=False)
    said = report(pack, [Figure(name="a", value=1.0, n=1, target=0.5)])
    assert said["digest"] == pack.digest
    assert said["passed"] is True
