"""The published StoryGen checkpoint, as a pack, against its second implementation (`tests/reference_storygen.py`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.models.drawing import Drawing, Edit, Seen, Sketch, begin
from services.models.registry import FrameModel, load_frame_model
from services.models.step import advance
from services.models.storygen import References
from tests.reference_arldm import Sizes, ddim_levels
from tests.reference_storygen import Numbers, Stage, StoryGen
from tests.stable_diffusion_checkpoints import sealed, tokenizer, write_checkpoint
from tests.unit.models.test_published import WEIGHTS, write_storygen

SIZES = Sizes(
    unet_channels=(16, 32),
    unet_attention=(True, False),
    unet_layers=1,
    unet_heads=2,
    unet_groups=8,
    vae_channels=(8, 8, 8, 16),
    vae_layers=1,
    vae_groups=4,
    clip_layers=3,
    clip_heads=4,
)
STEPS = 4
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}
GOLDEN = [4.6581, -5.6118, -13.6252, -6.7519, 4.6968]


class Both(NamedTuple):
    model: FrameModel
    reference: StoryGen


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """Of one checkpoint in the published layout: the pack that is made of it, and its files as they are."""
    folder = tmp_path_factory.mktemp("storygen")
    checkpoint = write_checkpoint(folder / "StoryGen", "sd15")
    write_storygen(checkpoint)
    unet = load_file(checkpoint / "unet" / WEIGHTS)
    generator = torch.Generator().manual_seed(3)
    for name in sorted(unet):  # fresh norms are all the same one, and fresh networks hardly look at anything
        if ".norm" in name:
            unet[name] = unet[name] + 0.2 * torch.randn(unet[name].shape, generator=generator)
        elif ".attn" in name and ".to_" in name:
            unet[name] = 2.0 * unet[name]
    save_file(unet, checkpoint / "unet" / WEIGHTS, metadata={"format": "pt"})
    state = {f"unet.{name}": value for name, value in unet.items()}
    for network, file in (("vae", WEIGHTS), ("text_encoder", "model.safetensors")):
        state |= {f"{network}.{name}": value for name, value in load_file(checkpoint / network / file).items()}
    model = load_frame_model(sealed(checkpoint, folder / "packs" / "storygen", ""))
    return Both(model, StoryGen(state, SIZES))


def ids(text: str) -> Tensor:
    """Of transformers' own tokenizer."""
    return torch.tensor(tokenizer()(text, padding="max_length", max_length=77, truncation=True).input_ids)


def sketch(count: int, width_px: int = 64, height_px: int = 64, **changes: Any) -> Sketch:
    random = np.random.default_rng(count)
    references = tuple(
        Seen(
            pixels=random.integers(0, 256, (height_px, width_px, 3), dtype=np.uint8),
            description=f"the cat and dog {number}",
        )
        for number in range(count)
    )
    values: dict[str, Any] = {
        "description": "a cat, the dog",
        "seed": 11,
        "width_px": width_px,
        "height_px": height_px,
        "steps": STEPS,
        "text_guidance": 7.0,
        "image_guidance": 3.5,
        "references": references,
    }
    return Sketch(**{**values, **changes})


