"""Published FLUX.2 Klein checkpoints become packs that draw, or are refused before anything is copied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from services.models.drawing import Randomness, Sketch, begin
from services.models.errors import PackError, PackFileUnsafe, PackSourceInvalid, PackUnsupported
from services.models.flux2.published import PLAIN, read_flow_scheduler
from services.models.footprint import footprint
from services.models.library import Library, PackPlan
from services.models.published import Told, plan_published
from services.models.ranges import FlowConfig
from services.models.registry import ARCHITECTURES, load_frame_model
from services.models.source import FolderSource
from services.models.step import advance
from tests.flux2_checkpoints import CHANNELS, KINDS, SCHEDULE, pipeline, write_checkpoint

KLEIN, KV = KINDS
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipeline(KLEIN)


@pytest.fixture(scope="module")
def published(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("published") / "FLUX.2-klein_Test", pipe, parts=3)


@pytest.fixture
def checkpoint(published: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(published, tmp_path / "spoilt"))


def plan(folder: Path, **told: Any) -> PackPlan:
    source = FolderSource(folder)
    return plan_published(source, source.files(), Told(**{"licence": "Apache-2.0", **told}), ARCHITECTURES)


def edit(file: Path, **changes: Any) -> None:
    document = json.loads(file.read_bytes())
    file.write_text(json.dumps({**document, **changes}), encoding="utf-8")


def test_a_checkpoint_becomes_a_pack_that_draws_as_its_pipeline(pipe: Any, published: Path, tmp_path: Path) -> None:
    source, planned = FolderSource(published), plan(published)
    assert planned.notes == (
        "left out, because nothing here reads it: text_encoder/generation_config.json, "
        "text_encoder/model.safetensors.index.json",
    )
    pack = Library(tmp_path, (tmp_path,)).add(planned, source).pack
    manifest: Any = pack.manifest
    assert (manifest.name, manifest.architecture) == ("flux-2-klein-test", KLEIN)
    assert (manifest.width_px, manifest.max_references, manifest.dtype) == (1024, 3, "float32")
    assert manifest.schedule == SCHEDULE
    sampling = manifest.sampling
    assert (sampling.sampler, sampling.default_steps, sampling.default_text_guidance) == ("flow_euler", *PLAIN)
    model = load_frame_model(pack)
    job = Sketch(
        description="the cat",
        seed=3,
        width_px=64,
        height_px=64,
        steps=4,
        text_guidance=4.0,
        image_guidance=1.0,
    )
    drawing = begin(model, job)
    while not drawing.finished:
        advance(model, [drawing])
    noise = Randomness(3).normal(1, CHANNELS, 4, 4)
    given = {"prompt": "the cat", "height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 4.0}
    theirs = pipe(**given, latents=noise, output_type="latent").images
    torch.testing.assert_close(model.codec.raw(drawing.latents_CHW[None]), theirs, atol=1e-4, rtol=0.0)


def test_what_was_distilled_takes_four_steps_without_guidance(checkpoint: Path) -> None:
    edit(checkpoint / "model_index.json", is_distilled=True)
    settings: Any = plan(checkpoint).settings
    assert (settings.sampling.default_steps, settings.sampling.default_text_guidance) == (4, 1.0)
    told: Any = plan(checkpoint, steps=8, text_guidance=2.0, name="mine").settings
    assert (told.name, told.sampling.default_steps, told.sampling.default_text_guidance) == ("mine", 8, 2.0)


def test_the_second_kind_is_told_by_its_pipeline(checkpoint: Path) -> None:
    edit(checkpoint / "model_index.json", _class_name="Flux2KleinKVPipeline")
    planned = plan(checkpoint)
    settings: Any = planned.settings
    assert planned.architecture == settings.architecture == KV
    assert (settings.sampling.default_steps, settings.sampling.default_text_guidance) == (4, 1.0)


def test_its_memory_is_that_of_what_is_loaded(published: Path, tmp_path: Path) -> None:
    pack = Library(tmp_path, (tmp_path,)).add(plan(published), FolderSource(published)).pack
    manifest: Any = pack.manifest
    tensors = {path: load_file(str(pack.path(path))) for path in manifest.files if path.endswith(".safetensors")}
    count = {"vae": 0, "rest": 0}
    for path, own in tensors.items():
        kept = (value.numel() for name, value in own.items() if not name.startswith("lm_head."))
        count["vae" if path.startswith("vae/") else "rest"] += sum(kept)
    assert len(tensors) == 5
    found = footprint(pack.folder, manifest, unet_bytes=2)
    assert found.weights_bytes == 4 * count["vae"] + 2 * count["rest"]
    parts = [entry.size_bytes for path, entry in manifest.files.items() if path.startswith("text_encoder/model-")]
    assert found.loading_bytes == max(
        sum(parts), manifest.files["transformer/diffusion_pytorch_model.safetensors"].size_bytes
    )
    assert found.working_bytes > 0


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ({"licence": ""}, "--licence"),
        ({"family": "sd15"}, "is a flux2-klein, and sd15 is not"),
        ({"reference_range": "unit"}, "always signed"),
        ({"steps": 5000}, "default_steps"),
    ],
)
def test_what_is_told_wrongly_is_refused(published: Path, told: dict[str, Any], named: str) -> None:
    with pytest.raises((PackSourceInvalid, ValueError), match=named):
        plan(published, **told)


def without(relative: str) -> Any:
    return lambda folder: (folder / relative).unlink()


def pickled(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def elsewhere(folder: Path) -> None:
    index = folder / "text_encoder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../vae/model-1.safetensors"}}), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "error", "named"),
    [
        (without("tokenizer/tokenizer.json"), PackSourceInvalid, "has no tokenizer/tokenizer.json"),
        (without("scheduler/scheduler_config.json"), PackSourceInvalid, "has no scheduler/"),
        (without("vae/config.json"), PackSourceInvalid, "has no vae/config.json"),
        (without("text_encoder/model-00002-of-00003.safetensors"), PackSourceInvalid, "does not name the parts"),
        (without("text_encoder/model.safetensors.index.json"), PackSourceInvalid, "has no text_encoder/model"),
        (elsewhere, PackSourceInvalid, "does not name the parts"),
        (pickled, PackFileUnsafe, "pickles"),
        (lambda f: edit(f / "scheduler/scheduler_config.json", shift_terminal=0.02), PackUnsupported, "shift_terminal"),
        (lambda f: edit(f / "vae/config.json", latent_channels="many"), PackSourceInvalid, "no autoencoder's"),
        (lambda f: edit(f / "model_index.json", _class_name="Flux2Pipeline"), PackUnsupported, "Flux2KleinPipeline"),
    ],
)
def test_what_cannot_be_drawn_with_is_refused(checkpoint: Path, spoil: Any, error: type[PackError], named: str) -> None:
    spoil(checkpoint)
    with pytest.raises(error, match=named):
        plan(checkpoint)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "EulerDiscreteScheduler"),
        ({"time_shift_type": "linear"}, "time_shift_type"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        ({"stochastic_sampling": True}, "stochastic_sampling"),
        ({"shift": -1.0}, "shift"),
    ],
)
def test_a_scheduler_that_would_give_other_pictures_is_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        read_flow_scheduler({**FLOW, **wrong})


def test_a_scheduler_says_how_its_steps_are_moved() -> None:
    assert read_flow_scheduler({**FLOW, "shift": 3.0}) == FlowConfig(kind="flow", shift=3.0)
    assert read_flow_scheduler({**FLOW, "shift": 3.0, "use_dynamic_shifting": True}) == SCHEDULE
    assert read_flow_scheduler({**FLOW, "num_train_timesteps": 500}).train_steps == 500
