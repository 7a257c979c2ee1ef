"""From a pack to the models that draw its frames. `ARCHITECTURES` is the registry: a family is a line in it.

Knows where the networks lie in a pack's folder, and nothing about serving.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from services.models.arldm.checkpoint import load_arldm
from services.models.arldm.reader import ArldmReader, arldm_files, check_arldm
from services.models.denoiser import StoryDenoiser
from services.models.errors import AdapterError, PackManifestInvalid, PackWeightsMismatch
from services.models.flux2.networks import check_flux2, load_flux2_networks, transformer_files
from services.models.glimpse import FILE as GLIMPSE_FILE
from services.models.glimpse import Glimpse, load_glimpse
from services.models.graphs import Graphs
from services.models.lora import Adapter, AdapterSlots, read_adapter_file
from services.models.pack import Manifest, Pack
from services.models.ranges import FlowConfig
from services.models.samplers import Sampler, samplers_of
from services.models.schedule import FlowSchedule, Schedule
from services.models.stable_diffusion.networks import Networks, load_networks
from services.models.storygen import StoryGenConfig, build_storygen
from services.models.storygen_published import is_published_storygen, load_storygen_networks
from services.models.text_encoder import (
    NO_WORDS,
    TextChange,
    TextEncoder,
    TextShape,
    Tokenizer,
    Words,
    build_text_encoder,
)
from services.models.tokenizer import StoryTokenizer
from services.models.vae import Codec, VaeShape, build_vae
from services.models.weights import load_weights as load_weights

CONFIG = "config.json"
UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"  # the names diffusers and transformers give them
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "model.safetensors"


class Texts(Protocol):
    """What the engine asks of a text encoder: `TextEncoder`, or a family's own.

    One text is one `[S, D']` tensor, whatever the network that goes with it reads out of it.
    """

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """What a character may change, by the name that its files have for it."""

    @property
    def width(self) -> int:
        """D of its words: what a learned one must have."""

    @property
    def window(self) -> int:
        """Positions that each text takes."""

    def token_ids(self, texts: Sequence[str], words: Words = NO_WORDS) -> Tensor:
        """Raises TextTooLong when a text does not fit."""

    def fitting(self, text: str, words: Words = NO_WORDS) -> str:
        """`text` itself, or as much of its beginning as fits the window."""

    def encode(self, texts: Sequence[str], words: Words = NO_WORDS, changes: Sequence[TextChange] = ()) -> Tensor:
        """`[B, S, D']`, with what characters taught and change. Raises TextTooLong when a text does not fit."""


class StoryReader(Protocol):
    """Reads earlier frames, picture and caption together, into the texts of the frame that is drawn.

    What has one looks at no picture while it draws: all that it knows of the story is in its texts.
    """

    @property
    def given_frames(self) -> int:
        """How many earlier frames it needs at least: it was trained to go on from them."""

    def contexts(
        self, description: str, past: Sequence[tuple[npt.NDArray[np.uint8], str]], words: Words = NO_WORDS
    ) -> Tensor:
        """`[2, S, D']`: about nothing, then about the story. `past` is pixels `[H, W, 3]` with captions, oldest first.

        `words` are those that characters taught.
        Raises TextTooLong when a text does not fit, and ValueError for more frames than it knows.
        """


@dataclass(frozen=True)
class FrameModel:
    """Everything that draws frames of one pack, on one device."""

    manifest: Manifest
    denoiser: StoryDenoiser
    codec: Codec
    text: Texts
    sampler: Sampler
    device: torch.device
    dtype: torch.dtype  # of the UNet's arithmetic; latents are always float32 between steps
    reader: StoryReader | None = None  # of earlier frames; None: the UNet looks at them itself, or nobody does
    adapters: Mapping[str, Adapter] = field(default_factory=dict)  # of the pack's own, by file: see `pack.Sampling`
    glimpse: Glimpse | None = None  # for previews; None: the autoencoder draws them, smaller
    slots: AdapterSlots | None = None  # where characters' weights lie; None: it draws nobody but its own
    # True: earlier frames are parts of what the network reads, without noise or caption, and no passes of their own.
    sees_pictures: bool = False
    has_deep_blocks: bool = True  # whose states another step may use again
    # Its forwards ask the device for nothing, and what they see lies where it lay the step before.
    is_recordable: bool = True
    graphs: Graphs | None = None  # its forwards, recorded, if they can be; None: they run as they are

    def __post_init__(self) -> None:
        if self.graphs is not None and not self.is_recordable:
            raise ValueError(f"forwards of {self.manifest.architecture} cannot be recorded")

    @property
    def base_digest(self) -> str:
        """The SHA-256 of the denoiser's file: what a character's weights are a change of."""
        return _base_digest(self.manifest)


def load_frame_model(pack: Pack, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> FrameModel:
    """Load the frame models of a checked pack.

    Raises PackManifestInvalid, PackFileMissing or PackWeightsMismatch.
    """
    loader = ARCHITECTURES.get(pack.manifest.architecture)
    if loader is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise PackManifestInvalid(f"architecture {pack.manifest.architecture!r} is unknown; known: {known}")
    model = loader(pack, torch.device(device), dtype)
    if model.device.type == "cuda":  # whose convolutions want their channels together; processors gain nothing by it
        networks: tuple[Any, ...] = (model.denoiser.unet, model.codec.vae)
        for network in networks:
            network.to(memory_format=torch.channels_last)
    return replace(model, glimpse=_glimpse(pack, model.codec, torch.device(device)))


def _glimpse(pack: Pack, codec: Codec, device: torch.device) -> Glimpse | None:
    """The pack's map for previews; None when it has none."""
    if GLIMPSE_FILE not in pack.manifest.files:
        return None
    try:
        glimpse = load_glimpse(pack.path(GLIMPSE_FILE))
    except ValueError as error:
        raise PackWeightsMismatch(str(error)) from None
    if (glimpse.channels, glimpse.patch_px) != (codec.channels, codec.factor):
        raise PackWeightsMismatch(
            f"{GLIMPSE_FILE} makes {glimpse.patch_px} px of {glimpse.channels} channels; "
            f"the VAE {codec.factor} px of {codec.channels}"
        )
    return glimpse.to(device)


