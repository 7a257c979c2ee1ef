"""A pack's eyes: who stands in a picture, from left to right, and what they look like.

A LLaVA as small as the toon pack's sees a beach in a picture and not a teal top hat, and whoever is not told what
somebody looks like makes somebody else of them. So a pack may bring a network that was taught nothing but to read its
world's pictures: what it reads goes into the question as words, which are copied faithfully. A pack whose LLaVA sees
well needs none.

Which questions there are, and the words that answer them, stand in `eyes/config.json`; four of them, `LOOK`, are what a
figure is recognised by. Knows no world, no prompt and no service.

Shapes: B pictures `[B, 3, H, W]` in −1..1, slots are figures from left to right, W words of a question.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from services.models.shape import config_values

FOLDER = "eyes"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
SETTING = "setting"  # the question of the whole picture that tells its place
LOOK = ("species", "colour", "accessory", "accessory_colour")

SURE = 0.8  # a look that is less sure than this is not told: see `Figure.look_sureness`
_ALIKE = 3  # of the four parts of a look make somebody who is known
_WIDTHS = (32, 64, 128)
_CELLS = 16  # along each side of what figures are looked for in
_GLIMPSES = 2  # a figure is looked at; each sees eight places
_LOOK_WIDTH = 192
_ANSWER_WIDTH = 256


@dataclass(frozen=True, kw_only=True)
class EyesShape:
    """What eyes are asked: questions of each figure and of the whole picture, with the words that answer them."""

    figure: Mapping[str, Sequence[str]]
    scene: Mapping[str, Sequence[str]]
    figures_max: int = 3
    image_px: int = 128
    plural: Sequence[str] = ()  # accessories that are said without an article: "teal glasses"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EyesShape:
        """Read a `config.json`. Raises ValueError naming what is unknown, missing or empty."""
        shape = cls(**config_values(cls, values, "eyes"))
        if missing := [name for name in LOOK if not shape.figure.get(name)]:
            raise ValueError(f"eyes are not asked for {', '.join(missing)}")
        return shape

    def to_dict(self) -> dict[str, Any]:
        """The same, for `config.json`."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Somebody in a picture: the answer to each question, and how sure it is (0..1)."""

    answers: Mapping[str, str]
    sureness: Mapping[str, float]

    @property
    def look(self) -> tuple[str, ...]:
        """What it is recognised by, in the order of `LOOK`."""
        return tuple(self.answers[name] for name in LOOK)

    @property
    def look_sureness(self) -> float:
        """How sure all of the look is, its parts being taken for independent."""
        return float(np.prod([self.sureness[name] for name in LOOK]))


class Answers(nn.Module):
    """One linear answer per question."""

    def __init__(self, width: int, figure: Mapping[str, Sequence[str]], scene: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.slot_heads = nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in figure.items()})
        self.scene_heads = nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in scene.items()})

    def forward(self, slots_BKW: Tensor, scene_BW: Tensor) -> dict[str, Tensor]:
        """Logits: `[B, slots, words]` per question of a figure, `[B, words]` per question of the scene."""
        said = {name: head(slots_BKW) for name, head in self.slot_heads.items()}
        return said | {name: head(scene_BW) for name, head in self.scene_heads.items()}


