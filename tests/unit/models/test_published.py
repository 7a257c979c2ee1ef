"""Published checkpoints become packs that draw, or are refused before anything is copied, with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.models.drawing import Seen, Sketch
from services.models.errors import PackError, PackFileUnsafe, PackSourceInvalid, PackUnsupported
from services.models.library import Library, PackPlan
from services.models.pack import Pack
from services.models.published import Told, plan_published
from services.models.registry import ARCHITECTURES, FrameModel, load_frame_model
from services.models.source import FolderSource
from services.models.step import draw
from services.models.storygen import StoryGenConfig, build_storygen
from services.models.storygen_published import build_published_storygen
from tests.stable_diffusion_checkpoints import write_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_storygen(checkpoint: Path) -> None:
    """Makes of a Stable Diffusion checkpoint what StoryGen's authors published: the same with `attn3` in its UNet."""
    config = json.loads((checkpoint / "unet/config.json").read_text())
    known = {name: config[name] for name in StoryGenConfig().to_dict() if name in config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        unet: Any = build_storygen(StoryGenConfig.from_dict(known))
    save_file(unet.state_dict(), checkpoint / "unet" / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    for kind in ("sd15", "sdxl"):
        write_checkpoint(folder / kind, kind)
    shutil.copytree(folder / "sd15", folder / "StoryGen_Test")
    write_storygen(folder / "StoryGen_Test")
    return folder


@pytest.fixture
def storygen(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(checkpoints / "StoryGen_Test", tmp_path / "StoryGen_Test"))


class Watched(FolderSource):
    """Counts what is read."""

    bytes_read = 0

    def blocks(self, path: str, start: int) -> Iterator[bytes]:
        for block in super().blocks(path, start):
            for begin in range(0, len(block), 1 << 16):
                self.bytes_read += len(block[begin : begin + (1 << 16)])
                yield block[begin : begin + (1 << 16)]


def plan(checkpoint: Path, **told: Any) -> PackPlan:
    source = FolderSource(checkpoint)
    return plan_published(source, source.files(), Told(**{"licence": "MIT", **told}), ARCHITECTURES)


def added(checkpoint: Path, folder: Path, **told: Any) -> Pack:
    return Library(folder, (folder,)).add(plan(checkpoint, **told), FolderSource(checkpoint)).pack


def seen() -> Seen:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Seen(pixels=pixels, description="the dog")


def frame(model: FrameModel, *, references: tuple[Seen, ...] = ()) -> Any:
    sampling = model.manifest.sampling
    return draw(
        model,
        Sketch(
            description="the cat",
            seed=3,
            width_px=model.manifest.width_px,
            height_px=model.manifest.height_px,
            steps=2,
            text_guidance=sampling.default_text_guidance,
            image_guidance=sampling.default_image_guidance,
            references=references,
        ),
    )


def test_a_published_storygen_becomes_a_pack_that_draws_what_it_sees(checkpoints: Path, tmp_path: Path) -> None:
    pack = added(checkpoints / "StoryGen_Test", tmp_path / "packs")
    manifest = pack.manifest
    assert (pack.name, manifest.architecture, manifest.base) == ("storygen-test", "storygen", "StoryGen_Test")
    assert (manifest.reference_range, manifest.max_references) == ("unit", 3)
    assert (manifest.width_px, manifest.height_px, manifest.dtype) == (64, 64, "float32")
    assert manifest.latents.scale == (0.18215,) * 4
    schedule = manifest.schedule
    assert (schedule.spacing, schedule.steps_offset, schedule.final_step_is_clean) == ("leading", 1, False)
    sampling = manifest.sampling
    assert (sampling.sampler, sampling.default_steps) == ("ddim", 40)
    assert (sampling.default_text_guidance, sampling.default_image_guidance) == (7.0, 3.5)
    model = load_frame_model(pack)
    published = load_file(checkpoints / "StoryGen_Test/unet" / WEIGHTS)
    unet: Any = model.denoiser.unet
    assert unet.state_dict().keys() == published.keys()
    assert all(torch.equal(value, published[name]) for name, value in unet.state_dict().items())
    alone, looking = frame(model), frame(model, references=(seen(),))
    assert alone.shape == (64, 64, 3)
    assert not np.array_equal(alone, looking), "an earlier frame changes what is drawn"


@pytest.mark.parametrize(("kind", "architecture"), [("sd15", "stable-diffusion"), ("sdxl", "stable-diffusion-xl")])
def test_a_plain_checkpoint_becomes_a_pack_that_draws(
    checkpoints: Path, tmp_path: Path, kind: str, architecture: str
) -> None:
    pack = added(checkpoints / kind, tmp_path / "packs", name="plain", steps=7)
    assert (pack.name, pack.manifest.architecture) == ("plain", architecture)
    assert (pack.manifest.max_references, pack.manifest.reference_range) == (0, "signed")
    assert pack.manifest.sampling.default_steps == 7
    assert frame(load_frame_model(pack)).shape == (64, 64, 3)


def test_half_precision_weights_take_the_plain_name_where_there_are_no_others(storygen: Path, tmp_path: Path) -> None:
    unet = storygen / "unet" / WEIGHTS
    half = {name: value.half() for name, value in load_file(unet).items()}
    save_file(half, unet.with_name("diffusion_pytorch_model.fp16.safetensors"), metadata={"format": "pt"})
    assert plan(storygen).settings.dtype == "float32"  # type: ignore[union-attr]
    unet.unlink()
    pack = added(storygen, tmp_path / "packs")
    assert pack.manifest.dtype == "float16"
    assert f"unet/{WEIGHTS}" in pack.manifest.files
    load_frame_model(pack)


def test_what_nothing_reads_is_left_out_and_named(storygen: Path, tmp_path: Path) -> None:
    (storygen / "safety_checker").mkdir()
    (storygen / "safety_checker/pytorch_model.bin").write_bytes(b"x")
    (storygen / "unet/diffusion_pytorch_model.bin").write_bytes(b"x")
    told = plan(storygen)
    assert any("safety_checker/pytorch_model.bin" in note for note in told.notes)
    pack = added(storygen, tmp_path / "packs")
    assert not [path for path in pack.manifest.files if path.endswith(".bin")]


def test_what_is_told_counts_more_than_what_is_guessed(checkpoints: Path) -> None:
    told = plan(
        checkpoints / "StoryGen_Test",
        name="ours",
        base="sd15",
        reference_range="signed",
        steps=25,
        text_guidance=5.0,
        image_guidance=1.5,
        made_by="by hand",
    )
    settings = told.settings
    assert settings is not None
    assert (told.name, settings.base, settings.reference_range, settings.made_by) == (
        "ours",
        "sd15",
        "signed",
        "by hand",
    )
    sampling = settings.sampling
    assert (sampling.default_steps, sampling.default_text_guidance, sampling.default_image_guidance) == (25, 5.0, 1.5)
    with pytest.raises(PackSourceInvalid, match="no family 'sd9'"):
        plan(checkpoints / "sd15", family="sd9")
    with pytest.raises(PackSourceInvalid, match="sdxl is not"):
        plan(checkpoints / "sd15", family="sdxl")


def edit(file: str, **changes: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        document.update(changes)
        (folder / file).write_text(json.dumps({key: value for key, value in document.items() if value != "gone"}))

    return spoil


def other_pipeline(folder: Path) -> None:
    """A pipeline without a UNet, as newer families have none."""
    edit("model_index.json", _class_name="FluxPipeline")(folder)
    shutil.rmtree(folder / "unet")


def only_pickles(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).rename(folder / "unet/diffusion_pytorch_model.bin")


def split(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).rename(folder / "unet/diffusion_pytorch_model-00001-of-00002.safetensors")
    (folder / f"unet/{WEIGHTS}.index.json").write_text("{}")


def nothing_left(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


REFUSED: list[tuple[str, Callable[[Path], object], type[PackError], str]] = [
    ("another family", other_pipeline, PackUnsupported, "FluxPipeline; this version draws with"),
    ("pickles", only_pickles, PackFileUnsafe, "fabula pack convert"),
    (
        "pickle in disguise",
        lambda f: (f / "unet" / WEIGHTS).write_bytes(b"\x80\x04" * 50),
        PackFileUnsafe,
        "not a safe",
    ),
    ("empty weights", lambda f: (f / "unet" / WEIGHTS).write_bytes(b""), PackFileUnsafe, "not a safetensors"),
    ("split weights", split, PackUnsupported, "several files"),
    ("no scheduler", lambda f: (f / "scheduler/scheduler_config.json").unlink(), PackSourceInvalid, "scheduler"),
    ("no tokenizer", lambda f: shutil.rmtree(f / "tokenizer"), PackSourceInvalid, "tokenizer"),
    ("no autoencoder", lambda f: shutil.rmtree(f / "vae"), PackSourceInvalid, "vae"),
    ("config is no JSON", lambda f: (f / "vae/config.json").write_text("{"), PackSourceInvalid, "vae/config.json"),
    ("config is empty", lambda f: (f / "vae/config.json").write_text(""), PackSourceInvalid, "vae/config.json"),
    ("odd autoencoder", edit("vae/config.json", block_out_channels="gone"), PackSourceInvalid, "autoencoder"),
    ("no size", edit("unet/config.json", sample_size=0), PackSourceInvalid, "width_px"),
    (
        "steps that we do not take",
        edit("scheduler/scheduler_config.json", timestep_spacing="linspace"),
        PackUnsupported,
        "linspace",
    ),
    ("no checkpoint at all", nothing_left, PackSourceInvalid, "neither a pack.json"),
]


@pytest.mark.parametrize(("spoil", "error", "said"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
def test_what_cannot_be_drawn_with_is_refused_before_copying(
    storygen: Path, spoil: Callable[[Path], object], error: type[PackError], said: str
) -> None:
    size = (storygen / "unet" / WEIGHTS).stat().st_size
    spoil(storygen)
    source = Watched(storygen)
    with pytest.raises(error, match=said) as raised:
        plan_published(source, source.files(), Told(licence="MIT"), ARCHITECTURES)
    assert type(raised.value) is error
    assert source.bytes_read < size, "only configurations and a header were looked at"


def test_a_family_that_it_is_not_is_refused(checkpoints: Path) -> None:
    with pytest.raises(PackSourceInvalid, match="StoryGen_Test is a StoryGen, and sd15 is not"):
        plan(checkpoints / "StoryGen_Test", family="sd15")
    assert plan(checkpoints / "StoryGen_Test", family="storygen") == plan(checkpoints / "StoryGen_Test")
    with pytest.raises(PackSourceInvalid, match="no family 'storygen'"):
        plan(checkpoints / "sd15", family="storygen")


def test_an_architecture_without_a_loader_is_refused(checkpoints: Path) -> None:
    source = FolderSource(checkpoints / "sdxl")
    with pytest.raises(PackUnsupported, match="'stable-diffusion-xl'; it knows storygen"):
        plan_published(source, source.files(), Told(licence="MIT"), ["storygen"])


def test_a_checkpoint_without_a_licence_is_not_guessed_one(checkpoints: Path) -> None:
    with pytest.raises(PackSourceInvalid, match="--licence"):
        plan(checkpoints / "sd15", licence="")


def test_a_unet_that_says_it_is_another_network_is_refused(checkpoints: Path) -> None:
    config = json.loads((checkpoints / "StoryGen_Test/unet/config.json").read_text())
    with torch.device("meta"):
        assert len(build_published_storygen(config).state_dict()) > 100
        with pytest.raises(ValueError, match="act_fn of the UNet is 'mish'"):
            build_published_storygen({**config, "act_fn": "mish"})
        with pytest.raises(ValueError, match="unknown keys in the config of the UNet: wheels"):
            build_published_storygen({**config, "wheels": 4})
