"""Makes the whole toon pack: every network in turn, then the sealed folder. `make toon-pack` runs it.

Each stage continues from its checkpoint, and a finished one is skipped, so an interrupted run is started again with the
same command. Order matters: the tokenizer comes first, the frame model needs autoencoder and text encoder.

With `--processes N` that many train a network together, each on batches of its own (`peers`): on two cores two of one
thread took twice the rows of one of two threads in the same time.

    python -m training.toon_pack [--processes 2] [--threads 2] [--only pack]
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.models.eyes import FOLDER as EYES_FOLDER
from services.models.eyes import save_eyes
from services.models.glimpse import Glimpse, fitted_glimpse
from services.models.pack import Pack, PackSettings, write_pack
from services.models.registry import UNET_WEIGHTS, save_network
from services.models.storygen import build_storygen
from services.models.toon import FRAME_PX, MAX_REFERENCES, TEXT, UNET, VAE
from services.models.vae import Codec
from training.card import CARD, card_of, model_card
from training.clip import CHECKPOINT as CLIP_CHECKPOINT
from training.clip import export_clip, train_clip, trained_clip
from training.draft import CHECKPOINT as DRAFT_CHECKPOINT
from training.draft import export_draft, train_draft
from training.evaluation.judge import train_and_ship
from training.eyes import train_eyes, trained_eyes
from training.frame import train_frame, trained_frame
from training.latents import scaling_of
from training.pictures import shelf
from training.precision import on_gpu
from training.recipes import (
    DRAFT_FILE,
    TOON_DRAFT,
    TOON_SAMPLING,
    toon_clip,
    toon_decoder,
    toon_draft,
    toon_eyes,
    toon_frame,
    toon_judge,
    toon_text,
    toon_vae,
)
from training.storage import training_dir
from training.text import train_text, trained_text
from training.toon.knowledge import write_knowledge
from training.vae import encoding_vae, train_vae, trained_vae

PACK = Path(__file__).resolve().parents[1] / "services" / "models" / "packs" / "toon"


def write_networks(folder: Path) -> PackSettings:
    """Write every network of frames, and the eyes, from the training folder into a pack; returns its settings.

    Raises FileNotFoundError when a network is not trained yet (a CLIP may be missing).
    """
    unet: Any = build_storygen(UNET)
    weights = trained_frame()
    unet.load_state_dict(weights)
    vae: Any = trained_vae()
    save_network(folder / "unet", unet, UNET, torch.float16)
    sampling = TOON_SAMPLING
    if (training_dir() / DRAFT_CHECKPOINT).is_file():  # without it, a draft takes fewer steps and no less guidance
        digest = hashlib.sha256((folder / "unet" / UNET_WEIGHTS).read_bytes()).hexdigest()
        export_draft(folder / DRAFT_FILE, weights, digest, toon_draft(gpu=on_gpu()).rank)
        sampling = sampling.model_copy(update={"qualities": {**sampling.qualities, "draft": TOON_DRAFT}})
    save_network(folder / "text_encoder", trained_text().model, TEXT, torch.float16)
    save_network(folder / "vae", vae, VAE, torch.float16)
    save_eyes(trained_eyes(), folder / EYES_FOLDER)
    latents = scaling_of(encoding_vae(), shelf(toon_frame(gpu=on_gpu()).singles[0]))
    previews_of(Codec(encoding_vae(), latents)).save(folder)
    if (training_dir() / CLIP_CHECKPOINT).is_file():  # for metrics only: a pack can be served without it
        export_clip(trained_clip(), folder / "clip")
    return PackSettings(
        name="toon",
        architecture="storygen",
        base="nothing",
        licence="Apache-2.0",
        made_by="make toon-pack",
        width_px=FRAME_PX,
        height_px=FRAME_PX,
        max_references=MAX_REFERENCES,
        reference_range="signed",
        sample_latents=False,  # trained on posterior means
        latents=latents,
        schedule=toon_frame().schedule,  # what it was trained with
        sampling=sampling,
    )


def previews_of(codec: Codec, count: int = 600) -> Glimpse:
    """The map from latents to rough pictures, fitted to single frames of the cast."""
    pictures = np.array(shelf(toon_frame(gpu=on_gpu()).singles[0])[:count])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255.0
    with torch.inference_mode():
        latents = torch.cat([codec.encode(pixels[start : start + 32]) for start in range(0, len(pixels), 32)])
    return fitted_glimpse(latents, pixels, codec.factor)


def seal(folder: Path = PACK) -> Pack:
    """Write everything that is trained into `folder` and seal it with its manifest.

    The captioner's files must be there already (`training.captions` writes them).
    """
    settings = write_networks(folder)
    for name in ("llava", "adapters/story", "adapters/descriptive"):
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"the pack has no {name}/ yet: run `python -m training.captions --out {folder}`")
    write_knowledge(folder)
    (folder / CARD).write_text(model_card(earlier=card_of(folder)), encoding="utf-8")
    for leftover in folder.rglob("*.part"):
        leftover.unlink()
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    return write_pack(folder, settings)


def _module(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", *arguments], check=True)


_TOGETHER = {  # the stages that processes can share, and their commands
    "eyes": ("training.eyes",),
    "vae": ("training.vae",),
    "text": ("training.text",),
    "decoder": ("training.vae", "--decoder"),
    "frame": ("training.frame",),
    "draft": ("training.draft",),
    "clip": ("training.clip",),
}


def _together(command: Sequence[str], processes: int) -> None:
    """Runs a training command in several processes of this machine, which share its threads."""
    threads = max(1, torch.get_num_threads() // processes)
    started_by = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m")
    _module(*started_by, *command, "--threads", str(threads))


def stages(folder: Path, processes: int = 1) -> dict[str, Callable[[], object]]:
    """Every stage by name, in order; those of `_TOGETHER` in so many processes."""

    def tokenizer() -> None:
        if not (folder / "tokenizer" / "tokenizer.json").is_file():
            _module("training.tokenizer", "--out", str(folder / "tokenizer"))

    alone: dict[str, Callable[[], object]] = {
        "tokenizer": tokenizer,
        "eyes": lambda: train_eyes(toon_eyes(gpu=on_gpu())),
        "vae": lambda: train_vae(toon_vae(gpu=on_gpu())),
        "text": lambda: train_text(toon_text(gpu=on_gpu())),
        "decoder": lambda: train_vae(toon_decoder(gpu=on_gpu())),
        "frame": lambda: train_frame(toon_frame(gpu=on_gpu())),
        "draft": lambda: train_draft(toon_draft(gpu=on_gpu())),
        "clip": lambda: train_clip(toon_clip(gpu=on_gpu())),
        "captions": lambda: _module("training.captions", "--out", str(folder)),
        "judge": lambda: train_and_ship(toon_judge(gpu=on_gpu())),
        "pack": lambda: print(f"toon pack {seal(folder).digest} in {folder}"),
        "evaluation": lambda: _module("training.evaluation.toon", "--pack", str(folder), "--card"),
    }
    if processes == 1:
        return alone
    return alone | {name: partial(_together, command, processes) for name, command in _TOGETHER.items()}


def main() -> None:
    """Run every stage, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PACK, help="pack folder")
    parser.add_argument("--only", choices=tuple(stages(PACK)), help="run this stage alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processes", type=int, default=1, help="that train each network together")
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error("--processes: at least one")
    if on_gpu() and arguments.processes > torch.cuda.device_count():
        parser.error(f"--processes: each takes a GPU of its own, and here are {torch.cuda.device_count()}")
    torch.set_num_threads(arguments.threads)
    for name, stage in stages(arguments.out, arguments.processes).items():
        if arguments.only in (None, name):
            print(f"== {name}", flush=True)
            stage()


if __name__ == "__main__":
    main()
