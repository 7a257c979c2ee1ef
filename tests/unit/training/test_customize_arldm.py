"""Teaching a tiny AR-LDM pack somebody new: what moves, what is lost, what a frame service makes of it."""

from __future__ import annotations

import hashlib
import io
import json
import queue
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load
from torch import Tensor
from torch.nn import functional as F

from services.frame.engine import EngineSettings, FrameEngine
from services.frame.job import Event, FrameJob, ReferenceImage, RenderedFrame
from services.models.arldm.blip import as_blip_sees
from services.models.arldm.reader import ArldmReader
from services.models.character import CharacterWeights
from services.models.epicevo import EpicEvoWeights
from services.models.lora import read_adapter
from services.models.pack import Pack
from services.models.registry import FrameModel, load_frame_model
from services.runtime.errors import FabulaError
from tests.reference_arldm import Reference, ddim_levels, random_state
from tests.tiny_arldm import SIZES, nulls, texts_by_hand, worst
from tests.tiny_arldm_pack import PHRASE, barney, build_arldm_pack, known
from training.backbones.backbone import Table
from training.customize import (
    Customization,
    CustomizationRecipe,
    customization,
    customize,
    main,
    published_customization,
    recipe_for,
    toon_customization,
)
from training.customize_errors import RecipeInvalid, StoryInvalid
from training.lessons import LessonRecipe, Lessons
from training.loop import step_generator
from training.methods.adam import GroupedAdam
from training.methods.custom_diffusion import CustomDiffusion
from training.methods.dreambooth import DreamBoothRecipe
from training.methods.epicevo import EpicEvo, EpicEvoRecipe
from training.methods.lora import LoraRecipe
from training.methods.method import EXISTING, NEW, TOTAL, Batch, answer_to, squared_errors
from training.methods.registry import METHODS, MethodRecipe
from training.methods.words import LearnedWords
from training.new_story import Called, KnownStory, NewStory, SeenFrame

WAIT_S = 60.0  # a test that waits so long has failed
EVERYTHING = LessonRecipe(existing_stories=2, frame_dropout=0.0)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return build_arldm_pack(tmp_path_factory.mktemp("arldm") / "stories")


@pytest.fixture(scope="module")
def model(pack: Pack) -> FrameModel:
    return load_frame_model(pack)


@pytest.fixture(scope="module")
def continuing(tmp_path_factory: pytest.TempPathFactory) -> FrameModel:
    return load_frame_model(build_arldm_pack(tmp_path_factory.mktemp("arldm") / "continues", given=1))


def recipe_of(method: str | MethodRecipe, steps: int = 3, **lessons: Any) -> CustomizationRecipe:
    recipe = toon_customization("lora" if not isinstance(method, str) else method)
    shown = replace(LessonRecipe(existing_stories=2, frames_per_story=3), **lessons)
    recipe = replace(recipe, steps=steps, warmup_steps=1, lessons=shown)
    return recipe if isinstance(method, str) else replace(recipe, method=method)


def taught(model: FrameModel, method: str | MethodRecipe, **lessons: Any) -> Customization:
    return customization(model, barney(), known(), recipe_of(method, **lessons))


def state_of(model: FrameModel) -> dict[str, Tensor]:
    """Every weight of the pack's networks."""
    assert isinstance(model.text, ArldmReader)
    return {name: value.clone() for name, value in model.text.model.networks.state_dict().items()}


# What moves.