def numbers_of(job: Sketch) -> Numbers:
    """As a seed gives them: the frame's, its references' noise, the blank's, the references' own."""
    random = np.random.default_rng(job.seed)
    shape = (4, job.height_px // 8, job.width_px // 8)

    def normal(*sides: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(sides, dtype=np.float32))

    start, noise = normal(*shape), normal(*shape)
    if not job.references:
        return Numbers(start, noise, torch.empty(0), torch.empty(0))
    return Numbers(start, noise, normal(1, *shape)[0], normal(len(job.references), *shape))


@torch.no_grad()
def by_hand(reference: StoryGen, job: Sketch, stage: Stage = "auto-regressive") -> Tensor:
    pictures = [torch.from_numpy(seen.pixels).permute(2, 0, 1) / 255 for seen in job.references]
    return reference.draw(
        prompt_ids=ids(job.description),
        empty_ids=ids(""),
        previous_ids=[ids(seen.description) for seen in job.references],
        pictures_N3HW=torch.stack(pictures) if pictures else torch.empty(0),
        numbers=numbers_of(job),
        steps=job.steps,
        text_scale=job.text_guidance,
        image_scale=job.image_guidance,
        stage=stage,
    )


def drawn(model: FrameModel, *jobs: Sketch) -> list[Drawing]:
    drawings = [begin(model, job) for job in jobs]
    while unfinished := [drawing for drawing in drawings if not drawing.finished]:
        advance(model, unfinished)
    return drawings


@torch.no_grad()
def test_texts_and_pictures_are_what_it_makes_of_them(both: Both) -> None:
    model, reference = both
    texts = ["a cat, the dog", ""]
    expected = torch.cat([reference.clip(ids(text)[None], None) for text in texts])
    torch.testing.assert_close(model.text.encode(texts), expected, atol=1e-5, rtol=0.0)
    pixels = torch.rand(2, 3, 64, 40, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(2, 4, 8, 5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model.codec.encode_references(pixels, noise), reference.encode(pixels, noise), **CLOSE)
    blank = reference.encode(torch.zeros(1, 3, 64, 40), noise[:1])
    torch.testing.assert_close(model.codec.encode_blank(64, 40, noise[:1]), blank, **CLOSE)


@pytest.mark.parametrize("size", [(8, 8), (5, 9)])
@torch.no_grad()
def test_every_block_leaves_the_same_and_one_call_answers_the_same(both: Both, size: tuple[int, int]) -> None:
    model, reference = both
    unet: Any = model.denoiser.unet
    generator = torch.Generator().manual_seed(4)
    earlier, latents = (torch.randn(2, 4, *size, generator=generator) for _ in range(2))
    text = torch.randn(2, 77, 32, generator=generator)
    features = unet.features(earlier, torch.tensor([37, 37]), text)
    reference.call(earlier, 37, text)
    left = reference.left
    assert features.keys() == left.keys()
    assert len(left) == 4
    for name, value in left.items():
        torch.testing.assert_close(features[name], value, atol=1e-5, rtol=0.0)
    both_of_them = {name: torch.cat([value[:1], value[1:]], dim=1) for name, value in left.items()}
    alone = reference.call(latents[:1], 370, text[:1])
    looking = reference.call(latents[:1], 370, text[:1], both_of_them)
    t = torch.tensor([370])
    torch.testing.assert_close(unet.predict(latents[:1], t, text[:1]), alone, atol=1e-5, rtol=0.0)
    found = unet.predict(latents[:1], t, text[:1], References(unet.project(features), torch.tensor([[0, 1]])))
    torch.testing.assert_close(found, looking, atol=2e-5, rtol=0.0)
    assert (looking - alone).abs().max() > 0.1, "what it looks at counts"


@pytest.mark.parametrize(("width_px", "height_px"), [(64, 64), (72, 40)])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_frame_is_that_of_the_second_implementation(both: Both, count: int, width_px: int, height_px: int) -> None:
    job = sketch(count, width_px, height_px)
    (drawing,) = drawn(both.model, job)
    expected = by_hand(both.reference, job)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(drawing.latents_CHW, expected, **CLOSE)


def test_references_that_are_all_as_near_are_the_other_stage(both: Both) -> None:
    job = sketch(3)
    alike = [Seen(pixels=seen.pixels, description=seen.description, distance=1) for seen in job.references]
    (drawing,) = drawn(both.model, sketch(3, references=tuple(alike)))
    expected = by_hand(both.reference, job, "multi-image-condition")
    torch.testing.assert_close(drawing.latents_CHW, expected, **CLOSE)
    assert (expected - by_hand(both.reference, job)).abs().max() > 1e-2


@pytest.mark.parametrize(("image_scale", "text_scale"), [(0.0, 1.0), (1.0, 0.5), (2.0, 2.0)])
def test_guidance_at_its_corners(both: Both, image_scale: float, text_scale: float) -> None:
    job = sketch(2, image_guidance=image_scale, text_guidance=text_scale)
    (drawing,) = drawn(both.model, job)
    torch.testing.assert_close(drawing.latents_CHW, by_hand(both.reference, job), **CLOSE)


def test_a_batch_of_stories_is_drawn_as_each_alone(both: Both) -> None:
    """The published pipeline takes one prompt a call."""
    jobs = [sketch(count, seed=20 + count, steps=steps) for count, steps in ((0, 5), (3, 4), (1, 8), (2, 4))]
    for job, drawing in zip(jobs, drawn(both.model, *jobs), strict=True):
        torch.testing.assert_close(drawing.latents_CHW, by_hand(both.reference, job), **CLOSE)


@torch.no_grad()
def test_an_edit_begins_in_the_range_of_pictures_that_are_drawn(both: Both) -> None:
    """−1 to 1, whatever range references are seen in."""
    pixels = np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    job = sketch(0, edit=Edit(pixels=pixels, strength=0.5))
    random = np.random.default_rng(job.seed)
    start, _, own = (torch.from_numpy(random.standard_normal((1, 4, 8, 8), dtype=np.float32)) for _ in range(3))
    values = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 * 2 - 1
    level = ddim_levels()[251]  # of the third of four steps
    expected = level.sqrt() * both.reference.encode(values, own) + (1 - level).sqrt() * start
    torch.testing.assert_close(begin(both.model, job).latents_CHW, expected[0].float(), **CLOSE)


def test_golden_numbers(both: Both) -> None:
    """Some latents of the second implementation, as it gave them when this was written."""
    assert by_hand(both.reference, sketch(2))[0, 2, :5].tolist() == pytest.approx(GOLDEN, abs=5e-3)
