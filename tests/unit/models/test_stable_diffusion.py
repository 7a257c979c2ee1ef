"""Stable Diffusion packs: the numbers of diffusers' own pipelines, drawn by the engine's steps.

Tiny checkpoints with random weights, written in the published layout by diffusers and sealed by our own command.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor

from services.models.denoiser import StoryDenoiser
from services.models.drawing import Drawing, Edit, Pixels, Randomness, Sketch, begin, finish
from services.models.errors import TextTooLong
from services.models.graphs import Graphs
from services.models.lora import ALPHA, NOBODY, AdapterSlots, Worn, read_adapter
from services.models.registry import FrameModel, load_frame_model
from services.models.samplers import SAMPLERS
from services.models.schedule import Schedule
from services.models.stable_diffusion.pack import read_scheduler
from services.models.step import advance
from tests.stable_diffusion_checkpoints import BETAS, KINDS, pipeline, sealed, write_checkpoint
from tests.tape import Tape

CLOSE = {"atol": 1e-4, "rtol": 0.0}  # latents are of the order of one
PROMPT = "the cat and the dog, at night"
LATENT = (4, 8, 8)
SEED = 7
Pair = tuple[Any, FrameModel]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Per kind, diffusers' pipeline and our model of the same weights."""
    folder, found = tmp_path_factory.mktemp("checkpoints"), {}
    for kind in KINDS:
        pipe = pipeline(kind)
        checkpoint = write_checkpoint(folder / "published" / kind, kind, pipe)
        found[kind] = (pipe, load_frame_model(sealed(checkpoint, folder / kind, kind)))
    return found


def scheduler(name: str, prediction: str, **more: Any) -> Any:
    """A scheduler of diffusers whose config our own reading can be tried on."""
    spacing = {"timestep_spacing": "trailing"}
    kinds: dict[str, Callable[..., Any]] = {
        "ddim": lambda **v: DDIMScheduler(**v, clip_sample=False, steps_offset=1, set_alpha_to_one=False),
        "ddim-zero-snr": lambda **v: DDIMScheduler(**v, **spacing, clip_sample=False, rescale_betas_zero_snr=True),
        "dpm": lambda **v: DPMSolverMultistepScheduler(**v, **spacing),
        "euler": lambda **v: EulerDiscreteScheduler(**v, timestep_spacing="leading", steps_offset=1),
        "euler-trailing": lambda **v: EulerDiscreteScheduler(**v, **spacing),
        "euler-ancestral": lambda **v: EulerAncestralDiscreteScheduler(**v, **spacing),
    }
    return kinds[name](**BETAS, prediction_type=prediction, **more)


def scheduled(pair: Pair, name: str, prediction: str = "") -> Pair:
    """Both with another scheduler: what its config says is read by the code that seals packs."""
    pipe, model = pair
    theirs = scheduler(name, prediction or pipe.scheduler.config.prediction_type)
    config, sampler = read_scheduler({"_class_name": type(theirs).__name__, **theirs.config})
    other = copy.copy(pipe)
    other.scheduler = theirs
    denoiser = StoryDenoiser(model.denoiser.unet, Schedule(config))
    manifest = model.manifest.model_copy(update={"schedule": config})
    return other, replace(model, denoiser=denoiser, sampler=SAMPLERS[sampler], manifest=manifest)


def sketch(**changes: Any) -> Sketch:
    values: dict[str, Any] = {
        "description": PROMPT,
        "seed": SEED,
        "width_px": 64,
        "height_px": 64,
        "steps": 10,
        "text_guidance": 7.5,
        "image_guidance": 1.0,
    }
    return Sketch(**{**values, **changes})


def drawn(model: FrameModel, job: Sketch) -> Drawing:
    drawing = begin(model, job)
    while not drawing.finished:
        advance(model, [drawing])
    return drawing


