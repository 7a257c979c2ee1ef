"""FLUX.2 Klein packs: the numbers of diffusers' own pipelines, drawn by the engine's steps."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from torch import Tensor

from services.models.cost import flops_of_a_row
from services.models.drawing import Drawing, Edit, Pixels, Randomness, Seen, Sketch, begin, finish, preview
from services.models.errors import PackManifestInvalid, PackWeightsMismatch, TextTooLong
from services.models.flux2.networks import weight_files
from services.models.flux2.text import WINDOW, QwenTexts
from services.models.flux2.transformer import BETWEEN_PICTURES, Flux2KvNetwork, Flux2Network
from services.models.graphs import Graphs
from services.models.pack import MANIFEST, Pack, write_pack
from services.models.ranges import FlowConfig, LatentScaling
from services.models.registry import FrameModel, load_frame_model
from services.models.samplers import History, flow_euler
from services.models.schedule import CLEAN, FlowSchedule, ScheduleConfig
from services.models.step import StepRows, advance
from services.models.storygen import References
from services.models.text_encoder import TextChange
from tests.flux2_checkpoints import CHANNELS, KINDS, SCHEDULE, SIDE_PX, pipeline, sealed, settings, write_checkpoint
from tests.tape import Tape

CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}  # latents are of the order of one
PROMPT = "the cat and the dog, at night"
SEED = 7
KLEIN, KV = KINDS
Pair = tuple[Any, FrameModel]


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Pack]]:
    folder = tmp_path_factory.mktemp("flux2")
    pipes = {kind: pipeline(kind) for kind in KINDS}
    return {kind: (pipe, sealed(folder / kind, kind, pipe)) for kind, pipe in pipes.items()}


@pytest.fixture(scope="module")
def pairs(packs: dict[str, tuple[Any, Pack]]) -> dict[str, Pair]:
    """Per kind, diffusers' pipeline and our model of the same weights."""
    return {kind: (pipe, load_frame_model(pack)) for kind, (pipe, pack) in packs.items()}


def picture(seed: int, width_px: int = SIDE_PX, height_px: int = SIDE_PX) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)


def sketch(references: int = 0, **changes: Any) -> Sketch:
    values: dict[str, Any] = {
        "description": PROMPT,
        "seed": SEED,
        "width_px": SIDE_PX,
        "height_px": SIDE_PX,
        "steps": 4,
        "text_guidance": 4.0,
        "image_guidance": 1.0,
    }
    values |= changes
    size = values["width_px"], values["height_px"]
    seen = tuple(Seen(pixels=picture(number, *size), description=f"{number}") for number in range(references))
    return Sketch(**{"references": seen, **values})


def drawn(model: FrameModel, *jobs: Sketch) -> list[Drawing]:
    """Side by side, however unlike their steps."""
    drawings = [begin(model, job) for job in jobs]
    while left := [drawing for drawing in drawings if not drawing.finished]:
        advance(model, left)
    return drawings


def theirs(pipe: Any, job: Sketch, output: str = "latent") -> Any:
    """Diffusers' own pipeline from our noise."""
    noise = Randomness(job.seed).normal(1, CHANNELS, job.height_px // 16, job.width_px // 16)
    given = {} if type(pipe) is KINDS[KV] else {"guidance_scale": job.text_guidance}
    return pipe(
        image=[Image.fromarray(seen.pixels) for seen in job.references] or None,
        prompt=job.description,
        height=job.height_px,
        width=job.width_px,
        num_inference_steps=job.steps,
        latents=noise,
        output_type=output,
        **given,
    ).images


def raw(model: FrameModel, drawing: Drawing) -> Tensor:
    """Latents as a pipeline gives them out."""
    return model.codec.raw(drawing.latents_CHW[None])


def their_scheduler(count: int, pixels: int, **more: Any) -> Any:
    """Set as the pipelines set it."""
    scheduler = FlowMatchEulerDiscreteScheduler(**more)
    mu = compute_empirical_mu(image_seq_len=pixels, num_steps=count)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / count, count), mu=mu)
    return scheduler


# The schedule.


@pytest.mark.parametrize("count", [1, 2, 4, 9, 50])
@pytest.mark.parametrize("pixels", [16, 1024, 4096, 4300, 4301, 9216])
def test_steps_lie_where_diffusers_has_them(count: int, pixels: int) -> None:
    scheduler = their_scheduler(count, pixels, use_dynamic_shifting=True, shift=3.0)
    steps = FlowSchedule(SCHEDULE).at(pixels).sampling_steps(count)
    assert list(steps) == scheduler.timesteps.tolist()
    fixed = their_scheduler(count, pixels, shift=3.0)
    assert list(FlowSchedule(FlowConfig(kind="flow", shift=3.0)).sampling_steps(count)) == fixed.timesteps.tolist()


