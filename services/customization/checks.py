"""Looks over an uploaded example story before anything is trained on it, and says what is wrong and how to mend it.

Errors are what a training run would refuse, or could learn nothing from; warnings are risks that somebody may take.
Everything from outside is read here, pictures included; nothing raises for what a client sent. Knows no job, no store
and no transport, and of the pack only what it is given: whom it knows, how much text it takes, and its eyes if it has
some.

    FRAMES_TOO_FEW  FRAMES_TOO_MANY  FRAMES_FEW           how many frames there are
    NAME_INVALID  NAME_TAKEN  NAME_LIKE_KNOWN  NAME_GENERIC
    PHRASE_INVALID  NOUN_INVALID  LOOK_ALIKE              who it is, and whom they could be taken for
    CAPTION_INVALID  CAPTIONS_WITHOUT_NAME
    DESCRIPTION_INVALID  DESCRIPTION_TOO_LONG
    DESCRIPTION_WITHOUT_CHARACTER                         what is told
    FRAME_UNREADABLE  FRAME_TOO_LARGE  FRAME_TOO_SMALL  FRAME_SMALL  FRAME_SHAPE
    FRAME_EMPTY  FRAME_BLURRED  FRAME_REPEATED  FRAME_NEARLY_REPEATED
    CHARACTER_NOT_SEEN                                    what is shown

Of 120 stories of the toon world's new characters, all without fault, four are warned of, in 6 of their 600 frames,
each time because the eyes overlook what a small figure wears; none is refused.

Pictures are uint8 `[H, W, 3]`, RGB.
"""

from __future__ import annotations

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from services.customization.window import Window
from services.models.likeness import ALIKE, WORN, Vocabulary, matches, whole_word

if TYPE_CHECKING:  # torch is not needed to look over a story
    from services.models.eyes import EyesShape, Figure

Pixels = npt.NDArray[np.uint8]
Severity = Literal["error", "warning"]

FEWEST_FRAMES, USUAL_FRAMES, MOST_FRAMES = 3, 5, 20
MOST_NAME_LETTERS, MOST_PHRASE_LETTERS, MOST_TEXT_LETTERS = 40, 200, 1000
MOST_BYTES = 8 << 20
MOST_PIXELS = 4096 * 4096
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF")
PAPER = (255, 255, 255)  # what shows through transparent pixels

# Of the pack's side: a picture with less than that much of it is more invented than shown when it is enlarged.
_LEAST_SIDE_RATIO = 0.5
# The Laplacian's variance over that of the picture itself, at the pack's size, so that a dark picture is no blurred
# one. 300 frames of the toon world have 0.84 to 3; blurred by 1 px 0.14 to 0.24, by 1.5 px at most 0.08.
_LEAST_SHARPNESS = 0.1
_LEAST_DEVIATION = 4.0  # of 255: what is flatter shows nobody
# Pictures are compared as 16 × 16 grey cells with mean 0 and deviation 1, by the cell that differs most. Frames of a
# story share their setting and differ in one place, and copies differ a little everywhere: of 800 pairs of the toon
# world the most alike have 1.35; its frames as JPEG at quality 40 at most 0.16, made smaller 0.08, brighter 0.84, with
# 2 of 128 px cut off each side 1.13. (The distance of two DCT hashes is 2 to 6 of 63 for both.)
_CELLS = 16
_LEAST_DIFFERENCE = 1.2
_ALIKE_WORDS = 0.75  # of the words of a look make somebody who is known, where no eyes say which words those are
_NAME = re.compile(r"[^\W\d_](?:[\w'’ -]*\w)?")
_WORD = re.compile(r"[^\W_]+")
_SAY_NO_LOOK = frozenset(("a", "an", "the", "with", "wearing", "in", "and", "of", "his", "her", "its"))


@dataclass(frozen=True, kw_only=True)
class GivenFrame:
    """One frame as it was uploaded."""

    image: bytes  # of any of `FORMATS`; empty when it could not be decoded before
    caption: str
    description: str = ""  # empty: the caption


@dataclass(frozen=True, kw_only=True)
class GivenStory:
    """The example story as it was uploaded, for a pack that draws `width_px` × `height_px`."""

    name: str
    phrase: str  # "a black penguin with orange earmuffs"
    frames: Sequence[GivenFrame]
    noun: str = ""  # "penguin"; empty: the last word of the phrase before what they wear
    width_px: int = 128
    height_px: int = 128