class Eyes(nn.Module):
    """Convolutions to 16×16 cells, glimpses at the places where figures can stand, one linear answer per question.

    Places are those of pictures with one, two and more figures; how many there are decides which are believed.
    """

    def __init__(self, shape: EyesShape) -> None:
        """Fresh weights from torch's global generator."""
        super().__init__()
        self.shape = shape
        layers: list[nn.Module] = []
        before = 3
        for width in _WIDTHS:
            layers += [_Convolution(before, width, stride=2), _Residual(width)]
            before = width
        self.body = nn.Sequential(*layers, _Residual(before), _Residual(before))
        places = sum(range(1, shape.figures_max + 1)) * _GLIMPSES
        places += 2 * _GLIMPSES  # the last ones look at the scene, and count
        self.query = nn.Parameter(torch.randn(places, _LOOK_WIDTH) * 0.1)
        self.cell = nn.Parameter(torch.randn(_CELLS * _CELLS, before) * 0.1)
        self.look = nn.MultiheadAttention(_LOOK_WIDTH, 8, kdim=before, vdim=before, batch_first=True)
        self.figure = nn.Sequential(nn.Linear(_GLIMPSES * _LOOK_WIDTH, _ANSWER_WIDTH), nn.ReLU(inplace=True))
        self.scene = nn.Sequential(nn.Linear(2 * _GLIMPSES * _LOOK_WIDTH, _ANSWER_WIDTH), nn.ReLU(inplace=True))
        self.answers = Answers(_ANSWER_WIDTH, shape.figure, shape.scene)
        self.count = nn.Linear(_ANSWER_WIDTH, shape.figures_max)

    def cells(self, pixels_B3HW: Tensor) -> Tensor:
        """What the convolutions see, `[B, 128, 16, 16]`."""
        return F.adaptive_avg_pool2d(self.body(pixels_B3HW), _CELLS)

    def forward(self, pixels_B3HW: Tensor, count_B: Tensor | None = None) -> dict[str, Tensor]:
        """Logits per question, and `count`. Figures are looked for where `count_B` of them stand.

        Without `count_B`, where as many stand as there seem to be.
        """
        return self.read(self.cells(pixels_B3HW), count_B)

    def read(self, cells_BCHW: Tensor, count_B: Tensor | None = None) -> dict[str, Tensor]:
        """The same of what the convolutions saw."""
        features = cells_BCHW.flatten(2).transpose(1, 2)
        query = self.query[None].expand(len(features), -1, -1)
        seen, _ = self.look(query, features + self.cell, features, need_weights=False)
        seen = seen.unflatten(1, (-1, _GLIMPSES)).flatten(2)
        scene = self.scene(seen[:, -2:].flatten(1))
        count = self.count(scene)
        count_B = count.argmax(dim=1) + 1 if count_B is None else count_B
        first_B = count_B * (count_B - 1) // 2
        slots = first_B[:, None] + torch.arange(self.shape.figures_max, device=first_B.device)
        slots = slots.clamp_max(seen.shape[1] - 3)  # of too few figures, the others are not asked about
        figures = self.figure(torch.take_along_dim(seen, slots[:, :, None], dim=1))
        said: dict[str, Tensor] = self.answers(figures, scene)
        return said | {"count": count}

    @torch.inference_mode()
    def figures(self, picture: npt.NDArray[np.uint8]) -> tuple[Figure, ...]:
        """Who stands in one picture, uint8 `[H, W, 3]` of any size; squeezed to the size that the eyes know."""
        said = {name: logits[0].float().softmax(dim=-1) for name, logits in self(self._pixels(picture)).items()}
        found = []
        for slot in range(int(said["count"].argmax()) + 1):
            best = {name: said[name][slot].max(dim=-1) for name in self.shape.figure}
            found.append(
                Figure(
                    answers={name: self.shape.figure[name][int(one.indices)] for name, one in best.items()},
                    sureness={name: float(one.values * said["count"].max()) for name, one in best.items()},
                )
            )
        return tuple(found)

    @torch.inference_mode()
    def place(self, picture: npt.NDArray[np.uint8]) -> str | None:
        """Where one picture is, in the word of the eyes' question `setting`; None when they are not sure."""
        if SETTING not in self.shape.scene:
            return None
        sureness, answer = self(self._pixels(picture))[SETTING][0].float().softmax(dim=-1).max(dim=-1)
        return self.shape.scene[SETTING][int(answer)] if float(sureness) >= SURE else None

    def _pixels(self, picture: npt.NDArray[np.uint8]) -> Tensor:
        """uint8 `[H, W, 3]` of any size, squeezed to the size that the eyes know: `[1, 3, h, w]`."""
        pixels = as_input(picture[None]).to(self.query.device)
        size = (self.shape.image_px, self.shape.image_px)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
        return pixels

    def phrase(self, figure: Figure) -> str:
        """A figure's look in words: "a red duck with a teal top hat"."""
        species, colour, accessory, accessory_colour = figure.look
        worn = f"{accessory_colour} {accessory}"
        return f"{article(f'{colour} {species}')} with {worn if accessory in self.shape.plural else article(worn)}"


class _Convolution(nn.Sequential):
    def __init__(self, before: int, width: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU(inplace=True)
        )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = _Convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x)
        return out


def new_looks(
    names: Sequence[str], known: Sequence[str], figures: Sequence[Figure], phrase: Callable[[Figure], str]
) -> dict[str, str]:
    """What the one of `names` looks like whom nobody has described: the one figure that is nobody `known` (phrases).

    Empty when it is not clear who is who: several names, several figures left, or a look that is not seen for sure.
    """
    left = list(figures)
    for told in known:
        words = told.split()
        # The very look counts more than its words in another order: a red duck with a blue cap, a blue one with a red.
        alike = [
            5 if phrase(figure) == told else sum(part in told for part in figure.look if part.split()[-1] in words)
            for figure in left
        ]
        if alike and max(alike) >= _ALIKE:
            if alike.count(max(alike)) > 1:
                return {}
            del left[alike.index(max(alike))]
    if len(names) != 1 or len(left) != 1 or left[0].look_sureness < SURE:
        return {}
    return {names[0]: phrase(left[0])}


def article(noun: str) -> str:
    """A noun with its article: "an orange cat"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def as_input(pictures: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 `[B, H, W, 3]` as floats `[B, 3, H, W]` in −1..1."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0  # a copy: shelves are read-only


def save_eyes(eyes: Eyes, folder: Path) -> None:
    """Write config and float16 weights into a pack's `eyes` folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(eyes.shape.to_dict(), indent=1) + "\n", encoding="utf-8")
    weights = {name: value.detach().half().contiguous() for name, value in eyes.state_dict().items()}
    save_file(weights, str(folder / WEIGHTS_FILE))


def load_eyes(pack_folder: Path) -> Eyes | None:
    """The eyes of a pack, in eval mode, float32; None when it has none.

    Raises ValueError when a file is malformed or the weights do not fit the config.
    """
    folder = pack_folder / FOLDER
    if not (folder / CONFIG_FILE).is_file():
        return None
    try:
        eyes = Eyes(EyesShape.from_dict(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))))
        eyes.load_state_dict({n: v.float() for n, v in load_file(str(folder / WEIGHTS_FILE)).items()})
    except (OSError, RuntimeError, TypeError, AttributeError, KeyError, SafetensorError) as error:
        raise ValueError(f"the eyes of {pack_folder.name} cannot be used: {error}") from error
    eyes.requires_grad_(False).eval()
    return eyes
