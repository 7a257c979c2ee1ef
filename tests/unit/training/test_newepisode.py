"""The NewEpisode benchmark: nobody new was pretrained on, nothing tested was taught, and tables say what cells hold."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.models.epicevo import EpicEvoWeights
from services.models.pack import Pack
from services.models.tiny import build_tiny_pack
from training.customize import toon_customization
from training.customize_errors import FramesSeen, RecipeInvalid, RunMismatch
from training.evaluation import newepisode
from training.evaluation.newepisode import (
    BUDGETS,
    METHODS,
    PAPER,
    PRETRAINED,
    TABLE_2,
    TABLE_3,
    Budget,
    Cell,
    cells,
    figures_of,
    finished,
    frechet,
    known_windows,
    markdown,
    old_clips,
    recipe_of,
    recipe_of_cell,
    run,
    settings_of,
    split_of,
    write_cell,
)
from training.methods.dreambooth import DreamBoothRecipe
from training.methods.epicevo import EpicEvoRecipe
from training.methods.lora import LoraRecipe
from training.methods.method import EXISTING, NEW, reconstruction
from training.new_story import Called, check_wall
from training.newepisode.split import ALL, STRICT
from training.newepisode.toon import (
    CASTS,
    FURTHER,
    HARBOUR,
    MEADOW,
    check_pretraining,
    known_stories_of,
    new_story,
    story_frame,
)
from training.pictures import ShelfRecipe
from training.recipes import toon_frame
from training.toon.grammar import describe_plainly

TINY = Budget(episodes=2, tests_max={"meadow": 1, "harbour": 1}, steps_per_character=1, old_frames=4, seeds=1)


# --- who is new


def test_there_are_nine_and_six_as_in_the_paper_and_old_casts_are_apart() -> None:
    assert [len(cast.new) for cast in CASTS.values()] == [9, 6]
    everybody = [one.id for cast in CASTS.values() for one in (*cast.new, *cast.old)]
    assert len(set(everybody)) == len(everybody)


def test_the_frame_models_own_recipe_never_shows_anybody_new() -> None:
    recipe = toon_frame()
    few = [replace(shelf, count=min(shelf.count, 300)) for shelf in (*recipe.singles, *recipe.stories)]
    assert check_pretraining([*MEADOW.new, *HARBOUR.new], few) == 300 * (1 + 1 + 5 + 5)


def test_a_frame_that_shows_somebody_new_is_named() -> None:
    shown = ShelfRecipe(split="new", breadth="scene", count=3)
    with pytest.raises(FramesSeen, match=r"scene:new:0:0, which the frame model was trained on, shows "):
        check_pretraining(MEADOW.new, [shown])
    stranger = ShelfRecipe(split="train", breadth="looks", count=1)
    (scene,) = stranger.scenes(stranger.seeds)
    alike = replace(FURTHER[0], look=scene.actors[0].character.look)
    with pytest.raises(FramesSeen, match=r"looks:train:0:0, .* shows Lotte"):
        check_pretraining([alike], [stranger])


# --- splits


@pytest.mark.parametrize("cast", list(CASTS.values()), ids=list(CASTS))
def test_one_story_each_to_learn_and_every_other_to_test(cast: Any) -> None:
    budget = replace(TINY, tests_max={"meadow": None, "harbour": 100})
    split = split_of(cast, budget)
    assert set(split.lessons) == set(split.tests) == {one.id for one in cast.new}
    for one in cast.new:
        lesson = split.lessons[one.id]
        assert all(one.id in split.corpus.clips[clip].new for clip in lesson.clips)
        assert lesson.id not in {window.id for window in split.tests[one.id]}
        assert len(split.tests[one.id]) == len(split.corpus.showing(one.id)) - 1
        shared = [window for window in split.tests[one.id] if set(window.clips) & set(lesson.clips)]
        assert shared  # windows overlap, as the published ones do
        for window in shared:
            whole, strict = (split.measured(one.id, window, variant) for variant in (ALL, STRICT))
            assert [clip for clip in whole if clip not in split.taught] == list(strict)
            assert len(strict) < len(whole)
        strict = {clip for window in split.tests[one.id] for clip in split.measured(one.id, window, STRICT)}
        assert strict
        assert not strict & split.taught


@pytest.mark.parametrize("cast", list(CASTS.values()), ids=list(CASTS))
def test_what_forgetting_is_measured_on_is_not_learned_from(cast: Any) -> None:
    split = split_of(cast, TINY)
    known = known_windows(cast, split, 0)
    assert len(known) == 5 * len(cast.new)
    assert known != known_windows(cast, split, 1)
    learned = {clip for window in known for clip in window.clips}
    measured = old_clips(split, 32)
    assert len(measured) == 32
    assert not learned & set(measured)
    new_ids = {one.id for one in cast.new}
    for clip in (*learned, *measured):
        assert not {actor.character.id for actor in story_frame(cast, clip).scene.actors} & new_ids


def test_a_run_keeps_to_its_side_of_the_wall() -> None:
    split = split_of(HARBOUR, TINY)
    lessons = [new_story(HARBOUR, one.id, split.lessons[one.id], 32) for one in HARBOUR.new]
    check_wall(lessons, known_stories_of(HARBOUR, known_windows(HARBOUR, split, 0)[:4], 32))
    assert [one.name for one in lessons] == ["Zora", "Lotte", "Tuli", "Wanda", "Vito", "Rufus"]
    assert lessons[1].phrase == "a white frog with a red flower"


def test_a_clip_is_the_same_every_time_and_of_one_cast() -> None:
    split = split_of(HARBOUR, TINY)
    clip = split.lessons["zora"].clips[0]
    assert story_frame(HARBOUR, clip) == story_frame(HARBOUR, clip)
    with pytest.raises(ValueError, match="no clip of meadow"):
        story_frame(MEADOW, clip)


def test_by_name_a_description_does_not_tell_the_look() -> None:
    split = split_of(HARBOUR, TINY)
    for one, story in ((who, new_story(HARBOUR, who.id, split.lessons[who.id], 32)) for who in HARBOUR.new):
        for clip in split.lessons[one.id].clips:
            told = newepisode.described(story_frame(HARBOUR, clip).scene, story.called)
            assert str(one.name) in told
            assert f"{one.look.colour} {one.look.species}" not in told


# --- methods


def test_every_method_of_the_papers_tables_has_a_recipe() -> None:
    for method in METHODS:
        if method != PRETRAINED:
            assert recipe_of(MEADOW, method, 7, 3).steps == 7
    with pytest.raises(RecipeInvalid):
        recipe_of(MEADOW, "magic", 7, 3)


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("epicevo-mse", (0.0, 0.0)),
        ("epicevo-mse-distil", (0.0, 0.5)),
        ("epicevo", (0.75, 0.5)),
    ],
)
def test_the_ablation_leaves_out_one_loss_after_the_other(method: str, weights: tuple[float, float]) -> None:
    recipe = recipe_of(MEADOW, method, 7, 0).method
    assert isinstance(recipe, EpicEvoRecipe)
    assert recipe.weights == EpicEvoWeights(adversarial=weights[0], distillation=weights[1])
    assert recipe.learns == "unet"


def test_beside_the_papers_rows_stands_what_the_product_teaches_by_default() -> None:
    assert recipe_of(MEADOW, "epicevo-lora", 7, 0).method == toon_customization("epicevo").method
    assert recipe_of(MEADOW, "lora-phrase", 7, 0).method == toon_customization("lora").method
    plain = recipe_of(MEADOW, "lora", 7, 0).method
    assert isinstance(plain, LoraRecipe)
    assert plain.word_rate == 0.0  # the paper's row has no word


def test_the_papers_dreambooth_is_not_the_first_row_of_its_ablation() -> None:
    """The same UNet at the same rate on the same batches: what they are asked for is what tells them apart."""
    dreambooth, mse = (recipe_of(HARBOUR, method, 7, 0).method for method in ("dreambooth", "epicevo-mse"))
    assert isinstance(dreambooth, DreamBoothRecipe)
    assert isinstance(mse, EpicEvoRecipe)
    assert (dreambooth.existing_weight, dreambooth.prior_weight) == (0.0, 0.0)
    assert mse.existing_weight == 1.0
    errors_B, kinds_B = torch.tensor([2.0, 3.0]), torch.tensor([NEW, EXISTING])
    totals = [float(reconstruction(errors_B, kinds_B, one.existing_weight)["mse"]) for one in (dreambooth, mse)]
    assert totals == [2.0, 5.0]


def test_cells_come_seed_by_seed() -> None:
    todo = cells(["meadow", "harbour"], ["lora", "epicevo"], "name", 3)
    assert [cell.seed for cell in todo] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({cell.name for cell in todo}) == 12
    assert all(budget.seeds >= 3 for name, budget in BUDGETS.items() if name != "minutes")


# --- figures


def test_frechets_distance_of_diagonal_normals_is_as_by_hand() -> None:
    rows = np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])  # variances 2/3 each, uncorrelated
    assert frechet(rows, rows) == pytest.approx(0.0, abs=1e-9)
    assert frechet(rows, rows + np.array([3.0, 4.0])) == pytest.approx(25.0)
    expected = 2 * (np.sqrt(2 / 3) - 2 * np.sqrt(2 / 3)) ** 2  # twice as wide, along both
    assert frechet(rows, 2 * rows) == pytest.approx(expected)


def test_frechets_distance_holds_with_fewer_rows_than_numbers() -> None:
    noise = np.random.default_rng(0)
    first, second = noise.normal(size=(5, 64)), noise.normal(size=(6, 64)) + 1.0
    assert frechet(first, second) == pytest.approx(frechet(second, first))
    assert frechet(first, second) > 50.0
    assert frechet(first, first) == pytest.approx(0.0, abs=1e-3)  # against more than 50


def row(fid: float, right: list[bool]) -> dict[str, Any]:
    """A character's measurements."""
    one = {"n": 4, "fid": fid, "clip_i": 0.8, "clip_i_matched": 0.9, "clip_t": 0.3, "recognised": right}
    return {ALL: one, STRICT: {"n": 1}}