@dataclass(frozen=True, kw_only=True)
class KnownCharacter:
    """Somebody whom the pack knows, or who was published for it."""

    name: str
    phrase: str = ""  # empty: nobody says what they look like


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is wrong, or could go wrong."""

    code: str  # stable
    severity: Severity  # an error refuses the story, a warning can be accepted
    message: str  # what was found, for a person
    mend: str  # what to do
    frame_number: int | None = None  # counted from one; None: the story as a whole


class Looks(Protocol):
    """Eyes that see who stands in a picture: `services.models.eyes.Eyes`."""

    @property
    def shape(self) -> EyesShape:
        """What they can be asked, and the words that they answer with."""
        ...

    def figures(self, picture: Pixels) -> Sequence[Figure]:
        """Who stands in a picture."""
        ...


def check_story(
    story: GivenStory, cast: Sequence[KnownCharacter], look: Looks | None, window: Window | None = None
) -> list[Finding]:
    """What is wrong with a story: as a whole first, then frame by frame. Empty for one without fault.

    `cast` are those whom the pack knows already, `look` the pack's eyes; without eyes nobody says whether the character
    is to be seen, and without `window` whether a description fits the pack's text encoder.
    """
    vocabulary = None if look is None else Vocabulary(look.shape)
    pictures, unreadable = _pictures(story)
    shown = _shown(story, cast, pictures, look, vocabulary)
    whole = [
        *_count(story),
        *_name(story, cast),
        *_phrase(story),
        *_told_alike(story, cast, vocabulary),
        *_drawn_alike(story, shown),
        *_captions(story),
    ]
    by_frame: list[Finding] = []
    for number, frame in enumerate(story.frames, 1):
        found = [*unreadable.get(number, ()), *_texts(story, frame, number), *_length(story, frame, number, window)]
        if number in pictures:
            found += [*_size(story, pictures[number], number), *_quality(story, pictures[number], number)]
            found += _repeats(pictures, number)
        if number in shown and not shown[number].is_seen:
            found.append(_not_seen(story, shown[number], number))
        by_frame += found
    return whole + by_frame


def check_character(story: GivenStory, cast: Sequence[KnownCharacter]) -> list[Finding]:
    """What is wrong with a name and a look alone: of somebody who comes without an example story."""
    return [*_name(story, cast), *_phrase(story)]


def is_acceptable(findings: Sequence[Finding], accepted: Sequence[str] = ()) -> bool:
    """Whether a job may be made: no errors, and every warning among the `accepted` codes; `*` accepts all of them."""
    return all(finding.severity == "warning" and (finding.code in accepted or "*" in accepted) for finding in findings)


def noun_of(story: GivenStory) -> str:
    """What the character is in one word: as given, else the last word of the phrase before what they wear."""
    before = WORN.split(story.phrase)[0].split()
    return story.noun.strip() or (before[-1] if before else "")


def is_told_in(story: GivenStory, text: str) -> bool:
    """Whether a text speaks of the character, by name or by phrase."""
    if story.name.strip() and whole_word(story.name.strip()).search(text):
        return True
    what, wears = _look(story)
    return bool(what and re.search(rf"\b(?:an?|the) {what}{wears}", text, re.IGNORECASE))


def by_name(story: GivenStory, text: str) -> str:
    """The same with the name alone where the look was told, as training reads it, too."""
    name, (what, wears) = story.name.strip(), _look(story)
    if not name or not what:
        return text
    after = rf"(?<!\w){re.escape(name)}(?:, (?:an?|the) {what}{wears},?| the {what}{wears})"
    before = rf"\b(?:an?|the) {what} {re.escape(name)}{wears}"
    named = re.sub(f"{after}|{before}", lambda _: name, text, flags=re.IGNORECASE)
    if whole_word(name).search(named):
        return named
    return re.sub(rf"\b(?:an?|the) {what}{wears}", lambda _: name, named, flags=re.IGNORECASE)


def _look(story: GivenStory) -> tuple[str, str]:
    """Patterns of what somebody is ("black penguin"), empty for no phrase, and of what they may wear."""
    bare = re.sub(r"^(?:an?|the) ", "", story.phrase.strip(), flags=re.IGNORECASE)
    joint = WORN.search(bare)
    what, worn = (bare, "") if joint is None else (bare[: joint.start()], bare[joint.end() :])
    return re.escape(what), rf"(?: (?:with|wearing|in) {re.escape(worn)})?" if worn else ""


class PictureTooLarge(ValueError):
    """A picture has more bytes or pixels than are taken."""


def read_picture(image: bytes) -> Pixels:
    """An uploaded picture, upright, on white paper. Raises ValueError that says why not, PictureTooLarge among them."""
    if not image:
        raise ValueError("there is no picture that can be read")
    if len(image) > MOST_BYTES:
        raise PictureTooLarge(f"the picture has {len(image)} bytes; at most {MOST_BYTES >> 20} MiB are taken")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a bomb: our own, lower limit follows
            opened: Image.Image = Image.open(io.BytesIO(image), formats=FORMATS)
    except Image.DecompressionBombError:
        raise PictureTooLarge(f"the picture has more than {MOST_PIXELS} pixels") from None
    except Exception:  # noqa: BLE001 - a parser raises whatever it likes for a broken file
        raise ValueError("this is not a PNG, JPEG, WebP, GIF or TIFF picture") from None
    if opened.width * opened.height > MOST_PIXELS:
        raise PictureTooLarge(f"the picture is {opened.width}×{opened.height}; at most {MOST_PIXELS} pixels are taken")
    try:
        upright = ImageOps.exif_transpose(opened)
        if upright.has_transparency_data:
            layered = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", layered.size, (*PAPER, 255)), layered)
        return np.asarray(upright.convert("RGB"), dtype=np.uint8)
    except Exception as error:  # noqa: BLE001 - as above
        raise ValueError(f"the picture is damaged or cut off ({type(error).__name__})") from None


def _error(code: str, message: str, mend: str, frame_number: int | None = None) -> Finding:
    return Finding(code=code, severity="error", message=message, mend=mend, frame_number=frame_number)


def _warning(code: str, message: str, mend: str, frame_number: int | None = None) -> Finding:
    return Finding(code=code, severity="warning", message=message, mend=mend, frame_number=frame_number)


def _count(story: GivenStory) -> Iterator[Finding]:
    count = len(story.frames)
    if count < FEWEST_FRAMES:
        yield _error(
            "FRAMES_TOO_FEW",
            f"There are {count} frames; a story to learn from has at least {FEWEST_FRAMES}.",
            f"Add frames that show {_who(story)} in other places and poses; {USUAL_FRAMES} work best.",
        )
    elif count > MOST_FRAMES:
        yield _error(
            "FRAMES_TOO_MANY",
            f"There are {count} frames; at most {MOST_FRAMES} are taken.",
            f"Choose the {MOST_FRAMES} that show {_who(story)} best.",
        )
    elif count < USUAL_FRAMES:
        yield _warning(
            "FRAMES_FEW",
            f"There are {count} frames; the methods were made for {USUAL_FRAMES}.",
            f"Add {USUAL_FRAMES - count} more, or accept that {_who(story)} may be learned less well.",
        )


def _name(story: GivenStory, cast: Sequence[KnownCharacter]) -> Iterator[Finding]:
    name = story.name.strip()
    if not _NAME.fullmatch(name) or len(name) > MOST_NAME_LETTERS:
        yield _error(
            "NAME_INVALID",
            f"A name begins with a letter, holds letters, digits, spaces, hyphens and apostrophes, and has at most "
            f"{MOST_NAME_LETTERS} of them.",
            "Choose a name such as Otto.",
        )
        return
    same = [one.name for one in cast if one.name.casefold() == name.casefold()]
    if same:
        yield _error(
            "NAME_TAKEN",
            f"{same[0]} is somebody whom the pack knows already.",
            "Choose another name, and use it in the captions and descriptions.",
        )
    elif like := next((one.name for one in cast if _reads_alike(one.name, name)), None):
        yield _warning(
            "NAME_LIKE_KNOWN",
            f"{name} reads like {like}, whom the pack knows; the two may be mixed up.",
            "Choose a name that is further from it.",
        )
    if name.casefold() in {noun_of(story).casefold(), *(word.casefold() for word in _WORD.findall(story.phrase))}:
        yield _warning(
            "NAME_GENERIC",
            f"{name} is a word of the look, so every {name.lower()} may come to look like this one.",
            "Give the character a name of their own.",
        )


def _reads_alike(known: str, name: str) -> bool:
    """One a word of the other, or one letter apart: of short names only the former, or Rosa would be Rose."""
    first, second = known.casefold(), name.casefold()
    if first in second.split() or second in first.split():
        return True
    return min(len(first), len(second)) > 4 and _letters_apart(first, second) <= 1


def _letters_apart(first: str, second: str) -> int:
    """Levenshtein's distance."""
    before = list(range(len(second) + 1))
    for row, letter in enumerate(first, 1):
        now = [row]
        for column, other in enumerate(second, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (letter != other)))
        before = now
    return before[-1]


