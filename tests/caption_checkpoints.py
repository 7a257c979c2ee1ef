"""Tiny captioners with random weights in the layouts they are published in, written by transformers and PEFT."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

MODEL = "model.safetensors"
IMAGE = "<image>"
LLAVA_CHAT = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def seeded(seed: int, make: Callable[[], Any], scale: float = 0.2) -> Any:
    """A network with random weights, the same for the same seed, far enough from nothing that its words differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=scale)
                elif "norm" not in name.lower():
                    parameter.normal_(std=0.05)
    return network.eval()


def llama_tokenizer() -> tokenizers.Tokenizer:
    """Llama's kind: pieces with ▁, bytes for the rest, `<s>` in front; LLaVA's `<image>` and `<pad>` are added."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    words += [*string.ascii_letters, *string.digits, *".,:;'!?-\\\"<>/[]"]
    merges = [("▁", "'"), (".", "'"), ("'", ","), ("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "S"), ("A", "S")]
    words += ["".join(pair) for pair in merges]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={word: number for number, word in enumerate(words)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    added = [tokenizers.AddedToken(word, normalized=False, special=True) for word in (IMAGE, "<pad>")]
    tokenizer.add_special_tokens(added)
    return tokenizer


def llava(seed: int = 0) -> Any:
    """LLaVA-1.5 in small: the last but one layer of the tower is read, the vocabulary is larger than the tokenizer."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = llama_tokenizer()
    size = tokenizer.get_vocab_size()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=(size + 63) // 64 * 64,
            hidden_size=64,  # vLLM's attention on a CPU takes heads of 32 at least
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
        ),
        image_token_index=tokenizer.token_to_id(IMAGE),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        pad_token_id=tokenizer.token_to_id("<pad>"),
    )
    return seeded(seed, lambda: LlavaForConditionalGeneration(config))


def hub_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that the weights on the hub have: from before a model was wrapped in another."""
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("model.") if not name.startswith("model.language_model.") else name
        name = name.replace("model.language_model.", "language_model.model.")
        name = f"language_model.{name}" if name.startswith("lm_head.") else name
        if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        renamed[name] = value.contiguous()
    return renamed


def write_llava(folder: Path, *, seed: int = 0, names: str = "hub", parts: int = 1, adapters: bool = False) -> Any:
    """`llava-1.5-7b-hf` in small. `names` are the `hub`'s or those `saved` by transformers 5; the model it holds."""
    model = llava(seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder), max_shard_size=f"{120 if parts > 1 else 10_000}KB")
    if names == "hub":
        for path in folder.glob("*.safetensors"):
            save_file(hub_names(load_file(str(path))), str(path), metadata={"format": "pt"})
        index = folder / f"{MODEL}.index.json"
        if index.is_file():
            document = json.loads(index.read_text())
            places = {name: torch.zeros(1) for name in document["weight_map"]}
            files = list(document["weight_map"].values())
            document["weight_map"] = dict(zip(hub_names(places), files, strict=True))
            index.write_text(json.dumps(document))
    write_llava_processor(folder)
    if adapters:
        for number, name in enumerate(("story", "descriptive"), start=1):
            write_adapter(folder / "adapters" / name, model, seed + number)
    return model


def write_llava_processor(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=llama_tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE},
    ).save_pretrained(str(folder))
    side = {"height": 28, "width": 28}
    picture = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 28},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    write_json(folder / "preprocessor_config.json", picture)
    write_json(folder / "processor_config.json", processor)
    (folder / "chat_template.jinja").write_text(LLAVA_CHAT, encoding="utf-8")


def byte_tokenizer(*special: str) -> tokenizers.Tokenizer:
    """GPT's kind: every byte is a token, `<|endoftext|>` ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", *special, *alphabet]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", *special])
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: tokenizers.Tokenizer, **named: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(str(folder))


def write_mpt(folder: Path, seed: int = 0) -> Any:
    """`mpt-7b` in small: positions by ALiBi, no chat template, `architectures` in its authors' spelling."""
    from transformers import MptConfig, MptForCausalLM

    config = MptConfig(d_model=32, n_heads=2, n_layers=2, expansion_ratio=2, max_seq_len=512, vocab_size=320)
    config.attn_config.alibi = True
    model = seeded(seed, lambda: MptForCausalLM(config))
    model.save_pretrained(str(folder))
    change_json(folder / "config.json", architectures=["MPTForCausalLM"], auto_map={"AutoModel": "modeling_mpt.MPT"})
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_tokenizer(folder, byte_tokenizer(), eos_token="<|endoftext|>")
    return model


def write_gpt2(folder: Path, seed: int = 0) -> Any:
    """A language model that vLLM serves too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=64, n_head=2, n_layer=2, n_positions=512, vocab_size=320, bos_token_id=0, eos_token_id=0)
    model = seeded(seed, lambda: GPT2LMHeadModel(config))
    model.save_pretrained(str(folder))
    save_tokenizer(folder, byte_tokenizer(), eos_token="<|endoftext|>")
    return model


def bert_tokenizer() -> tokenizers.Tokenizer:
    """BERT's kind, with a few words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "picture", "of", "cat", "dog", "and", "two"]
    words += [*string.ascii_lowercase[1:], *(f"##{letter}" for letter in string.ascii_lowercase)]
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece(vocab={word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(words[:6])
    return tokenizer


def write_blip(folder: Path, seed: int = 0) -> Any:
    """`blip-image-captioning-base` in small."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    tokenizer = bert_tokenizer()
    config = BlipConfig(
        text_config={
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 32,
            "encoder_hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
            "projection_dim": 32,
            "bos_token_id": 5,
            "sep_token_id": 3,
            "eos_token_id": 3,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
            "projection_dim": 32,
        },
        projection_dim=32,
    )
    model = seeded(seed, lambda: BlipForConditionalGeneration(config))
    model.save_pretrained(str(folder))
    save_tokenizer(folder, tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
    picture = {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "BlipProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    write_json(folder / "preprocessor_config.json", picture)
    return model


QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def write_qwen(folder: Path, seed: int = 0) -> Any:
    """`Qwen2-VL-Instruct` in small: pictures of any size, chat turns by special tokens."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokenizer = byte_tokenizer(*QWEN_SPECIAL)
    ids = {token: tokenizer.token_to_id(token) for token in QWEN_SPECIAL}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "bos_token_id": 0,
            "eos_token_id": ids["<|im_end|>"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    model = seeded(seed, lambda: Qwen2VLForConditionalGeneration(config))
    model.save_pretrained(str(folder))
    save_tokenizer(folder, tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    picture = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    write_json(folder / "preprocessor_config.json", picture)
    (folder / "chat_template.jinja").write_text(QWEN_CHAT, encoding="utf-8")
    return model


def change_json(path: Path, **changes: Any) -> None:
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def write_adapter(folder: Path, model: Any, seed: int) -> None:
    """A PEFT adapter of the language model, as PEFT saves it."""
    import copy

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        adapted = get_peft_model(copy.deepcopy(model), config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(str(folder))


def write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2), encoding="utf-8")