def load_storygen(pack: Pack, device: torch.device, dtype: torch.dtype) -> FrameModel:
    """The `storygen` architecture: a pack of ours, or the published checkpoint with its files as they are."""
    if is_published_storygen(pack):
        return _load_published(pack, device, dtype, load_storygen_networks)
    manifest = pack.manifest
    sampler = _sampler(manifest)
    try:
        tokenizer = StoryTokenizer.load(pack.path("tokenizer/tokenizer.json"))
        unet_shape = StoryGenConfig.from_dict(_config(pack, "unet"))
        vae_shape = VaeShape.from_dict(_config(pack, "vae"))
        text_shape = TextShape.from_dict(_config(pack, "text_encoder"))
        check_fit(manifest, unet_shape, vae_shape, text_shape)
        unet = build_storygen(unet_shape)
        vae: Any = build_vae(vae_shape)
        text: Any = build_text_encoder(
            text_shape,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )
    except (ValueError, TypeError) as error:
        raise PackManifestInvalid(f"pack {pack.name!r}: {error}") from None
    load_weights(unet, pack.path(f"unet/{UNET_WEIGHTS}"))
    load_weights(vae, pack.path(f"vae/{VAE_WEIGHTS}"))
    load_weights(text, pack.path(f"text_encoder/{TEXT_WEIGHTS}"))
    for network in (unet, vae, text):
        network.requires_grad_(False)
    # The VAE and the text encoder run once a frame and stay in float32: half-precision VAEs are where black frames
    # come from, and reference latents must not depend on how fast the UNet is asked to be.
    codec = Codec(
        nn.Module.to(vae, device),
        manifest.latents,
        reference_range=manifest.reference_range,
        sample_latents=manifest.sample_latents,
    )
    return FrameModel(
        manifest=manifest,
        adapters=_own_adapters(pack, unet),
        denoiser=StoryDenoiser(nn.Module.to(unet, device, dtype), _schedule(manifest)),
        codec=codec,
        text=TextEncoder(nn.Module.to(text, device), tokenizer, bidirectional=text_shape.bidirectional),
        sampler=sampler,
        device=device,
        dtype=dtype,
    )