def _phrase(story: GivenStory) -> Iterator[Finding]:
    if not _is_text(story.phrase, MOST_PHRASE_LETTERS):
        yield _error(
            "PHRASE_INVALID",
            f"The phrase says what the character looks like, in 1 to {MOST_PHRASE_LETTERS} letters.",
            'Write it as "a black penguin with orange earmuffs".',
        )
    elif not _is_text(noun_of(story), MOST_NAME_LETTERS):
        yield _error(
            "NOUN_INVALID",
            f"The noun says what the character is, in 1 to {MOST_NAME_LETTERS} letters.",
            'Write it as "penguin".',
        )


def _told_alike(story: GivenStory, cast: Sequence[KnownCharacter], vocabulary: Vocabulary | None) -> Iterator[Finding]:
    """Of those whom the pack knows, the one whose phrase is too near."""
    alike = {
        one.name: one for one in cast if one.phrase.strip() and _phrases_alike(story.phrase, one.phrase, vocabulary)
    }
    for one in alike.values():
        yield _warning(
            "LOOK_ALIKE",
            f"{_who(story)}, {story.phrase.strip()[:MOST_PHRASE_LETTERS]}, looks nearly like {one.name}, {one.phrase}; "
            "the two may be drawn as one.",
            "Change the species, the colour or what is worn, in the pictures and in the words.",
        )