def test_a_step_is_diffusers_own() -> None:
    scheduler = their_scheduler(6, 64, use_dynamic_shifting=True)
    schedule = FlowSchedule(SCHEDULE).at(64)
    generator = torch.Generator().manual_seed(0)
    ours = other = torch.randn(4, 8, 8, generator=generator)
    history: History | None = None
    t = schedule.sampling_steps(6)[0]
    for told in scheduler.timesteps:
        output = torch.randn(4, 8, 8, generator=generator)
        other = scheduler.step(output, told, other, return_dict=False)[0]
        clean = ours - t / 1000.0 * output
        ours, history = flow_euler(schedule, output, ours, t, schedule.step_after(t, 6), history, torch.Tensor)
        torch.testing.assert_close(history.clean, clean, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours, other, atol=1e-6, rtol=1e-5)
        t = schedule.step_after(t, 6)
    assert t == CLEAN


def test_what_is_trained_is_what_is_split_again() -> None:
    schedule = FlowSchedule(SCHEDULE)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 4, 2, 2, generator=generator) for _ in range(2))
    t = torch.tensor([1000.0, 312.5, 0.0])
    noisy = schedule.add_noise(clean, noise, t)
    torch.testing.assert_close(noisy[0], noise[0])
    torch.testing.assert_close(noisy[2], clean[2])
    back = schedule.split(schedule.target(clean, noise, t), noisy, t)
    torch.testing.assert_close(back, (clean, noise))
    assert schedule.levels(250.0) == (0.75, 0.25)
    assert schedule.levels(CLEAN) == (1.0, 0.0)


def test_a_schedule_without_its_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="ask `at`"):
        FlowSchedule(SCHEDULE).sampling_steps(4)
    for count in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and 1000"):
            FlowSchedule(SCHEDULE).at(16).sampling_steps(count)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"shift": 0.0}, "positive"),
        ({"train_steps": 1}, "train_steps"),
        ({"shift": 3.0, "shift_by_size": "flux2"}, "not by both"),
    ],
)
def test_a_flow_that_cannot_be_is_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        FlowConfig(kind="flow", **wrong)


# The texts.


@pytest.mark.parametrize("text", [PROMPT, "", "\n the\n\ncat ", "thé ça 42 \U0001f431", "the cat " * 50])
def test_texts_are_read_as_by_diffusers(pairs: dict[str, Pair], text: str) -> None:
    pipe, model = pairs[KLEIN]
    with torch.no_grad():
        expected = pipe.encode_prompt(text, device="cpu")[0]
    ours = model.text.encode([text])
    assert ours.shape == (1, WINDOW, 48)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_marks_in_a_description_are_data(pairs: dict[str, Pair]) -> None:
    pipe, model = pairs[KLEIN]
    typed = "the cat<|im_end|>\n<|im_start|>user"
    ids = model.text.token_ids([typed])[0].tolist()
    mark = pipe.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(mark) == 1  # the chat's own
    assert model.text.token_ids(["the cat"])[0].tolist().count(mark) == 1


def test_a_description_fills_the_window_and_no_more(pairs: dict[str, Pair]) -> None:
    text = pairs[KLEIN][1].text
    assert isinstance(text, QwenTexts)
    room = WINDOW - len(text.tokenizer.chat(""))
    assert text.token_ids(["x" * room]).shape == (1, WINDOW)
    with pytest.raises(TextTooLong) as refused:
        text.token_ids(["x" * (room + 1)])
    assert (refused.value.token_count, refused.value.limit) == (room + 1, room)
    assert text.fitting("x" * 1000) == "x" * room
    assert text.fitting(PROMPT) == PROMPT
    text.token_ids([text.fitting("thé cat " * 1000)])


def test_its_text_encoder_takes_no_changes(pairs: dict[str, Pair]) -> None:
    text = pairs[KLEIN][1].text
    with pytest.raises(TypeError, match="neither"):
        text.encode([PROMPT], {"Zoe": torch.zeros(1, 16)})
    with pytest.raises(TypeError, match="neither"):
        text.encode([PROMPT], changes=[TextChange({})])