def document(method: str, seed: int, fids: tuple[float, float], right: list[bool], old: list[bool]) -> dict[str, Any]:
    cell = Cell(cast="harbour", method=method, wording="name", seed=seed)
    return {
        "cell": {"cast": cell.cast, "method": method, "wording": "name", "seed": seed},
        "settings": "s",
        "characters": {"zora": row(fids[0], right), "further-vito": row(fids[1], right)},
        "old": old,
    }


def test_a_row_is_over_characters_and_seeds_and_forgetting_is_frame_by_frame() -> None:
    documents = [
        document(PRETRAINED, 0, (9.0, 9.0), [False, False], [True, True, True, False]),
        document("epicevo", 0, (1.0, 2.0), [True, False], [True, True, False, False]),
        document("epicevo", 1, (3.0, 4.0), [True, True], [False, False, False, False]),
    ]
    done = {Cell(**one["cell"]).name: one for one in documents}
    figures = figures_of(done, "harbour", "epicevo", "name", ALL)
    assert (figures["fid"].value, figures["fid"].n) == (2.5, 4)
    assert (figures["recognised"].value, figures["recognised"].n) == (0.75, 8)
    # Seed 1 has no pack without weights to compare with, so it says nothing about forgetting.
    assert (figures["old_drop"].value, figures["old_drop"].n) == (0.25, 4)
    assert figures_of(done, "harbour", "lora", "name", ALL) == {}
    assert figures_of(done, "harbour", "epicevo", "name", STRICT)["fid"].n == 0  # too few frames for a covariance