TRAINED = {
    "custom-diffusion": r"change\.parts\..*attn2/to_[kv]\.delta|word\.",
    "dreambooth": r"unet\.",
    "epicevo": r"lora\.parts\..*(attn[12]|ff).*\.(down|up)|word\.|discriminator\.",
    "epicevo whole": r"unet\.|discriminator\.",
    "lora": r"change\.parts\..*(attn[12]|ff).*\.(down|up)|word\.",
    "textual-inversion": r"word\.",
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_method_moves_its_own_parameters_and_nothing_else(model: FrameModel, name: str) -> None:
    chosen = EpicEvoRecipe(rate=1e-3) if name == "epicevo whole" else name
    before = state_of(model)
    trainee = taught(model, chosen)
    copy = dict(trainee.method.ground.unet.named_parameters())  # type: ignore[attr-defined]
    start = {key: value.detach().clone() for key, value in copy.items()}
    own = {key: value.detach().clone() for key, value in trainee.networks.named_parameters()}
    named = [(key, value) for key, value in trainee.networks.named_parameters() if value.requires_grad]
    assert all(re.match(TRAINED[name], key) for key, _ in named)
    optimizer = GroupedAdam(named, trainee.method.rates, 1.0)
    for step in range(3):
        optimizer.zero_grad()
        trainee.parts(step_generator(0, step))[TOTAL].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    moved = {key for key, value in trainee.networks.named_parameters() if not torch.equal(value, own[key])}
    assert moved == set(own)  # all of it
    is_whole = name in ("dreambooth", "epicevo whole")
    assert all(torch.equal(value, start[key]) is not is_whole for key, value in copy.items())
    after = state_of(model)
    assert all(torch.equal(value, after[key]) for key, value in before.items())  # encoders, tables, the pack's UNet


def test_a_word_learns_in_both_encoders_where_it_is_read(model: FrameModel) -> None:
    """CLIP's half from the frame that is drawn, BLIP's from earlier ones."""
    method = METHODS["textual-inversion"].recipe(named_share=1.0, rate=1e-2)
    trainee = taught(model, method, frame_dropout=0.0, frames_per_story=1)
    width = SIZES.width
    seen = set()
    for step in range(12):
        trainee.networks.zero_grad()
        batch = trainee.lessons.batch(step_generator(0, step), trainee.method.words)
        parts = trainee.method.loss(batch)
        parts[TOTAL].backward()  # type: ignore[no-untyped-call]
        (vectors,) = (value for key, value in trainee.networks.named_parameters() if key.startswith("word."))
        assert vectors.grad is not None
        clip, blip = vectors.grad[:, :width], vectors.grad[:, width:]
        positions = batch.example.text_BSD[0, :, -1].sum()  # of the new story's frame and its history
        has_history = bool(positions > SIZES.positions)
        assert bool(clip.any())
        assert bool(blip.any()) is has_history
        seen.add(has_history)
    assert seen == {True, False}


def test_the_encoders_are_asked_once_and_again_only_for_texts_with_a_learned_word(
    model: FrameModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(model.text, ArldmReader)
    networks = model.text.model.networks
    still = taught(model, LoraRecipe(), frame_dropout=0.0)
    learning = taught(model, METHODS["textual-inversion"].recipe(named_share=1.0), frame_dropout=0.0)
    for one in (still, learning):  # what stands for nothing is computed when it is first asked for
        one.lessons.batch(step_generator(0, 0), one.method.words)
    asked: list[tuple[str, int]] = []

    def counted(name: str, real: Any) -> Any:
        def ask(*given: Any, **named: Any) -> Any:
            rows = next(value for value in (*given, *named.values()) if isinstance(value, Tensor))
            asked.append((name, len(rows)))
            return real(*given, **named)

        return ask

    for name, encoder in (("clip", networks.text_encoder), ("bert", networks.mm_encoder.text)):
        monkeypatch.setattr(encoder, "forward", counted(name, encoder.forward))
    monkeypatch.setattr(networks.mm_encoder.vision, "forward", counted("vision", networks.mm_encoder.vision.forward))
    still.lessons.batch(step_generator(0, 1))
    assert asked == []
    batch = learning.lessons.batch(step_generator(0, 1), learning.method.words)
    drawn = int((batch.kinds_B == NEW).sum())
    assert asked[0] == ("clip", drawn)  # the known story's texts hold no word that is learned
    assert [name for name, _ in asked] == ["clip", "bert"]


# What is lost.


@pytest.fixture(scope="module")
def reference() -> Reference:
    """The independent implementation, with the pack's weights."""
    return Reference(random_state(SIZES, seed=0), SIZES)


def errors_by_hand(
    reference: Reference, batch: Batch, rows: Tensor, texts: Sequence[str], pictures: Sequence[Any], dropped: Tensor
) -> Tensor:
    """Of a whole story's rows."""
    return reference.loss(
        **texts_by_hand(tuple(texts), len(texts)),
        **nulls(),
        pictures_F3HW=as_blip_sees(list(pictures), SIZES.vit_image),
        latents_VCHW=batch.example.latents_BCHW[rows],
        noise_VCHW=batch.noise_BCHW[rows],
        t_V=batch.timesteps_B[rows],
        dropped_V=dropped,
    )


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_squared_errors_are_the_references(model: FrameModel, reference: Reference, dropout: float) -> None:
    trainee = taught(model, LoraRecipe(), frames_per_story=5, frame_dropout=dropout)
    batch = trainee.lessons.batch(step_generator(0, 4))
    whole = taught(model, LoraRecipe(), frames_per_story=5, frame_dropout=0.0).lessons.batch(step_generator(0, 4))
    dropped = (batch.example.text_BSD != whole.example.text_BSD).flatten(1).any(dim=1)
    assert bool(dropped.any()) is (dropout > 0.0)
    assert not bool(dropped.all())
    ground = trainee.method.ground  # type: ignore[attr-defined]
    errors = squared_errors(ground.denoiser, batch, answer_to(ground.denoiser, batch)).detach()
    latents = batch.example.latents_BCHW
    shown = [barney(), *known()]
    for kind in (NEW, EXISTING):
        rows = (batch.kinds_B == kind).nonzero()[:, 0]
        shelf = trainee.lessons.new if kind == NEW else trainee.lessons.existing
        first = next(n for n, own in enumerate(shelf.latents_FCHW) if torch.equal(own, latents[rows[0]]))
        frames = shown[0].frames if kind == NEW else [frame for one in shown[1:] for frame in one.frames]
        frames = frames[first : first + 5]
        expected = errors_by_hand(
            reference,
            batch,
            rows,
            [frame.descriptions[0] for frame in frames],
            [frame.pixels for frame in frames],
            dropped[rows],
        )
        assert worst(errors[rows], expected) <= 1e-4
        assert float(expected.std()) > 0.0
    parts = trainee.method.loss(batch)
    told = [float(errors[batch.kinds_B == kind].mean()) for kind in (NEW, EXISTING)]
    assert float(parts["mse_new"].detach()) == pytest.approx(told[0], rel=1e-5)
    assert float(parts["mse_existing"].detach()) == pytest.approx(told[1], rel=1e-5)
    assert float(parts[TOTAL].detach()) == pytest.approx(sum(told), rel=1e-5)


@pytest.mark.parametrize("learns", ["lora", "unet"])
@pytest.mark.parametrize("distil_on", ["all", "existing"])
def test_epicevos_losses_are_those_computed_by_hand(
    model: FrameModel, reference: Reference, learns: Any, distil_on: Any
) -> None:
    weights = EpicEvoWeights(adversarial=0.75, distillation=0.5)
    recipe = EpicEvoRecipe(weights=weights, learns=learns, rank=2, distil_on=distil_on)
    trainee = taught(model, recipe, frames_per_story=5, frame_dropout=0.0)
    method = trainee.method
    assert isinstance(method, EpicEvo)
    with torch.no_grad():  # as if it had learned something
        for name, value in method.networks.named_parameters():
            if name.endswith(("up", "attn2.to_k.weight")):
                value += 0.05
    batch = trainee.lessons.batch(step_generator(0, 1))
    parts = {name: float(value.detach()) for name, value in method.loss(batch).items()}
    clean, noise, t = batch.example.latents_BCHW, batch.noise_BCHW, batch.timesteps_B
    alphas = ddim_levels().float()[t][:, None, None, None]
    noisy = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
    unet: Any = method.ground.unet
    with torch.no_grad():
        answer = unet.predict(noisy, t, batch.example.text_BSD)
        before: Any = model.denoiser.unet
        taught_by = before.predict(noisy, t, batch.example.text_BSD)
        estimate = (noisy - (1 - alphas).sqrt() * answer) / alphas.sqrt()
        judge = method.discriminator
        assert judge is not None
        true = judge(clean[batch.pairs_P], batch.exemplars_PCHW)
        made = judge(estimate[batch.pairs_P], batch.exemplars_PCHW)
    squares = (answer - noise).square().mean(dim=(1, 2, 3))
    mse = sum(float(squares[batch.kinds_B == kind].mean()) for kind in (NEW, EXISTING))
    rows = batch.kinds_B == EXISTING if distil_on == "existing" else torch.ones_like(batch.kinds_B, dtype=torch.bool)
    distillation = float((answer - taught_by)[rows].square().mean())
    adversarial = float(-F.logsigmoid(made).mean())
    discriminator = float((-F.logsigmoid(true) - torch.log1p(-torch.sigmoid(made))).mean())
    assert distillation > 1e-6
    assert parts["mse"] == pytest.approx(mse, rel=1e-4)
    assert parts["distillation"] == pytest.approx(distillation, rel=1e-3)
    assert parts["adversarial"] == pytest.approx(adversarial, rel=1e-3)
    assert parts["discriminator"] == pytest.approx(discriminator, rel=1e-3)
    assert parts[TOTAL] == pytest.approx(mse + 0.75 * adversarial + 0.5 * distillation + discriminator, rel=1e-3)


@pytest.mark.parametrize(
    "chosen",
    [
        EpicEvoWeights(levels="signal"),
        EpicEvoWeights(levels="below", level_max=400),
        EpicEvoWeights(levels="signal", mismatch_negatives=True),
        EpicEvoWeights(adversarial=0.0),
        EpicEvoWeights(distillation=0.0),
    ],
    ids=["signal", "below", "mismatch", "no adversary", "no teacher"],
)
def test_epicevos_options_weigh_arldms_rows_as_they_say(model: FrameModel, chosen: EpicEvoWeights) -> None:
    recipe = EpicEvoRecipe(learns="lora", rank=2, weights=chosen, existing_weight=0.5)
    trainee = taught(model, recipe, frames_per_story=5)
    method = trainee.method
    assert isinstance(method, EpicEvo)
    batch = trainee.lessons.batch(step_generator(0, 1))
    parts = {name: float(value.detach()) for name, value in method.loss(batch).items()}
    assert ("adversarial" in parts) is (chosen.adversarial > 0.0)
    assert ("distillation" in parts) is (chosen.distillation > 0.0)
    assert parts["mse"] == pytest.approx(parts["mse_new"] + 0.5 * parts["mse_existing"], rel=1e-5)
    total = parts["mse"] + sum(
        weight * parts.get(name, 0.0)
        for name, weight in (
            ("adversarial", chosen.adversarial),
            ("distillation", chosen.distillation),
            ("discriminator", 1.0),
        )
    )
    assert parts[TOTAL] == pytest.approx(total, rel=1e-5)
    judge, rows = method.discriminator, batch.pairs_P
    if judge is None:
        return
    alphas = ddim_levels().float()[batch.timesteps_B]
    clean, noise = batch.example.latents_BCHW, batch.noise_BCHW
    signal, rest = alphas.sqrt()[:, None, None, None], (1 - alphas).sqrt()[:, None, None, None]
    with torch.no_grad():
        answer = answer_to(method.ground.denoiser, batch)
        estimate = (signal * clean + rest * (noise - answer)) / signal
        true, made = (judge(one[rows], batch.exemplars_PCHW) for one in (clean, estimate))
        wrong = judge(clean[rows], batch.strangers_PCHW)
    counts = {
        "uniform": torch.ones(len(rows)),
        "signal": alphas[rows],
        "below": (batch.timesteps_B[rows] <= 400).float(),
    }
    weights_P = counts[chosen.levels]
    refused = (F.softplus(made) + F.softplus(wrong)) / 2 if chosen.mismatch_negatives else F.softplus(made)
    assert parts["adversarial"] == pytest.approx(float((F.softplus(-made) * weights_P).mean()), rel=1e-3)
    expected = float(((F.softplus(-true) + refused) * weights_P).mean())
    assert parts["discriminator"] == pytest.approx(expected, rel=1e-3)


def test_adversary_and_teacher_have_the_gradients_that_are_theirs(model: FrameModel) -> None:
    trainee = taught(model, EpicEvoRecipe(learns="lora", rank=2, weights=EpicEvoWeights(adversarial=1.0)))
    parts = trainee.parts(step_generator(0, 0))
    own = dict(trainee.networks.named_parameters())
    lora = [value for key, value in own.items() if key.startswith("lora.")]
    judge = [value for key, value in own.items() if key.startswith("discriminator.")]
    for part, reached, spared in (("adversarial", lora, judge), ("discriminator", judge, lora)):
        given = torch.autograd.grad(parts[part], [*reached, *spared], allow_unused=True, retain_graph=True)
        assert any(one is not None and bool(one.any()) for one in given[: len(reached)])
        assert all(one is None for one in given[len(reached) :])


def test_dreambooths_prior_is_what_the_network_itself_draws(model: FrameModel, continuing: FrameModel) -> None:
    trainee = taught(model, DreamBoothRecipe(prior_weight=1.0))
    assert trainee.lessons.prior is not None
    assert trainee.lessons.prior.frames[0].descriptions == ("A car sits in kitchen",)
    parts = trainee.parts(step_generator(0, 0))
    total = sum(float(parts[f"mse_{kind}"].detach()) for kind in ("new", "existing", "prior"))
    assert float(parts["mse"].detach()) == pytest.approx(total, rel=1e-5)
    with pytest.raises(RecipeInvalid, match="'continues' goes on from 1: set prior_weight to 0"):
        taught(continuing, DreamBoothRecipe(prior_weight=1.0))


# What is kept.


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_run_that_was_killed_ends_with_the_same_weights(pack: Pack, tmp_path: Path, name: str) -> None:
    recipe = replace(recipe_of(name, steps=4), save_every_s=0.0)
    whole = customize(pack, barney(), known(), recipe, tmp_path / "whole", say=lambda line: None)

    class Killed(BaseException):
        """What nobody catches."""

    def dies(step: int, parts: Mapping[str, float]) -> None:
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        customize(pack, barney(), known(), recipe, tmp_path / "parts", say=lambda line: None, watch=dies)
    again: list[int] = []
    parts = customize(
        pack,
        barney(),
        known(),
        recipe,
        tmp_path / "parts",
        say=lambda line: None,
        watch=lambda step, told: again.append(step),
    )
    assert again == [1, 2, 3]  # the loss of step 2 was never told, so what step 1 left had not proved good yet
    assert parts.payload == whole.payload
    assert parts.card["losses"] == whole.card["losses"]


def test_a_frame_service_draws_otherwise_with_it_and_as_before_without(
    pack: Pack, model: FrameModel, tmp_path: Path
) -> None:
    files: dict[str, bytes] = {}
    learned: dict[str, str] = {}
    for name in METHODS:
        recipe = recipe_of(name, steps=4)
        recipe = replace(recipe, method=replace(recipe.method, rate=2e-2 if name != "dreambooth" else 2e-3))
        payload = customize(pack, barney(), known(), recipe, tmp_path / name, say=lambda line: None).payload
        learned[name] = hashlib.sha256(payload).hexdigest()
        files[learned[name]] = payload
        adapter = read_adapter(
            payload, model.denoiser.unet, base_digest=model.base_digest, text_width=model.text.width, name=name
        )
        assert (adapter.unet is not None) is (name == "dreambooth")
        assert bool(adapter.words) is (name != "dreambooth")
    engine = FrameEngine({"stories": model}, "stories", EngineSettings(max_running=2), fetch=files.__getitem__)
    engine.start()
    try:
        plain = drawn(engine)
        for name, digest in learned.items():
            worn = drawn(engine, CharacterWeights(digest, 1.0))
            assert np.abs(worn - plain).max() > 1, name
            assert np.array_equal(drawn(engine), plain), name
    finally:
        engine.stop()


def drawn(engine: FrameEngine, *characters: CharacterWeights) -> Any:
    """The third frame of a story about Barney, who is told by name alone."""
    out = io.BytesIO()
    Image.fromarray(barney().frames[0].pixels).save(out, "PNG")
    past = (ReferenceImage(image=out.getvalue(), description="barney sits"),) * 2
    job = FrameJob(description="barney runs", seed=3, references=past, characters=characters)
    events: queue.Queue[Event | FabulaError] = queue.Queue()
    engine.submit(job, events.put)
    while not isinstance(event := events.get(timeout=WAIT_S), RenderedFrame):
        assert not isinstance(event, FabulaError), event
    return np.asarray(Image.open(io.BytesIO(event.image)), dtype=np.int16)


def test_custom_diffusion_keeps_differences_of_text_attention_and_words_of_both_widths(
    pack: Pack, model: FrameModel, tmp_path: Path
) -> None:
    artefact = customize(pack, barney(), known(), recipe_of("custom-diffusion"), tmp_path, say=lambda line: None)
    tensors = load(artefact.payload)
    assert tensors.pop("words.barney").shape == (2, 2 * SIZES.width)
    unet: Any = model.denoiser.unet
    layers = {f"{name}.delta" for name, _ in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert set(tensors) == layers
    assert isinstance(customization(model, barney(), known(), recipe_of("custom-diffusion")).method, CustomDiffusion)


def written(folder: Path, story: NewStory | KnownStory) -> Path:
    """A story as a folder has it."""
    folder.mkdir(parents=True)
    is_new = isinstance(story, NewStory)
    frames = []
    for number, frame in enumerate(story.frames, 1):
        Image.fromarray(frame.pixels).save(folder / f"{number}.png")
        told = {"image": f"{number}.png", "caption": frame.caption, "description": frame.descriptions[0]}
        frames.append(told if is_new else {**told, "characters": sorted(frame.characters)})
    about = {"name": story.name, "phrase": story.phrase, "noun": story.noun} if isinstance(story, NewStory) else {}
    (folder / "story.json").write_text(json.dumps({**about, "frames": frames}), encoding="utf-8")
    return folder


def test_the_command_teaches_it_beside_stories_of_its_own_world(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, story in enumerate(known(length=4)):
        written(tmp_path / "known" / f"{number}", story)
    story = written(tmp_path / "new", barney(8))

    def run(*more: str) -> str:
        words = ("--pack", str(pack.folder), "--story", str(story), "--method", "lora", "--steps", "2", *more)
        out = ("--out", str(tmp_path / "barney.safetensors"), "--folder", str(tmp_path / "run"), "--threads", "1")
        monkeypatch.setattr(sys, "argv", ["customize", *words, *out])
        main()
        return capsys.readouterr().out

    with pytest.raises(SystemExit):
        run()
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["error"] == "RECIPE_INVALID"
    run("--known", str(tmp_path / "known"), "--probes")
    card = json.loads((tmp_path / "barney.json").read_text(encoding="utf-8"))
    assert (card["steps"], card["pack"]["name"]) == (2, "stories")
    assert card["recipe"]["method"] == {"name": "lora", **asdict(LoraRecipe())}  # as published: it is no small network
    assert len(card["dataset"]["new"]) == 8
    assert sorted(card["dataset"]["existing"]) == [
        f"known:{story}:{number}" for story in range(2) for number in range(4)
    ]
    assert (tmp_path / "run" / "probes" / "000002-alone.png").is_file()
    written(tmp_path / "known" / "2", replace(known(1)[0], frames=tuple(also(frame) for frame in known(1)[0].frames)))
    with pytest.raises(SystemExit):
        run("--known", str(tmp_path / "known"))
    assert "barney is somebody whom the pack knows" in capsys.readouterr().err


def also(frame: SeenFrame) -> SeenFrame:
    """The same frame, with Barney in it."""
    return replace(frame, pixels=255 - frame.pixels, characters=frame.characters | {"barney"})


# Words.


def test_a_name_that_starts_as_its_phrase_means_what_the_phrase_means(model: FrameModel) -> None:
    assert isinstance(model.text, ArldmReader)
    words = taught(model, LoraRecipe(word_rate=1e-3)).method.words
    assert words["barney"].shape == (2, 2 * SIZES.width)
    picture = barney().frames[0].pixels
    told, named = (
        model.text.contexts(f"{who} runs", [(picture, f"{who} sits"), (picture, f"fred and {who}")], own)
        for who, own in ((PHRASE, {}), ("barney", words))
    )
    assert worst(told, named) <= 1e-5
    assert worst(told[1], model.text.contexts("barney runs", [(picture, "barney sits")])[1]) > 1e-2


def test_a_phrase_may_have_more_tokens_in_one_encoder_than_in_the_other(model: FrameModel) -> None:
    generator = torch.Generator().manual_seed(0)
    clip, blip = (torch.randn(6, SIZES.width, generator=generator) for _ in range(2))
    tables = (Table(clip, lambda text: [1, 2]), Table(blip, lambda text: [3, 4, 5]))
    word = LearnedWords.of_phrases(tables, [Called(name="barney", phrase=PHRASE, noun="car")])
    assert isinstance(model.text, ArldmReader)
    own, other = model.text.model.networks.halves(word.words)
    assert torch.equal(own["barney"], clip[[1, 2]])
    assert torch.equal(other["barney"], blip[[3, 4, 5]])
    captions, sources = model.text.caption_rows(["barney"], word.words), model.text.source_rows(["barney"], word.words)
    assert (int(captions.real_BS.sum()), int(sources.real_BS.sum())) == (2 + 2, 3 + 2)
    # What is no token gets no gradient, so it never becomes one.
    optimizer = torch.optim.Adam(word.parameters(), lr=0.1)
    (own["barney"].sum() + other["barney"].sum()).backward()
    optimizer.step()
    after, _ = model.text.model.networks.halves(word.words)
    assert len(after["barney"]) == 2
    assert not torch.equal(after["barney"], own["barney"])


def test_a_word_of_nothing_but_zeros_says_nothing(model: FrameModel) -> None:
    assert isinstance(model.text, ArldmReader)
    silent = {"barney": torch.zeros(2, model.text.width)}
    assert torch.equal(model.text.encode(["barney runs"], silent), model.text.encode(["runs"]))
    many = "barney " * 40 + "runs"
    assert model.text.fitting(many, silent) == many
    spoken = {"barney": torch.ones(2, model.text.width)}  # two tokens each, of nine that fit
    assert model.text.fitting(many, spoken) == "barney barney barney barney"


# What it is taught with.


def test_an_arldm_pack_is_taught_with_the_published_numbers_and_others_with_the_toon_worlds(pack: Pack) -> None:
    toon = replace(pack, manifest=pack.manifest.model_copy(update={"architecture": "storygen"}))
    for name in METHODS:
        for learns in ("lora", "unet"):
            assert recipe_for(pack, name, learns=learns) == published_customization(name, learns=learns)
            assert recipe_for(toon, name, learns=learns) == toon_customization(name, learns=learns)
    whole = recipe_for(pack, "epicevo", learns="unet")
    assert whole == CustomizationRecipe()  # EpicEvo's: 100 passes over a story at 1e-5
    assert isinstance(recipe_for(pack, "epicevo").method, EpicEvoRecipe)
    assert recipe_for(pack, "epicevo").method.learns == "lora"  # type: ignore[union-attr]
    with pytest.raises(RecipeInvalid, match="no method 'magic'"):
        recipe_for(pack, "magic")


# What cannot be taught.


def test_what_cannot_be_taught_is_refused_by_name(model: FrameModel) -> None:
    long = barney()
    frames = [*long.frames[:4], replace(long.frames[4], descriptions=(" and ".join([PHRASE] * 4),))]
    with pytest.raises(StoryInvalid, match="does not fit"):
        customization(model, replace(long, frames=tuple(frames)), known(), recipe_of("lora"))
    with pytest.raises(RecipeInvalid, match=r"no layers .*attn3"):
        taught(model, LoraRecipe(layers=r".*\.attn3\.to_k"))
    with pytest.raises(RecipeInvalid, match="no place for a word"):
        taught(model, EpicEvoRecipe(learns="unet", word_rate=1e-3))


def test_other_families_are_refused_by_name(model: FrameModel) -> None:
    other = replace(model, manifest=model.manifest.model_copy(update={"architecture": "stable-diffusion"}))
    with pytest.raises(RecipeInvalid, match="arldm and storygen packs, and 'stories' is a stable-diffusion pack"):
        taught(other, "lora")


def test_what_goes_on_from_a_given_frame_is_never_taught_to_draw_it(continuing: FrameModel) -> None:
    lessons = Lessons(continuing, [barney()], known(), EVERYTHING)
    batch = lessons.batch(step_generator(0, 0))
    assert (batch.kinds_B == NEW).sum() == 4
    given = lessons.new.latents_FCHW[0]
    assert not any(torch.equal(row, given) for row in batch.example.latents_BCHW)
    seen = batch.example.text_BSD[:, :, -1].sum(dim=1)
    assert bool((seen > 4 + 2).all())  # more than a caption's words and marks: each sees what came before
    with pytest.raises(RecipeInvalid, match="goes on from 1 given frames"):
        Lessons(continuing, [barney()], known(length=1), EVERYTHING)
