"""Captioners that others published: which kinds there are, and from a checked pack to what the caption service needs.

    captioner/    config.json, weights, tokenizer and preprocessor, as their authors published them
    adapters/     PEFT adapters of the language model, `story/` and `descriptive/`, where there are any

A kind is a line in `ARCHITECTURES`. Knows no service and does not load weights: `writers.py` does, or vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from services.models.captions.wording import LookingWording, PublishedWording, Wording
from services.models.errors import PackManifestInvalid
from services.models.pack import Captioner, CaptionerManifest, SealedPack

FOLDER = "captioner"
ADAPTERS_FOLDER = "adapters"
CONFIG = f"{FOLDER}/config.json"
TOKENIZER = f"{FOLDER}/tokenizer.json"

LLAVA = "llava"
VISION_LANGUAGE = "vision-language"
CAUSAL_LM = "causal-lm"
BLIP = "blip"


@dataclass(frozen=True, kw_only=True)
class PublishedCaptioner:
    """What the caption service needs to know of one, its weights apart."""

    wording: Wording
    image_tokens_count: int  # that one picture takes in a prompt; 1 where no token stands for it


def read_captioner(pack: SealedPack) -> PublishedCaptioner:
    """The words and sizes of a checked pack's captioner.

    Raises PackManifestInvalid or PackFileMissing.
    """
    manifest = pack.manifest
    if not isinstance(manifest, CaptionerManifest):
        raise PackManifestInvalid(f"pack {pack.name!r} holds no published captioner")
    kind = ARCHITECTURES.get(manifest.architecture)
    if kind is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise PackManifestInvalid(f"architecture {manifest.architecture!r} is unknown; known captioners: {known}")
    folder = pack.path(CONFIG).parent
    try:
        config = json.loads(pack.path(CONFIG).read_bytes())
        tokenizer = tokenizers.Tokenizer.from_file(str(pack.path(TOKENIZER)))
        wording = kind.wording(tokenizer, manifest.captioner, config)
        count = kind.image_tokens(folder, manifest.captioner, config)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise PackManifestInvalid(f"pack {pack.name!r}: {type(error).__name__}: {error}") from None
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exception for a malformed file
        raise PackManifestInvalid(f"pack {pack.name!r}: {TOKENIZER} is no tokenizer: {error}") from None
    return PublishedCaptioner(wording=wording, image_tokens_count=count)


def read_adapters(pack: SealedPack, manifest: CaptionerManifest) -> dict[str, Path]:
    """Folders of a captioner's adapters by name. Raises PackFileMissing."""
    return {
        name: pack.path(f"{folder}/adapter_config.json").parent for name, folder in manifest.captioner.adapters.items()
    }


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How captioners of one architecture are read."""

    wording: Callable[[tokenizers.Tokenizer, Captioner, dict[str, Any]], Wording]
    image_tokens: Callable[[Path, Captioner, dict[str, Any]], int]
    by_vllm: bool  # False: vLLM may not know it; `writers.py` does


def _questions(tokenizer: tokenizers.Tokenizer, captioner: Captioner, config: dict[str, Any]) -> Wording:
    return PublishedWording(tokenizer, captioner)


def _first_words(tokenizer: tokenizers.Tokenizer, captioner: Captioner, config: dict[str, Any]) -> Wording:
    return LookingWording(tokenizer, captioner, begin_id=int(config["text_config"].get("bos_token_id", 30522)))


def _patches(folder: Path, captioner: Captioner, config: dict[str, Any]) -> int:
    vision = config["vision_config"]
    count = int(vision["image_size"]) // int(vision["patch_size"])
    has_class_token = config.get("vision_feature_select_strategy", "default") == "full"
    return count * count + int(has_class_token)


def _counted(folder: Path, captioner: Captioner, config: dict[str, Any]) -> int:
    """As many as its own processor makes of a picture of the size that all pictures get."""
    from PIL import Image
    from transformers import AutoProcessor

    if not captioner.image_token:
        return 1
    processor: Any = AutoProcessor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    picture = Image.new("RGB", (captioner.image_px, captioner.image_px))
    ids = processor(text=[captioner.opening], images=[picture], return_tensors="pt")["input_ids"]
    token = processor.tokenizer.convert_tokens_to_ids(captioner.image_token)
    return max(1, int((ids == token).sum()))


def _none(folder: Path, captioner: Captioner, config: dict[str, Any]) -> int:
    return 1


ARCHITECTURES: dict[str, Kind] = {
    LLAVA: Kind(wording=_questions, image_tokens=_patches, by_vllm=True),
    VISION_LANGUAGE: Kind(wording=_questions, image_tokens=_counted, by_vllm=True),
    CAUSAL_LM: Kind(wording=_questions, image_tokens=_none, by_vllm=False),
    BLIP: Kind(wording=_first_words, image_tokens=_none, by_vllm=False),
}
"""Architecture name in a captioner's manifest → how it is read."""
