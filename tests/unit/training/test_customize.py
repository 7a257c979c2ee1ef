"""Teaching a tiny pack somebody new: every method learns, is interrupted without a trace, is read as served."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from services.models.epicevo import EpicEvoWeights
from services.models.lora import read_adapter, read_adapter_file
from services.models.pack import Pack
from services.models.registry import FrameModel, load_frame_model
from services.models.text_encoder import TextEncoder
from services.models.tiny import build_tiny_pack
from training.customize import (
    CHECKPOINT,
    CustomizationRecipe,
    Parts,
    card_path,
    customization,
    customize,
    seconds_a_step,
    toon_customization,
    write_artefact,
)
from training.customize_errors import FramesSeen, LossNotFinite, RecipeInvalid, RunMismatch, StoryInvalid
from training.lessons import LessonRecipe, Lessons
from training.loop import step_generator
from training.methods.dreambooth import DreamBoothRecipe
from training.methods.epicevo import EpicEvoRecipe
from training.methods.lora import LoraRecipe
from training.methods.method import EXISTING, NEW, TOTAL
from training.methods.registry import METHODS, MethodRecipe
from training.methods.textual_inversion import TextualInversionRecipe
from training.new_story import KnownStory, NewStory, known_stories, world_story
from training.storage import load_checkpoint

SIZE = 64


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return build_tiny_pack(tmp_path_factory.mktemp("pack") / "tiny", captions=False, positions=512)


@pytest.fixture(scope="module")
def model(pack: Pack) -> FrameModel:
    return load_frame_model(pack)


@pytest.fixture(scope="module")
def otto() -> NewStory:
    return world_story("otto", SIZE)


@pytest.fixture(scope="module")
def rosa() -> NewStory:
    return world_story("rosa", SIZE)


@pytest.fixture(scope="module")
def known() -> tuple[KnownStory, ...]:
    return known_stories(2, SIZE)


def recipe_of(name: str, steps: int = 3) -> CustomizationRecipe:
    recipe = toon_customization(name)
    return replace(recipe, steps=steps, warmup_steps=1, lessons=replace(recipe.lessons, existing_stories=2))


LEARNED = {  # by method, parts of its file that only a step can change, by what their names hold
    "custom-diffusion": (".delta", "words."),
    "dreambooth": ("",),
    "epicevo": (".lora_up.", "bundle_emb."),
    "lora": (".lora_up.", "bundle_emb."),
    "textual-inversion": ("words.",),
}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_learns_something_and_is_read_back_as_served(
    pack: Pack, model: FrameModel, otto: NewStory, known: tuple[KnownStory, ...], tmp_path: Path, name: str
) -> None:
    before = {key: value.clone() for key, value in model.denoiser.unet.state_dict().items()}
    artefact = customize(pack, otto, known, recipe_of(name), tmp_path / name, say=lambda line: None)
    path = tmp_path / f"{name}.safetensors"
    write_artefact(artefact, path)
    adapter = read_adapter_file(path, model.denoiser.unet, base_digest=model.base_digest, text_width=model.text.width)
    card = json.loads(card_path(path).read_text(encoding="utf-8"))
    assert card["weights"]["sha256"] == adapter.digest
    assert (card["character"]["name"], card["steps"], card["recipe"]["method"]["name"]) == ("Otto", 3, name)
    learned = load(artefact.payload)
    start = load(customization(model, otto, known, recipe_of(name)).method.payload())
    assert learned.keys() == start.keys()
    moved = {key for key, value in learned.items() if not torch.equal(value, start[key])}
    for part in LEARNED[name]:
        assert any(part in key for key in moved), part
    after = model.denoiser.unet.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)  # the pack's own network never moves


def test_a_run_that_was_interrupted_ends_with_the_same_weights(
    pack: Pack, otto: NewStory, known: tuple[KnownStory, ...], tmp_path: Path
) -> None:
    recipe = recipe_of("epicevo", steps=4)
    whole = customize(pack, otto, known, recipe, tmp_path / "whole", say=lambda line: None)
    customize(pack, otto, known, recipe, tmp_path / "parts", say=lambda line: None, until_step=2)
    parts = customize(pack, otto, known, recipe, tmp_path / "parts", say=lambda line: None)
    assert parts.payload == whole.payload
    assert parts.card["losses"] == whole.card["losses"]


def test_a_discriminator_that_blew_up_in_the_last_step_ends_the_run(
    pack: Pack, otto: NewStory, known: tuple[KnownStory, ...], tmp_path: Path
) -> None:
    """Its figures are in no error of the network's, and only the next step's loss would tell."""
    recipe = recipe_of("epicevo", steps=1)
    method = recipe.method
    assert isinstance(method, EpicEvoRecipe)
    weights = replace(method.weights, adversarial=0.1)
    broken = replace(recipe, method=replace(method, weights=weights, discriminator_rate=1e30))
    with pytest.raises(LossNotFinite, match="discriminator"):
        customize(pack, otto, known, broken, tmp_path, say=lambda line: None)


def test_another_runs_folder_is_refused(
    pack: Pack, otto: NewStory, known: tuple[KnownStory, ...], tmp_path: Path
) -> None:
    customize(pack, otto, known, recipe_of("lora"), tmp_path, say=lambda line: None, until_step=1)
    with pytest.raises(RunMismatch, match="another pack, story or recipe"):
        customize(pack, otto, known, replace(recipe_of("lora"), seed=1), tmp_path, say=lambda line: None)


@pytest.mark.parametrize("steps", [6, 1], ids=["by the next loss", "by the last step"])
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_checkpoint(
    pack: Pack, model: FrameModel, otto: NewStory, known: tuple[KnownStory, ...], tmp_path: Path, steps: int
) -> None:
    """However often a state is kept, never what a step too large has left."""
    recipe = replace(recipe_of("lora", steps=steps), save_every_s=0.0)
    broken = replace(recipe, method=LoraRecipe(rank=4, rate=1e30, named_share=0.5))
    with pytest.raises(LossNotFinite):
        customize(pack, otto, known, broken, tmp_path, say=lambda line: None)
    kept = load_checkpoint(tmp_path / CHECKPOINT)
    assert kept is not None
    trainee = customization(model, otto, known, broken)
    trainee.networks.load_state_dict(kept.part("networks"))
    parts = trainee.parts(step_generator(broken.seed, int(kept.facts["step"])))
    assert all(bool(value.isfinite()) for value in parts.values())


def test_a_run_never_sees_somebody_new_among_the_known(model: FrameModel, otto: NewStory, rosa: NewStory) -> None:
    with pytest.raises(FramesSeen):
        customization(model, otto, [KnownStory(frames=rosa.frames)], recipe_of("lora"))


def test_a_method_that_is_none_is_refused() -> None:
    with pytest.raises(RecipeInvalid, match="there are custom-diffusion"):
        toon_customization("magic")


def test_several_are_taught_jointly_and_each_word_is_learned(
    pack: Pack, model: FrameModel, otto: NewStory, rosa: NewStory, known: tuple[KnownStory, ...], tmp_path: Path
) -> None:
    recipe = recipe_of("textual-inversion", steps=8)
    artefact = customize(pack, [otto, rosa], known, recipe, tmp_path, say=lambda line: None)
    assert "character" not in artefact.card
    assert [one["name"] for one in artefact.card["characters"]] == ["Otto", "Rosa"]
    assert set(artefact.card["dataset"]["new"]) == {frame.id for one in (otto, rosa) for frame in one.frames}
    adapter = read_adapter(
        artefact.payload, model.denoiser.unet, base_digest=model.base_digest, text_width=model.text.width, name="it"
    )
    assert set(adapter.words) == {"Otto", "Rosa"}
    ground = customization(model, [otto, rosa], known, recipe).method.words
    assert all(bool((adapter.words[name] != ground[name].half()).any()) for name in ground)


def test_two_of_one_name_are_not_taught_jointly(
    model: FrameModel, otto: NewStory, known: tuple[KnownStory, ...]
) -> None:
    with pytest.raises(StoryInvalid, match="two of the new characters have the id"):
        customization(model, [otto, otto], known, recipe_of("lora"))
    with pytest.raises(StoryInvalid, match="nobody"):
        customization(model, [], known, recipe_of("lora"))


def test_every_new_character_has_its_turn(
    model: FrameModel, otto: NewStory, rosa: NewStory, known: tuple[KnownStory, ...]
) -> None:
    lessons = Lessons(model, [otto, rosa], known, LessonRecipe(frames_per_story=2))
    latents = {name: lessons.new.latents_FCHW[first : first + 5] for name, first in (("otto", 0), ("rosa", 5))}
    seen = set()
    for step in range(12):
        batch = lessons.batch(step_generator(0, step))
        rows = batch.example.latents_BCHW[batch.kinds_B == NEW]
        owners = {
            name for name, own in latents.items() if all(any(torch.equal(row, one) for one in own) for row in rows)
        }
        assert len(owners) == 1  # a step's new rows are of one story
        seen |= owners
    assert seen == {"otto", "rosa"}


def test_a_step_is_the_same_whenever_it_is_taken(
    model: FrameModel, otto: NewStory, known: tuple[KnownStory, ...]
) -> None:
    lessons = Lessons(model, [otto], known, LessonRecipe(), named_share=0.5)
    first, again = (lessons.batch(step_generator(3, 7)) for _ in range(2))
    lessons.batch(step_generator(3, 8))
    assert torch.equal(first.example.text_BSD, again.example.text_BSD)
    assert torch.equal(first.noise_BCHW, again.noise_BCHW)
    assert torch.equal(first.timesteps_B, again.timesteps_B)
    assert not torch.equal(first.noise_BCHW, lessons.batch(step_generator(3, 8)).noise_BCHW)


def test_a_frames_exemplar_shows_whom_it_shows_and_its_stranger_does_not(
    model: FrameModel, otto: NewStory, known: tuple[KnownStory, ...]
) -> None:
    lessons = Lessons(model, [otto], known, LessonRecipe())
    shelf = {NEW: lessons.new, EXISTING: lessons.existing}

    def shown(latents: torch.Tensor) -> frozenset[str]:
        for one in shelf.values():
            for frame, own in zip(one.frames, one.latents_FCHW, strict=True):
                if torch.equal(own, latents):
                    return frame.characters
        raise AssertionError("no frame of the run")

    batch = lessons.batch(step_generator(0, 0))
    assert len(batch.pairs_P) >= len(batch.kinds_B)
    for row, exemplar, stranger in zip(batch.pairs_P.tolist(), batch.exemplars_PCHW, batch.strangers_PCHW, strict=True):
        here = shown(batch.example.latents_BCHW[row])
        assert here & shown(exemplar)
        assert not here <= shown(stranger)  # not even beside somebody else


def losses(model: FrameModel, otto: NewStory, known: tuple[KnownStory, ...], method: MethodRecipe) -> Parts:
    recipe = replace(recipe_of("epicevo"), method=method)
    return customization(model, otto, known, recipe).parts(step_generator(0, 0))


def test_epicevos_loss_is_its_parts_weighted(model: FrameModel, otto: NewStory, known: tuple[KnownStory, ...]) -> None:
    weights = EpicEvoWeights(adversarial=0.75, distillation=0.5)
    parts = losses(model, otto, known, EpicEvoRecipe(weights=weights, learns="lora", rank=2))
    expected = parts["mse"] + 0.75 * parts["adversarial"] + 0.5 * parts["distillation"] + parts["discriminator"]
    assert float(parts[TOTAL].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(parts["mse"].detach()) == pytest.approx(
        float(parts["mse_new"].detach()) + float(parts["mse_existing"].detach()), rel=1e-5
    )
    assert float(parts["distillation"].detach()) == pytest.approx(0.0, abs=1e-10)  # nothing has moved yet


def test_a_loss_of_no_weight_is_not_computed(model: FrameModel, otto: NewStory, known: tuple[KnownStory, ...]) -> None:
    method = EpicEvoRecipe(weights=EpicEvoWeights(adversarial=0.0, distillation=0.0), learns="lora", rank=2)
    parts = losses(model, otto, known, method)
    assert set(parts) == {"mse_new", "mse_existing", "mse", TOTAL}


def test_dreambooths_prior_is_what_the_network_itself_draws(
    model: FrameModel, otto: NewStory, known: tuple[KnownStory, ...]
) -> None:
    parts = losses(model, otto, known, DreamBoothRecipe(prior_weight=1.0))
    assert "mse_prior" in parts
    total = parts["mse_new"] + parts["mse_existing"] + parts["mse_prior"]
    assert float(parts["mse"].detach()) == pytest.approx(float(total.detach()), rel=1e-5)


def test_timing_a_step_moves_nothing(model: FrameModel, otto: NewStory, known: tuple[KnownStory, ...]) -> None:
    trainee = customization(model, otto, known, replace(recipe_of("lora"), method=TextualInversionRecipe()))
    before = [value.clone() for value in trainee.networks.state_dict().values()]
    assert math.isfinite(seconds_a_step(trainee, 0))
    assert all(torch.equal(a, b) for a, b in zip(before, trainee.networks.state_dict().values(), strict=True))
    assert all(parameter.grad is None for parameter in trainee.networks.parameters())


@pytest.mark.parametrize("name", ["lora", "epicevo"])
def test_a_name_may_start_as_its_phrase_and_is_kept_with_the_lora(
    pack: Pack, model: FrameModel, otto: NewStory, known: tuple[KnownStory, ...], tmp_path: Path, name: str
) -> None:
    assert isinstance(model.text, TextEncoder)
    recipe = recipe_of(name)
    method = replace(recipe.method, word_rate=1e-3)
    trainee = customization(model, otto, known, replace(recipe, method=method))
    started = trainee.method.words
    told, named = "A black penguin with orange earmuffs runs.", "Otto runs."
    alike = [model.text.encode([" " + told[0].lower() + told[1:]]), model.text.encode([named], started)]
    assert torch.allclose(*alike, atol=1e-5)  # a name alone means what the phrase means
    artefact = customize(pack, otto, known, replace(recipe, method=method), tmp_path, say=lambda line: None)
    adapter = read_adapter(
        artefact.payload, model.denoiser.unet, base_digest=model.base_digest, text_width=model.text.width, name="it"
    )
    assert set(adapter.words) == {"Otto"}
    assert adapter.factors
    assert not torch.equal(adapter.words["Otto"], started["Otto"].detach().half().float())


def test_a_whole_unet_has_no_place_for_a_word(model: FrameModel, otto: NewStory, known: tuple[KnownStory, ...]) -> None:
    method = EpicEvoRecipe(learns="unet", word_rate=1e-3)
    with pytest.raises(RecipeInvalid, match="no place for a word"):
        customization(model, otto, known, replace(recipe_of("epicevo"), method=method))


def test_accumulated_batches_give_their_mean_gradient(
    model: FrameModel, otto: NewStory, known: tuple[KnownStory, ...]
) -> None:
    recipe = replace(recipe_of("lora"), lessons=LessonRecipe(existing_stories=2, frames_per_story=1))
    one = customization(model, otto, known, recipe)
    totals = [one.parts(step_generator(0, 0, number))[TOTAL] for number in range(3)]
    (sum(totals[1:], totals[0]) / 3).backward()  # type: ignore[no-untyped-call]
    several = customization(model, otto, known, replace(recipe, accumulate=3))
    loss = several.loss(0, 0.0, step_generator(0, 0))
    assert float(loss.detach()) == pytest.approx(float(sum(totals).detach()) / 3, rel=1e-5)  # type: ignore[union-attr]
    loss.backward()  # type: ignore[no-untyped-call]
    expected = {name: value.grad for name, value in one.networks.named_parameters() if value.grad is not None}
    assert expected
    for name, value in several.networks.named_parameters():
        if name in expected:
            assert value.grad is not None
            assert torch.allclose(value.grad, expected[name], atol=1e-6), name
    with pytest.raises(ValueError, match="accumulate"):
        replace(recipe, accumulate=0)
