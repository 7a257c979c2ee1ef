"""What AR-LDM is trained with: the loss of whole stories, what is dropped, and what is frozen."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from services.models.arldm.blip import as_blip_sees
from services.models.arldm.model import (
    CUSTOMIZE_FREEZE,
    PUBLISHED_FREEZE,
    Dropout,
    Freeze,
    Nothing,
    StoryExample,
    loss,
    set_training,
    training_context,
)
from services.models.arldm.text import TokenRows
from tests.tiny_arldm import CAPTIONS, LATENT, SIZES, Both, both, nulls, picture, texts_by_hand, worst

STORIES = (CAPTIONS, tuple(reversed(CAPTIONS)))
S = SIZES.positions


@pytest.fixture(scope="module")
def pair() -> Both:
    return both()


@pytest.fixture
def fresh() -> Both:
    """A pair that a test may train."""
    return both()


def example(pair: Both, drawn: int) -> StoryExample:
    clip = pair.model.clip_tokenizer.rows([c for story in STORIES for c in story[-drawn:]], S)
    blip = pair.model.blip_tokenizer.rows([c for story in STORIES for c in story], S)
    pixels = as_blip_sees([picture(i) for i in range(10)], SIZES.vit_image)
    return StoryExample(
        latents_BVCHW=torch.randn(2, drawn, *LATENT, generator=torch.Generator().manual_seed(1)),
        captions=TokenRows(clip.ids_BS.view(2, drawn, S), clip.real_BS.view(2, drawn, S)),
        sources=TokenRows(blip.ids_BS.view(2, 5, S), blip.real_BS.view(2, 5, S)),
        pixels_BF3HW=pixels.view(2, 5, *pixels.shape[1:]),
    )


def levels(drawn: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 1000, (2, drawn), generator=generator), torch.randn(2, drawn, *LATENT, generator=generator)


def loss_of(pair: Both, given: StoryExample, dropped: Tensor | None = None, nothing: Nothing | None = None) -> Tensor:
    drawn = given.latents_BVCHW.shape[1]
    timesteps, noise = levels(drawn)
    return loss(
        pair.model.networks,
        pair.model.schedule,
        given,
        timesteps_BV=timesteps,
        noise_BVCHW=noise,
        dropped_BV=torch.zeros(2, drawn, dtype=torch.bool) if dropped is None else dropped,
        nothing=pair.model.nothing() if nothing is None else nothing,
    )


@pytest.mark.parametrize("drawn", [5, 4], ids=["visualization", "continuation"])
def test_the_loss_is_the_references(pair: Both, drawn: int) -> None:
    given = example(pair, drawn)
    timesteps, noise = levels(drawn)
    dropped = torch.rand(2, drawn, generator=torch.Generator().manual_seed(8)) < 0.4
    assert dropped.any()
    assert not dropped.all()
    expected = torch.stack(
        [
            pair.reference.loss(
                **texts_by_hand(STORIES[b], drawn),
                **nulls(),
                pictures_F3HW=given.pixels_BF3HW[b],
                latents_VCHW=given.latents_BVCHW[b],
                noise_VCHW=noise[b],
                t_V=timesteps[b],
                dropped_V=dropped[b],
            )
            for b in range(2)
        ]
    )
    assert worst(loss_of(pair, given, dropped), expected) <= 1e-4
    assert float(expected.std()) > 0.0


def test_no_frame_is_taught_from_itself_or_later(pair: Both) -> None:
    given = example(pair, 5)
    base = loss_of(pair, given)
    for changed in range(5):
        pixels = given.pixels_BF3HW.clone()
        pixels[:, changed] = pixels[:, changed].flip(-1) + 1.0
        difference = (loss_of(pair, dataclasses.replace(given, pixels_BF3HW=pixels)) - base).abs().amax(dim=0)
        assert float(difference[: changed + 1].max()) <= 1e-5
        if changed < 4:
            assert float(difference[changed + 1]) > 1e-4


def test_a_dropped_frame_learns_from_nothing(pair: Both) -> None:
    """Of caption and history together, padding seen, later frames hidden all the same."""
    given = example(pair, 5)
    dropped = torch.zeros(2, 5, dtype=torch.bool)
    dropped[0, 3] = True
    nothing = pair.model.nothing()
    context = training_context(pair.model.networks, given, dropped, nothing)
    row = context.states_BKD[3]
    assert torch.equal(row, torch.cat([nothing.caption_SD, nothing.history_FSD[:4].flatten(0, 1)]))
    assert torch.equal(context.seen_BK[3], torch.arange(5 * S) < 4 * S)
    untouched = training_context(pair.model.networks, given, torch.zeros_like(dropped), nothing)
    others = torch.arange(10) != 3
    assert torch.equal(context.states_BKD[others], untouched.states_BKD[others])
    assert torch.equal(context.seen_BK[others], untouched.seen_BK[others])


def test_one_frame_in_ten_is_dropped_each_for_itself() -> None:
    drawn = Dropout().draw(2000, 5, torch.Generator().manual_seed(0))
    assert drawn.shape == (2000, 5)
    assert float(drawn.float().mean()) == pytest.approx(0.10, abs=0.01)
    whole = drawn.all(dim=1).float().mean() + (~drawn).all(dim=1).float().mean()
    assert float(whole) == pytest.approx(0.9**5, abs=0.03)  # stories that lose none; all five at once almost never
    assert torch.equal(drawn, Dropout().draw(2000, 5, torch.Generator().manual_seed(0)))
    assert not Dropout(rate=0.0).draw(50, 5, torch.Generator()).any()


def parts(names: tuple[str, ...]) -> set[str]:
    return {name.split(".")[0] for name in names}


WORD_TABLES = {
    "text_encoder.embeddings.token_embedding.weight",
    "mm_encoder.text.embeddings.word_embeddings.weight",
}


def test_everything_is_trained_unless_told_otherwise(fresh: Both) -> None:
    networks = fresh.model.networks
    assert len(set_training(networks, PUBLISHED_FREEZE)) == len(list(networks.parameters()))
    assert networks.mm_encoder.training


def test_customizing_trains_the_denoiser_alone(fresh: Both) -> None:
    networks = fresh.model.networks
    assert parts(set_training(networks, CUSTOMIZE_FREEZE)) == {"unet"}
    assert networks.unet.training
    assert not any(m.training for e in (networks.text_encoder, networks.mm_encoder) for m in e.modules())


def test_word_tables_are_frozen_by_their_own_name(fresh: Both) -> None:
    """The published flags leave them trainable while they say that the encoders are frozen."""
    names = set_training(fresh.model.networks, Freeze(clip=True, blip=True))
    encoders = {name for name in names if name.startswith(("text_encoder.", "mm_encoder."))}
    assert encoders == WORD_TABLES
    names = set_training(fresh.model.networks, Freeze(word_tables=True))
    assert not WORD_TABLES & set(names)
    assert "text_encoder.final_layer_norm.weight" in names


def test_resnets_can_be_frozen(fresh: Both) -> None:
    names = set_training(fresh.model.networks, Freeze(resnets=True))
    assert all("attentions" in name for name in names if name.startswith("unet."))
    assert any(name.startswith("unet.") for name in names)


@pytest.mark.parametrize("freeze", [PUBLISHED_FREEZE, CUSTOMIZE_FREEZE], ids=["published", "customize"])
def test_gradients_reach_what_is_trained_and_nothing_else(fresh: Both, freeze: Freeze) -> None:
    networks = fresh.model.networks
    trained = set(set_training(networks, freeze))
    dropped = torch.zeros(2, 5, dtype=torch.bool)
    dropped[1, 2] = True
    loss_of(fresh, example(fresh, 5), dropped).mean().backward()
    reached = {name for name, parameter in networks.named_parameters() if parameter.grad is not None}
    moved = {name for name in reached if bool(networks.get_parameter(name).grad.any())}
    assert reached <= trained
    # The text part's last layer has a norm's bias that every state shares; nothing is left without a gradient.
    assert trained - moved == set()


def test_it_learns_a_story_by_heart(fresh: Both) -> None:
    networks = fresh.model.networks
    set_training(networks, CUSTOMIZE_FREEZE)
    given, nothing = example(fresh, 5), fresh.model.nothing()
    optimizer = torch.optim.Adam([p for p in networks.parameters() if p.requires_grad], lr=3e-3)
    history = []
    for _ in range(12):
        optimizer.zero_grad()
        value = loss_of(fresh, given, nothing=nothing).mean()
        value.backward()
        optimizer.step()
        history.append(float(value.detach()))
    assert history[-1] < 0.8 * history[0]


def test_counts_must_agree(pair: Both) -> None:
    given = example(pair, 5)
    with pytest.raises(ValueError, match="for each drawn frame"):
        dataclasses.replace(given, latents_BVCHW=given.latents_BVCHW[:, :4])
    with pytest.raises(ValueError, match="for each frame"):
        dataclasses.replace(given, pixels_BF3HW=given.pixels_BF3HW[:, :4])