def _phrases_alike(phrase: str, known: str, vocabulary: Vocabulary | None) -> bool:
    if vocabulary is not None:
        first, second = vocabulary.parts(phrase), vocabulary.parts(known)
        if len(first) >= ALIKE and len(second) >= ALIKE:
            return matches(first, second) >= ALIKE
    words, known_words = _look_words(phrase), _look_words(known)
    if not words or not known_words:
        return False
    return len(words & known_words) / min(len(words), len(known_words)) >= _ALIKE_WORDS


def _look_words(phrase: str) -> frozenset[str]:
    return frozenset(word.casefold() for word in _WORD.findall(phrase)) - _SAY_NO_LOOK


def _captions(story: GivenStory) -> Iterator[Finding]:
    """A caption may say "she"; the whole story may not."""
    told = [frame.caption for frame in story.frames]
    if story.name.strip() and any(text.strip() for text in told) and not any(is_told_in(story, text) for text in told):
        yield _warning(
            "CAPTIONS_WITHOUT_NAME",
            f"No caption speaks of {_who(story)}, so the name would mean nothing in a story.",
            f"Name {_who(story)} in the captions that are about them.",
        )


def _texts(story: GivenStory, frame: GivenFrame, number: int) -> Iterator[Finding]:
    if not _is_text(frame.caption, MOST_TEXT_LETTERS):
        yield _error(
            "CAPTION_INVALID",
            f"The caption of frame {number} has no letters, more than {MOST_TEXT_LETTERS}, or control characters.",
            "Write in a sentence what happens.",
            number,
        )
    if frame.description and not _is_text(frame.description, MOST_TEXT_LETTERS):
        yield _error(
            "DESCRIPTION_INVALID",
            f"The description of frame {number} has no letters, more than {MOST_TEXT_LETTERS}, or control characters.",
            "Write in a sentence or two what is to be seen, or leave it out.",
            number,
        )
    elif not is_told_in(story, frame.description or frame.caption):
        what = "description" if frame.description else "caption, which stands for the description,"
        yield _error(
            "DESCRIPTION_WITHOUT_CHARACTER",
            f"The {what} of frame {number} speaks neither of {_who(story)} nor of "
            f"{story.phrase.strip()[:MOST_PHRASE_LETTERS] or 'a look'}.",
            f"Say {_who(story)}, or the look, where now stands somebody of that kind.",
            number,
        )