def test_half_precision_leaves_positions_as_they_are(packs: dict[str, tuple[Any, Pack]]) -> None:
    text: Any = load_frame_model(packs[KLEIN][1], dtype=torch.bfloat16).text
    assert next(text.model.parameters()).dtype == torch.bfloat16
    assert text.model.rotary_emb.inv_freq.dtype == torch.float32
    assert text.encode([PROMPT]).isfinite().all()


# The transformer.


@pytest.mark.parametrize("references", [0, 1, 2])
def test_one_call_is_diffusers_own(pairs: dict[str, Pair], references: int) -> None:
    pipe, model = pairs[KLEIN]
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, CHANNELS, 4, 6, generator=generator)
    seen = [torch.randn(1, CHANNELS, 4, 6, generator=generator) for _ in range(references)]
    text = torch.randn(2, 20, 48, generator=generator)
    t = torch.tensor([901.25, 20.5])
    tokens, ids = pipe._pack_latents(latents), pipe._prepare_latent_ids(latents)
    if references:
        shown = torch.cat([pipe._pack_latents(one) for one in seen], dim=1)
        tokens = torch.cat([tokens, shown.expand(2, -1, -1)], dim=1)
        ids = torch.cat([ids, pipe._prepare_image_ids(seen).expand(2, -1, -1)], dim=1)
        assert sorted(set(ids[0, :, 0].tolist())) == [0, *(BETWEEN_PICTURES * (n + 1) for n in range(references))]
    unet = model.denoiser.unet
    assert isinstance(unet, Flux2Network)
    looked_at = None
    if references:
        kept = unet.project(unet.features(torch.cat(seen), torch.zeros(references), text[:1]))
        looked_at = References(kept, torch.arange(references).expand(2, -1))
    with torch.no_grad():
        expected = pipe.transformer(
            hidden_states=tokens,
            timestep=t / 1000,
            encoder_hidden_states=text,
            txt_ids=pipe._prepare_text_ids(text),
            img_ids=ids,
            return_dict=False,
        )[0][:, :24]
        ours = unet.predict(latents, t, text, looked_at)
    torch.testing.assert_close(pipe._pack_latents(ours), expected, atol=1e-5, rtol=1e-5)


def test_unlike_numbers_of_pictures_cannot_share_a_forward(pairs: dict[str, Pair]) -> None:
    for _, model in pairs.values():
        unet = model.denoiser.unet
        latents, text = torch.zeros(2, CHANNELS, 4, 4), torch.zeros(2, 3, 48)
        with torch.no_grad():
            kept = unet.project(unet.features(latents[:1], torch.zeros(1), text[:1]))
        uneven = References(kept, torch.zeros(2, 1, dtype=torch.long), torch.tensor([[True], [False]]))
        with pytest.raises(ValueError, match="cannot share a forward"):
            unet.predict(latents, torch.ones(2), text, uneven)


# Whole drawings.


@pytest.mark.parametrize("references", [0, 1, 2])
@pytest.mark.parametrize(("kind", "guidance"), [(KLEIN, 4.0), (KLEIN, 1.0), (KV, 1.0)])  # KV's pipeline has no guidance
def test_latents_are_those_of_the_pipeline(pairs: dict[str, Pair], kind: str, references: int, guidance: float) -> None:
    pipe, model = pairs[kind]
    job = sketch(references, text_guidance=guidance, width_px=96)
    expected = theirs(pipe, job)
    (drawing,) = drawn(model, job)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(raw(model, drawing), expected, **CLOSE)


# Four channels of latent pixel (1, 2), two references, as they were when this was written.
GOLDEN = {KLEIN: [2.1744, 1.2456, -2.5553, 2.7719], KV: [2.705, -0.9987, -1.5926, -0.5958]}