def load_stable_diffusion(pack: Pack, device: torch.device, dtype: torch.dtype) -> FrameModel:
    """The `stable-diffusion` architecture: 1.x, 2.x and SD-Turbo."""
    return _load_published(pack, device, dtype, functools.partial(load_networks, is_xl=False))


def load_stable_diffusion_xl(pack: Pack, device: torch.device, dtype: torch.dtype) -> FrameModel:
    """The `stable-diffusion-xl` architecture, SDXL-Turbo included."""
    return _load_published(pack, device, dtype, functools.partial(load_networks, is_xl=True))


def load_arldm_pack(pack: Pack, device: torch.device, dtype: torch.dtype) -> FrameModel:
    """The `arldm` architecture: Stable Diffusion that reads the story so far."""
    sampler = _sampler(pack.manifest)
    for relative in arldm_files():
        pack.path(relative)  # only what the manifest lists was checked
    loaded = load_arldm(pack.folder, device=str(device), dtype=dtype)
    try:
        check_arldm(pack.manifest, loaded)
    except ValueError as error:
        raise PackManifestInvalid(f"pack {pack.name!r}: {error}") from None
    reader = ArldmReader(loaded)
    return FrameModel(
        manifest=pack.manifest,
        adapters=_own_adapters(pack, loaded.networks.unet),
        denoiser=StoryDenoiser(loaded.networks.unet, _schedule(pack.manifest)),
        codec=Codec(loaded.codec.vae, pack.manifest.latents, sample_latents=pack.manifest.sample_latents),
        text=reader,
        sampler=sampler,
        device=device,
        dtype=dtype,
        reader=reader,
        is_recordable=False,  # how much context a forward reads, it asks the texts
    )


def load_flux2(pack: Pack, device: torch.device, dtype: torch.dtype, *, keeps_references: bool) -> FrameModel:
    """The `flux2-klein` architecture: a transformer that sees earlier frames as they are.

    `keeps_references`: its second kind, `flux2-klein-kv`, which reads them once a frame.
    """
    manifest = pack.manifest
    sampler = _sampler(manifest)
    try:
        flow = check_flux2(manifest)
        networks = load_flux2_networks(pack, device, dtype, keeps_references=keeps_references)
    except (ValueError, TypeError) as error:
        raise PackManifestInvalid(f"pack {pack.name!r}: {error}") from None
    return FrameModel(
        manifest=manifest,
        adapters=_own_adapters(pack, networks.transformer),
        denoiser=StoryDenoiser(networks.transformer, FlowSchedule(flow)),
        codec=networks.codec,
        text=networks.text,
        sampler=sampler,
        device=device,
        dtype=dtype,
        sees_pictures=True,
        has_deep_blocks=False,
        is_recordable=False,  # what it sees lies elsewhere in every step
    )


def _load_published(
    pack: Pack, device: torch.device, dtype: torch.dtype, load: Callable[[Pack, torch.device, torch.dtype], Networks]
) -> FrameModel:
    sampler = _sampler(pack.manifest)
    try:
        networks = load(pack, device, dtype)
    except (ValueError, TypeError) as error:
        raise PackManifestInvalid(f"pack {pack.name!r}: {error}") from None
    return FrameModel(
        manifest=pack.manifest,
        adapters=_own_adapters(pack, networks.unet),
        denoiser=StoryDenoiser(networks.unet, _schedule(pack.manifest)),
        codec=networks.codec,
        text=networks.text,
        sampler=sampler,
        device=device,
        dtype=dtype,
    )


def _sampler(manifest: Manifest) -> Sampler:
    samplers = samplers_of(manifest.schedule)
    if manifest.sampling.sampler not in samplers:
        known = ", ".join(sorted(samplers))
        raise PackManifestInvalid(f"sampler {manifest.sampling.sampler!r} is unknown; known: {known}")
    return samplers[manifest.sampling.sampler]


