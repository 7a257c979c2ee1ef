"""What the LLaVA is asked, as token ids: the one place both training and serving take it from.

The wording is the report's (§5.1) with the image token it left out and, for the story adapter, all captions so far:

    <bos><user><image>
    Story so far: 'c1' 'c2' Current frame story caption: 'c3', What is the next frame story caption?<assistant>

User text is data. It is encoded without special-token recognition, so `<image>` or `<assistant>` in a caption are
ordinary bytes and a prompt holds exactly one image token; quotes are escaped, so a caption cannot close its own;
control characters and bidirectional overrides are dropped.

A description is asked with what the story's people look like, because a small model cannot know everybody:

    Cast: Pip, an orange cat with a blue scarf. Previous frame story caption: 'c2', Current frame story caption: 'c3', …

Everything must fit the model's context. Captions are windowed by tokens: a single caption is read up to
`CAPTION_TOKENS_MAX`; of the captions so far the newest and the first always stay (where the story is, and where it
began), then the newer ones as far as they fit. Nothing marks the gap.

Knows the tokenizer, and neither a model nor a service.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.models.tokenizer import StoryTokenizer

CAST_MAX = 6  # of those whose looks are told; more than a frame has room for
CAPTION_TOKENS_MAX = 96  # of one caption; the world's own captions have at most 45

STORY_SO_FAR = "Story so far:"
CURRENT = "Current frame story caption:"
CAST = "Cast:"
PREVIOUS = "Previous frame story caption:"
ASK_NEXT = ", What is the next frame story caption?"
ASK_DESCRIPTION = ", What is the description of this caption?"
ASK_PICTURE = "Describe the picture."

_WORD = re.compile(r"\w+")
# "Sam, a yellow monkey with a blue bow": the words of `cast_line`, as a description is taught to say them.
_TOLD_LOOK = re.compile(
    r"\b(?P<name>[^\W\d_a-z]\w*), (?P<look>an?(?: \w+){1,3} (?:with|wearing|in)(?: \w+){1,4})(?=[,.;])"
)
_KEPT_FORMAT_CHARACTERS = "\u200c\u200d"  # joiners: emoji and several scripts cannot be written without them


@dataclass(frozen=True)
class Prompt:
    """Token ids with exactly one image token, which stands for the whole picture."""

    ids: tuple[int, ...]
    captions_kept: tuple[int, ...] = ()  # indices of the captions so far that fitted the window


def clean(text: str) -> str:
    """Text as one NFC line: control and invisible formatting characters dropped, white space collapsed."""
    kept = (
        " " if character.isspace() else character
        for character in unicodedata.normalize("NFC", text)
        if character.isspace() or _is_visible(character)
    )
    return " ".join("".join(kept).split())


def _is_visible(character: str) -> bool:
    category = unicodedata.category(character)
    # Unassigned characters stay: they are emoji newer than this Python's Unicode tables.
    return category not in ("Cc", "Cf", "Cs", "Co") or character in _KEPT_FORMAT_CHARACTERS


def escape(text: str) -> str:
    """Cleaned text whose quotes and backslashes are escaped, so that it cannot leave the quotes around it."""
    return clean(text).replace("\\", "\\\\").replace("'", "\\'")


def story_prompt(tokenizer: StoryTokenizer, captions: Sequence[str], budget_tokens: int) -> Prompt:
    """Ask for the caption after the last of `captions` (oldest first, at least one).

    `budget_tokens` is the length of the ids, the image counted as one token. Raises ValueError when not even the newest
    caption fits.
    """
    if not captions:
        raise ValueError("a story prompt needs at least one caption")
    current = _quoted(tokenizer, captions[-1])
    ending = tokenizer.encode(" " + CURRENT) + current + tokenizer.encode(ASK_NEXT)
    alone = tokenizer.encode(CURRENT) + current + tokenizer.encode(ASK_NEXT)
    room = budget_tokens - _FRAME_TOKENS - len(tokenizer.encode("\n"))
    if len(alone) > room:
        raise ValueError(f"the newest caption needs {len(alone)} tokens and {room} are left")
    opening = tokenizer.encode(STORY_SO_FAR)
    earlier = [_quoted(tokenizer, caption) for caption in captions[:-1]]
    kept = _window([len(ids) for ids in earlier], room - len(ending) - len(opening))
    if not kept:
        return Prompt(_framed(tokenizer, alone), (len(captions) - 1,))
    body = opening + [index for number in kept for index in earlier[number]] + ending
    return Prompt(_framed(tokenizer, body), (*kept, len(captions) - 1))


def description_prompt(
    tokenizer: StoryTokenizer, previous_caption: str, caption: str, budget_tokens: int, cast: Sequence[str] = ()
) -> Prompt:
    """Ask for the description of `caption`, the picture being the frame before, whose caption is `previous_caption`.

    `cast` says what those look like whom the captions name ("Pip, an orange cat with a blue scarf"); of long ones the
    last are left out. Raises ValueError when the two captions do not fit `budget_tokens`.
    """
    body = (
        _quoted(tokenizer, previous_caption)
        + tokenizer.encode(", " + CURRENT)
        + _quoted(tokenizer, caption)
        + tokenizer.encode(ASK_DESCRIPTION)
    )
    alone = _framed(tokenizer, tokenizer.encode(PREVIOUS) + body)
    if len(alone) > budget_tokens:
        raise ValueError(f"the captions need {len(alone)} tokens and {budget_tokens} are left")
    for count in range(min(len(cast), CAST_MAX), 0, -1):
        looks = f"{CAST} {'; '.join(map(escape, cast[:count]))}. {PREVIOUS}"
        ids = _framed(tokenizer, tokenizer.encode(looks) + body)
        if len(ids) <= budget_tokens:
            return Prompt(ids)
    return Prompt(alone)


def cast_lines(looks: Mapping[str, str], captions: Sequence[str]) -> tuple[str, ...]:
    """The lines of `description_prompt`'s cast: what those look like, by `looks`, whom a story's captions name.

    `captions` go from the oldest to the one that is asked about; whom the newest name comes first.
    """
    words = dict.fromkeys(word for caption in reversed(captions) for word in _WORD.findall(caption))
    return tuple(cast_line(name, looks[name]) for name in words if name in looks)


def told_looks(descriptions: Iterable[str]) -> dict[str, str]:
    """What descriptions say that somebody looks like, by name: "Sam, a yellow monkey with a blue bow, runs."

    Of two looks of the same name the first counts, because that is how they were drawn first.
    """
    told: dict[str, str] = {}
    for description in descriptions:
        for found in _TOLD_LOOK.finditer(description):
            told.setdefault(found["name"], found["look"])
    return told


def cast_line(name: str, look: str) -> str:
    """One of them: "Pip, an orange cat with a blue scarf"."""
    return f"{name}, {look}"


def picture_prompt(tokenizer: StoryTokenizer) -> Prompt:
    """Ask for the description of the picture itself: base training, and a caption for a frame that has none."""
    return Prompt(_framed(tokenizer, tokenizer.encode(ASK_PICTURE)))


def answer_ids(tokenizer: StoryTokenizer, text: str) -> list[int]:
    """What the model should write after a prompt, in training."""
    return [*tokenizer.encode(text), tokenizer.eos_id]


_FRAME_TOKENS = 4  # <bos> <user> <image> <assistant>


def picture_opening(tokenizer: StoryTokenizer) -> tuple[int, ...]:
    """What every prompt begins with: `<bos><user><image>` and a line break."""
    return (tokenizer.bos_id, tokenizer.user_id, tokenizer.image_id, *tokenizer.encode("\n"))


def _framed(tokenizer: StoryTokenizer, body: Sequence[int]) -> tuple[int, ...]:
    return (*picture_opening(tokenizer), *body, tokenizer.assistant_id)


def _quoted(tokenizer: StoryTokenizer, text: str) -> list[int]:
    ids = tokenizer.encode(escape(text))
    if len(ids) > CAPTION_TOKENS_MAX:
        ids = ids[:CAPTION_TOKENS_MAX]
        while ids and tokenizer.decode(ids[-1:]).endswith("\\"):  # half an escape would swallow the closing quote
            ids.pop()
    return [*tokenizer.encode(" '"), *ids, *tokenizer.encode("'")]


def _window(lengths: Sequence[int], room: int) -> tuple[int, ...]:
    """Which earlier captions stay: the first, then from the newest back until one does not fit. Pure."""
    if not lengths or lengths[0] > room:
        return ()
    room -= lengths[0]
    kept: list[int] = []
    for number in range(len(lengths) - 1, 0, -1):
        if lengths[number] > room:
            break
        room -= lengths[number]
        kept.append(number)
    return (0, *reversed(kept))
