"""Starts a run from the weights of a pack instead of from nothing.

Writes the checkpoint of step 0, which the run then continues from. A network that has grown since (more latent
channels) keeps what it knew and computes it at first: weights lie in the corner of the larger ones they came from, what
is new is fresh, and what was there learns to listen to it from zero.

    python -m training.start vae decoder text frame eyes judge captions [--pack DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from services.models import toon
from services.models.captions import llava
from services.models.eyes import load_eyes
from services.models.pack import Pack, load_pack
from services.models.registry import TEXT_WEIGHTS, UNET_WEIGHTS, VAE_WEIGHTS
from services.models.storygen import build_storygen
from training.captions import FOLDER as CAPTIONS_FOLDER
from training.captions import CaptionsRecipe
from training.evaluation.judge import CHECKPOINT as JUDGE_CHECKPOINT
from training.evaluation.judge import load_judge
from training.eyes import CHECKPOINT as EYES_CHECKPOINT
from training.eyes import WorldEyes
from training.frame import CHECKPOINT as FRAME_CHECKPOINT
from training.loop import STARTED_FROM
from training.recipes import toon_text
from training.storage import Checkpoint, load_checkpoint, save_checkpoint, training_dir, with_prefix
from training.text import CHECKPOINT as TEXT_CHECKPOINT
from training.text import TextTrainee, fresh_text
from training.vae import CHECKPOINT as VAE_CHECKPOINT
from training.vae import DECODER_CHECKPOINT, encoding_vae
from training.widen import widened

# A VAE's moments are its means followed by its log variances, so a grown one has two corners, not one.
_MOMENTS = ("encoder.conv_out.", "quant_conv.")
_READS_LATENTS = "decoder.conv_in.weight"
_READS_MOMENTS = "quant_conv.bias"
_QUIET = -6.0  # log variance at which a new latent channel begins: with noise as large as itself nobody would use it


def grown(fresh: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`fresh` with the values of `known` in the leading corner of each tensor, and zero from new inputs to old outputs.

    Raises ValueError when a name differs or a tensor has shrunk.
    """
    if fresh.keys() != known.keys():
        raise ValueError(f"not the same network: {sorted(fresh.keys() ^ known.keys())[:3]}")
    out = {}
    for name, value in fresh.items():
        old = known[name].to(value.dtype)
        if old.ndim != value.ndim or any(a > b for a, b in zip(old.shape, value.shape, strict=True)):
            raise ValueError(f"{name}: {tuple(old.shape)} does not fit into {tuple(value.shape)}")
        new = value.detach().clone()
        moments = (
            [name.startswith(_MOMENTS)] * 2 if name.startswith("quant_conv.weight") else [name.startswith(_MOMENTS)]
        )
        _place(new, old, moments)
        out[name] = new
    return out


