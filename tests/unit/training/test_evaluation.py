"""What the evaluation says, and how it says it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.models.drawing import Pixels
from services.models.registry import FrameModel
from services.models.tiny import build_tiny_pack
from training.evaluation import captions, frames, toon
from training.evaluation.arcs import drops_hero, has_arc, places_of
from training.evaluation.captions import expected, is_whole, names_agree
from training.evaluation.figures import Figure, difference, gap, mean, share, table
from training.evaluation.frames import Dials, Task, crowd_tasks, held_out_stories, story_tasks
from training.evaluation.judge import Judge, load_judge, measure_shipped, save_judge
from training.evaluation.stories import Told, story_figures
from training.evaluation.toon import pooled, report
from training.questions import EMPTY, PRESENT, answers
from training.recipes import toon_judge
from training.toon.arcs import ARCS
from training.toon.grammar import describe
from training.toon.reading import parse
from training.toon.render import render
from training.toon.scene import MAX_ACTORS
from training.toon.splits import is_held_out
from training.toon.stories import Story
from training.toon.world import sample_frame, sample_story
from training.verdicts import Someone, Verdict, agreement, outcomes, truth


def someone(**changes: str) -> Someone:
    said = {
        "who": "pip",
        "species": "cat",
        "colour": "orange",
        "accessory": "scarf",
        "accessory_colour": "blue",
        "action": "run",
        "mood": "happy",
        "prop": "none",
    }
    return Someone(**{**said, **changes})


MINA = {"who": "mina", "species": "rabbit", "colour": "pink", "accessory": "bow", "accessory_colour": "yellow"}


def verdict(*figures: Someone, **changes: str) -> Verdict:
    place = {"setting": "park", "time": "day", "side": "left", "weather": "clear", "ground_prop": "none"}
    return Verdict(figures=figures or (someone(),), **{**place, **changes})


class TestJudge:
    def test_a_frame_counts_only_when_all_of_its_answer_is_right(self) -> None:
        true = [verdict(someone(), someone(**MINA)), verdict()]
        said = [verdict(someone(), someone(**{**MINA, "who": "ella"}), time="night"), verdict()]
        shares = agreement(said, true)
        assert shares["characters"] == 0.5
        assert shares["whole"] == 1.0  # her look is right
        assert shares["time"] == 0.5
        assert shares["setting"] == 1.0

    def test_somebody_missing_makes_everybody_of_the_frame_wrong(self) -> None:
        found = outcomes([verdict(someone())], [verdict(someone(), someone(**MINA))])
        assert found["count"] == [False]
        assert found["characters"] == [False]
        assert found["action"] == [False, False]
        assert found["whole"] == [False]

    def test_figures_are_compared_in_their_places(self) -> None:
        found = outcomes(
            [verdict(someone(**MINA, action="jump"), someone())], [verdict(someone(), someone(**MINA, action="jump"))]
        )
        assert found["characters"] == [True]  # both are there
        assert found["action"] == [False, False]  # but each does what the other should

    @pytest.mark.parametrize(
        ("seen", "is_apart"),
        [
            ([someone(), someone(**MINA)], True),
            ([someone(colour="green"), someone(**MINA)], True),  # wrong, and nobody's
            ([someone(colour="pink"), someone(**MINA)], False),  # hers
            ([someone(accessory="bow"), someone(**MINA)], False),
            ([someone(**MINA), someone(**MINA)], False),  # doubled
            ([someone(species="dog"), someone(species="dog")], False),
            ([someone()], False),
            ([someone(**MINA), someone()], False),  # each looks like the other
        ],
    )
    def test_figures_are_apart_when_none_has_a_part_of_another(self, seen: list[Someone], is_apart: bool) -> None:
        assert outcomes([verdict(*seen)], [verdict(someone(), someone(**MINA))])["apart"] == [is_apart]

    def test_props_are_asked_of_frames_that_have_one(self) -> None:
        kite = someone(action="hold", prop="kite")
        assert outcomes([verdict(kite)], [verdict(kite)])["prop"] == [True]
        assert outcomes([verdict()], [verdict(kite)])["prop"] == [False]
        assert outcomes([verdict(ground_prop="ball")], [verdict()])["no_prop"] == [False]
        assert outcomes([verdict()], [verdict(ground_prop="ball")])["prop"] == [False]
        assert outcomes([verdict()], [verdict()])["prop"] == []

    def test_the_truth_of_a_scene_is_what_its_labels_say(self) -> None:
        for seed in range(20):
            scene = sample_frame(seed, split="test").scene
            labels, said = scene.labels(), truth(scene)
            assert said.setting == labels["setting"]
            assert tuple(one.action for one in said.figures) == labels["actions"]
            assert said.characters == {c for c in labels["characters"] if not c.startswith("side")}
            wanted = answers([scene])
            assert int(wanted[PRESENT].sum()) == len(scene.actors)
            assert (wanted["mood"][0, len(scene.actors) :] == EMPTY).all()
            assert wanted["species"].shape == (1, MAX_ACTORS)

    def test_as_many_figures_are_looked_for_as_there_seem_to_be(self) -> None:
        torch.manual_seed(0)
        judge = Judge().eval()
        pictures = np.stack([render(sample_frame(seed).scene) for seed in range(3)])
        for count in (1, 2, 3):
            with torch.no_grad():
                judge.count.weight.zero_()
                judge.count.bias.copy_(torch.nn.functional.one_hot(torch.tensor(count - 1), 3).float())
            assert [len(v.figures) for v in judge.verdicts(pictures)] == [count] * 3

    def test_a_figure_is_looked_for_where_it_stands_among_so_many(self) -> None:
        torch.manual_seed(0)
        judge = Judge().eval()
        pixels = torch.randn(1, 3, 128, 128)
        with torch.no_grad():
            one, two, three = (judge(pixels, torch.tensor([n]))["species"] for n in (1, 2, 3))
        assert not torch.allclose(one[:, 0], two[:, 0])
        assert not torch.allclose(two[:, 0], three[:, 0])
        assert not torch.allclose(two[:, 0], two[:, 1])

    def test_it_comes_back_as_it_was_shipped(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        judge = Judge().half().float()
        save_judge(judge, {"accuracy": {}}, tmp_path)
        pixels = torch.zeros(1, 3, 64, 64)
        again = load_judge(tmp_path)
        with torch.no_grad():
            assert torch.allclose(judge(pixels)["time"], again(pixels)["time"], atol=1e-5)
        assert (tmp_path / "judge.safetensors").stat().st_size <= 2_500_000

    def test_it_can_be_measured_again_and_stays_as_it_is(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        save_judge(Judge(), {"accuracy": {"setting": 2.0}, "steps": 7}, tmp_path)
        before = (tmp_path / "judge.safetensors").read_bytes()
        recipe = replace(toon_judge(), held_out=replace(toon_judge().held_out, count=3))
        found = measure_shipped(recipe, tmp_path, tmp_path)
        facts = json.loads((tmp_path / "judge.json").read_text())
        assert facts["accuracy"] == found
        assert 0.0 <= found["setting"] <= 1.0
        assert (facts["steps"], facts["measured_on"]) == (7, recipe.held_out.file_name)
        assert (tmp_path / "judge.safetensors").read_bytes() == before


class TestTasks:
    def test_references_are_the_true_frames_before(self) -> None:
        (story,) = held_out_stories(1)
        tasks = story_tasks([story], 4, 32)
        assert [len(task.references) for task in tasks] == [1, 2, 3, 3]
        assert [task.description for task in tasks] == [frame.description for frame in story.frames[1:]]
        assert tasks[3].references[-1].description == story.frames[3].description

    def test_every_seed_has_stories_and_noise_of_its_own(self) -> None:
        first, second = (story_tasks(held_out_stories(2, seed), 8, 16, seed) for seed in (0, 1))
        assert not {t.description for t in first} & {t.description for t in second}
        assert not {t.seed for t in first} & {t.seed for t in second}

    def test_a_crowd_has_as_many_as_asked_for(self) -> None:
        for count in (2, 3):
            tasks = crowd_tasks(count, 4, 16)
            assert [len(task.scene.actors) for task in tasks] == [count] * 4
            assert len({task.description for task in tasks}) == 4
            assert all(task.references for task in tasks)

    def test_a_task_knows_whether_training_held_out_what_it_shows(self) -> None:
        tasks = story_tasks(held_out_stories(10), 40, 16)
        for task in tasks:
            assert task.is_held_out == any(is_held_out(a, task.scene.setting) for a in task.scene.actors)
        assert {task.is_held_out for task in tasks} == {True, False}


class TestFigures:
    def test_a_missed_target_is_said(self) -> None:
        low, high = (
            Figure(name="a", value=0.7, n=10, target=0.8),
            Figure(name="b", value=3.0, n=10, target=2.0, at_most=True),
        )
        assert not low.passed
        assert not high.passed
        assert Figure(name="c", value=0.1, n=10).passed
        assert "MISSED" in table([low])

    def test_nothing_counted_is_nothing_reached(self) -> None:
        assert not share("a", [], 0.5).passed
        assert not share("a", [], 0.5, at_most=True).passed
        assert not mean("a", [], 0.5).passed

    def test_a_share_has_wilsons_interval(self) -> None:
        figure = share("a", [True] * 90 + [False] * 10)
        assert figure.value == 0.9
        assert figure.low == pytest.approx(0.8256, abs=1e-3)  # as statsmodels has it
        assert figure.high == pytest.approx(0.9448, abs=1e-3)
        assert share("a", [True] * 5).high == pytest.approx(1.0)

    def test_a_gain_must_be_sure(self) -> None:
        sure = difference("a", [1.0, 1.1, 0.9, 1.0] * 10, [0.5, 0.6, 0.4, 0.55] * 10, 0.0)
        assert sure.passed
        assert sure.value == pytest.approx(0.4875)
        unsure = difference("a", [1.0, 0.0] * 10, [0.0, 0.9] * 10, 0.0)
        assert unsure.value > 0
        assert not unsure.passed

    def test_a_gap_is_how_much_lower_the_held_out_share_is(self) -> None:
        figure = gap("a", share("k", [True] * 8 + [False] * 2), share("h", [True] * 7 + [False] * 3), 0.08)
        assert figure.value == pytest.approx(0.1)
        assert not figure.passed
        assert gap("a", share("k", [True]), share("h", [True]), 0.08).passed

    def test_seeds_are_pooled_by_their_counts(self) -> None:
        parts = [[share("a", [True] * 30, 0.9)], [share("a", [False] * 10, 0.9)]]
        (figure,) = pooled(parts)
        assert figure.value == pytest.approx(0.75)
        assert figure.n == 40
        assert not figure.passed
        alike = [[share("a", [True, False] * 50)], [share("a", [True, False] * 50)]]
        (both,) = pooled(alike)
        whole = share("a", [True, False] * 100)
        assert (both.low, both.high) == (whole.low, whole.high)
        (all_right,) = pooled([[share("a", [True] * 20)], [share("a", [True] * 20)]])
        assert all_right.high is not None
        assert all_right.high <= 1.0

    def test_means_of_seeds_are_weighted_and_their_interval_shrinks(self) -> None:
        one, two = mean("a", [1.0, 2.0, 3.0]), mean("a", [5.0])
        (both,) = pooled([[one], [two]])
        assert both.value == pytest.approx(2.75)
        assert both.high is not None
        assert one.high is not None
        assert both.high - both.value < one.high - one.value


class TestArcs:
    def test_true_stories_are_stories(self) -> None:
        for seed in range(60):
            story = sample_story(seed, split="test")
            told = [frame.caption for frame in story.frames]
            assert has_arc(told), told
            assert not drops_hero(told, str(story.hero.name))
            for beat, caption in enumerate(told):
                assert (story.arc, beat) in places_of(caption), caption

    def test_a_story_without_its_ending_or_out_of_order_is_none(self) -> None:
        story = sample_story(3, split="test")
        told = [frame.caption for frame in story.frames]
        assert not has_arc(told[:4])
        assert not has_arc([*told[:1], *reversed(told[1:])])
        assert not has_arc([told[0], told[4]])  # no turn
        assert not has_arc([*told[:4], told[3]])
        assert has_arc([told[0], "He waited.", told[2], told[4]])

    def test_a_blend_of_two_beats_is_neither(self) -> None:
        assert places_of("They laughed and twirled, catching snowflakes all afternoon.")
        assert not places_of("They laughed and twirled, for that is what friends do.")

    def test_every_wording_is_recognised_as_its_own(self) -> None:
        plain = {"hero": "Pip", "friend": "Mina", "other": "Dot", "prop": "ball", "place": "the park", "at": "in town"}
        for name, arc in ARCS.items():
            for number, beat in enumerate(arc.beats):
                for way in beat.ways:
                    if "[" in way:
                        continue
                    text = way
                    for slot, word in plain.items():
                        text = text.replace("{" + slot + "}", word)
                    if "{" not in text:
                        assert (name, number) in places_of(text)


class TestTexts:
    def test_where_and_when_are_told_or_carried_over(self) -> None:
        assert expected("They walked on.", "beach", "day") == ("beach", "day")
        assert expected("That night, in the forest, Pip slept.", "beach", "day") == ("forest", "night")
        assert expected("They danced all evening.", "park", "day") == ("park", "day")

    def test_true_descriptions_agree_with_their_stories(self) -> None:
        for seed in range(40):
            story = sample_story(seed, split="test")
            for before, frame in zip(story.frames, story.frames[1:], strict=False):
                place, when = expected(frame.caption, before.scene.setting, before.scene.time)
                assert place == frame.scene.setting, frame.caption
                assert when == frame.scene.time, frame.caption

    def test_a_description_must_parse_and_name_whom_the_caption_names(self) -> None:
        scene = next(
            s for s in (sample_frame(seed).scene for seed in range(200)) if len(s.actors) == 1 and truth(s).characters
        )
        text = describe(scene, random.Random(0))
        name = str(scene.actors[0].character.name)
        assert is_whole(parse(text))
        assert not is_whole(parse("mumble"))
        assert names_agree(text, f"{name} laughed.", set())
        assert not names_agree(text, "Kiri laughed.", set())
        assert not names_agree(text, "She laughed.", set())
        assert names_agree(text, "She laughed.", {name})


class Parrot:
    """A judge that has seen the true pictures."""

    def __init__(self, verdicts: Sequence[Verdict]) -> None:
        self.said = list(verdicts)

    def verdicts(self, pictures: Sequence[Pixels]) -> list[Verdict]:
        return [self.said.pop(0) for _ in pictures]


def told_truly(story: Story) -> Told:
    captions_ = [frame.caption for frame in story.frames]
    return Told(story, captions_, [f.description for f in story.frames], [render(f.scene) for f in story.frames])


class TestStories:
    def test_a_true_story_passes_and_a_repeated_one_does_not(self) -> None:
        stories = [sample_story(seed, split="test") for seed in range(6)]
        judge = Parrot([truth(f.scene) for s in stories for f in s.frames[1:]])
        figures = {f.name: f for f in story_figures([told_truly(s) for s in stories], judge)}  # type: ignore[arg-type]
        assert figures["story_identity"].value == 1.0
        assert figures["story_arc"].value == 1.0
        assert figures["story_agrees"].value == 1.0
        assert figures["story_near_copies"].value == 0.0
        stuck = told_truly(stories[0])
        stuck.captions[1:] = [stuck.captions[0]] * 4
        nobody = Parrot([verdict()] * 4)
        figures = {f.name: f for f in story_figures([stuck], nobody)}  # type: ignore[arg-type]
        assert figures["story_near_copies"].value == 1.0
        assert figures["story_arc"].value == 0.0


def test_the_last_line_is_one_json_object_with_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_tiny_pack(tmp_path / "tiny", captions=False)
    torch.manual_seed(0)
    monkeypatch.setattr(toon, "load_judge", lambda: Judge().eval())
    draw_all = frames.draw_all

    def with_short_texts(model: FrameModel, tasks: Sequence[Task], dials: Dials | None = None) -> list[Pixels]:
        """The tiny pack has a token a letter, so a whole description does not fit its window."""
        short = [
            replace(
                task,
                description=task.description[:30],
                references=tuple(replace(seen, description=seen.description[:30]) for seen in task.references),
            )
            for task in tasks
        ]
        return draw_all(model, short, Dials(steps=1))

    monkeypatch.setattr(frames, "draw_all", with_short_texts)
    sheets = tmp_path / "sheets"
    arguments = ["toon", "--pack", str(tmp_path / "tiny"), "--frames", "8", "--stories", "0", "--threads", "1"]
    monkeypatch.setattr("sys.argv", [*arguments, "--sheets", str(sheets)])
    toon.main()
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    names = {figure["name"] for figure in said["figures"]}
    assert {"vae_psnr_db_known", "vae_look_new", "frame_characters", "frame_action", "crowd_three"} <= names
    assert {"judge_characters", "first_characters", "frame_seconds"} <= names
    assert all({"value", "low", "high", "target", "n", "passed"} <= figure.keys() for figure in said["figures"])
    assert said["seeds"] == 2
    assert next(f["n"] for f in said["figures"] if f["name"] == "frame_setting") == 8
    assert said["not_measured"] == ["texts", "stories"]
    assert said["passed"] is False
    assert (sheets / "frames.png").stat().st_size > 1000


def test_a_report_says_which_pack_it_is_about(tmp_path: Path) -> None:
    pack = build_tiny_pack(tmp_path / "tiny", captions=False)
    said = report(pack, [Figure(name="a", value=1.0, n=1, target=0.5)], 1)
    assert said["digest"] == pack.digest
    assert said["passed"] is True
    assert report(pack, [], 1, ["texts"])["passed"] is False


def test_the_evaluation_guards_texts_as_the_service_does() -> None:
    from services.caption import engine, job

    assert captions.SERVED_TEMPERATURE == job.TEMPERATURE_DEFAULT
    assert captions.NAME_LOCK_TRIES == engine.NAME_LOCK_TRIES
    assert captions.CAPTION_TRIES == engine.CAPTION_TRIES
    assert captions.RETRY_TEMPERATURE == engine.RETRY_TEMPERATURE
