"""Studies turn one dial at a time."""

from __future__ import annotations

from collections.abc import Sequence

from services.models.drawing import Pixels
from training.evaluation.figures import share
from training.evaluation.studies import rows, told_figures
from training.toon.world import sample_story


class Reader:
    """A captioner that knows the true story and remembers how it was asked."""

    def __init__(self, repeat: bool) -> None:
        self.stories = [sample_story(seed, split="test") for seed in (0, 1)]
        self.repeat = repeat
        self.lengths: list[int] = []
        self.beat = 0

    def next_captions(
        self, histories: Sequence[Sequence[str]], images: Sequence[Pixels], *, temperature: float, guarded: bool
    ) -> list[str]:
        self.lengths += [len(captions) for captions in histories]
        self.beat += 1
        beat = 0 if self.repeat else self.beat
        return [story.frames[beat].caption for story in self.stories]

    def descriptions(
        self,
        histories: Sequence[Sequence[str]],
        images: Sequence[Pixels],
        described: Sequence[Sequence[str]],
        *,
        temperature: float,
        guarded: bool,
    ) -> list[str]:
        assert {len(texts) for texts in described} == {self.beat - 1}
        return [story.frames[self.beat].description for story in self.stories]


def test_a_history_is_cut_to_what_is_studied() -> None:
    for history, expected in ((None, [1, 1, 2, 2, 3, 3, 4, 4]), (1, [1] * 8), (2, [1, 1, 2, 2, 2, 2, 2, 2])):
        reader = Reader(repeat=False)
        told_figures(reader, reader.stories, temperature=0.2, history=history, guarded=True)  # type: ignore[arg-type]
        assert reader.lengths == expected


def test_a_true_story_is_coherent_and_a_repeated_one_is_not() -> None:
    found = []
    for repeat in (False, True):
        reader = Reader(repeat)
        figures = told_figures(reader, reader.stories, temperature=0.2, guarded=True)  # type: ignore[arg-type]
        found.append({figure.name: figure.value for figure in figures})
    assert found[0]["copies"] == 0.0
    assert found[0]["arc"] == 1.0
    assert found[0]["names agree"] == 1.0
    assert found[1]["copies"] == 1.0
    assert found[1]["arc"] == 0.0


def test_a_study_is_a_table() -> None:
    text = rows("steps", [("4", [share("a", [True, False])]), ("8", [share("a", [True, True])])])
    assert text.splitlines()[:4] == ["| steps | a |", "| --- | --- |", "| 4 | 0.500 |", "| 8 | 1.000 |"]
