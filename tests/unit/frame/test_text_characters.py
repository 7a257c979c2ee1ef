"""Characters whose LoRA changes the text encoder, too, drawn beside those who leave it as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from services.frame.engine import FrameEngine
from services.models.lora import Adapter, Form, LowRank, adapted_layers, read_adapter, write_adapter
from services.models.lora_formats import TEXT
from services.models.registry import FrameModel
from services.models.text_encoder import TextChange
from services.runtime.errors import CharacterWeightsUnusable

from .test_characters import Files, _differs, a_whole_unet, files, started, wearing, weights  # noqa: F401 - fixtures
from .test_engine import Inbox, gate, job  # noqa: F401 - a fixture


def text_weights(model: FrameModel, seed: int, form: Form = "kohya", with_unet: bool = False) -> bytes:
    """A LoRA of the text encoder, alone or with the UNet's that `weights` makes of the same seed."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, layer in adapted_layers(model.text.networks[TEXT]).items():
        down = torch.randn(2, layer.weight.shape[1], generator=generator)
        factors[name] = LowRank(down, torch.randn(layer.weight.shape[0], 2, generator=generator), 3.0)
    unet = read_adapter(weights(model, seed), model.denoiser.unet).factors if with_unet else {}
    adapter = Adapter(digest="", factors=unet, deltas={}, size_bytes=0, texts={TEXT: factors})
    return write_adapter(adapter, form, base_digest=model.base_digest)


@pytest.mark.parametrize("references", [0, 1])
def test_a_text_encoders_change_is_its_jobs_alone(
    references: int,
    tiny_model: FrameModel,
    files: Files,  # noqa: F811
    started: Callable[..., FrameEngine],  # noqa: F811
) -> None:
    """Also where earlier frames left their passes: what one character's text left is no other's."""
    of_text = [files.keep(text_weights(tiny_model, seed)) for seed in range(2)]
    of_both = files.keep(text_weights(tiny_model, 1, with_unet=True))
    of_unet = files.keep(weights(tiny_model, 1))
    engine = started(max_running=7)
    jobs = [
        job(9, references=references),
        *(wearing(9, digest, references=references) for digest in (*of_text, of_both, of_unet)),
        wearing(9, *of_text, references=references),
        wearing(9, of_text[0], references=references, scale=0.5),
    ]
    alone = [Inbox(engine, one).frame().image for one in jobs]
    assert len(set(alone)) == len(jobs), "each has its own look"
    together = [inbox.frame().image for inbox in [Inbox(engine, one) for one in jobs]]
    assert [_differs(a, b) for a, b in zip(alone, together, strict=True)] == [False] * len(jobs)
    assert Inbox(engine, wearing(9, of_text[0], references=references, scale=0.0)).frame().image == alone[0]
    hooked = [m for network in tiny_model.text.networks.values() for m in network.modules() if m._forward_hooks]
    assert not hooked, "nothing is left behind"


@pytest.mark.parametrize("form", ["peft", "diffusers", "kohya"])
def test_one_character_in_every_form_is_one_picture(
    form: Form,
    tiny_model: FrameModel,
    files: Files,  # noqa: F811
    started: Callable[..., FrameEngine],  # noqa: F811
) -> None:
    digest = files.keep(text_weights(tiny_model, 3, form, with_unet=True))
    expected = files.keep(text_weights(tiny_model, 3, "kohya", with_unet=True))
    engine = started(max_running=1)
    pictures = [Inbox(engine, wearing(2, one)).frame().sha256 for one in (digest, expected)]
    assert len(set(pictures)) == 1
    assert pictures[0] != Inbox(engine, job(2)).frame().sha256


def test_a_whole_unet_may_bring_a_change_of_the_text_encoder(
    tiny_model: FrameModel,
    files: Files,  # noqa: F811
    started: Callable[..., FrameEngine],  # noqa: F811
) -> None:
    whole, of_text = files.keep(a_whole_unet(tiny_model, 1)), files.keep(text_weights(tiny_model, 1))
    engine = started(max_running=1)
    jobs = [wearing(4, *digests) for digests in ((whole,), (whole, of_text), (of_text,))]
    assert len({Inbox(engine, one).frame().sha256 for one in jobs}) == 3


def test_a_lora_of_another_family_is_refused_with_what_it_looks_like(
    tiny_model: FrameModel,
    files: Files,  # noqa: F811
    started: Callable[..., FrameEngine],  # noqa: F811
) -> None:
    of_text = read_adapter(text_weights(tiny_model, 1), tiny_model.denoiser.unet, texts=tiny_model.text.networks).texts[
        TEXT
    ]
    second = Adapter(digest="", factors={}, deltas={}, size_bytes=0, texts={"text_encoder_2": of_text})
    engine = started(max_running=1)
    with pytest.raises(CharacterWeightsUnusable, match="SDXL: it has lora_te2 keys") as refused:
        engine.submit(wearing(1, files.keep(write_adapter(second, "kohya"))), lambda _: None)
    assert refused.value.metadata["cause"] == "ADAPTER_WRONG_BASE"


def test_the_texts_are_encoded_as_the_character_changes_them(tiny_model: FrameModel) -> None:
    payload = text_weights(tiny_model, 5)
    adapter = read_adapter(payload, tiny_model.denoiser.unet, texts=tiny_model.text.networks)
    assert not adapter.needs_slot
    assert adapter.size_bytes == sum(low.nbytes for low in adapter.texts[TEXT].values())
    plain = tiny_model.text.encode(["a cat"])
    changed = tiny_model.text.encode(["a cat"], changes=[TextChange(adapter.texts)])
    assert not torch.allclose(plain, changed, atol=1e-3)
    assert torch.equal(tiny_model.text.encode(["a cat"]), plain)