def _place(new: Tensor, old: Tensor, in_halves: list[bool]) -> None:
    """Copy `old` into `new`, and zero beside it; dimensions marked in `in_halves` are copied half by half."""
    index = [torch.arange(size) for size in old.shape]
    for dim, halves in enumerate(in_halves[: old.ndim]):
        if halves:
            half = torch.arange(old.shape[dim] // 2)
            index[dim] = torch.cat([half, new.shape[dim] // 2 + half])
    if old.ndim == 0:
        new.copy_(old)
        return
    if old.ndim > 1:
        new[index[0]] = 0.0
    new[torch.meshgrid(*index, indexing="ij")] = old


def with_more_inputs(weight: Tensor, inputs: int) -> Tensor:
    """A convolution's weight `[out, in, …]` with `inputs` inputs, deaf to the new ones."""
    out = weight.new_zeros(weight.shape[0], inputs, *weight.shape[2:])
    out[:, : weight.shape[1]] = weight
    return out


def start_vae(pack: Pack) -> None:
    """Write step 0 of the autoencoder's run."""
    torch.manual_seed(1)
    fresh, known = toon.toon_vae().state_dict(), load_file(pack.path(f"vae/{VAE_WEIGHTS}"))
    known[_READS_LATENTS] = with_more_inputs(known[_READS_LATENTS], fresh[_READS_LATENTS].shape[1])
    weights: dict[str, Tensor] = {}
    for grow, inside in ((partial(widened, generator=torch.Generator().manual_seed(1)), True), (grown, False)):
        parts = ({n: v for n, v in one.items() if n.startswith("decoder.") is inside} for one in (fresh, known))
        weights |= grow(*parts)
    before, now = known[_READS_MOMENTS].numel() // 2, weights[_READS_MOMENTS].numel() // 2
    weights[_READS_MOMENTS][now + before :] = _QUIET
    _save(VAE_CHECKPOINT, with_prefix("vae", weights), pack)


def start_decoder(pack: Pack) -> None:
    """Write step 0 of the run in which the decoder learns on alone, behind the pack's own encoder.

    Raises FileNotFoundError without an autoencoder, and ValueError for one that is not the pack's.
    """
    whole = load_checkpoint(training_dir() / VAE_CHECKPOINT)
    if whole is not None and (whole.facts["step"], whole.facts.get(STARTED_FROM)) != (0, pack.digest):
        raise ValueError("the autoencoder here is no longer the pack's: run `python -m training.vae --decoder` at once")
    _save(DECODER_CHECKPOINT, with_prefix("vae", encoding_vae().state_dict()), pack)


def start_text(pack: Pack) -> None:
    """Write step 0 of the text encoder's run; who reads its states starts from nothing."""
    torch.manual_seed(6)
    trainee = TextTrainee(fresh_text(), toon_text())
    known = grown(trainee.text.model.state_dict(), load_file(pack.path(f"text_encoder/{TEXT_WEIGHTS}")))
    networks = with_prefix("text", known) | with_prefix("reader", trainee.reader.state_dict())
    _save(TEXT_CHECKPOINT, networks, pack)


def start_frame(pack: Pack) -> None:
    """Write step 0 of the frame model's run."""
    torch.manual_seed(2)
    unet = build_storygen(toon.UNET)
    networks = with_prefix("unet", grown(unet.state_dict(), load_file(pack.path(f"unet/{UNET_WEIGHTS}"))))
    _save(FRAME_CHECKPOINT, networks, pack)


def start_eyes(pack: Pack) -> None:
    """Write step 0 of the eyes' run. Raises FileNotFoundError when the pack has none."""
    eyes = load_eyes(pack.folder)
    if eyes is None:
        raise FileNotFoundError(f"pack {pack.name!r} has no eyes")
    _save(EYES_CHECKPOINT, with_prefix("eyes", grown(WorldEyes().state_dict(), eyes.state_dict())), pack)


def start_judge(pack: Pack) -> None:
    """Write step 0 of the run of the judge that is shipped, which no pack has."""
    _save(JUDGE_CHECKPOINT, with_prefix("judge", load_judge().state_dict()), pack)


def start_captions(pack: Pack) -> None:
    """Write step 0 of the captioner's "tales" phase; the phases before it are then left out."""
    later = sorted(file.name for file in (training_dir() / CAPTIONS_FOLDER).glob("*.safetensors"))
    if later:  # a phase that has ended would be taken for learned, and nothing of this start would remain
        raise FileExistsError(
            f"{training_dir() / CAPTIONS_FOLDER} holds {', '.join(later)}: move them away to start anew"
        )
    base = llava.load_base(pack.path("llava/config.json").parent)
    networks = with_prefix("llava", base.state_dict())
    _save(f"{CAPTIONS_FOLDER}/{CaptionsRecipe().tales.name}.safetensors", networks, pack)


def _save(name: str, networks: dict[str, Tensor], pack: Pack) -> None:
    path = training_dir() / name
    if path.exists():
        raise FileExistsError(f"{path} is there already: move it away to start anew")
    facts: dict[str, Any] = {"step": 0, "elapsed_s": 0.0, "figures": {}, "done": False, STARTED_FROM: pack.digest}
    path.parent.mkdir(exist_ok=True)
    save_checkpoint(path, Checkpoint(with_prefix("networks", networks) | with_prefix("average", networks), facts))


STARTS = {
    "vae": start_vae,
    "decoder": start_decoder,
    "text": start_text,
    "frame": start_frame,
    "eyes": start_eyes,
    "judge": start_judge,
    "captions": start_captions,
}


def main() -> None:
    """Start the named runs."""
    from training.toon_pack import PACK

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", choices=tuple(STARTS))
    parser.add_argument("--pack", type=Path, default=PACK)
    arguments = parser.parse_args()
    pack = load_pack(arguments.pack)
    for name in arguments.networks:
        STARTS[name](pack)


if __name__ == "__main__":
    main()