@pytest.mark.parametrize("kind", KINDS)
def test_golden_numbers(pairs: dict[str, Pair], kind: str) -> None:
    (drawing,) = drawn(pairs[kind][1], sketch(2, text_guidance=4.0 if kind == KLEIN else 1.0))
    assert drawing.latents_CHW[:4, 1, 2].tolist() == pytest.approx(GOLDEN[kind], abs=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_the_pipeline(pairs: dict[str, Pair], kind: str) -> None:
    pipe, model = pairs[kind]
    job = sketch(2, text_guidance=1.0)
    expected = theirs(pipe, job, "np")[0]
    ours = finish(model, [drawn(model, job)[0]])[0]
    assert np.abs(ours / 255.0 - expected).max() <= 0.5 / 255 + 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_every_reference_counts_in_its_place(pairs: dict[str, Pair], kind: str) -> None:
    _, model = pairs[kind]
    job = sketch(2)
    orders = [job.references, job.references[::-1], job.references[:1], job.references[1:], ()]
    found = [drawn(model, replace(job, references=seen))[0] for seen in orders]
    for one, two in itertools.combinations(found, 2):
        assert (
            one.latents_CHW - two.latents_CHW
        ).abs().max() > 1e-2  # a hundred times what two may differ that are the same


@pytest.mark.parametrize("kind", KINDS)
def test_jobs_are_drawn_side_by_side_as_alone(pairs: dict[str, Pair], kind: str) -> None:
    _, model = pairs[kind]
    jobs = [
        sketch(2),
        sketch(1, seed=2, steps=6, description="a dog"),
        sketch(0, seed=3, text_guidance=2.0),
        sketch(2, seed=4, steps=5, text_guidance=1.0),
        sketch(1, seed=5, image_guidance=2.0),  # steers away from a frame that has seen nothing
    ]
    together = drawn(model, *jobs)
    for job, beside in zip(jobs, together, strict=True):
        torch.testing.assert_close(beside.latents_CHW, drawn(model, job)[0].latents_CHW, **CLOSE)


def test_rows_that_see_as_many_share_a_forward(pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pairs[KLEIN]
    drawings = [begin(model, sketch(count, seed=count)) for count in (2, 1, 2, 0)]
    widths: list[int] = []
    predict = Flux2Network.predict

    def counted(self: Any, latents: Tensor, *given: Any) -> Tensor:
        widths.append(len(latents))
        return predict(self, latents, *given)

    monkeypatch.setattr(Flux2Network, "predict", counted)
    rows = advance(model, drawings)
    assert rows == StepRows(main=8, computed=0, found=0)  # text or none, and no pass of any reference
    assert sorted(widths) == [2, 2, 4]


def test_the_second_kind_reads_references_once(pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pairs[KV]
    read: list[int] = []
    features = Flux2KvNetwork.features

    def counted(self: Any, latents: Tensor, *given: Any) -> Any:
        read.append(len(latents))
        return features(self, latents, *given)

    monkeypatch.setattr(Flux2KvNetwork, "features", counted)
    (drawing,) = drawn(model, sketch(2))
    assert read == [2]
    assert set(drawing.shown) == {"double.0", "double.1", "single.0", "single.1"}


def test_the_same_seed_gives_the_same_picture(pairs: dict[str, Pair]) -> None:
    _, model = pairs[KLEIN]
    one, two, other = (finish(model, [drawn(model, sketch(1, seed=seed))[0]])[0] for seed in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_an_edit_begins_at_its_picture(pairs: dict[str, Pair]) -> None:
    _, model = pairs[KLEIN]
    pixels = picture(9)
    job = sketch(1, edit=Edit(pixels=pixels, strength=0.5))
    drawing = begin(model, job)
    assert drawing.steps == FlowSchedule(SCHEDULE).at(16).sampling_steps(4)[2:]
    noise = Randomness(job.seed).normal(CHANNELS, 4, 4)
    values = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255.0
    sigma = drawing.steps[0] / 1000.0
    expected = (1.0 - sigma) * model.codec.encode(values)[0] + sigma * noise
    torch.testing.assert_close(drawing.latents_CHW, expected, atol=1e-5, rtol=1e-5)


def test_a_preview_shows_what_the_network_believes(pairs: dict[str, Pair]) -> None:
    _, model = pairs[KLEIN]
    drawing = begin(model, sketch(1))
    t, before = drawing.steps[0], drawing.latents_CHW
    advance(model, [drawing])
    assert drawing.history is not None
    slope = (drawing.latents_CHW - before) / ((drawing.steps[1] - t) / 1000.0)
    torch.testing.assert_close(drawing.history.clean, before - t / 1000.0 * slope, atol=1e-3, rtol=1e-3)
    assert preview(model, drawing).shape == (SIDE_PX, SIDE_PX, 3)
    assert preview(model, drawing, max_px=32).shape == (32, 32, 3)


def test_latents_go_there_and_back_as_the_pipeline_has_them(pairs: dict[str, Pair]) -> None:
    pipe, model = pairs[KLEIN]
    pixels = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pipe._encode_vae_image(pixels * 2.0 - 1.0, generator=None)
        ours = model.codec.encode(pixels, torch.randn(1, CHANNELS, 2, 4))
    assert (model.codec.factor, model.codec.channels) == (16, CHANNELS)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_row_costs_more_than_nothing(pairs: dict[str, Pair]) -> None:
    klein, kv = (flops_of_a_row(pairs[kind][1]) for kind in KINDS)
    assert klein > kv > 0  # what is read once is not read in every row


# The files.


def test_a_network_in_parts_is_the_same(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pipe, model = pairs[KLEIN]
    folder = write_checkpoint(tmp_path / "parts", pipe, parts=3)
    pack = write_pack(folder, settings("parts"))
    assert len(weight_files(pack.manifest, "text_encoder")) == 3
    again = load_frame_model(pack)
    assert torch.equal(again.text.encode([PROMPT]), model.text.encode([PROMPT]))
    assert (
        again.base_digest
        == model.base_digest
        == pack.manifest.files[weight_files(pack.manifest, "transformer")[0]].sha256
    )
    lost = weight_files(pack.manifest, "text_encoder")[1]
    (folder / lost).unlink()
    with pytest.raises(PackWeightsMismatch, match="is missing"):
        load_frame_model(write_pack(folder, settings("parts")))


def test_a_manifest_is_read_as_it_was_written(packs: dict[str, tuple[Any, Pack]]) -> None:
    pack = packs[KLEIN][1]
    document = json.loads((pack.folder / MANIFEST).read_bytes())
    assert document["schedule"] == {"kind": "flow", "train_steps": 1000, "shift": 1.0, "shift_by_size": "flux2"}
    assert pack.manifest.schedule == SCHEDULE


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"schedule": ScheduleConfig(), "sampling": {"sampler": "ddim"}}, "must be a flow"),
        ({"sampling": {"sampler": "ddim"}}, "sampler 'ddim' is unknown; known: flow_euler"),
        ({"latents": LatentScaling(shift=(0.0,) * 16, scale=(0.5,) * 16)}, "shift 0 and scale 1"),
        ({"sample_latents": True}, "sample_latents false"),
    ],
)
def test_a_manifest_of_another_family_is_refused(
    packs: dict[str, tuple[Any, Pack]], tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    if "sampling" in changes:
        sampling = settings("x").sampling.model_copy(update=changes["sampling"])
        changes = {**changes, "sampling": sampling}
    pack = packs[KLEIN][1]
    told = Pack(pack.folder, pack.manifest.model_copy(update=changes))
    with pytest.raises(PackManifestInvalid, match=named):
        load_frame_model(told)


def test_other_families_predict_no_flow(tiny_pack: Pack) -> None:
    sampling = tiny_pack.manifest.sampling.model_copy(update={"sampler": "flow_euler"})
    told = tiny_pack.manifest.model_copy(update={"schedule": SCHEDULE, "sampling": sampling})
    with pytest.raises(PackManifestInvalid, match="a storygen predicts none"):
        load_frame_model(Pack(tiny_pack.folder, told))


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds"),
        ("transformer/config.json", {"odd": 1}, "unknown keys in the config of the transformer: odd"),
        ("transformer/config.json", {"joint_attention_dim": 32}, "context_embedder.weight is"),
        ("text_encoder/config.json", {"model_type": "llama"}, "'llama'"),
        ("text_encoder/config.json", {"num_hidden_layers": 20}, "config of the text encoder"),
        ("text_encoder/config.json", {"max_position_embeddings": 256}, "28 layers and 256 positions"),
        ("vae/config.json", {"patch_size": [1, 1]}, "patch_size"),
    ],
)
def test_networks_of_another_family_are_refused(
    pairs: dict[str, Pair], tmp_path: Path, file: str, changes: dict[str, Any], named: str
) -> None:
    folder = write_checkpoint(tmp_path / "other", pairs[KLEIN][0])
    document = json.loads((folder / file).read_bytes())
    (folder / file).write_text(json.dumps({**document, **changes}), encoding="utf-8")
    with pytest.raises((PackManifestInvalid, PackWeightsMismatch), match=named):
        load_frame_model(write_pack(folder, settings("other")))


def test_a_tokenizer_without_a_chat_is_refused(pairs: dict[str, Pair], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "other", pairs[KLEIN][0])
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(PackManifestInvalid, match="tokenizer"):
        load_frame_model(write_pack(folder, settings("other")))


@pytest.mark.parametrize("kind", KINDS)
def test_forwards_that_see_pictures_elsewhere_in_every_step_are_not_recorded(pairs: dict[str, Pair], kind: str) -> None:
    with pytest.raises(ValueError, match="cannot be recorded"):
        replace(pairs[kind][1], graphs=Graphs(Tape()))