def their_latents(pipe: Any, job: Sketch, **more: Any) -> Tensor:
    """Diffusers' own sampling loop from our noise."""
    noise = Randomness(job.seed).normal(1, 4, job.height_px // 8, job.width_px // 8)
    given = {
        "num_inference_steps": job.steps,
        "guidance_scale": job.text_guidance,
        "output_type": "latent",
        **({} if "image" in more else {"latents": noise, "height": job.height_px, "width": job.width_px}),
        **more,
    }
    with torch.no_grad():
        return pipe(job.description, **given).images[0]


@contextmanager
def noise_of(module: Any, noises: Iterator[Tensor]) -> Iterator[None]:
    """Within, a module of diffusers gets its random numbers from us."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda shape, **_: next(noises).reshape(tuple(shape)))
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_read_as_by_diffusers(pairs: dict[str, Pair], kind: str) -> None:
    pipe, model = pairs[kind]
    for text in (PROMPT, "A", "thé   ça cat's 42 \n dog " * 3):
        with torch.no_grad():
            theirs = pipe.encode_prompt(
                text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=None
            )
            ours = model.text.encode([text, ""])
        words, nothing = ours[:, :77]
        torch.testing.assert_close(words, theirs[0][0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(nothing, theirs[1][0], atol=1e-6, rtol=1e-5)
        if kind == "sdxl":
            torch.testing.assert_close(ours[0, 77, :24], theirs[2][0], atol=1e-6, rtol=1e-5)
            assert not ours[1].any()  # the base model's pipeline says so
            assert not ours[0, 77, 24:].any()


def test_xl_may_read_an_empty_text_instead_of_zeros(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pipe = copy.copy(pairs["sdxl"][0])
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    pack = sealed(write_checkpoint(tmp_path / "published", "sdxl", pipe), tmp_path / "own", "sdxl")
    pipe.register_to_config(force_zeros_for_empty_prompt=True)
    nothing = load_frame_model(pack).text.encode([""])
    with torch.no_grad():
        theirs = pipe.encode_prompt("", device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(nothing[0, :77], theirs[0][0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(nothing[0, 77, :24], theirs[2][0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_fills_the_window_of_77_and_no_more(pairs: dict[str, Pair], kind: str) -> None:
    text = pairs[kind][1].text
    assert text.encode(["cat " * 75]).shape[1] == (78 if kind == "sdxl" else 77)
    with pytest.raises(TextTooLong) as refused:
        text.encode(["cat " * 76])
    assert (refused.value.token_count, refused.value.limit) == (76, 75)
    with pytest.raises(TextTooLong):
        text.token_ids(["cat " * 76])
    assert text.fitting("cat " * 80).split() == ["cat"] * 75


@pytest.mark.parametrize("kind", KINDS)
def test_no_mark_comes_out_of_a_text(pairs: dict[str, Pair], kind: str) -> None:
    tokenizer = pairs[kind][1].text.tokenizer
    ids = tokenizer.encode("<|endoftext|> cat <|startoftext|> !")
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.pad_id not in ids
    assert tokenizer.pad_id == (0 if kind == "sd2" else tokenizer.eos_id)


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_of_the_network_is_diffusers_own(pairs: dict[str, Pair], kind: str) -> None:
    """Rows of unlike steps and texts, and a picture that is no square."""
    pipe, model = pairs[kind]
    generator = torch.Generator().manual_seed(3)
    latents, t = torch.randn(3, 4, 8, 16, generator=generator), torch.tensor([999, 437, 1])
    texts = [PROMPT, "", "dog"]
    with torch.no_grad():
        answer = model.denoiser.unet.predict(latents, t, model.text.encode(texts))
        for row, text in enumerate(texts):
            rest: dict[str, Any] = {}
            embedded = pipe.encode_prompt(
                text or "x", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
            )
            words = embedded[0] if text else embedded[1]
            if kind == "sdxl":
                ids = torch.tensor([[64.0, 128.0, 0.0, 0.0, 64.0, 128.0]])
                rest = {"added_cond_kwargs": {"text_embeds": embedded[2 if text else 3], "time_ids": ids}}
            expected = pipe.unet(latents[row : row + 1], t[row : row + 1], words, **rest).sample
            torch.testing.assert_close(answer[row : row + 1], expected, **CLOSE)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize(
    ("kind", "name", "prediction"),
    [
        ("sd15", "ddim", ""),
        ("sd15", "dpm", ""),
        ("sd15", "euler", ""),
        ("sd15", "euler-trailing", ""),
        ("sd2", "ddim", ""),
        ("sd2", "ddim-zero-snr", ""),
        ("sd2", "dpm", ""),
        ("sd2", "euler", ""),
        ("sdxl", "ddim", ""),
        ("sdxl", "dpm", ""),
        ("sdxl", "euler", ""),
        ("sdxl", "euler", "v_prediction"),
    ],
)
def test_a_whole_drawing_is_diffusers_own(
    pairs: dict[str, Pair], kind: str, name: str, prediction: str, guidance: float
) -> None:
    pipe, model = scheduled(pairs[kind], name, prediction)
    job = sketch(text_guidance=guidance, **({"width_px": 96} if guidance == 1.0 else {}))
    drawing = begin(model, job)
    rows = 0
    while not drawing.finished:
        rows += advance(model, [drawing]).main
    assert rows == job.steps * (1 if guidance == 1.0 else 2)  # a row that counts nothing is not computed
    torch.testing.assert_close(drawing.latents_CHW, their_latents(pipe, job), **CLOSE)


# Of latent pixel (1, 2) after four steps, when this was written; the tests around it hold them to diffusers' own.
GOLDEN = {
    "sd15": [-2.8369, 2.1556, -2.1346, 10.219],
    "sd2": [-1.2447, 0.1219, -1.0401, 1.0056],
    "sdxl": [-0.5983, 1.1416, 0.5019, 6.355],
}


@pytest.mark.parametrize("kind", KINDS)
def test_golden_numbers(pairs: dict[str, Pair], kind: str) -> None:
    latents = drawn(pairs[kind][1], sketch(steps=4)).latents_CHW
    assert latents[:, 1, 2].tolist() == pytest.approx(GOLDEN[kind], abs=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_is_diffusers_own(pairs: dict[str, Pair], kind: str) -> None:
    pipe, model = scheduled(pairs[kind], "ddim")
    pixels = finish(model, [drawn(model, sketch(steps=4))])[0]
    theirs = their_latents(pipe, sketch(steps=4), output_type="np")
    assert np.abs(pixels / 255.0 - theirs).max() <= 0.5 / 255 + 1e-4


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", ["euler-trailing", "euler-ancestral"])
def test_turbo_draws_in_one_to_four_steps_as_diffusers_does(
    pairs: dict[str, Pair], kind: str, steps: int, name: str
) -> None:
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as ancestral

    pipe, model = scheduled(pairs[kind], name)
    job = sketch(steps=steps, text_guidance=1.0)
    fresh = (Randomness(job.seed, done).normal(*LATENT) for done in itertools.count())
    with noise_of(ancestral, fresh):
        theirs = their_latents(pipe, replace(job, text_guidance=0.0))  # their word for "off"
    torch.testing.assert_close(drawn(model, job).latents_CHW, theirs, **CLOSE)


def picture(seed: int = 0) -> Pixels:
    """Smooth, so that the VAE has something to say."""
    rough = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(rough, size=(64, 64), mode="bilinear")[0]
    return (smooth.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


@pytest.mark.parametrize("strength", [0.5, 0.3, 1.0])
@pytest.mark.parametrize(("kind", "name"), [("sd15", "ddim"), ("sd15", "dpm"), ("sd2", "ddim"), ("sdxl", "euler")])
def test_an_edit_is_diffusers_own(pairs: dict[str, Pair], kind: str, name: str, strength: float) -> None:
    from diffusers.models.autoencoders import vae
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as plain
    from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img as xl

    pipe, model = scheduled(pairs[kind], name)
    parts = dict(pipe.components)
    if kind == "sdxl":
        theirs: Any = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    else:
        theirs = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    job = sketch(edit=Edit(pixels=picture(), strength=strength))
    random = Randomness(job.seed)
    noise, _, posterior = random.normal(1, *LATENT), random.normal(1, *LATENT), random.normal(1, *LATENT)
    image = torch.from_numpy(picture()).permute(2, 0, 1)[None].float() / 255.0
    with noise_of(vae, iter([posterior])), noise_of(xl if kind == "sdxl" else plain, iter([noise])):
        expected = their_latents(theirs, job, image=image, strength=strength)
    drawing = drawn(model, job)
    assert drawing.done == int(10 * strength)
    torch.testing.assert_close(drawing.latents_CHW, expected, **CLOSE)


def test_an_edit_takes_a_step_at_least_and_a_strength_that_is_one(pairs: dict[str, Pair]) -> None:
    assert drawn(pairs["sd15"][1], sketch(steps=1, edit=Edit(pixels=picture()))).done == 1
    for wrong in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="strength"):
            Edit(pixels=picture(), strength=wrong)


def test_a_weak_edit_keeps_the_picture_and_a_strong_one_does_not(pairs: dict[str, Pair]) -> None:
    model = pairs["sd15"][1]
    given = model.codec.encode(torch.from_numpy(picture()).permute(2, 0, 1)[None].float() / 255.0)[0]

    def kept(strength: float) -> float:
        latents = drawn(model, sketch(text_guidance=1.0, edit=Edit(pixels=picture(), strength=strength))).latents_CHW
        return float((latents - given).abs().mean())

    assert kept(0.1) < kept(0.5) < kept(1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_jobs_of_unlike_steps_share_a_batch(pairs: dict[str, Pair], kind: str) -> None:
    """Each as alone: another number of steps, sampler, guidance, text, and one that begins with a picture."""
    model = pairs[kind][1]
    jobs = [
        sketch(),
        sketch(seed=1, steps=4, text_guidance=1.0, sampler="euler"),
        sketch(seed=2, steps=6, description="dog", sampler="dpm_solver_pp_2m"),
        sketch(seed=3, steps=8, edit=Edit(pixels=picture()), sampler="euler_ancestral"),
    ]
    drawings = [begin(model, job) for job in jobs[:2]]
    advance(model, drawings)  # the others join later
    drawings += [begin(model, job) for job in jobs[2:]]
    shared = 0
    while unfinished := [one for one in drawings if not one.finished]:
        shared = max(shared, advance(model, unfinished).main)
    assert shared == 2 + 1 + 2 + 2
    for job, drawing in zip(jobs, drawings, strict=True):
        torch.testing.assert_close(drawing.latents_CHW, drawn(model, job).latents_CHW, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_decides(pairs: dict[str, Pair], kind: str) -> None:
    model = pairs[kind][1]
    job = sketch(steps=3, sampler="euler_ancestral")
    assert torch.equal(drawn(model, job).latents_CHW, drawn(model, job).latents_CHW)
    assert not torch.allclose(drawn(model, replace(job, seed=8)).latents_CHW, drawn(model, job).latents_CHW, atol=0.1)


LAYERS = (
    r".*attentions.*(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2|proj_in|proj_out)"
    r"|.*resnets.*conv1|.*add_embedding\.linear_1"
)


@pytest.mark.parametrize("kind", KINDS)
def test_characters_weights_are_pefts(pairs: dict[str, Pair], kind: str) -> None:
    """Rows of one batch: one wears an adapter, one half of it, one nothing."""
    pipe, model = pairs[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=LAYERS, init_lora_weights=False)
        adapted: Any = peft.get_peft_model(copy.deepcopy(pipe.unet), config).eval()
    state = {
        f"unet.{key.removeprefix('base_model.model.')}": value.contiguous()
        for key, value in get_peft_model_state_dict(adapted).items()
    }
    unet = model.denoiser.unet
    adapter = read_adapter(save(state, metadata={ALPHA: "6"}), unet, text_width=model.text.width)
    slots = AdapterSlots(unet, count=2, rank_max=4)
    slots.put(1, adapter)
    latents = torch.randn(3, *LATENT, generator=torch.Generator().manual_seed(0))
    t, text = torch.tensor([700, 20, 500]), model.text.encode([PROMPT, "dog", PROMPT])
    with torch.no_grad():
        with slots.rows([(Worn(1, 1.0),), (NOBODY,), (Worn(1, 0.5),)]):
            answer = unet.predict(latents, t, text)
        words, told = unet._told(latents, text)
        whole = adapted(latents, t, words, **told).sample
        plain = pipe.unet(latents, t, words, **told).sample
        torch.testing.assert_close(answer[0], whole[0], **CLOSE)
        torch.testing.assert_close(answer[1], plain[1], **CLOSE)
        assert (whole[0] - plain[0]).abs().max() > 1e-2
        for module in adapted.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.scale_layer(0.5)
        half = adapted(latents, t, words, **told).sample
        torch.testing.assert_close(answer[2], half[2], **CLOSE)


def test_a_character_may_be_a_whole_unet(pairs: dict[str, Pair]) -> None:
    unet = pairs["sdxl"][1].denoiser.unet
    state = {name: value * 1.01 for name, value in unet.state_dict().items()}
    other = read_adapter(save(state), unet).unet
    assert type(other) is type(unet)
    latents, t = torch.ones(1, *LATENT), torch.tensor([500])
    text = pairs["sdxl"][1].text.encode([PROMPT])
    with torch.no_grad():
        assert (other.predict(latents, t, text) - unet.predict(latents, t, text)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_word_stands_where_it_is_said(pairs: dict[str, Pair], kind: str) -> None:
    text = pairs[kind][1].text
    generator = torch.Generator().manual_seed(0)
    words = {"Zoe": torch.randn(2, text.width, generator=generator)}
    with_it, without = text.encode(["the Zoe"], words), text.encode(["the Zoe"])
    assert (with_it - without).abs().max() > 1e-2
    torch.testing.assert_close(text.encode(["the dog"], words), text.encode(["the dog"]))
    if kind == "sdxl":  # each of the two encoders has its own half, and the pooled vector hears it too
        own = 32
        first_only = {"Zoe": words["Zoe"].clone()}
        first_only["Zoe"][:, own:] = 0.0
        other = text.encode(["the Zoe"], first_only)
        torch.testing.assert_close(other[:, :77, :own], with_it[:, :77, :own])
        assert (other[:, :77, own:] - with_it[:, :77, own:]).abs().max() > 1e-2
        assert (other[:, 77] - with_it[:, 77]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_deep_states_of_the_same_step_give_the_same_answer(pairs: dict[str, Pair], kind: str) -> None:
    _, model = pairs[kind]
    unet = model.denoiser.unet
    latents = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(0))
    t, text = torch.tensor([700, 20]), model.text.encode([PROMPT, "dog"])
    with torch.no_grad():
        answer, deep = unet.predict_and_keep(latents, t, text)
        torch.testing.assert_close(answer, unet.predict(latents, t, text))
        torch.testing.assert_close(unet.predict_shallow(latents, t, text, deep), answer, atol=1e-5, rtol=1e-5)
        assert (unet.predict_shallow(latents, t, text, deep * 0.5) - answer).abs().max() > 1e-3
    drawing, counts = begin(model, sketch(steps=3, deep_every=2)), []
    while not drawing.finished:
        taken = advance(model, [drawing])
        counts.append((taken.main, taken.shallow))
    assert counts == [(2, 0), (2, 2), (2, 0)]


def test_it_cannot_look_at_earlier_frames(pairs: dict[str, Pair]) -> None:
    unet = pairs["sd15"][1].denoiser.unet
    with pytest.raises(TypeError, match="earlier frames"):
        unet.features(torch.zeros(1, *LATENT), torch.tensor([1]), torch.zeros(1, 77, 32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deep_every", [1, 2])
def test_forwards_can_be_recorded(pairs: dict[str, Pair], kind: str, deep_every: int) -> None:
    model, graphs, job = pairs[kind][1], Graphs(Tape()), sketch(deep_every=deep_every)
    recorded = replace(model, graphs=graphs)
    for size in (64, 128):  # XL is told the size, which is therefore part of what is recorded
        sized = replace(job, width_px=size)
        assert torch.allclose(drawn(recorded, sized).latents_CHW, drawn(model, sized).latents_CHW, **CLOSE)
    assert graphs.replayed_count
    assert not graphs.is_broken
