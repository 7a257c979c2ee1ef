"""The small LLaVA of a pack: its shape, its preprocessing, and the files vLLM and transformers both load.

One base (`LlavaForConditionalGeneration`: a CLIP vision tower, a two-layer projector, a Llama) and
PEFT adapters on the Llama. Knows nothing of prompts (`services.models.captions.prompts`), of serving
(`services.caption.engine`) or of training (`training.captions`).

Shapes: B pictures, H and W pixels, C colour channels, P image tokens (one per patch), D text width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from services.models.tokenizer import (
    ASSISTANT,
    EOS,
    IMAGE,
    USER,
    StoryTokenizer,
)

ADAPTERS = ("story", "descriptive")
WEIGHTS_FILE = "model.safetensors"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTED_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PIXEL_MEAN = PIXEL_STD = 0.5  # pixels 0..255 become -1..1, per channel

# transformers 5 saves the tower without the `vision_model.` level that vLLM 0.32 (and older transformers) name.
_SAVED_TOWER, _SERVED_TOWER = "model.vision_tower.", "model.vision_tower.vision_model."


@dataclass(frozen=True)
class LlavaShape:
    """Sizes of one LLaVA. The defaults are the toon pack's: 4.0 M parameters, 8 MB in fp16."""

    image_px: int = 128
    patch_px: int = 16  # 64 image tokens at 128 px
    vision_width: int = 160
    vision_layers: int = 4
    vision_heads: int = 5
    text_width: int = 192
    text_layers: int = 5
    text_heads: int = 3
    text_mlp_width: int = 512
    context_tokens: int = 512  # image, prompt and answer together

    @property
    def image_tokens_count(self) -> int:
        """Tokens one picture takes in the prompt."""
        return (self.image_px // self.patch_px) ** 2


TINY = LlavaShape(
    image_px=32,
    patch_px=16,
    vision_width=32,
    vision_layers=1,
    vision_heads=1,
    text_width=32,
    text_layers=1,
    text_heads=1,
    text_mlp_width=64,
)


def llava_config(shape: LlavaShape, tokenizer: StoryTokenizer) -> Any:
    """The `transformers.LlavaConfig` of a shape."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    special = {
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_width,
            intermediate_size=4 * shape.vision_width,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads,
            image_size=shape.image_px,
            patch_size=shape.patch_px,
            projection_dim=shape.vision_width,
        ),
        text_config=LlamaConfig(
            vocab_size=tokenizer.vocabulary_size,
            hidden_size=shape.text_width,
            intermediate_size=shape.text_mlp_width,
            num_hidden_layers=shape.text_layers,
            num_attention_heads=shape.text_heads,
            num_key_value_heads=shape.text_heads,
            max_position_embeddings=shape.context_tokens,
            tie_word_embeddings=True,
            **special,
        ),
        image_token_index=tokenizer.image_id,
        image_seq_length=shape.image_tokens_count,
        vision_feature_layer=-1,  # all of the tower: nothing above it is trained or shipped
        vision_feature_select_strategy="default",  # patches without the class token
        tie_word_embeddings=True,
        **special,
    )


def build(shape: LlavaShape, tokenizer: StoryTokenizer, seed: int) -> Any:
    """A randomly initialised `LlavaForConditionalGeneration` in fp32, the same for the same seed."""
    from transformers import LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(llava_config(shape, tokenizer))
    return model


def pixels(images_BHWC: npt.NDArray[np.uint8]) -> Tensor:
    """Model input [B,C,H,W] in -1..1 from RGB bytes already at the model's size."""
    bytes_BHWC = torch.tensor(images_BHWC)  # a copy: memory maps are read-only
    return bytes_BHWC.permute(0, 3, 1, 2).float().div(255.0).sub(PIXEL_MEAN).div(PIXEL_STD)


def add_adapter(model: Any, rank: int, alpha: float, seed: int) -> Any:
    """Wrap the language model's linear layers in a fresh trainable PEFT LoRA; the base is frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=r"model\.language_model\..*\.(" + "|".join(ADAPTED_MODULES) + ")",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def served_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fp16 weights under the names vLLM and transformers load; the tied output table is left out."""
    return {name: tensor.detach().to(torch.float16).cpu().contiguous() for name, tensor in _served_names(state)}


def _served_names(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        if name == "lm_head.weight" or name.endswith("position_ids"):
            continue
        if name.startswith(_SAVED_TOWER) and not name.startswith(_SERVED_TOWER):
            name = _SERVED_TOWER + name[len(_SAVED_TOWER) :]
        yield name, tensor


def save_base(model: nn.Module, tokenizer: StoryTokenizer, folder: Path) -> None:
    """Write a LLaVA folder: configuration, processor, tokenizer, `model.safetensors` in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = model.config
    document = {**config.to_dict(), "dtype": "float16", "architectures": ["LlavaForConditionalGeneration"]}
    _write_json(folder / "config.json", document)
    save_file(served_state(model.state_dict()), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    tokenizer.save(folder)
    image_px, patch_px = config.vision_config.image_size, config.vision_config.patch_size
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": patch_px,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # the class token, which "default" drops again
        "image_token": IMAGE,
    }
    _write_json(folder / "processor_config.json", processor)
    size = {"height": image_px, "width": image_px}
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": 3,  # bicubic, as `services.caption.image` resizes
        "do_center_crop": False,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [PIXEL_MEAN] * 3,
        "image_std": [PIXEL_STD] * 3,
    }
    _write_json(folder / "preprocessor_config.json", preprocessor)
    (folder / "chat_template.jinja").write_text(chat_template(), encoding="utf-8")
    _write_json(folder / "generation_config.json", {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id})


def chat_template() -> str:
    """The one-turn layout of `services.models.captions.prompts`, for other tools that load the folder."""
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}" + USER + "{% else %}" + ASSISTANT + "{% endif %}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + IMAGE + "\n{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{% if message['role'] == 'assistant' %}" + EOS + "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
    )


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The `LlavaForConditionalGeneration` of a folder that `save_base` wrote, for plain transformers.

    Raises RuntimeError when a weight is missing, unknown or of another shape.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(str(folder), local_files_only=True))
    load_base_state(model, load_file(folder / WEIGHTS_FILE))
    return model.to(dtype).eval()


def load_base_state(model: nn.Module, served: Mapping[str, Tensor]) -> None:
    """Put weights under their served names into a transformers model.

    Raises RuntimeError when a weight is missing, unknown or of another shape.
    """
    state = {
        _SAVED_TOWER + name[len(_SERVED_TOWER) :] if name.startswith(_SERVED_TOWER) else name: tensor
        for name, tensor in served.items()
    }
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)


def save_adapter(adapted: Any, folder: Path, base_name: str = "llava") -> None:
    """Write one trained adapter as PEFT files, fp16 safetensors, under the names vLLM looks up."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to(torch.float16).cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(adapted).items()
    }
    save_file(state, folder / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
    config = adapted.peft_config["default"]
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": config.target_modules
        if isinstance(config.target_modules, str)
        else sorted(config.target_modules),
    }
    _write_json(folder / ADAPTER_CONFIG_FILE, document)


def load_adapter(model: Any, folder: Path) -> Any:
    """A PEFT model of `model` with the adapter of `folder`, for plain transformers."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder), local_files_only=True).eval()


def export_tiny(folder: Path, tokenizer: StoryTokenizer, seed: int, shape: LlavaShape = TINY) -> None:
    """Write `llava/` and `adapters/<name>/` with random weights under a pack folder, by the shipping code."""
    save_base(build(shape, tokenizer, seed), tokenizer, folder / "llava")
    for number, name in enumerate(ADAPTERS, start=1):
        adapted = add_adapter(build(shape, tokenizer, seed), rank=8, alpha=16, seed=seed + number)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed + 100 * number)
            for parameter_name, parameter in adapted.named_parameters():
                if "lora_B" in parameter_name:  # zero at birth: without this the adapters would change nothing
                    parameter.normal_(std=0.2)
        save_adapter(adapted, folder / "adapters" / name)


def _write_json(file: Path, document: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
