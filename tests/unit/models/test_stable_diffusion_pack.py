"""What a published checkpoint says of itself, read strictly: a pack draws what it says, or is not loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, PNDMScheduler
from safetensors.torch import load_file, save_file

from services.models.errors import PackError, PackManifestInvalid, PackWeightsMismatch
from services.models.pack import MANIFEST, Pack, PackSettings, write_pack
from services.models.registry import load_frame_model, load_weights
from services.models.schedule import ScheduleConfig
from services.models.stable_diffusion.pack import FAMILIES, read_scheduler
from services.models.storygen import StoryGenConfig, build_storygen
from tests.stable_diffusion_checkpoints import BETAS, KINDS, sealed, write_checkpoint

PUBLISHED = {  # as the authors' scheduler_config.json say it
    "sd15": ("PNDMScheduler", {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}),
    "sd2": ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction", "set_alpha_to_one": False,
                              "skip_prk_steps": True, "steps_offset": 1}),
    "sd-turbo": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "steps_offset": 1, "clip_sample": False,
                                            "set_alpha_to_one": False, "interpolation_type": "linear"}),
    "sdxl": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False,
                                        "set_alpha_to_one": False, "use_karras_sigmas": False}),
    "sdxl-turbo": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing", "steps_offset": 1}),
}  # fmt: skip
EXPECTED = {
    "sd15": (ScheduleConfig(), "ddim"),
    "sd2": (ScheduleConfig(prediction="v_prediction"), "ddim"),
    "sd-turbo": (ScheduleConfig(spacing="trailing", final_step_is_clean=True), "euler"),
    "sdxl": (ScheduleConfig(final_step_is_clean=True), "euler"),
    "sdxl-turbo": (ScheduleConfig(spacing="trailing", final_step_is_clean=True), "euler_ancestral"),
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_published_schedulers_are_read(family: str) -> None:
    name, values = PUBLISHED[family]
    assert read_scheduler({"_class_name": name, **BETAS, **values}) == EXPECTED[family]


@pytest.mark.parametrize(
    ("made", "visited"),
    [
        (DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1), [751, 501, 251, 1]),
        (PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1), [751, 501, 251, 1]),
        (EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"), [999, 749, 499, 249]),
        (EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="leading"), [750, 500, 250, 0]),
    ],
)
def test_the_steps_are_the_schedulers_own(made: Any, visited: list[int]) -> None:
    from services.models.schedule import Schedule

    config, _ = read_scheduler({"_class_name": type(made).__name__, **made.config})
    assert list(Schedule(config).sampling_steps(4)) == visited
    made.set_timesteps(4)
    assert sorted({int(t) for t in made.timesteps}, reverse=True) == visited


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch"),
        ({"_class_name": "LCMScheduler"}, "LCMScheduler"),  # it skips steps in a way of its own
        ({"beta_schedule": "linear"}, "beta_schedule"),
        ({"beta_schedule": None}, "beta_schedule"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"timestep_spacing": "linspace"}, "timestep_spacing"),
        ({"timestep_spacing": None}, "timestep_spacing"),
        ({"prediction_type": "sample"}, "prediction_type"),
        ({"rescale_betas_zero_snr": True}, "zero_terminal_snr"),
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "clip_sample"),
        ({"_class_name": "DDIMScheduler"}, "clip_sample"),  # which is what its class does without a word
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "solver_order"),
    ],
)
def test_a_scheduler_that_would_give_other_pictures_is_refused(wrong: dict[str, Any], named: str) -> None:
    values = {"_class_name": "EulerDiscreteScheduler", **BETAS, "timestep_spacing": "leading", "steps_offset": 1}
    read_scheduler(values)
    changed = {key: value for key, value in {**values, **wrong}.items() if value is not None}
    with pytest.raises(ValueError, match=named):
        read_scheduler(changed)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pack]:
    folder = tmp_path_factory.mktemp("packs")
    return {kind: sealed(write_checkpoint(folder / "published" / kind, kind), folder / kind, kind) for kind in KINDS}


def resealed(pack: Pack, folder: Path, change: Callable[[Path], None], **settings: Any) -> Pack:
    """A copy of the pack with something changed, sealed anew."""
    shutil.copytree(pack.folder, folder)
    (folder / MANIFEST).unlink()
    change(folder)
    values = {name: getattr(pack.manifest, name) for name in PackSettings.model_fields}
    return write_pack(folder, PackSettings(**{**values, **settings}))


def edit_json(relative: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        document = json.loads((folder / relative).read_text())
        (folder / relative).write_text(json.dumps({**document, **changes}))

    return change


def edit_weights(relative: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(str(folder / relative))
        change(state)
        save_file(state, str(folder / relative), metadata={"format": "pt"})

    return edit


UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("sd15", edit_json("unet/config.json", in_channels=9), "latent channels|conv_in"),  # fills masks
        ("sd15", edit_json("unet/config.json", time_cond_proj_dim=16), "time_cond_proj_dim"),  # is told its guidance
        ("sd15", edit_json("unet/config.json", colour="red"), "colour"),
        ("sd15", edit_json("vae/config.json", colour="red"), "colour"),
        ("sd15", edit_json("unet/config.json", addition_embed_type="text_time"), "addition_embed_type"),
        ("sdxl", edit_json("unet/config.json", addition_embed_type=None), "addition_embed_type"),
        ("sdxl", edit_json("unet/config.json", projection_class_embeddings_input_dim=56), "pooled|add_embedding"),
        ("sdxl", edit_json("model_index.json", force_zeros_for_empty_prompt="yes"), "force_zeros"),
        ("sd15", edit_json("text_encoder/config.json", hidden_size=64), "is .* and should be"),
        ("sd15", edit_weights(UNET, lambda state: state.pop("conv_in.bias")), "conv_in.bias is missing"),
        ("sd15", edit_weights(UNET, lambda state: state.update(extra=torch.ones(1))), "extra is unknown"),
        ("sd15", lambda folder: (folder / "tokenizer/merges.txt").unlink(), "tokenizer"),
        ("sd15", lambda folder: (folder / UNET).unlink(), "unet/diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_checkpoint_that_cannot_be_drawn_with_is_named(
    packs: dict[str, Pack], tmp_path: Path, kind: str, change: Callable[[Path], None], named: str
) -> None:
    pack = resealed(packs[kind], tmp_path / "other", change)
    with pytest.raises(PackError, match=named):
        load_frame_model(pack)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"max_references": 1}, "max_references"), ({"architecture": "stable-diffusion-xl"}, "addition_embed_type")],
)
def test_a_manifest_that_promises_too_much_is_refused(
    packs: dict[str, Pack], tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    pack = resealed(packs["sd15"], tmp_path / "other", lambda folder: None, **settings)
    with pytest.raises(PackManifestInvalid, match=named):
        load_frame_model(pack)


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_says_what_the_checkpoint_says(packs: dict[str, Pack], kind: str) -> None:
    manifest, family = packs[kind].manifest, FAMILIES[kind]
    assert manifest.architecture == ("stable-diffusion-xl" if kind == "sdxl" else "stable-diffusion")
    assert manifest.latents.scale == pytest.approx((0.13025 if kind == "sdxl" else 0.18215,) * 4)
    assert manifest.latents.shift == (0.0,) * 4
    assert manifest.max_references == 0
    assert (manifest.width_px, manifest.height_px) == (64, 64)  # the UNet's own 8 latents, not what its family draws
    assert manifest.sampling.default_steps == family.steps


def test_half_precision_weights_are_drawn_with_in_full(packs: dict[str, Pack], tmp_path: Path) -> None:
    def halve(state: dict[str, torch.Tensor]) -> None:
        for name in state:
            state[name] = state[name].half()

    pack = resealed(packs["sd15"], tmp_path / "half", edit_weights(UNET, halve))
    model, whole = load_frame_model(pack), load_frame_model(packs["sd15"])
    text, latents, t = model.text.encode(["cat"]), torch.ones(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        answer, expected = (one.denoiser.unet.predict(latents, t, text) for one in (model, whole))
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer, expected, atol=2e-2, rtol=0.0)
    assert not torch.equal(answer, expected)
    assert next(model.codec.vae.parameters()).dtype == torch.float32


def test_published_storygen_keys_fill_the_network(tmp_path: Path) -> None:
    """The 798 names of the published checkpoint at a tenth of its width: every tensor lands, none is left over."""
    narrow = StoryGenConfig(block_out_channels=(32, 64, 96, 96), cross_attention_dim=32, attention_head_dim=4)
    with torch.device("meta"):
        published = build_storygen(StoryGenConfig()).state_dict()
        unet = build_storygen(narrow)
    state = {
        name: torch.full(value.shape, float(number))
        for number, (name, value) in enumerate(sorted(unet.state_dict().items()))
    }
    assert state.keys() == published.keys()
    assert len(state) == 798
    file = tmp_path / "unet.safetensors"
    save_file(state, str(file))
    load_weights(unet, file, assign=True)
    found = unet.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    del state["mid_block.attentions.0.transformer_blocks.0.norm4.bias"]
    save_file(state, str(file))
    with pytest.raises(PackWeightsMismatch, match=r"norm4\.bias is missing"):
        load_weights(unet, file)
