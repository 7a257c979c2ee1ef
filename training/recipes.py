"""Every run of the toon pack as a function that returns a frozen recipe: what is trained, on what, for how long.

Steps are what a quiet run does; `minutes` caps a run's time and brings its learning rate to zero by then. On a GPU
(`gpu`) steps are wide, because a narrow one leaves it idle; on a CPU they are narrow, because there are few of them.
"""

from __future__ import annotations

from dataclasses import replace

from services.models.pack import QualitySettings, Sampling
from training.clip import ClipRecipe
from training.draft import DraftRecipe
from training.eyes import EyesRecipe
from training.frame import FrameRecipe
from training.loop import LoopRecipe
from training.optimizer import OptimizerRecipe, Pace
from training.pictures import ShelfRecipe
from training.text import TextRecipe
from training.vae import VaeRecipe

TOON_SAMPLING = Sampling(
    sampler="dpm_solver_pp_2m",
    default_steps=6,
    default_text_guidance=1.5,
    default_image_guidance=1.0,
    qualities={"best": QualitySettings(steps=20, text_guidance=1.5, image_guidance=1.5)},
)
DRAFT_FILE = "draft/adapter.safetensors"
TOON_DRAFT = QualitySettings(steps=4, text_guidance=1.0, image_guidance=1.0, adapter=DRAFT_FILE)


def toon_vae(minutes: float | None = None, *, gpu: bool = False) -> VaeRecipe:
    """The autoencoder: wide pictures, so that no palette is new to it, and twice as many of the cast."""
    return VaeRecipe(
        loop=LoopRecipe(
            pace=Pace(steps=16_000, warmup_steps=20, minutes=minutes, decay_share=0.6),
            optimizer=OptimizerRecipe(matrix_rate=0.02, rate=2e-3, weight_decay=0.0),
            seed=1,
            ema=0.98,
        ),
        shelves=(
            ShelfRecipe(split="train", breadth="wide", count=8_000),
            ShelfRecipe(split="train", breadth="scene", count=16_000),
            ShelfRecipe(split="train", breadth="looks", count=20_000),
        ),
        batch=32 if gpu else 4,
        crops_share=0.45,
        square_weight=3.0,
        figure_weight=2.0,
        seen_weight=2.0,
        read_weight=0.01,
        edge_weight=0.5,
        held_out=(
            ("known", ShelfRecipe(split="validation", breadth="scene", count=256)),
            ("new", ShelfRecipe(split="new", breadth="scene", count=256)),
        ),
    )


def toon_decoder(minutes: float | None = None, *, gpu: bool = False) -> VaeRecipe:
    """The autoencoder's decoder, learning on with the encoder frozen: whole frames, squares weighted up."""
    return replace(
        toon_vae(gpu=gpu),
        loop=LoopRecipe(
            pace=Pace(steps=4_000, warmup_steps=20, minutes=minutes, decay_share=0.8),
            optimizer=OptimizerRecipe(matrix_rate=0.01, rate=1e-3, weight_decay=0.0),
            seed=5,
            ema=0.98,
        ),
        crops_share=0.0,
        square_weight=4.0,
        edge_weight=0.5,
        decoder_only=True,
    )


def toon_text(minutes: float | None = None, *, gpu: bool = False) -> TextRecipe:
    """The text encoder: as many descriptions as it takes to read them without a mistake."""
    return TextRecipe(
        loop=LoopRecipe(
            pace=Pace(steps=6_000, warmup_steps=40, minutes=minutes, decay_share=0.6),
            optimizer=OptimizerRecipe(matrix_rate=0.02, rate=2e-3, weight_decay=0.01),
            seed=6,
            ema=0.99,
        ),
        batch=192 if gpu else 48,
    )