def _length(story: GivenStory, frame: GivenFrame, number: int, window: Window | None) -> Iterator[Finding]:
    """Training reads a description as it is and with the name alone, and cuts neither off."""
    text = (frame.description or frame.caption).strip()
    if window is None or not _is_text(text, MOST_TEXT_LETTERS):
        return
    read = [found for told in (text, by_name(story, text)) if (found := window.overlong(told)) is not None]
    if read:
        worst = max(read, key=lambda one: one.token_count - one.limit)
        words = math.ceil(len(text.split()) * (1.0 - worst.limit / worst.token_count))
        what = "description" if frame.description else "caption, which stands for the description,"
        yield _error(
            "DESCRIPTION_TOO_LONG",
            f"The {what} of frame {number} has {worst.token_count} tokens as training counts them, and the pack's text "
            f"encoder takes {worst.limit}.",
            f"Say it with about {words} words less, and only what is to be seen.",
            number,
        )


def _is_text(text: str, most: int) -> bool:
    if not text.strip() or len(text) > most:
        return False
    return not any(unicodedata.category(one) in ("Cc", "Cs") and one not in "\t\n\r" for one in text)


def _who(story: GivenStory) -> str:
    return story.name.strip()[:MOST_NAME_LETTERS] or "the character"


def _pictures(story: GivenStory) -> tuple[dict[int, Pixels], dict[int, list[Finding]]]:
    """The pictures by frame number, and what those were that cannot be read. Of too many frames none is decoded."""
    pictures: dict[int, Pixels] = {}
    unreadable: dict[int, list[Finding]] = {}
    if len(story.frames) > MOST_FRAMES:
        return pictures, unreadable
    for number, frame in enumerate(story.frames, 1):
        try:
            pictures[number] = read_picture(frame.image)
        except PictureTooLarge as error:
            mend = f"Make it smaller: the pack draws {story.width_px}×{story.height_px}."
            unreadable[number] = [_error("FRAME_TOO_LARGE", f"Frame {number}: {error}.", mend, number)]
        except ValueError as error:
            mend = "Save the picture again as PNG, and upload that."
            unreadable[number] = [_error("FRAME_UNREADABLE", f"Frame {number}: {error}.", mend, number)]
    return pictures, unreadable


def _size(story: GivenStory, picture: Pixels, number: int) -> Iterator[Finding]:
    height, width = picture.shape[:2]
    needed = f"the pack draws {story.width_px}×{story.height_px}"
    if width < story.width_px * _LEAST_SIDE_RATIO or height < story.height_px * _LEAST_SIDE_RATIO:
        yield _error(
            "FRAME_TOO_SMALL",
            f"Frame {number} is {width}×{height}, and {needed}.",
            "Upload a larger picture, not an enlarged one.",
            number,
        )
    elif width < story.width_px or height < story.height_px:
        yield _warning(
            "FRAME_SMALL",
            f"Frame {number} is {width}×{height}, and {needed}; it will be enlarged and look soft.",
            "Upload a larger picture.",
            number,
        )
    if width * story.height_px != height * story.width_px:
        yield _error(
            "FRAME_SHAPE",
            f"Frame {number} is {width}×{height}, and {needed}.",
            f"Crop it to that shape, so that {_who(story)} stays whole.",
            number,
        )


def _quality(story: GivenStory, picture: Pixels, number: int) -> Iterator[Finding]:
    grey = _grey(picture, story.width_px, story.height_px)
    if float(grey.std()) < _LEAST_DEVIATION:
        yield _error(
            "FRAME_EMPTY",
            f"Frame {number} is nearly of one colour.",
            f"Upload a picture that shows {_who(story)}.",
            number,
        )
    elif sharpness(grey) < _LEAST_SHARPNESS:
        yield _warning(
            "FRAME_BLURRED",
            f"Frame {number} is blurred, and blur is learned like anything else.",
            "Upload a sharper picture, or leave this frame out.",
            number,
        )


def _grey(picture: Pixels, width_px: int, height_px: int) -> npt.NDArray[np.float64]:
    """At the pack's size where it is larger, `[H, W]` in 0..255."""
    grey = Image.fromarray(picture).convert("L")
    if grey.width > width_px and grey.height > height_px:
        grey = grey.resize((width_px, height_px), Image.Resampling.LANCZOS)
    return np.asarray(grey, dtype=np.float64)