def _schedule(manifest: Manifest) -> Schedule:
    """Of a network that predicts noise or velocity."""
    if isinstance(manifest.schedule, FlowConfig):
        raise PackManifestInvalid(f"the schedule is a flow's, and a {manifest.architecture} predicts none")
    return Schedule(manifest.schedule)


def _base_digest(manifest: Manifest) -> str:
    """Of the denoiser's file; of one in several parts, the SHA-256 of theirs in order."""
    if (plain := manifest.files.get(f"unet/{UNET_WEIGHTS}")) is not None:
        return plain.sha256
    parts = [manifest.files[path].sha256 for path in transformer_files(manifest)]
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def _own_adapters(pack: Pack, unet: nn.Module) -> dict[str, Adapter]:
    """The pack's own adapters, by file."""
    adapters = {settings.adapter for settings in pack.manifest.sampling.qualities.values() if settings.adapter}
    base_digest = _base_digest(pack.manifest)
    try:
        own = {file: read_adapter_file(pack.path(file), unet, base_digest=base_digest) for file in sorted(adapters)}
    except AdapterError as error:
        raise PackWeightsMismatch(str(error)) from None
    if useless := [file for file, one in own.items() if not one.needs_slot]:
        raise PackWeightsMismatch(f"{useless[0]} changes no layer of the UNet")
    return own


def check_fit(manifest: Manifest, unet: StoryGenConfig, vae: VaeShape, text: TextShape) -> None:
    """Raises ValueError where the networks of a pack do not fit each other: each alone would load without complaint."""
    latents = {
        "the VAE's latent channels": vae.latent_channels,
        "the manifest's latent shifts": len(manifest.latents.shift),
        "the manifest's latent scales": len(manifest.latents.scale),
        "the UNet's input channels": unet.in_channels,
        "the UNet's output channels": unet.out_channels,
    }
    if len(set(latents.values())) > 1:
        told = ", ".join(f"{what} are {count}" for what, count in latents.items())
        raise ValueError(f"latent channels differ: {told}")
    if unet.cross_attention_dim != text.width:
        raise ValueError(f"the UNet reads texts {unet.cross_attention_dim} wide, the text encoder's are {text.width}")


ARCHITECTURES: dict[str, Callable[[Pack, torch.device, torch.dtype], FrameModel]] = {
    "arldm": load_arldm_pack,
    "flux2-klein": functools.partial(load_flux2, keeps_references=False),
    "flux2-klein-kv": functools.partial(load_flux2, keeps_references=True),
    "stable-diffusion": load_stable_diffusion,
    "stable-diffusion-xl": load_stable_diffusion_xl,
    "storygen": load_storygen,
}
"""Architecture name in a manifest → what loads it."""


def save_network(
    folder: Path, module: nn.Module, shape: StoryGenConfig | VaeShape | TextShape, dtype: torch.dtype
) -> None:
    """Write one network of a pack: `config.json` and its weights, in the layout `load_storygen` reads.

    `folder` is the pack's `unet`, `vae` or `text_encoder` folder. Raises ValueError for weights that are not finite in
    `dtype`: a pack that cannot draw must not be sealed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(shape.to_dict(), indent=2) + "\n", encoding="utf-8")
    state = {
        name: value.detach().to(device="cpu", dtype=dtype).contiguous() for name, value in module.state_dict().items()
    }
    broken = sorted(name for name, value in state.items() if not bool(value.isfinite().all()))
    if broken:
        raise ValueError(f"weights are not finite in {dtype}: {', '.join(broken[:5])}")
    name = TEXT_WEIGHTS if isinstance(shape, TextShape) else UNET_WEIGHTS
    save_file(state, str(folder / name), metadata={"format": "pt"})


def _config(pack: Pack, network: str) -> dict[str, Any]:
    document = json.loads(pack.path(f"{network}/{CONFIG}").read_bytes())
    if not isinstance(document, dict):
        raise ValueError(f"{network}/{CONFIG} is not a JSON object")
    return document
