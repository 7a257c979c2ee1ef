"""Sampling, against a straight-line re-derivation of the published algorithm that shares no code with ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from services.models import tiny, toon
from services.models.denoiser import (
    Dropout,
    Dropped,
    Example,
    StoryDenoiser,
    Unconditional,
    apply_dropout,
    guidance,
    reference_level,
    reference_levels,
)
from services.models.drawing import (
    Edit,
    Randomness,
    Seen,
    Sketch,
    Start,
    are_sound,
    begin,
    begin_together,
    finish,
    preview,
    rows_of_a_frame,
)
from services.models.references import ReferencePolicy
from services.models.registry import FrameModel
from services.models.samplers import SAMPLERS
from services.models.schedule import Schedule, ScheduleConfig
from services.models.step import advance, draw
from services.models.storygen import References
from services.models.text_encoder import TextEncoder
from services.models.vae import Codec

SIZE_PX = 32  # 4×4 latents
LATENT = (4, SIZE_PX // 8, SIZE_PX // 8)


def sketch(count: int, *, seed: int = 7, **changes: Any) -> Sketch:
    """A small job with `count` references."""
    random = np.random.default_rng(1000 + seed)
    references = tuple(
        Seen(pixels=random.integers(0, 256, (SIZE_PX, SIZE_PX, 3), dtype=np.uint8), description=f"frame {i}")
        for i in range(count)
    )
    base = Sketch(
        description=f"a hare with a kite, {seed}",
        seed=seed,
        width_px=SIZE_PX,
        height_px=SIZE_PX,
        steps=5,
        text_guidance=7.0,
        image_guidance=3.5,
        references=references,
    )
    return replace(base, **changes)


def with_schedule(model: FrameModel, config: ScheduleConfig, sampler: str = "ddim") -> FrameModel:
    denoiser = StoryDenoiser(model.denoiser.unet, Schedule(config))
    manifest = model.manifest.model_copy(update={"schedule": config})
    return replace(model, denoiser=denoiser, manifest=manifest, sampler=SAMPLERS[sampler])


class PublishedUNet:
    """The published network, from diffusers' own blocks: features kept in and read from one dictionary."""

    def __init__(self, model: FrameModel) -> None:
        state = model.denoiser.unet.state_dict()
        self.features: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] | None = None
        self.unet: Any = UNet2DConditionModel(**tiny.UNET.to_dict()).eval()
        self.unet.load_state_dict({k: v for k, v in state.items() if ".attn3." not in k and ".norm4." not in k})
        for name, block in self.unet.named_modules():
            if isinstance(block, BasicTransformerBlock):
                block.forward = self._forward(name, block, {k: v for k, v in state.items() if k.startswith(name)})

    def _forward(self, name: str, block: Any, state: dict[str, Tensor]) -> Any:
        def linear(x: Tensor, part: str) -> Tensor:
            return torch.nn.functional.linear(x, state[f"{name}.{part}.weight"], state.get(f"{name}.{part}.bias"))

        def forward(hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
            h = block.attn1(block.norm1(hidden_states)) + hidden_states
            self.features[name] = h.clone()
            h_t = block.attn2(block.norm2(h), encoder_hidden_states=encoder_hidden_states) + h
            if self.seen is not None:
                norm4 = torch.nn.functional.layer_norm(
                    h, h.shape[-1:], state[f"{name}.norm4.weight"], state[f"{name}.norm4.bias"]
                )
                context, heads = self.seen[name], block.attn1.heads
                q, k, v = (
                    linear(x, f"attn3.{part}").unflatten(-1, (heads, -1)).transpose(1, 2)
                    for part, x in (("to_q", norm4), ("to_k", context), ("to_v", context))
                )
                weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
                h_i = linear((weights @ v).transpose(1, 2).flatten(2), "attn3.to_out.0") + h
                h_t = h_t + h_i
            return block.ff(block.norm3(h_t)) + h_t

        return forward

    def __call__(self, latents: Tensor, t: int, text: Tensor, seen: dict[str, Tensor] | None) -> Tensor:
        self.features, self.seen = {}, seen
        answer: Tensor = self.unet(latents, t, text).sample
        return answer


@torch.no_grad()
def published_latents(
    model: FrameModel, job: Sketch, scheduler: DDIMScheduler, stage: str = "auto-regressive"
) -> Tensor:
    """The published algorithm as written down: three rows everywhere, a call per reference, one noise for all."""
    unet, vae = PublishedUNet(model), model.codec.vae
    scale = torch.tensor(model.manifest.latents.scale)[:, None, None]
    shift = torch.tensor(model.manifest.latents.shift)[:, None, None]
    random = np.random.default_rng(job.seed)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape, dtype=np.float32))

    n = len(job.references)
    latents, noise = normal(*LATENT)[None], normal(*LATENT)[None]
    if n:
        posterior = vae.encode(torch.zeros(1, 3, SIZE_PX, SIZE_PX)).latent_dist
        zero = (posterior.mean + posterior.std * normal(1, *LATENT) - shift) * scale
        pixels = torch.stack([torch.from_numpy(r.pixels) for r in job.references]).permute(0, 3, 1, 2) / 255 * 2 - 1
        posterior = vae.encode(pixels).latent_dist
        images = (posterior.mean + posterior.std * normal(n, *LATENT) - shift) * scale
    uncond, prompt = model.text.encode([""]), model.text.encode([job.description])
    previous = [model.text.encode([r.description]) for r in job.references]

    scheduler.set_timesteps(job.steps)
    for t in scheduler.timesteps:
        ref_t = int(t) // 10
        seen: dict[str, Tensor] | None = None
        if n:
            passes = []
            for i in range(n):
                tau = torch.tensor([ref_t * (n - i) if stage == "auto-regressive" else ref_t])
                noisy_image = scheduler.add_noise(images[i : i + 1], noise, tau)
                noisy_zero = scheduler.add_noise(zero, noise, tau)
                unet(
                    torch.cat([noisy_zero, noisy_image, noisy_image]),
                    int(tau),
                    torch.cat([uncond, previous[i], previous[i]]),
                    None,
                )
                passes.append(unet.features)
            seen = {key: torch.cat([p[key] for p in passes], dim=1) for key in passes[0]}
        answers = unet(torch.cat([latents] * 3), int(t), torch.cat([uncond, uncond, prompt]), seen)
        e_u, e_img, e_all = answers.chunk(3)
        answer = e_u + job.image_guidance * (e_img - e_u) + job.text_guidance * (e_all - e_img)
        latents = scheduler.step(answer, t, latents).prev_sample
    return latents[0]