def sharpness(grey_HW: npt.NDArray[np.float64]) -> float:
    """The variance of the Laplacian over that of the picture; 0 of a picture of one colour."""
    middle = grey_HW[1:-1, 1:-1]
    around = grey_HW[:-2, 1:-1] + grey_HW[2:, 1:-1] + grey_HW[1:-1, :-2] + grey_HW[1:-1, 2:]
    variance = float(grey_HW.var())
    return float((4.0 * middle - around).var()) / variance if middle.size and variance > 0.0 else 0.0


def _repeats(pictures: Mapping[int, Pixels], number: int) -> Iterator[Finding]:
    """The first earlier frame that this one repeats."""
    picture = pictures[number]
    for earlier in (one for one in sorted(pictures) if one < number):
        if picture.shape == pictures[earlier].shape and np.array_equal(picture, pictures[earlier]):
            yield _error(
                "FRAME_REPEATED",
                f"Frame {number} is the picture of frame {earlier}.",
                "Replace one of them with another picture.",
                number,
            )
            return
        if difference(picture, pictures[earlier]) < _LEAST_DIFFERENCE:
            yield _warning(
                "FRAME_NEARLY_REPEATED",
                f"Frame {number} shows nearly the same as frame {earlier}.",
                "Replace one of them: whatever is the same in both is learned as a part of the character.",
                number,
            )
            return


def difference(first: Pixels, second: Pixels) -> float:
    """How much the most different of 16 × 16 grey cells differs, in deviations of a picture; 0 of equal pictures."""
    return float(np.abs(_cells(first) - _cells(second)).max())


def _cells(picture: Pixels) -> npt.NDArray[np.float64]:
    small = Image.fromarray(picture).convert("L").resize((_CELLS, _CELLS), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=np.float64)
    return np.asarray((grey - grey.mean()) / max(float(grey.std()), 1.0))


@dataclass(frozen=True)
class _Shown:
    """What eyes make of one frame."""

    is_seen: bool  # somebody looks as the phrase says
    instead: str  # whom of the cast the best likeness is, where that is a better one; empty: nobody


def _shown(
    story: GivenStory,
    cast: Sequence[KnownCharacter],
    pictures: Mapping[int, Pixels],
    look: Looks | None,
    vocabulary: Vocabulary | None,
) -> dict[int, _Shown]:
    """By frame number; empty where the eyes lack the words to judge."""
    if look is None or vocabulary is None:
        return {}
    wanted = vocabulary.parts(story.phrase)
    if len(wanted) < ALIKE:
        return {}
    known = {one.name: vocabulary.parts(one.phrase) for one in cast}
    found = {}
    for number, picture in pictures.items():
        seen = [vocabulary.seen(figure.answers) for figure in look.figures(picture)]
        # One of the four parts may be seen wrongly: a scarf is small.
        is_seen = any(matches(wanted, figure) >= ALIKE for figure in seen)
        instead = ""
        if not is_seen:
            likeness = {
                name: max((matches(parts, figure) for figure in seen), default=0) for name, parts in known.items()
            }
            best = max(likeness, key=lambda name: likeness[name], default="")
            instead = best if best and likeness[best] >= ALIKE else ""
        found[number] = _Shown(is_seen, instead)
    return found


def _not_seen(story: GivenStory, shown: _Shown, number: int) -> Finding:
    other = f"; it seems to show {shown.instead}" if shown.instead else ""
    return _warning(
        "CHARACTER_NOT_SEEN",
        f"The pack's eyes do not see {story.phrase.strip()[:MOST_PHRASE_LETTERS]} in frame {number}{other}.",
        f"Show {_who(story)} whole and not too small, and let the phrase say what is to be seen.",
        number,
    )


def _drawn_alike(story: GivenStory, shown: Mapping[int, _Shown]) -> Iterator[Finding]:
    """In most frames nobody looks as the phrase says, and the same known one stands there."""
    names = [one.instead for one in shown.values() if one.instead]
    for name in dict.fromkeys(names):
        if names.count(name) * 2 > len(shown):
            yield _warning(
                "LOOK_ALIKE",
                f"In most frames {_who(story)} looks like {name}, whom the pack knows.",
                "Change the species, the colour or what is worn, in the pictures and in the words.",
            )
