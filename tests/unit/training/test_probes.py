"""Probes of a customization: always the same pictures, scored by who is in them, and no trace of them in training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from services.models.eyes import EyesShape
from services.models.likeness import Parts, Vocabulary
from services.models.lora import Adapter, LowRank, adapted_layers, write_adapter
from services.models.pack import Pack
from services.models.registry import FrameModel, load_frame_model
from services.models.tiny import build_tiny_pack
from services.models.world import World
from training import customize as command
from training.customize import customize, toon_customization
from training.customize_errors import RunStopped
from training.lessons import LessonRecipe
from training.new_story import NewStory, known_stories, world_story
from training.probes import FILE, Drawn, Probe, Prober, ProbeRecipe, Seen, drawn_in, figures_of, probes_of, seen_in

SIZE = 64
WORLD = World(
    characters={"Pip": "an orange cat with a blue scarf", "Mina": "a pink rabbit with a yellow bow"},
    places=("the beach", "the park"),
)
RECIPE = ProbeRecipe(alone=1, old_count=1, steps=2)
OTTO = "a black penguin with orange earmuffs"
PIP = WORLD.characters["Pip"]
VOCABULARY = Vocabulary(
    EyesShape(
        figure={
            "species": ("penguin", "cat", "rabbit", "pig"),
            "colour": ("black", "orange", "pink"),
            "accessory": ("earmuffs", "scarf", "bow", "bow tie"),
            "accessory_colour": ("orange", "blue", "yellow"),
        },
        scene={},
    )
)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return build_tiny_pack(tmp_path_factory.mktemp("pack") / "tiny", captions=False, positions=512, world=WORLD)


@pytest.fixture(scope="module")
def otto() -> NewStory:
    return world_story("otto", SIZE)


@pytest.fixture(scope="module")
def learned(pack: Pack) -> bytes:
    """Weights that change a picture for all to see."""
    model: FrameModel = load_frame_model(pack)
    name, layer = next(iter(adapted_layers(model.denoiser.unet).items()))
    assert isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for name, layer in adapted_layers(model.denoiser.unet).items():
        if isinstance(layer, torch.nn.Linear) and "attn2" in name:
            down = torch.randn(2, layer.in_features, generator=generator)
            factors[name] = LowRank(down, 3.0 * torch.randn(layer.out_features, 2, generator=generator), 2.0)
    adapter = Adapter(digest="", factors=factors, deltas={}, size_bytes=0)
    return write_adapter(adapter, "peft", base_digest=model.base_digest)


def parts(phrase: str) -> Parts:
    return VOCABULARY.parts(phrase)


def test_the_new_one_is_told_by_name_alone_and_the_old_ones_as_a_captioner_tells_them(otto: NewStory) -> None:
    told = {one.name: one for one in probes_of(otto, WORLD, ProbeRecipe(alone=2, old_count=2))}
    assert list(told) == ["alone", "alone#2", "with:Pip", "with:Mina", "old:Pip", "old:Mina"]
    assert told["alone"].description == "At the beach during the day. Otto waves."
    assert told["with:Mina"].description == (
        "At the park during the day. On the left Otto waves. On the right Mina, a pink rabbit with a yellow bow, waves."
    )
    assert otto.name not in told["old:Pip"].description
    assert len({one.seed for one in told.values()}) == len(told)
    assert (told["old:Pip"].new, told["old:Pip"].old, told["alone"].old) == ("", PIP, "")


def test_a_pack_that_knows_nobody_has_probes_of_the_new_one(otto: NewStory) -> None:
    assert [one.description for one in probes_of(otto, World(), ProbeRecipe(alone=1))] == ["Otto waves."]


ALONE = Probe(name="alone", description="", seed=0, new=OTTO)
BOTH = Probe(name="with:Pip", description="", seed=0, new=OTTO, old=PIP)
OLD = Probe(name="old:Pip", description="", seed=0, old=PIP)


@pytest.mark.parametrize(
    ("probe", "figures", "seen"),
    [
        (ALONE, [OTTO], Seen(recognised=1.0, look_alike=0.0)),
        (ALONE, ["a black penguin with a blue scarf"], Seen(recognised=0.5, look_alike=0.0)),
        (ALONE, [], Seen(recognised=0.0, look_alike=0.0)),
        (ALONE, [PIP], Seen(recognised=0.0, look_alike=1.0)),
        (ALONE, ["an orange cat with orange earmuffs"], Seen(recognised=0.5, look_alike=0.0)),
        (ALONE, ["an orange cat with a blue bow"], Seen(recognised=0.0, look_alike=1.0)),
        (BOTH, [PIP, OTTO], Seen(recognised=1.0, look_alike=0.0, kept=1.0)),
        (BOTH, [PIP, PIP], Seen(recognised=0.0, look_alike=1.0, kept=1.0)),
        (BOTH, [PIP], Seen(recognised=0.0, look_alike=0.0, kept=1.0)),
        (BOTH, [OTTO], Seen(recognised=1.0, look_alike=0.0, kept=0.0)),
        (OLD, [PIP], Seen(kept=1.0)),
        (OLD, [OTTO], Seen(kept=0.0)),
        (OLD, ["an orange cat with a yellow scarf", OTTO], Seen(kept=0.75)),
        (replace(ALONE, new="a mauve robot"), [PIP], Seen()),
        (replace(BOTH, new="a mauve robot"), [PIP], Seen(kept=1.0)),
    ],
)
def test_figures_are_compared_with_those_who_should_be_there(probe: Probe, figures: list[str], seen: Seen) -> None:
    cast = list(WORLD.characters.values())
    assert seen_in(probe, [parts(one) for one in figures], VOCABULARY, cast) == seen
    assert seen_in(probe, [parts(one) for one in reversed(figures)], VOCABULARY, cast) == seen


def test_a_figure_is_the_mean_over_the_probes_that_are_about_it() -> None:
    seen = [Seen(recognised=1.0, look_alike=0.0), Seen(recognised=0.5, look_alike=1.0, kept=0.5), Seen(kept=1.0)]
    assert figures_of(seen) == {"recognised": 0.75, "look_alike": 0.5, "kept": 0.75}
    assert figures_of([Seen()]) == {}


def test_a_step_has_the_same_pictures_whenever_it_is_drawn(
    pack: Pack, otto: NewStory, learned: bytes, tmp_path: Path
) -> None:
    first = Prober(pack, otto, RECIPE)
    first.draw(0, None, tmp_path / "one")
    first.draw(10, learned, tmp_path / "one")
    torch.manual_seed(99)
    Prober(pack, otto, RECIPE).draw(10, learned, tmp_path / "two")  # begins here, as after a crash
    one, two = drawn_in(tmp_path / "one"), drawn_in(tmp_path / "two")
    assert [(drawn.step, drawn.probe) for drawn in one] == [
        (step, probe) for step in (0, 10) for probe in ("alone", "with:Pip", "old:Pip")
    ]
    assert one[3:] == two
    for before, after in zip(one[:3], one[3:], strict=True):
        assert before.seed == after.seed
        assert before.sha256 != after.sha256
        with Image.open(tmp_path / "one" / after.file) as picture:
            assert (picture.format, picture.size) == ("PNG", (SIZE, SIZE))


def test_a_step_that_is_drawn_is_not_drawn_again_but_told_again(
    pack: Pack, otto: NewStory, learned: bytes, tmp_path: Path
) -> None:
    prober = Prober(pack, otto, RECIPE)
    told: list[Drawn] = []
    prober.draw(5, learned, tmp_path, told.append)
    assert told == drawn_in(tmp_path)

    def never() -> bool:
        raise AssertionError("it is drawn again")

    prober.draw(5, learned, tmp_path, told.append, stop=never)
    assert told[:3] == told[3:]
    # Killed between pictures and lines, or while a picture was written: as if nothing had been there.
    (tmp_path / told[0].file).unlink()
    assert drawn_in(tmp_path) == []
    prober.draw(5, learned, tmp_path)
    assert drawn_in(tmp_path) == told[:3]
    (tmp_path / FILE).write_text('{"step": 5, "pro')
    assert drawn_in(tmp_path) == []


def test_a_stop_leaves_nothing_of_the_step(pack: Pack, otto: NewStory, learned: bytes, tmp_path: Path) -> None:
    asked = iter([False, True])
    with pytest.raises(RunStopped):
        Prober(pack, otto, RECIPE).draw(5, learned, tmp_path, stop=lambda: next(asked))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["epicevo", "dreambooth", "textual-inversion"])
def test_probes_leave_no_trace_in_training(pack: Pack, otto: NewStory, method: str, tmp_path: Path) -> None:
    recipe = replace(toon_customization(method), steps=3, lessons=LessonRecipe(existing_stories=1))
    known = known_stories(1, SIZE)

    def trained(folder: str, keep: Callable[[int, command.Artefact], None]) -> bytes:
        quiet: Callable[[str], None] = lambda line: None  # noqa: E731
        run = customize(pack, otto, known, recipe, tmp_path / folder, say=quiet, snapshot_steps=(1, 2), keep=keep)
        return run.payload

    plain = trained("plain", lambda step, artefact: None)
    prober = Prober(pack, otto, RECIPE)
    torch.manual_seed(5)
    state = torch.get_rng_state()

    def drawing(step: int, artefact: command.Artefact) -> None:
        before = torch.get_rng_state()
        prober.draw(step, artefact.payload, tmp_path / "probes")
        assert torch.equal(torch.get_rng_state(), before)

    prober.draw(0, None, tmp_path / "probes")
    assert torch.equal(torch.get_rng_state(), state)
    assert trained("probed", drawing) == plain
    assert {one.step for one in drawn_in(tmp_path / "probes")} == {0, 1, 2}


def test_a_run_is_told_to_draw_probes(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["customize", "--pack", str(pack.folder), "--world-character", "otto", "--method", "lora", "--steps", "2"]
    words += ["--folder", str(tmp_path / "run"), "--out", str(tmp_path / "otto.safetensors"), "--snapshots", "2"]
    monkeypatch.setattr(sys, "argv", [*words, "--probes", "--progress", str(tmp_path / "progress.jsonl")])
    monkeypatch.setattr(command, "Prober", lambda pack, story: SeeingProber(pack, story, RECIPE))
    monkeypatch.setattr(command, "toon_customization", lambda method, learns: _short(method))
    command.main()
    told = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    kinds = [(one["event"], one.get("step")) for one in told if one["event"] in ("probe", "probed", "snapshot")]
    first = [*[("probe", 0)] * 3, ("probed", 0), *[("probe", 1)] * 3, ("snapshot", 1)]
    assert kinds == [*first, *[("probe", 2)] * 3, ("snapshot", 2)]
    (before,) = (one["figures"] for one in told if one["event"] == "probed")
    assert before == {"recognised": 0.0, "look_alike": 0.0, "kept": 1.0}, "no card says what there was to forget"
    for one in told:
        if one["event"] == "probe":
            assert Path(one["file"]).is_file()
            assert {"probe", "description"} <= one.keys()
    figures = json.loads((tmp_path / "otto.json").read_text())["figures"]
    assert (figures["recognised"], figures["kept"]) == (1.0, 0.5)
    assert "mse_new" in figures
    capsys.readouterr()


class SeeingProber(Prober):
    """The tiny pack has no eyes; these see the old cast well before anything is learned, and less of them after."""

    def draw(self, step: int, payload: bytes | None, *others: Any) -> dict[str, float]:
        assert super().draw(step, payload, *others) == {}
        after = payload is not None
        return {"recognised": float(after), "look_alike": 0.0, "kept": 0.5 if after else 1.0}


def _short(method: str) -> command.CustomizationRecipe:
    return replace(toon_customization(method), lessons=LessonRecipe(existing_stories=1))