PUBLISHED = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    set_alpha_to_one=False,
    clip_sample=False,
)
OURS = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
)


@pytest.mark.parametrize(
    ("config", "theirs"), [(ScheduleConfig(), PUBLISHED), (toon.SCHEDULE, OURS)], ids=["sd", "toon"]
)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8])
def test_latents_are_those_of_the_published_algorithm(
    tiny_model: FrameModel, config: ScheduleConfig, theirs: DDIMScheduler, count: int
) -> None:
    model = with_schedule(tiny_model, config)
    job = sketch(count)
    drawing = begin(model, job)
    while not drawing.finished:
        advance(model, [drawing])
    expected = published_latents(model, job, theirs)
    assert expected.abs().max() > 0.5  # not a comparison of nothing with nothing
    torch.testing.assert_close(drawing.latents_CHW, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_references_that_are_all_as_near_are_the_multi_image_condition(tiny_model: FrameModel, count: int) -> None:
    model, job = with_schedule(tiny_model, ScheduleConfig()), sketch(count)
    alike = replace(job, references=tuple(replace(seen, distance=1) for seen in job.references))
    drawing = begin(model, alike)
    while not drawing.finished:
        advance(model, [drawing])
    expected = published_latents(model, job, PUBLISHED, "multi-image-condition")
    torch.testing.assert_close(drawing.latents_CHW, expected, atol=1e-4, rtol=1e-4)
    by_place = published_latents(model, job, PUBLISHED)
    assert torch.allclose(expected, by_place, atol=1e-4) == (count == 1)  # with one there is nothing to weigh


@pytest.mark.parametrize("scales", [(0.0, 1.0), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (1.0, 5.0), (2.0, 2.0), (0.0, 5.0)])
def test_guidance_corner_cases_are_the_same_formula(tiny_model: FrameModel, scales: tuple[float, float]) -> None:
    job = sketch(2, image_guidance=scales[0], text_guidance=scales[1], steps=4)
    drawing = begin(tiny_model, job)
    while not drawing.finished:
        advance(tiny_model, [drawing])
    torch.testing.assert_close(drawing.latents_CHW, published_latents(tiny_model, job, OURS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("count", "image_scale", "text_scale", "rows"),
    [
        (3, 3.5, 7.0, 9),
        (3, 1.0, 7.0, 5),
        (3, 2.0, 2.0, 8),
        (1, 3.5, 7.0, 5),
        (1, 1.0, 2.0, 3),
        (0, 3.5, 7.0, 2),
        (0, 1.0, 1.0, 1),
    ],
)
def test_a_step_computes_no_row_twice_and_none_that_counts_nothing(
    tiny_model: FrameModel, count: int, image_scale: float, text_scale: float, rows: int
) -> None:
    job = sketch(count, image_guidance=image_scale, text_guidance=text_scale)
    drawing = begin(tiny_model, job)
    computed: list[int] = []
    handle = tiny_model.denoiser.unet.conv_in.register_forward_hook(lambda _m, args, _o: computed.append(len(args[0])))
    try:
        advance(tiny_model, [drawing])
    finally:
        handle.remove()
    assert sum(computed) == rows == rows_of_a_frame(job) / job.steps


def test_guidance_branches_sum_to_one_and_give_the_published_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    e_u, e_img, e_all = torch.randn(3, 16, generator=generator)
    for s_i, s_t in ((3.5, 7.0), (0.0, 0.5), (1.0, 1.0)):
        b = guidance(s_i, s_t, has_references=True)
        assert b.nothing + b.images + b.everything == pytest.approx(1.0)
        published = e_u + s_i * (e_img - e_u) + s_t * (e_all - e_img)
        torch.testing.assert_close(b.nothing * e_u + b.images * e_img + b.everything * e_all, published)
        plain = guidance(s_i, s_t, has_references=False)
        assert plain.images == 0.0
        torch.testing.assert_close(plain.nothing * e_u + plain.everything * e_all, e_u + s_t * (e_all - e_u))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_newest_reference_is_always_the_clearest(count: int) -> None:
    levels = reference_levels(torch.tensor([999, 976, 25, 9, 0]), count)
    assert levels.shape == (5, count)
    assert levels[:, -1].tolist() == [99, 97, 2, 0, 0]
    assert levels[0].tolist() == [99 * distance for distance in range(count, 0, -1)]
    assert [reference_level(976, distance) for distance in range(count, 0, -1)] == levels[1].tolist()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_frame_does_not_depend_on_its_neighbours(tiny_model: FrameModel, count: int) -> None:
    """The latents move by float32 rounding only (1e-4 of a unit-variance latent), a pixel by at most one level."""
    alone = begin(tiny_model, sketch(count))
    others = [begin(tiny_model, sketch(n, seed=50 + n, steps=7)) for n in (2, 0, 3, 1)]
    advance(tiny_model, others[:2])  # a neighbour that is further along
    together = begin(tiny_model, sketch(count))
    while not alone.finished:
        advance(tiny_model, [alone])
        advance(tiny_model, [others[1], together, *others[2:]])
    torch.testing.assert_close(together.latents_CHW, alone.latents_CHW, atol=1e-4, rtol=1e-4)
    levels = np.abs(finish(tiny_model, [together])[0].astype(int) - finish(tiny_model, [alone])[0].astype(int))
    assert levels.max() <= 1


def test_same_sketch_same_pixels_whatever_happened_before(tiny_model: FrameModel) -> None:
    first = draw(tiny_model, sketch(2))
    torch.manual_seed(123)
    np.random.seed(5)
    draw(tiny_model, sketch(1, seed=99))
    assert np.array_equal(first, draw(tiny_model, sketch(2)))


@pytest.mark.parametrize("seed", [8, 7 + 2**32, 2**64 - 1])
def test_another_seed_is_another_picture(tiny_model: FrameModel, seed: int) -> None:
    base = sketch(1)
    assert not np.array_equal(draw(tiny_model, base), draw(tiny_model, replace(base, seed=seed)))


def test_noise_is_a_fact_about_the_seed() -> None:
    """Golden numbers: stored seeds must give the same pictures next year. numpy keeps this stream within a version."""
    assert Randomness(7).normal(3).tolist() == pytest.approx([1.5219693, -1.1441058, 1.1501616], abs=1e-6)


def test_references_change_the_picture_and_their_order_does_too(tiny_model: FrameModel) -> None:
    job = sketch(2)
    swapped = replace(job, references=job.references[::-1])
    pictures = [draw(tiny_model, j) for j in (job, swapped, replace(job, references=()))]
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_mean_latents_use_no_noise(tiny_model: FrameModel) -> None:
    from services.models.vae import Codec

    model = replace(tiny_model, codec=Codec(tiny_model.codec.vae, tiny_model.manifest.latents, sample_latents=False))
    one, two = begin(model, sketch(1)), begin(model, replace(sketch(1), seed=8))
    assert torch.equal(one.reference_latents_NCHW, two.reference_latents_NCHW)
    sampled = begin(tiny_model, sketch(1)), begin(tiny_model, replace(sketch(1), seed=8))
    assert not torch.equal(sampled[0].reference_latents_NCHW, sampled[1].reference_latents_NCHW)


def test_reference_range_is_the_manifests(tiny_model: FrameModel) -> None:
    from services.models.vae import Codec

    unit = Codec(tiny_model.codec.vae, tiny_model.manifest.latents, reference_range="unit")
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(unit.encode_references(pixels), unit.encode(pixels * 0.5 + 0.5))
        torch.testing.assert_close(tiny_model.codec.encode_references(pixels), tiny_model.codec.encode(pixels))
        # "No picture" is zero after the range is applied: black for one, mid-grey for the other.
        torch.testing.assert_close(unit.encode_blank(32, 32), unit.encode_references(torch.zeros(1, 3, 32, 32)))
        grey = tiny_model.codec.encode_references(torch.full((1, 3, 32, 32), 0.5))
        torch.testing.assert_close(tiny_model.codec.encode_blank(32, 32), grey)


def test_preview_is_small_and_of_the_frame(tiny_model: FrameModel) -> None:
    drawing = begin(tiny_model, sketch(0, width_px=64))
    advance(tiny_model, [drawing])
    assert preview(tiny_model, drawing).shape == (32, 64, 3)
    assert preview(tiny_model, drawing, max_px=32).shape == (16, 32, 3)


def unlike_starts(width: int) -> list[Start]:
    """One of everything that the beginning of a drawing depends on."""
    large = tuple(Seen(pixels=np.full((64, 64, 3), 9, np.uint8), description=f"large {n}") for n in range(2))
    edit = Edit(pixels=np.full((SIZE_PX, SIZE_PX, 3), 200, np.uint8))
    return [
        Start(sketch=sketch(2, seed=1), tenant="a"),
        Start(sketch=sketch(0, seed=2)),
        Start(sketch=sketch(2, seed=3, width_px=64, height_px=64, references=large), tenant="b"),
        Start(sketch=sketch(1, seed=4, policy=ReferencePolicy(shared_noise=True))),
        Start(sketch=sketch(1, seed=5, description="a zig"), words={"zig": torch.full((2, width), 0.5)}),
        Start(sketch=sketch(1, seed=6, edit=edit)),
    ]


def test_drawings_that_begin_together_are_what_they_are_alone(
    tiny_model: FrameModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = unlike_starts(tiny_model.text.width)
    for encoded_px in (1, 1 << 20):  # each picture alone; all of one size together
        monkeypatch.setattr("services.models.drawing._ENCODED_PX", encoded_px)
        for start, one in zip(starts, begin_together(tiny_model, starts), strict=True):
            [alone] = begin_together(tiny_model, [start])
            for name, value in vars(alone).items():
                if isinstance(value, torch.Tensor):
                    torch.testing.assert_close(getattr(one, name), value, atol=1e-5, rtol=1e-5)
                elif name == "told":
                    assert len(value) == len(one.told) == 2 + len(start.sketch.references)
                    for told, other in zip(value, one.told, strict=True):
                        torch.testing.assert_close(dict(told), dict(other), atol=1e-5, rtol=1e-5)
                else:
                    assert getattr(one, name) == value


def test_drawings_that_begin_together_share_their_passes(
    tiny_model: FrameModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[list[str]] = []
    pictures: list[tuple[int, ...]] = []
    read, see = TextEncoder.encode, Codec.encode_references

    def reading(text: TextEncoder, said: Sequence[str], *more: Any) -> torch.Tensor:
        texts.append(list(said))
        return read(text, said, *more)

    def seeing(codec: Codec, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        pictures.append(tuple(pixels.shape))
        return see(codec, pixels, noise)

    monkeypatch.setattr(TextEncoder, "encode", reading)
    monkeypatch.setattr(Codec, "encode_references", seeing)
    begin_together(tiny_model, unlike_starts(tiny_model.text.width))
    shared, own = texts
    assert len(shared) == len(set(shared)), "each text is read once"
    assert own == ["", "a zig", "frame 0"], "a learned word makes it another encoder"
    # The blank and the earlier frames: 3 + 2 + 2 + 2 small ones, and 3 large ones.
    assert sorted(pictures) == [(3, 3, 64, 64), (9, 3, 32, 32)]


def test_no_more_texts_and_pictures_at_once_than_there_is_room_for(
    tiny_model: FrameModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.models.drawing._POSITIONS_TOGETHER", 2 * tiny_model.text.window)
    monkeypatch.setattr("services.models.drawing._ENCODED_PX", 2 * SIZE_PX * SIZE_PX)
    rows: list[int] = []
    read, see = TextEncoder.encode, Codec.encode_references
    monkeypatch.setattr(
        TextEncoder, "encode", lambda text, said, *more: (rows.append(len(said)), read(text, said, *more))[1]
    )
    monkeypatch.setattr(
        Codec, "encode_references", lambda codec, some, noise: (rows.append(len(some)), see(codec, some, noise))[1]
    )
    begin_together(tiny_model, [Start(sketch=sketch(2, seed=1)), Start(sketch=sketch(1, seed=2))])
    assert rows == [2, 2, 1, 2, 2, 1]


def test_drawings_of_unlike_sizes_are_decoded_as_alone(tiny_model: FrameModel, monkeypatch: pytest.MonkeyPatch) -> None:
    drawings = [begin(tiny_model, sketch(0, seed=s, width_px=w)) for s, w in ((1, 32), (2, 32), (3, 64), (4, 32))]
    alone = [finish(tiny_model, [one])[0] for one in drawings]
    sizes: list[tuple[int, ...]] = []
    decode = Codec.decode

    def counted(codec: Codec, latents: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(latents.shape))
        return decode(codec, latents)

    monkeypatch.setattr(Codec, "decode", counted)
    for one, other in zip(finish(tiny_model, drawings), alone, strict=True):
        assert one.shape == other.shape
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    assert [(count, width) for count, _, _, width in sizes] == [(2, 4), (1, 8), (1, 4)]
    sizes.clear()
    monkeypatch.setattr("services.models.drawing._DECODED_PX", 2 * 32 * 32)
    finish(tiny_model, [drawings[0]] * 5)
    assert [count for count, *_ in sizes] == [2, 2, 1], "no more at once than there is room for"


def test_a_drawing_with_broken_numbers_says_so_and_does_not_hurt_its_neighbour(tiny_model: FrameModel) -> None:
    sick, well, alone = (begin(tiny_model, sketch(1, seed=s)) for s in (1, 2, 2))
    sick.latents_CHW = torch.full(LATENT, float("nan"))
    advance(tiny_model, [sick, well])
    advance(tiny_model, [alone])
    assert are_sound([sick, well]) == [False, True]
    torch.testing.assert_close(well.latents_CHW, alone.latents_CHW, atol=1e-5, rtol=1e-5)


def test_an_earlier_frame_with_broken_numbers_hurts_nobody_who_sees_fewer(tiny_model: FrameModel) -> None:
    sick, well, alone = begin(tiny_model, sketch(2, seed=1)), *(begin(tiny_model, sketch(1, seed=2)) for _ in range(2))
    sick.reference_latents_NCHW = torch.full_like(sick.reference_latents_NCHW, float("nan"))
    advance(tiny_model, [sick, well])
    advance(tiny_model, [alone])
    assert are_sound([sick, well]) == [False, True]
    torch.testing.assert_close(well.latents_CHW, alone.latents_CHW, atol=1e-5, rtol=1e-5)


def test_nothing_changes_when_a_step_fails(tiny_model: FrameModel, monkeypatch: pytest.MonkeyPatch) -> None:
    drawings = [begin(tiny_model, sketch(0, seed=s)) for s in (1, 2)]
    before = [d.latents_CHW.clone() for d in drawings]
    calls = 0

    def fails_second(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("no memory")
        return SAMPLERS["ddim"](*args)

    with pytest.raises(RuntimeError):
        advance(replace(tiny_model, sampler=fails_second), drawings)
    assert [d.done for d in drawings] == [0, 0]
    assert all(torch.equal(d.latents_CHW, b) for d, b in zip(drawings, before, strict=True))


def example(present: list[list[bool]]) -> Example:
    generator = torch.Generator().manual_seed(3)
    b, n = len(present), len(present[0])
    return Example(
        latents_BCHW=torch.randn(b, *LATENT, generator=generator),
        text_BSD=torch.randn(b, 6, 16, generator=generator),
        reference_latents_BNCHW=torch.randn(b, n, *LATENT, generator=generator),
        reference_text_BNSD=torch.randn(b, n, 6, 16, generator=generator),
        present_BN=torch.tensor(present),
    )


def test_training_loss_is_the_sampling_formula(tiny_model: FrameModel) -> None:
    """One row at a time by hand: references at their levels, one noise for all, target of the schedule."""
    denoiser = tiny_model.denoiser
    batch = example([[False, False, True], [True, True, True], [False, False, False]])
    t = torch.tensor([950, 437, 12])
    noise, reference_noise = torch.randn(2, 3, *LATENT, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        losses = denoiser.loss(batch, timesteps_B=t, noise_BCHW=noise, reference_noise_BCHW=reference_noise)
        for row, count in enumerate((1, 3, 0)):
            references = None
            if count:
                levels = torch.tensor([int(t[row]) // 10 * d for d in range(count, 0, -1)])
                noisy = denoiser.schedule.add_noise(
                    batch.reference_latents_BNCHW[row, 3 - count :], reference_noise[row].expand(count, *LATENT), levels
                )
                features = denoiser.unet.features(noisy, levels, batch.reference_text_BNSD[row, 3 - count :])
                references = References(denoiser.unet.project(features), torch.arange(count)[None])
            noisy = denoiser.schedule.add_noise(batch.latents_BCHW[row], noise[row], t[row])
            answer = denoiser.unet.predict(noisy[None], t[row : row + 1], batch.text_BSD[row : row + 1], references)[0]
            target = denoiser.schedule.target(batch.latents_BCHW[row], noise[row], t[row])
            assert losses[row].item() == pytest.approx((answer - target).square().mean().item(), rel=1e-4)


def test_dropout_shows_the_network_what_guidance_will(tiny_model: FrameModel) -> None:
    batch = example([[True, True], [True, True], [True, True], [True, True]])
    nothing = Unconditional(text_SD=torch.full((6, 16), 9.0), blank_CHW=torch.full(LATENT, 8.0))
    rows = torch.eye(4, dtype=torch.bool)
    out = apply_dropout(batch, Dropped(text_B=rows[0], references_B=rows[1], no_references_B=rows[2]), nothing)
    assert (out.text_BSD[0] == 9.0).all()
    assert torch.equal(out.text_BSD[1:], batch.text_BSD[1:])
    assert (out.reference_latents_BNCHW[1] == 8.0).all()
    assert (out.reference_text_BNSD[1] == 9.0).all()
    assert torch.equal(out.reference_latents_BNCHW[[0, 2, 3]], batch.reference_latents_BNCHW[[0, 2, 3]])
    assert out.present_BN.tolist() == [[True, True], [True, True], [False, False], [True, True]]


def test_dropout_happens_as_often_as_it_says() -> None:
    drawn = Dropout(text=0.05, references=0.2, no_references=0.5).draw(20_000, torch.Generator().manual_seed(0))
    assert drawn.text_B.float().mean().item() == pytest.approx(0.05, abs=0.01)
    assert drawn.references_B.float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert drawn.no_references_B.float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_loss_refuses_to_drop_without_knowing_what_nothing_is(tiny_model: FrameModel) -> None:
    dropped = Dropout().draw(1, torch.Generator())
    zeros = torch.zeros(1, *LATENT)
    with pytest.raises(ValueError, match="unconditional"):
        tiny_model.denoiser.loss(
            example([[True]]),
            timesteps_B=torch.tensor([5]),
            noise_BCHW=zeros,
            reference_noise_BCHW=zeros,
            dropped=dropped,
        )


def test_reference_passes_give_no_gradient_and_every_parameter_learns() -> None:
    torch.manual_seed(0)
    from services.models.storygen import build_storygen

    unet = build_storygen(tiny.UNET)
    batch = example([[True, True]])
    batch = replace(batch, reference_latents_BNCHW=batch.reference_latents_BNCHW.requires_grad_())
    noise = torch.randn(2, 1, *LATENT)
    loss = StoryDenoiser(unet, Schedule(toon.SCHEDULE)).loss(
        batch, timesteps_B=torch.tensor([500]), noise_BCHW=noise[0], reference_noise_BCHW=noise[1]
    )
    loss.mean().backward()
    assert batch.reference_latents_BNCHW.grad is None
    assert all(p.grad is not None for p in unet.parameters())


def test_golden_latents_of_the_tiny_pack(tiny_model: FrameModel) -> None:
    """No change intended means these numbers: random weights of seed 0, two references, four steps."""
    drawing = begin(tiny_model, sketch(2, steps=4))
    while not drawing.finished:
        advance(tiny_model, [drawing])
    found = [*drawing.latents_CHW[:, 1, 2].tolist(), drawing.latents_CHW.std().item()]
    assert found == pytest.approx([0.31881, -0.75126, -0.55898, 0.5563, 0.93778], abs=2e-3)


def test_deep_states_are_used_again_in_the_steps_between(tiny_model: FrameModel) -> None:
    job = sketch(2, steps=5, deep_every=2)
    drawing, counts = begin(tiny_model, job), []
    while not drawing.finished:
        taken = advance(tiny_model, [drawing])
        counts.append((taken.main, taken.shallow))
    assert counts == [(3, 0), (3, 3), (3, 0), (3, 3), (3, 0)]
    whole = draw(tiny_model, replace(job, deep_every=1)).astype(int)
    assert not np.array_equal(finish(tiny_model, [drawing])[0], whole)


def test_every_drawing_counts_its_own_steps(tiny_model: FrameModel) -> None:
    """Whoever joins late is drawn as alone, beside rows that are at another place of their turn."""
    first, late, all_of_it = sketch(1, deep_every=2), sketch(2, seed=8, deep_every=3), sketch(1, seed=9)
    drawings = [begin(tiny_model, first)]
    advance(tiny_model, drawings)
    drawings += [begin(tiny_model, late), begin(tiny_model, all_of_it)]
    mixed = 0
    while unfinished := [one for one in drawings if not one.finished]:
        taken = advance(tiny_model, unfinished)
        mixed += 0 < taken.shallow < taken.main
    assert mixed >= 3
    for one in drawings:
        difference = finish(tiny_model, [one])[0].astype(int) - draw(tiny_model, one.sketch)
        assert np.abs(difference).max() <= 1


def test_a_branch_that_begins_to_count_computes_its_own_deep_states(tiny_model: FrameModel) -> None:
    """Guidance that sets in at a step that reuses has nothing to reuse."""
    drawing = begin(tiny_model, sketch(1, steps=4, deep_every=4, guidance_interval=(0.25, 1.0)))
    counts = []
    while not drawing.finished:
        taken = advance(tiny_model, [drawing])
        counts.append((taken.main, taken.shallow))
    assert counts == [(1, 0), (3, 1), (3, 3), (3, 3)]
