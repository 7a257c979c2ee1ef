"""AR-LDM's weights on disk: the published checkpoint's names to ours, and the folder that is loaded.

    arldm/
      unet/ vae/ text_encoder/ mm_encoder/ frame_embeddings/    config.json + safetensors
      clip_tokenizer/ blip_tokenizer/                           tokenizer.json

`convert` starts from a flat safetensors file with the names of the Lightning checkpoint's `state_dict`. Every tensor of
it must have a place: the published loader skips what does not fit, and so hides a wrong checkpoint.
Knows no pack and no pickle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from services.models.arldm.blip import BlipShape
from services.models.arldm.model import LATENTS, SCHEDULE, Arldm, ArldmConfig, FrameShape
from services.models.arldm.sampling import ArldmModel
from services.models.arldm.text import BLIP_MARKS, CLIP_MARKS, CaptionTokenizer, resized_table
from services.models.errors import PackFileMissing, PackManifestInvalid, PackWeightsMismatch
from services.models.schedule import Schedule
from services.models.storygen import StoryGenConfig
from services.models.text_encoder import TextShape
from services.models.vae import Codec, VaeShape, build_vae

CONFIG = "config.json"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"
NETWORKS = {
    "unet": DIFFUSERS_WEIGHTS,
    "vae": DIFFUSERS_WEIGHTS,
    "text_encoder": TRANSFORMERS_WEIGHTS,
    "mm_encoder": TRANSFORMERS_WEIGHTS,
    "frame_embeddings": TRANSFORMERS_WEIGHTS,
}
"""Folder → file of weights."""
CLIP_TOKENIZER, BLIP_TOKENIZER = "clip_tokenizer", "blip_tokenizer"

States = dict[str, dict[str, Tensor]]
"""Network → name → tensor."""


@dataclass(frozen=True)
class _Rename:
    """Names that begin with `prefix` belong to `network`, where the rest is spelled otherwise."""

    prefix: str
    network: str
    spelled: tuple[tuple[re.Pattern[str], str], ...] = ()

    def __call__(self, name: str) -> str:
        rest = name.removeprefix(self.prefix)
        for pattern, ours in self.spelled:
            rest = pattern.sub(ours, rest)
        return rest


def _spelled(*pairs: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), ours) for pattern, ours in pairs)


_RENAMES = (
    _Rename("unet.", "unet"),
    # The autoencoder's attention had names of its own until diffusers 0.18.
    _Rename(
        "vae.",
        "vae",
        _spelled(
            (r"(\.attentions\.\d+)\.query\.", r"\1.to_q."),
            (r"(\.attentions\.\d+)\.key\.", r"\1.to_k."),
            (r"(\.attentions\.\d+)\.value\.", r"\1.to_v."),
            (r"(\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
        ),
    ),
    _Rename("text_encoder.text_model.", "text_encoder"),
    _Rename(
        "mm_encoder.visual_encoder.",
        "mm_encoder",
        _spelled(
            (r"^cls_token$", "vision.embeddings.class_embedding"),
            (r"^pos_embed$", "vision.embeddings.position_embedding"),
            (r"^patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
            (r"^norm\.", "vision.post_layernorm."),
            (r"^blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
            (r"^blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
            (r"^blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
            (r"^blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
        ),
    ),
    _Rename("mm_encoder.text_encoder.", "mm_encoder", _spelled((r"^", "text."))),
    _Rename("modal_type_embeddings.", "frame_embeddings", _spelled((r"^", "modal_type."))),
    _Rename("time_embeddings.", "frame_embeddings", _spelled((r"^", "time."))),
)
# Counting buffers, which hold no learned number, and the network that only ever measured pictures.
_LEFT_OUT = re.compile(r"^(text_encoder\.text_model|mm_encoder\.text_encoder)\.embeddings\.position_ids$|^inception\.")
_NULL_TOKENS = ("clip_text_null_token", "blip_text_null_token", "blip_image_null_token")


def from_lightning(state: Mapping[str, Tensor], config: ArldmConfig) -> tuple[ArldmConfig, States]:
    """The tensors of a published checkpoint under our names, and `config` with the sizes that its tables have.

    How many words and positions there are depends on the data set (91 positions and 49,412 words for FlintstonesSV), so
    the tables say it. Raises PackWeightsMismatch naming tensors that have no place, or that contradict each other.
    """
    states: States = {network: {} for network in NETWORKS}
    unknown = []
    for name, tensor in state.items():
        if _LEFT_OUT.match(name) or name in _NULL_TOKENS:
            continue
        rename = next((rename for rename in _RENAMES if name.startswith(rename.prefix)), None)
        if rename is None:
            unknown.append(name)
        else:
            states[rename.network][rename(name)] = tensor
    if unknown:
        raise PackWeightsMismatch(f"not of an AR-LDM checkpoint: {_some(sorted(unknown))}")
    sized = _sized(states, config)
    for name in ("clip_text_null_token", "blip_text_null_token"):
        if name in state and state[name].shape[-1] != sized.text.positions:
            raise PackWeightsMismatch(
                f"{name} has {state[name].shape[-1]} positions and the table of CLIP {sized.text.positions}: "
                "the position table was not resized"
            )
    wanted = _wanted(sized)
    for network in NETWORKS:
        _check(states[network], wanted[network], network)
    return sized, states


def _sized(states: States, config: ArldmConfig) -> ArldmConfig:
    """`config` with the counts of words, positions and frames that the tables have."""

    def rows(network: str, name: str) -> int:
        if name not in states[network]:
            raise PackWeightsMismatch(f"{name} of {network} is missing")
        return int(states[network][name].shape[0])

    try:
        return replace(
            config,
            text=replace(
                config.text,
                vocab_size=rows("text_encoder", "embeddings.token_embedding.weight"),
                positions=rows("text_encoder", "embeddings.position_embedding.weight"),
            ),
            blip=replace(
                config.blip,
                vocab_size=rows("mm_encoder", "text.embeddings.word_embeddings.weight"),
                positions=rows("mm_encoder", "text.embeddings.position_embeddings.weight"),
            ),
            frame=replace(config.frame, frames=rows("frame_embeddings", "time.weight")),
        )
    except ValueError as error:
        raise PackWeightsMismatch(str(error)) from None


def resized(
    config: ArldmConfig,
    states: States,
    generator: torch.Generator,
    *,
    positions: int | None = None,
    clip_words: int | None = None,
    blip_words: int | None = None,
) -> tuple[ArldmConfig, States]:
    """The same networks with tables of other lengths, before they are trained: longer captions, a cast's names.

    New rows come from `generator`; rows that fall off are lost. Networks that do not change are shared.
    Raises ValueError when BLIP cannot read so many positions.
    """
    new = replace(
        config,
        text=replace(
            config.text,
            positions=positions or config.text.positions,
            vocab_size=clip_words or config.text.vocab_size,
        ),
        blip=replace(config.blip, vocab_size=blip_words or config.blip.vocab_size),
    )
    changed = {network: dict(state) for network, state in states.items()}
    for network, name, rows in (
        ("text_encoder", "embeddings.position_embedding.weight", new.text.positions),
        ("text_encoder", "embeddings.token_embedding.weight", new.text.vocab_size),
        ("mm_encoder", "text.embeddings.word_embeddings.weight", new.blip.vocab_size),
    ):
        table = changed[network][name]
        if len(table) != rows:
            changed[network][name] = resized_table(table, rows, generator)
    return new, changed


def convert(
    source: Path,
    target: Path,
    *,
    clip_tokenizer: CaptionTokenizer,
    blip_tokenizer: CaptionTokenizer,
    config: ArldmConfig | None = None,
    dtype: torch.dtype | None = None,
) -> ArldmConfig:
    """Write the folder of a published checkpoint. `dtype` None keeps what the file has.

    `config` says what tables cannot: numbers of heads, and whether the first frame is given. By default those of
    Stable Diffusion 1.5 and BLIP-large, trained for visualization.
    Raises PackFileMissing or PackWeightsMismatch.
    """
    sized, states = from_lightning(_read(source), ArldmConfig() if config is None else config)
    for tokenizer, rows in ((clip_tokenizer, sized.text.vocab_size), (blip_tokenizer, sized.blip.vocab_size)):
        if tokenizer.vocabulary_size > rows:
            raise PackWeightsMismatch(
                f"the tokenizer with {tokenizer.marks.begin} has {tokenizer.vocabulary_size} words "
                f"and the checkpoint's table {rows} rows: it is another data set's"
            )
    save_arldm(target, sized, states, clip_tokenizer, blip_tokenizer, dtype=dtype)
    return sized


def save_arldm(
    folder: Path,
    config: ArldmConfig,
    states: States,
    clip_tokenizer: CaptionTokenizer,
    blip_tokenizer: CaptionTokenizer,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the folder. Raises ValueError for weights that are not finite in `dtype`."""
    shapes: dict[str, StoryGenConfig | VaeShape | TextShape | BlipShape | FrameShape] = {
        "unet": config.unet,
        "vae": config.vae,
        "text_encoder": config.text,
        "mm_encoder": config.blip,
        "frame_embeddings": config.frame,
    }
    for network, file in NETWORKS.items():
        state = {
            name: tensor.detach().to(device="cpu", dtype=dtype).contiguous() for name, tensor in states[network].items()
        }
        if broken := sorted(name for name, tensor in state.items() if not bool(tensor.isfinite().all())):
            raise ValueError(f"weights of {network} are not finite: {_some(broken)}")
        (folder / network).mkdir(parents=True, exist_ok=True)
        document = json.dumps(shapes[network].to_dict(), indent=2)
        (folder / network / CONFIG).write_text(document + "\n", encoding="utf-8")
        save_file(state, str(folder / network / file), metadata={"format": "pt"})
    clip_tokenizer.save(folder / CLIP_TOKENIZER)
    blip_tokenizer.save(folder / BLIP_TOKENIZER)


