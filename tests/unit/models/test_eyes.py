"""A pack's eyes: what they say of a picture, and whom it is believed of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.models.eyes import (
    CONFIG_FILE,
    FOLDER,
    LOOK,
    WEIGHTS_FILE,
    Eyes,
    EyesShape,
    Figure,
    load_eyes,
    new_looks,
    save_eyes,
)

SHAPE = EyesShape(
    figure={
        "species": ("duck", "elephant"),
        "colour": ("red", "orange"),
        "accessory": ("top hat", "glasses"),
        "accessory_colour": ("teal", "blue"),
    },
    scene={"time": ("day", "night")},
    plural=("glasses",),
)


def figure(*look: str, sureness: float = 1.0) -> Figure:
    return Figure(answers=dict(zip(LOOK, look, strict=True)), sureness=dict.fromkeys(LOOK, sureness))


DUCK = figure("duck", "red", "top hat", "teal")
ELEPHANT = figure("elephant", "orange", "glasses", "blue")


@pytest.fixture
def eyes() -> Eyes:
    torch.manual_seed(0)
    return Eyes(SHAPE).eval()


def test_a_look_is_said_in_the_worlds_words(eyes: Eyes) -> None:
    assert eyes.phrase(DUCK) == "a red duck with a teal top hat"
    assert eyes.phrase(ELEPHANT) == "an orange elephant with blue glasses"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_there_are_as_many_figures_as_are_counted(eyes: Eyes, count: int) -> None:
    with torch.no_grad():
        eyes.count.weight.zero_()
        eyes.count.bias.copy_(20.0 * torch.nn.functional.one_hot(torch.tensor(count - 1), 3).float())
    for size in ((128, 128), (40, 90)):
        figures = eyes.figures(np.full((*size, 3), 128, np.uint8))
        assert len(figures) == count
        for one in figures:
            assert all(one.answers[name] in words for name, words in SHAPE.figure.items())
            assert 1 / 16 <= one.look_sureness <= 1.0  # two words a question: the better one has half at least


def test_how_many_there_are_must_be_sure_too(eyes: Eyes) -> None:
    picture = np.full((128, 128, 3), 128, np.uint8)
    with torch.no_grad():
        eyes.count.weight.zero_()
        eyes.count.bias.copy_(torch.tensor([20.0, 0.0, 0.0]))
        (sure,) = eyes.figures(picture)
        eyes.count.bias.copy_(torch.tensor([0.1, 0.0, 0.0]))
        (unsure,) = eyes.figures(picture)
    assert sure.answers == unsure.answers
    assert unsure.look_sureness < 0.05 * sure.look_sureness


def test_a_place_is_told_only_when_it_is_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    eyes = Eyes(replace(SHAPE, scene={"setting": ("park", "beach")})).eval()
    seen: list[tuple[int, ...]] = []

    def answer(logits: list[float]) -> None:
        def forward(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            seen.append(tuple(pixels.shape))
            return {"setting": torch.tensor([logits])}

        monkeypatch.setattr(eyes, "forward", forward)

    for logits, place in (([0.0, 9.0], "beach"), ([9.0, 0.0], "park"), ([1.0, 0.0], None)):
        answer(logits)
        assert eyes.place(np.full((40, 90, 3), 128, np.uint8)) == place
    assert set(seen) == {(1, 3, 128, 128)}


def test_eyes_that_are_not_asked_for_places_tell_none(eyes: Eyes) -> None:
    assert eyes.place(np.zeros((128, 128, 3), np.uint8)) is None


def test_only_a_clear_case_gives_somebody_a_look(eyes: Eyes) -> None:
    known = ["an orange elephant with blue glasses"]
    look = {"Tessa": "a red duck with a teal top hat"}
    assert new_looks(["Tessa"], [], [DUCK], eyes.phrase) == look
    assert new_looks(["Tessa"], known, [ELEPHANT, DUCK], eyes.phrase) == look
    misread = figure("elephant", "orange", "top hat", "blue")
    assert new_looks(["Tessa"], known, [DUCK, misread], eyes.phrase) == look, "three of four parts are his"
    assert new_looks(["Tessa"], known, [ELEPHANT], eyes.phrase) == {}
    assert new_looks(["Tessa"], [], [DUCK, ELEPHANT], eyes.phrase) == {}
    assert new_looks(["Tessa", "Zed"], [], [DUCK], eyes.phrase) == {}
    assert new_looks(["Tessa"], [], [figure("duck", "red", "top hat", "teal", sureness=0.8)], eyes.phrase) == {}
    assert new_looks(["Tessa"], [], [], eyes.phrase) == {}


def test_they_come_back_as_they_were_saved(eyes: Eyes, tmp_path: Path) -> None:
    assert load_eyes(tmp_path) is None
    save_eyes(eyes, tmp_path / FOLDER)
    again = load_eyes(tmp_path)
    assert again is not None
    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    for before, after in zip(eyes.figures(picture), again.figures(picture), strict=True):
        assert before.answers == after.answers
        assert after.look_sureness == pytest.approx(before.look_sureness, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"figure": {"species": ["duck"]}}, "not asked for colour, accessory, accessory_colour"),
        ({"nose": 1}, "nose"),
        ({"figures_max": 2}, "eyes of"),  # weights for three
    ],
)
def test_what_cannot_be_used_is_named(eyes: Eyes, tmp_path: Path, change: dict[str, object], message: str) -> None:
    save_eyes(eyes, tmp_path / FOLDER)
    file = tmp_path / FOLDER / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_eyes(tmp_path)


def test_the_same_words_in_another_order_are_somebody_else(eyes: Eyes) -> None:
    shape = EyesShape(**{**SHAPE.to_dict(), "figure": {**SHAPE.figure, "accessory_colour": ("teal", "blue", "red")}})
    phrase = Eyes(shape).phrase
    mine, other = figure("duck", "red", "top hat", "teal"), figure("duck", "teal", "top hat", "red")
    told = "a red duck with a teal top hat"
    assert new_looks(["Tessa"], [told], [other, mine], phrase) == {"Tessa": "a teal duck with a red top hat"}
    assert new_looks(["Tessa"], [told], [mine, mine], phrase) == {}, "which of the two is known?"


@pytest.mark.parametrize("document", ["[]", '{"figure": [], "scene": {}}', "no JSON"])
def test_whatever_is_wrong_with_a_file_is_one_kind_of_error(eyes: Eyes, tmp_path: Path, document: str) -> None:
    save_eyes(eyes, tmp_path / FOLDER)
    (tmp_path / FOLDER / CONFIG_FILE).write_text(document)
    with pytest.raises(ValueError, match=r"eyes|Expecting"):
        load_eyes(tmp_path)
    save_eyes(eyes, tmp_path / FOLDER)
    (tmp_path / FOLDER / WEIGHTS_FILE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be used"):
        load_eyes(tmp_path)