def test_tables_stand_beside_the_papers_numbers() -> None:
    documents = [document(method, 0, (1.0, 2.0), [True], [True]) for method in (PRETRAINED, "lora", "epicevo")]
    text = markdown({Cell(**one["cell"]).name: one for one in documents}, "name", ["harbour"])
    assert "Table 2: methods: harbour (in the place of Pororo), all, told by name" in text
    assert "Table 3: losses: harbour" in text
    (epicevo, *_) = [line for line in text.splitlines() if line.startswith("| epicevo |")]
    assert [cell.strip() for cell in epicevo.split("|")][3:8:2] == ["130.40", "0.7954", "0.2551"]
    (lora, *_) = [line for line in text.splitlines() if line.startswith("| lora |")]
    assert [cell.strip() for cell in lora.split("|")][3:8:2] == ["—", "—", "—"]
    assert not any(line.startswith("| dreambooth") for line in text.splitlines())  # not run, so not told
    assert set(PAPER["meadow"]) == set(PAPER["harbour"]) == set(TABLE_3)
    assert TABLE_2[0] == PRETRAINED
    (above, *_) = text.split("| method |")
    assert "no rare token, and no word table is trained" in above


def test_each_character_has_a_line_for_each_method_with_its_own_figures() -> None:
    documents = [
        document(PRETRAINED, 0, (9.0, 8.0), [False, False], [True]),
        document("epicevo", 0, (1.0, 2.0), [True, False], [True]),
        document("epicevo", 1, (3.0, 4.0), [True, True], [True]),
    ]
    text = markdown({Cell(**one["cell"]).name: one for one in documents}, "name", ["harbour"])
    whole, strict = (
        text.split(f"### Characters: harbour (in the place of Pororo), {variant}, told by name\n")[1].split("###")[0]
        for variant in (ALL, STRICT)
    )
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in whole.splitlines() if line.startswith("| ")]
    assert lines[0] == ["character", "method", "N", "FID ↓", "CLIP-I ↑", "CLIP-T ↑", "recognised ↑"]
    assert [line[:3] for line in lines[2:]] == [
        ["Zora", "pretrained", "4"],
        ["Zora", "epicevo", "4 + 4"],
        ["Vito", "pretrained", "4"],
        ["Vito", "epicevo", "4 + 4"],
    ]
    assert lines[2][3:6] == ["9.00", "0.8000", "0.3000"]  # of one seed there is no interval
    assert [line[3].split(" ")[0] for line in lines[3:]] == ["2.00", "8.00", "3.00"]
    assert lines[3][6].startswith("0.750 (")
    assert "| Zora | epicevo | 1 + 1 | too few | too few | too few | too few |" in strict


