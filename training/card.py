"""Writes the toon pack's model card: what it was made from, how, and what was measured. Only figures that were seen."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from services.models.pack import Pack, PackSettings, write_pack
from services.models.toon import LATENT_CHANNELS
from training.captions import FOLDER as CAPTIONS
from training.clip import CHECKPOINT as CLIP
from training.draft import CHECKPOINT as DRAFT
from training.evaluation.judge import CHECKPOINT as JUDGE
from training.eyes import CHECKPOINT as EYES
from training.frame import CHECKPOINT as FRAME
from training.loop import STARTED_FROM
from training.precision import on_gpu
from training.recipes import toon_clip, toon_eyes, toon_frame, toon_judge, toon_text, toon_vae
from training.storage import load_checkpoint, training_dir
from training.text import CHECKPOINT as TEXT
from training.toon.world import PALETTES
from training.vae import CHECKPOINT as VAE
from training.vae import DECODER_CHECKPOINT as DECODER

CARD = "MODEL_CARD.md"
_RUNS = {
    "autoencoder": VAE,
    "its decoder alone": DECODER,
    "text encoder": TEXT,
    "frame model": FRAME,
    "eyes": EYES,
    "captioner, sight": f"{CAPTIONS}/sight.safetensors",
    "captioner, tales": f"{CAPTIONS}/tales.safetensors",
    "captioner, told": f"{CAPTIONS}/told.safetensors",
    "LoRA `story`": f"{CAPTIONS}/story.safetensors",
    "LoRA `descriptive`": f"{CAPTIONS}/descriptive.safetensors",
    "LoRA of drafts": DRAFT,
    "CLIP": CLIP,
    "judge": JUDGE,
}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor() or platform.machine()


def runs_table(folder: Path | None = None, earlier: str = "") -> str:
    """What each training run did, read from its checkpoint; without one, the row that an `earlier` card has."""
    lines = ["| network | began with | steps | minutes | held-out figures |", "| --- | --- | --- | --- | --- |"]
    for name, file in _RUNS.items():
        found = load_checkpoint((folder or training_dir()) / file)
        if found is None or not found.facts["step"]:  # a run that was only started has made nothing
            lines += [line for line in earlier.splitlines() if line.startswith(f"| {name} |") and line.count("|") == 6]
            continue
        facts = found.facts
        known = facts["figures"]
        # Of those with a figure per question: how often all questions about something were answered right.
        known = {key: value for key, value in known.items() if key.endswith("whole")} or known
        figures = ", ".join(f"{key} {value:.4f}" for key, value in sorted(known.items())) or "not measured"
        began = f"pack {facts[STARTED_FROM][:12]}" if STARTED_FROM in facts else "nothing"
        lines.append(f"| {name} | {began} | {facts['step']} | {facts['elapsed_s'] / 60:.0f} | {figures} |")
    return "\n".join(lines)


def figures_table(evaluation: Mapping[str, Any]) -> str:
    """What `make eval-toon` printed."""
    lines = ["| figure | value | 95 % interval | target | n |", "| --- | --- | --- | --- | --- |"]
    for figure in evaluation["figures"]:
        target = ""
        if figure["target"] is not None:
            sign, outcome = "≤" if figure["at_most"] else "≥", "met" if figure["passed"] else "**missed**"
            target = f"{sign} {figure['target']:g}, {outcome}"
        interval = "" if figure["low"] is None else f"{figure['low']:.3f} … {figure['high']:.3f}"
        lines.append(f"| {figure['name']} | {figure['value']:.3f} | {interval} | {target} | {figure['n']} |")
    return "\n".join(lines)


def model_card(evaluation: Mapping[str, Any] | None = None, today: datetime | None = None, earlier: str = "") -> str:
    """The card as Markdown. Without an evaluation it says that there is none yet.

    `earlier` is the card of the pack before, whose networks this one has where no run of their own is known.
    """
    gpu = on_gpu()
    vae, frame, judge, clip = toon_vae(gpu=gpu), toon_frame(gpu=gpu), toon_judge(gpu=gpu), toon_clip(gpu=gpu)
    text, eyes = toon_text(gpu=gpu), toon_eyes(gpu=gpu)
    day = (today or datetime.now(UTC)).strftime("%Y-%m-%d")
    measured = "Not evaluated yet: run `make eval-toon`."
    limits = ""
    if evaluation is not None:
        measured = figures_table(evaluation)
        missed = [figure["name"] for figure in evaluation["figures"] if not figure["passed"]]
        if missed:
            limits = f"\n- Targets that this pack misses: {', '.join(missed)}."
    rows = frame.single_rows + frame.story_rows
    return f"""# toon

Draws and tells five-frame cartoon stories at 128×128 px. Every weight was trained from nothing on pictures and texts
that the procedural world in `training/toon` makes; no other data, no other weights. Licence: Apache-2.0.

## What is inside