def toon_frame(minutes: float | None = None, *, gpu: bool = False) -> FrameRecipe:
    """The frame model: single frames and stories, drawn from other seeds than the judge's."""
    return FrameRecipe(
        loop=LoopRecipe(
            pace=Pace(steps=10_000, warmup_steps=20, minutes=minutes, decay_share=0.5),
            optimizer=OptimizerRecipe(matrix_rate=0.02, rate=3e-3, weight_decay=0.01),
            seed=2,
            ema=0.985,
            measure_every_s=900.0,  # a look takes half a minute of two cores
        ),
        figure_weight=2.0,
        unrelated_share=0.25,
        crowd_weights=(1.0, 1.5, 6.0),
        single_rows=16 if gpu else 2,
        story_rows=240 if gpu else 30,
        singles=(
            ShelfRecipe(split="train", breadth="scene", count=3_000),
            ShelfRecipe(split="train", breadth="looks", count=6_000),
        ),
        stories=(
            ShelfRecipe(split="train", breadth="story", count=12_000 if gpu else 4_000),
            ShelfRecipe(split="train", breadth="strangers", count=4_000 if gpu else 1_500),
        ),
        held_out=ShelfRecipe(split="validation", breadth="story", count=60),
    )


def toon_draft(minutes: float | None = None, *, gpu: bool = False) -> DraftRecipe:
    """The LoRA of the draft quality: guidance and steps as `toon_pack` says how frames are drawn."""
    return DraftRecipe(
        loop=LoopRecipe(
            pace=Pace(steps=1_500, warmup_steps=20, minutes=minutes, decay_share=0.6),
            optimizer=OptimizerRecipe(matrix_rate=0.0, rate=2e-3, weight_decay=0.0),
            seed=8,
            ema=0.98,
        ),
        frame=toon_frame(gpu=gpu),
        text_guidance=TOON_SAMPLING.default_text_guidance,
        image_guidance=TOON_SAMPLING.default_image_guidance,
        steps=TOON_DRAFT.steps,
        rows=192 if gpu else 24,
    )


def toon_eyes(minutes: float | None = None, *, gpu: bool = False) -> EyesRecipe:
    """The pack's eyes: the cast, and as many strangers, so that a look is read and not recognised."""
    return EyesRecipe(
        loop=LoopRecipe(
            pace=Pace(steps=4_000, warmup_steps=40, minutes=minutes, decay_share=0.6),
            optimizer=OptimizerRecipe(matrix_rate=0.02, rate=2e-3, weight_decay=0.01),
            seed=7,
            ema=0.99,
        ),
        shelves=(
            ShelfRecipe(split="train", breadth="scene", count=16_000),
            ShelfRecipe(split="train", breadth="looks", count=100_000 if gpu else 20_000),
        ),
        held_out=ShelfRecipe(split="test", breadth="looks", count=400),
        batch=256 if gpu else 32,
    )


def toon_judge(minutes: float | None = None, *, gpu: bool = False) -> EyesRecipe:
    """The judge of `make eval-toon`: seeds that nothing else is trained on, accuracy on held-out combinations."""
    return EyesRecipe(
        loop=LoopRecipe(
            pace=Pace(steps=4_000, warmup_steps=40, minutes=minutes, decay_share=0.6),
            optimizer=OptimizerRecipe(matrix_rate=0.02, rate=2e-3, weight_decay=0.01),
            seed=3,
            ema=0.99,
        ),
        shelves=(
            ShelfRecipe(split="train", breadth="scene", count=100_000 if gpu else 30_000, first_seed=200_000),
            ShelfRecipe(split="train", breadth="looks", count=100_000 if gpu else 20_000, first_seed=200_000),
        ),
        held_out=ShelfRecipe(split="test", breadth="scene", count=1_000),
        batch=256 if gpu else 32,
    )


def toon_clip(minutes: float | None = None, *, gpu: bool = False) -> ClipRecipe:
    """The CLIP: the frame model's single frames with their descriptions."""
    return ClipRecipe(
        loop=LoopRecipe(
            pace=Pace(steps=1_500, warmup_steps=40, minutes=minutes, decay_share=0.6),
            optimizer=OptimizerRecipe(matrix_rate=0.01, rate=1e-3, weight_decay=0.01),
            seed=4,
        ),
        pairs=ShelfRecipe(split="train", breadth="scene", count=5_000),
        held_out=ShelfRecipe(split="validation", breadth="scene", count=256),
    )