# --- runs


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return build_tiny_pack(tmp_path_factory.mktemp("pack") / "tiny", captions=False, positions=512)


def test_what_is_done_is_not_done_again_and_what_is_missing_is_gone_on_with(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run_cell(pack: Pack, cell: Cell, budget: Budget, out: Path, eye: object, say: Any) -> dict[str, Any]:
        ran.append(cell.name)
        told = document(cell.method, cell.seed, (1.0, 2.0), [True], [True])
        return {**told, **kept_with(pack, cell, budget), "elapsed_s": 1.0}

    monkeypatch.setattr(newepisode, "run_cell", run_cell)
    monkeypatch.setattr(newepisode, "Eye", lambda pack: object())
    monkeypatch.setattr(newepisode, "check_pretraining", lambda new, shelves: 0)
    todo = cells(["harbour"], [PRETRAINED, "lora", "epicevo"], "name", 1)
    limits = iter([False, True])
    said: list[str] = []
    first = run(pack, todo, TINY, tmp_path, said.append, lambda: next(limits))
    assert list(first) == ran == [todo[0].name]
    assert said[-1].startswith("enough for now")
    (tmp_path / "cells" / "half.json.7.part").write_text("{", encoding="utf-8")  # of a run that was killed
    assert len(run(pack, todo, TINY, tmp_path, said.append)) == 3
    assert ran == [cell.name for cell in todo]
    with pytest.raises(RunMismatch, match="another pack or budget"):
        run(pack, todo, replace(TINY, steps_per_character=2), tmp_path, said.append)


def kept_with(pack: Pack, cell: Cell, budget: Budget) -> dict[str, Any]:
    """What a cell says of how it was made."""
    recipe = recipe_of_cell(cell, budget)
    told = {} if recipe is None else json.loads(json.dumps(recipe.to_dict()))
    return {"format": newepisode._FORMAT, "settings": settings_of(pack, budget), "recipe": told}


@pytest.mark.parametrize(
    ("method", "changed", "told"),
    [
        ("lora", {"rate": 1.0}, "method.rate"),
        ("lora", {"named_share": 0.25, "rank": 2}, "method.named_share, method.rank"),
        ("epicevo", {"weights": {"adversarial": 0.5, "distillation": 0.25}}, "method.weights.adversarial"),
    ],
)
def test_a_cell_of_an_older_recipe_is_refused_and_named(
    pack: Pack, tmp_path: Path, method: str, changed: dict[str, Any], told: str
) -> None:
    """Half a table by one rate and half by another would be a table of neither."""
    cell = Cell(cast="harbour", method=method, wording="name", seed=0)
    kept = {**document(method, 0, (1.0, 2.0), [True], [True]), **kept_with(pack, cell, TINY)}
    write_cell(tmp_path, cell.name, {**kept, "recipe": {**kept["recipe"], "save_every_s": 1.0}})
    assert set(finished(tmp_path, pack, TINY)) == {cell.name}  # how often a run is saved changes nothing of it
    older = {**kept["recipe"], "method": {**kept["recipe"]["method"], **changed}}
    write_cell(tmp_path, cell.name, {**kept, "recipe": older})
    with pytest.raises(RunMismatch, match=re.escape(told)) as refused:
        run(pack, [cell], TINY, tmp_path, lambda line: None)
    assert f"{cell.name}.json was taught by another recipe than {method} has now" in str(refused.value)
    assert f"choose another --out, or remove it and {tmp_path / 'runs' / cell.name}" in str(refused.value)


@pytest.mark.parametrize(
    ("instead", "told"),
    [
        ({"format": 1}, "another format"),
        ({"settings": "0" * 16}, "another pack or budget"),
        ({"cell": {"cast": "harbour", "method": "magic", "wording": "name", "seed": 0}}, "method that is none"),
    ],
)
def test_a_cell_of_another_kind_is_refused(pack: Pack, tmp_path: Path, instead: dict[str, Any], told: str) -> None:
    cell = Cell(cast="harbour", method=PRETRAINED, wording="name", seed=0)
    kept = {**document(PRETRAINED, 0, (1.0, 2.0), [True], [True]), **kept_with(pack, cell, TINY)}
    write_cell(tmp_path, cell.name, {**kept, **instead})
    with pytest.raises(RunMismatch, match=told):
        finished(tmp_path, pack, TINY)
    old = {key: value for key, value in kept.items() if key not in ("format", "recipe")}
    write_cell(tmp_path, cell.name, old)
    with pytest.raises(RunMismatch, match="another format"):
        finished(tmp_path, pack, TINY)


def test_a_cell_trains_draws_and_measures(pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the pack's CLIP, which tiny packs have none of."""

    class Blind(newepisode.Eye):
        def __init__(self, pack: Pack) -> None:
            self.judge = newepisode.load_judge()

        def pictures(self, pictures: Any) -> Any:
            return np.ones((len(pictures), 2)) / np.sqrt(2)

        def texts(self, texts: Any) -> Any:
            return np.ones((len(texts), 2)) / np.sqrt(2)

    few = replace(HARBOUR, new=HARBOUR.new[:2])
    monkeypatch.setitem(CASTS, "harbour", few)
    cell = Cell(cast="harbour", method="textual-inversion", wording="name", seed=0)
    said: list[str] = []
    told = newepisode.run_cell(pack, cell, TINY, tmp_path, Blind(pack), said.append)
    assert set(told["characters"]) == {"zora", "further-lotte"}
    for one in told["characters"].values():
        assert one[ALL]["n"] >= one[STRICT]["n"]
        assert one[ALL]["clip_i"] == pytest.approx(1.0)
        assert one[ALL]["fid"] > 0.0
        assert len(one[ALL]["recognised"]) == one[ALL]["n"]
    assert told["losses"]["mse_new"]
    assert (tmp_path / "runs" / cell.name / "weights.safetensors").is_file()
    write_cell(tmp_path, cell.name, told)
    assert json.dumps(finished(tmp_path, pack, TINY)[cell.name]) == json.dumps(told)
    card = json.loads((tmp_path / "runs" / cell.name / "weights.json").read_text(encoding="utf-8"))
    assert told["recipe"] == card["recipe"]


def test_called_is_how_a_registry_tells_it() -> None:
    for cast in CASTS.values():
        for one, who in zip(cast.registry.characters, cast.new, strict=True):
            called = Called(name=str(who.name), phrase=one.phrase, noun=one.noun)
            assert called.is_told_in(f"{one.phrase} runs.".capitalize())
    scene = story_frame(HARBOUR, split_of(HARBOUR, TINY).lessons["zora"].clips[0]).scene
    assert "teal squirrel" in describe_plainly(scene)
