"""Published captioners say in the caption service what transformers' own `generate` says, token by token.

Each runs in a process of its own, through `fabula pack add`'s code and the service's engine. Compared is with the
model that was written to the checkpoint, with its own processor, asked in the words that are spelled out below.
"""

from __future__ import annotations

import functools
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from services.models.captions.published import plan_captioner
from services.models.library import Library
from services.models.published import Told
from services.models.source import FolderSource
from tests import caption_checkpoints as checkpoints
from tests.contract.caption.published_child import CAPTIONS, TOKENS, picture_file

QUESTION = (
    "Story so far: 'Momo found a kite.' Current frame story caption: "
    "'She said: \\'the < image> was A S\\'.', What is the next frame story caption?"
)
GOLDEN = json.loads((Path(__file__).parent / "golden_captioners.json").read_text())
KINDS: dict[str, Callable[[Path], Any]] = {
    "hub": functools.partial(checkpoints.write_llava, adapters=True),
    "saved": functools.partial(checkpoints.write_llava, names="saved"),
    "parts": functools.partial(checkpoints.write_llava, parts=3),
    "qwen": checkpoints.write_qwen,
    "gpt2": checkpoints.write_gpt2,
    "mpt": checkpoints.write_mpt,
    "blip": checkpoints.write_blip,
}


class Shelf:
    """Checkpoints, the packs that were made of them, and what they said; each made once, when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models: dict[str, Any] = {}
        self.said: dict[str, dict[str, Any]] = {}

    def checkpoint(self, kind: str) -> Path:
        path = self.folder / "published" / kind
        if kind not in self.models:
            self.models[kind] = KINDS[kind](path)
            source = FolderSource(path)
            plan, served = plan_captioner(source, source.files(), Told(licence="MIT"))
            Library(self.folder / "packs", (self.folder / "packs",)).add(plan, served)
        return path

    def observed(self, kind: str) -> dict[str, Any]:
        self.checkpoint(kind)
        if kind not in self.said:
            command = [sys.executable, "-m", "tests.contract.caption.published_child", str(self.folder / "packs"), kind]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
            self.said[kind] = json.loads(done.stdout.splitlines()[-1])
        return self.said[kind]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    torch.set_num_threads(1)
    return Shelf(tmp_path_factory.mktemp("captioners"))


def picture() -> Image.Image:
    return Image.open(io.BytesIO(picture_file())).convert("RGB")


def generated(model: Any, inputs: Any, stop: int) -> list[int]:
    """transformers' own greedy answer, up to the token that ends it."""
    with torch.inference_mode():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, eos_token_id=stop, pad_token_id=0)
    ids: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
    return ids[: ids.index(stop)] if stop in ids else ids


def llava_inputs(folder: Path) -> Any:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(str(folder), local_files_only=True)
    return processor(images=picture(), text=f"USER: <image>\n{QUESTION} ASSISTANT:", return_tensors="pt")


@pytest.mark.parametrize("kind", ["hub", "saved", "parts"])
def test_llava_says_what_transformers_says(shelf: Shelf, kind: str) -> None:
    folder = shelf.checkpoint(kind)
    said = shelf.observed(kind)
    inputs = llava_inputs(folder)
    assert said["greedy"]["base"] == generated(shelf.models[kind], inputs, stop=2)
    assert said["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert len(set(said["greedy"]["base"])) > 2, "a model that says one thing only would prove nothing"


def test_adapters_answer_their_own_questions(shelf: Shelf) -> None:
    folder = shelf.checkpoint("hub")
    said = shelf.observed("hub")
    from peft import PeftModel

    inputs = llava_inputs(folder)
    for name in ("story", "descriptive"):
        import copy

        worn = PeftModel.from_pretrained(copy.deepcopy(shelf.models["hub"]), str(folder / "adapters" / name))
        assert said["greedy"][name] == generated(worn.eval(), inputs, stop=2)
    assert len({tuple(ids) for ids in said["greedy"].values()}) == 3


def test_all_layouts_of_the_same_weights_say_the_same(shelf: Shelf) -> None:
    assert shelf.observed("saved")["greedy"]["base"] == shelf.observed("hub")["greedy"]["base"]
    assert shelf.observed("parts")["greedy"]["base"] == shelf.observed("hub")["greedy"]["base"]


def test_another_vision_model_of_vllm_needs_no_code_of_its_own(shelf: Shelf) -> None:
    from transformers import AutoProcessor

    folder = shelf.checkpoint("qwen")
    said = shelf.observed("qwen")
    processor = AutoProcessor.from_pretrained(str(folder), local_files_only=True)
    seen = picture().resize((448, 448), Image.Resampling.BICUBIC)
    text = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        f"{QUESTION.replace('< image>', '<image>')}<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = processor(images=[seen], text=[text], return_tensors="pt")
    stop = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert said["image_tokens_count"] == 256
    assert said["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert said["greedy"]["base"] == generated(shelf.models["qwen"], inputs, stop)


@pytest.mark.parametrize(("kind", "driver"), [("gpt2", "InProcessDriver"), ("mpt", "PlainDriver")])
def test_a_language_model_answers_without_the_picture(shelf: Shelf, kind: str, driver: str) -> None:
    from transformers import AutoTokenizer

    folder = shelf.checkpoint(kind)
    said = shelf.observed(kind)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    inputs = tokenizer(f"{QUESTION.replace('< image>', '<image>')}\n", return_tensors="pt")
    asked = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    assert said["driver"] == driver
    assert said["greedy"]["base"] == generated(shelf.models[kind], asked, stop=0)


def test_blip_says_what_transformers_says(shelf: Shelf) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer

    folder = shelf.checkpoint("blip")
    said = shelf.observed("blip")
    words = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)("a picture of", return_tensors="pt")
    pixels = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True)(
        images=picture().resize((32, 32), Image.Resampling.BICUBIC), return_tensors="pt"
    )
    with torch.inference_mode():
        out = shelf.models["blip"].generate(
            pixel_values=pixels["pixel_values"],
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
            do_sample=False,
            max_new_tokens=TOKENS,
        )
    ids = out[0, 4:].tolist()  # after the beginning and three words
    assert said["greedy"]["base"] == (ids[: ids.index(3)] if 3 in ids else ids)
    assert said["story"] == said["description"], "it only looks"


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_depends_on_its_seed_and_on_nobody_else(shelf: Shelf, kind: str) -> None:
    said = shelf.observed(kind)
    first, again, other = said["drawn"]
    assert first == again != other
    assert said["crowd"][:2] == [first, other]


@pytest.mark.parametrize("kind", KINDS)
def test_golden_numbers(shelf: Shelf, kind: str) -> None:
    said = shelf.observed(kind)
    assert {"prompt_ids": said["prompt_ids"], "greedy": said["greedy"]} == GOLDEN[kind]


def test_the_captions_above_are_those_that_were_asked_with() -> None:
    assert CAPTIONS == ("Momo found a kite.", "She said: 'the <image> was A S'.")