| part | architecture |
| --- | --- |
| `vae/` | AutoencoderKL, 8× smaller, {LATENT_CHANNELS} latent channels; its decoder is wider than its encoder |
| `preview/` | one convolution, fitted by least squares, from latents to previews |
| `text_encoder/` | CLIP text model, 192 wide, 4 layers, 96 positions; its words see both ways |
| `unet/` | StoryGen UNet (96, 160): diffusers' conditional UNet with `attn3` and `norm4` in every transformer block |
| `tokenizer/` | byte-level BPE, 2,048 entries, shared by all |
| `eyes/` | convolutions and attention that read who stands where, looking how: for the captioner |
| `draft/` | LoRA of the UNet that answers with guidance in one pass: what the draft quality wears |
| `llava/`, `adapters/` | LLaVA base, LoRA adapters `story` and `descriptive` |
| `clip/` | small CLIP, for metrics only |

## Data

- Eyes: {eyes.shelves[0].count:,} frames of the cast and {eyes.shelves[1].count:,} of strangers.
- Autoencoder: {vae.shelves[0].count:,} pictures of random looks and gradings, {vae.shelves[1].count:,} of the cast and
  {vae.shelves[2].count:,} of strangers. Figures count more than what is around them, and what the eyes see and
  read of a decoded picture should be what they see and read of the true one. The decoder learned on alone.
- Text encoder: descriptions without pictures, {text.batch} a step, none twice, {text.strangers_share:.0%} of them of
  strangers; it answers who stands where, looking how, doing what, and is then left as it is.
- Frame model: {frame.singles[0].count:,} single frames of the cast and {frame.singles[1].count:,} of strangers,
  {frame.stories[0].count:,} stories of five frames and {frame.stories[1].count:,} whose hero is a stranger. Text is
  dropped in {frame.text_dropped:.0%} of rows, references are blanked in {frame.references_dropped:.0%}.
  {frame.single_rows} of {rows} rows have no references, {frame.unrelated_share:.0%} of the others are single frames
  with an unrelated one. A frame with three figures comes {frame.crowd_weights[2]:g} times as often as one with a
  single figure (two: {frame.crowd_weights[1]:g} times), and an error where a figure stands counts
  {frame.figure_weight:g} times one elsewhere. Each story has one of {PALETTES} palettes, which no word tells: only the
  earlier frames do.
- CLIP: {clip.pairs.count:,} single frames with their descriptions.
- Judge (not in the pack): {judge.shelves[0].count:,} frames of other seeds, {judge.shelves[1].count:,} of strangers of
  every look but the cast's and the new characters'.
- Held out: ten new characters, and one in ten (character, setting, action, prop) combinations
  (`training/toon/splits.py`).

## Runs

{runs_table(earlier=earlier)}

A run may begin with the weights of an earlier pack (`training.start`). A network that had no run for this pack was
taken over from the one before as it was, with its row.

Rows a step: autoencoder {vae.batch} frames (as many pixels in crops at first), frame model
{rows}, CLIP {clip.batch}, judge {judge.batch}. Muon for matrices, AdamW for the rest; the learning rate goes linearly
to zero at the end of each run, which a cap on minutes may bring forward. The captioner's phases are described in
`training/captions.py`. Machine: {_processor()}.
Made {day}, stage by stage with the stages' own commands and caps on their minutes (`training/LOG.md`); `make toon-pack`
runs the same recipes in one go, from nothing.

## Measured ({day}, `make eval-toon`)

{measured}

`frame_*`: frames 2 to 5 of held-out stories, drawn from their true descriptions with the true earlier frames as
references; `_known` and `_held_out`: frames without and with a combination that training never showed. `crowd_*`:
frames of two and three in which everybody has to be right (`_apart`: nobody missing, doubled, or with a part of
another's look). `first_*`: no references. `reference_gain_*`: what
references are worth, frame by frame. `description_*`, `caption_*`: texts for true pictures and captions; `story_*`:
stories the pack told and drew alone from their true first frame. `judge_*`: the judge on the true pictures: no figure
above it can be trusted beyond that. Definitions: `training/evaluation/`.

Contact sheets of these frames and stories, the first of seed 0 and nothing chosen: `training/evaluation/sheets/`
(`frames.png`: a row of true pictures above the row that was drawn; `stories.png`: the first frame is true, the four
others are the pack's own, from captions and descriptions of its own).

## Limits

- Looks of characters outside the main cast may come out blended, most of all with three in a frame.
- "He" and "she" do not always agree with whom a caption names.
- Knows only its own world: other pictures and words give guesses, and new characters need training.{limits}
"""


def card_of(folder: Path) -> str:
    """The card in a pack's folder; nothing when there is none yet."""
    return (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""


def write_card(pack: Pack, evaluation: Mapping[str, Any]) -> Pack:
    """Put the evaluation into the pack's card and seal the pack again."""
    (pack.folder / CARD).write_text(model_card(evaluation, earlier=card_of(pack.folder)), encoding="utf-8")
    manifest = pack.manifest
    settings = PackSettings(**{name: getattr(manifest, name) for name in PackSettings.model_fields})
    return write_pack(pack.folder, settings, created=manifest.created)
