"""From AR-LDM's published checkpoint to a pack: first a folder of ours, then what its manifest will say.

    fabula pack convert last.ckpt flat                        what Lightning pickled becomes safetensors
    python -m services.models.arldm.published flat/last.safetensors flintstones \
        --clip-tokenizer CLIP --blip-tokenizer BLIP --words fred barney wilma … --given-frames 1
    fabula pack add flintstones --licence LicenseRef-arldm

Nobody publishes the tokenizers with the weights, and the words that a data set added to them are in no file: whoever
converts says both, and the tables' lengths prove them right. Fetches nothing. Knows no network but by its shapes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from services.models.arldm.checkpoint import CONFIG, convert
from services.models.arldm.model import GUIDANCE, LATENTS, SCHEDULE, ArldmConfig, FrameShape
from services.models.arldm.reader import arldm_files
from services.models.arldm.text import BLIP_MARKS, CLIP_MARKS, CaptionTokenizer
from services.models.errors import ModelError, PackSourceInvalid
from services.models.library import PackPlan, WantedFile
from services.models.pack import PackSettings, Sampling
from services.models.published import Told, pack_name, read_header, read_json, stored_dtype
from services.models.source import Source, SourceFile

ARCHITECTURE = "arldm"
STEPS = 50  # EpicEvo's; the published configuration takes 250, which `--steps 200` is nearest to here
_UNET = "unet/diffusion_pytorch_model.safetensors"
_TABLES = f"frame_embeddings/{CONFIG}"


def is_arldm(files: Mapping[str, SourceFile]) -> bool:
    """Whether a source that is no pack is a converted checkpoint."""
    return _TABLES in files


def plan_arldm(source: Source, files: Mapping[str, SourceFile], told: Told) -> PackPlan:
    """How to add a converted checkpoint. Raises PackSourceInvalid, PackUnsupported, PackFileUnsafe."""
    if not told.licence:
        raise PackSourceInvalid(
            f"{source.name} has no pack.json: say under which licence its weights are published, "
            "for example --licence MIT or --licence LicenseRef-name"
        )
    if told.family not in ("", ARCHITECTURE):
        raise PackSourceInvalid(f"{source.name} is an AR-LDM, and {told.family} is not")
    if missing := [path for path in arldm_files() if path not in files]:
        raise PackSourceInvalid(f"{source.name} has no {missing[0]}: convert the checkpoint again")
    wanted = tuple(WantedFile(path=path, source_path=path, file=files[path]) for path in arldm_files())
    try:
        frame = FrameShape.from_dict(read_json(source, files, _TABLES))
        side_px = int(read_json(source, files, f"unet/{CONFIG}").get("sample_size", 64)) * 2 ** (
            len(read_json(source, files, f"vae/{CONFIG}")["block_out_channels"]) - 1
        )
        settings = PackSettings(
            name=told.name or pack_name(source.name),
            architecture=ARCHITECTURE,
            base=told.base or source.name,
            licence=told.licence,
            made_by=told.made_by,
            width_px=side_px,
            height_px=side_px,
            dtype=stored_dtype(source, read_header(source, files, _UNET)),
            max_references=frame.frames - 1,
            reference_range="signed",
            latents=LATENTS,
            schedule=SCHEDULE,
            sampling=Sampling(
                sampler="ddim",
                default_steps=STEPS if told.steps is None else told.steps,
                default_text_guidance=GUIDANCE if told.text_guidance is None else told.text_guidance,
                default_image_guidance=1.0,
            ),
        )
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(str(p) for p in e['loc']) or 'manifest'}: {e['msg']}" for e in error.errors())
        raise PackSourceInvalid(f"{source.name}: {faults}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise PackSourceInvalid(f"{source.name} is no converted AR-LDM: {error}") from None
    given = f"goes on from {frame.given_frames} given frame" if frame.given_frames else "draws every frame of a story"
    notes = (f"it {given} and reads up to {frame.frames - 1} earlier ones",)
    return PackPlan(name=settings.name, architecture=ARCHITECTURE, files=wanted, settings=settings, notes=notes)


def main() -> int:
    """The command that converts."""
    parser = argparse.ArgumentParser(prog="python -m services.models.arldm.published")
    parser.add_argument("checkpoint", type=Path, help="the state dictionary as one safetensors file")
    parser.add_argument("folder", type=Path, help="where the folder is written; must not exist")
    parser.add_argument("--clip-tokenizer", type=Path, required=True, help="CLIP's tokenizer.json, or its folder")
    parser.add_argument("--blip-tokenizer", type=Path, required=True, help="BLIP's tokenizer.json, or its folder")
    parser.add_argument("--words", nargs="*", default=[], help="that training added to both, in its order")
    parser.add_argument("--given-frames", type=int, default=0, choices=(0, 1), help="1: it continues a given frame")
    given = parser.parse_args()
    if given.folder.exists():
        print(f"not converted: {given.folder} is there already", file=sys.stderr)
        return 1
    config = ArldmConfig()
    try:
        sized = convert(
            given.checkpoint,
            given.folder,
            clip_tokenizer=CaptionTokenizer.load(given.clip_tokenizer, CLIP_MARKS).with_words(given.words),
            blip_tokenizer=CaptionTokenizer.load(given.blip_tokenizer, BLIP_MARKS).with_words(given.words),
            config=replace(config, frame=replace(config.frame, given_frames=given.given_frames)),
        )
    except (ModelError, ValueError, FileNotFoundError) as error:
        print(f"not converted: {error}", file=sys.stderr)
        return 1
    print(f"{given.folder}: {sized.frame.frames} frames, captions of {sized.text.positions - 2} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