def load_arldm(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ArldmModel:
    """Load a folder that `save_arldm` wrote. `dtype` is of the UNet's arithmetic; all else stays in float32.

    Raises PackFileMissing, PackManifestInvalid (configs and tokenizers) or PackWeightsMismatch.
    """
    try:
        config = ArldmConfig(
            unet=StoryGenConfig.from_dict(_config(folder, "unet")),
            vae=VaeShape.from_dict(_config(folder, "vae")),
            text=TextShape.from_dict(_config(folder, "text_encoder")),
            blip=BlipShape.from_dict(_config(folder, "mm_encoder")),
            frame=FrameShape.from_dict(_config(folder, "frame_embeddings")),
        )
        clip_tokenizer = CaptionTokenizer.load(folder / CLIP_TOKENIZER, CLIP_MARKS)
        blip_tokenizer = CaptionTokenizer.load(folder / BLIP_TOKENIZER, BLIP_MARKS)
        states = {network: _read(folder / network / file) for network, file in NETWORKS.items()}
        networks, vae = assemble(config, states)
        networks.requires_grad_(False)
        networks.to(device)
        networks.unet.to(dtype)
        codec = Codec(nn.Module.to(vae, device), LATENTS)
        return ArldmModel(networks, codec, Schedule(SCHEDULE), clip_tokenizer, blip_tokenizer)
    except FileNotFoundError as error:
        raise PackFileMissing(str(error)) from None
    except (ValueError, TypeError) as error:
        raise PackManifestInvalid(f"{folder}: {error}") from None


def assemble(config: ArldmConfig, states: States) -> tuple[Arldm, Any]:
    """The networks and the VAE with these weights, in eval mode, in float32. Raises PackWeightsMismatch."""
    networks, vae = _empty(config)
    for network, module in _modules(networks, vae).items():
        _check(states[network], {name: tensor.shape for name, tensor in module.state_dict().items()}, network)
        module.load_state_dict(states[network])
    return networks, vae


def states_of(networks: Arldm, vae: nn.Module) -> States:
    """The weights as `save_arldm` takes them."""
    return {network: dict(module.state_dict()) for network, module in _modules(networks, vae).items()}


def _modules(networks: Arldm, vae: nn.Module) -> dict[str, nn.Module]:
    """What lies in which folder."""
    tables = nn.ModuleDict({"modal_type": networks.type_embeddings, "time": networks.time_embeddings})
    return {
        "unet": networks.unet,
        "vae": vae,
        "text_encoder": networks.text_encoder,
        "mm_encoder": networks.mm_encoder,
        "frame_embeddings": tables,
    }


def _empty(config: ArldmConfig) -> tuple[Arldm, Any]:
    networks = Arldm(config)
    networks.eval()
    vae: Any = build_vae(config.vae)
    vae.requires_grad_(False)
    return networks, vae


def _wanted(config: ArldmConfig) -> dict[str, dict[str, torch.Size]]:
    """Network → name → shape, without the memory."""
    with torch.device("meta"):
        networks, vae = _empty(config)
        return {
            network: {name: tensor.shape for name, tensor in module.state_dict().items()}
            for network, module in _modules(networks, vae).items()
        }


def _check(state: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], network: str) -> None:
    faults = [f"{name} is missing" for name in sorted(wanted.keys() - state.keys())]
    faults += [f"{name} is unknown" for name in sorted(state.keys() - wanted.keys())]
    faults += [
        f"{name} is {tuple(state[name].shape)} and should be {tuple(wanted[name])}"
        for name in sorted(wanted.keys() & state.keys())
        if state[name].shape != wanted[name]
    ]
    if faults:
        raise PackWeightsMismatch(f"{network}: {_some(faults)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return "; ".join(names[:5]) + more


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise PackFileMissing(f"{path.name} is not in {path.parent}")
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise PackWeightsMismatch(f"{path.name} of {path.parent.name} is not safetensors: {error}") from None


def _config(folder: Path, network: str) -> dict[str, Any]:
    path = folder / network / CONFIG
    if not path.is_file():
        raise PackFileMissing(f"{network}/{CONFIG} is not in {folder}")
    document = json.loads(path.read_bytes())
    if not isinstance(document, dict):
        raise ValueError(f"{network}/{CONFIG} is not a JSON object")
    return document
