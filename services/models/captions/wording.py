"""How a captioner is asked, and how what it says is read: a pack's own LLaVA, and captioners that others published.

    StoryWording      our tokenizer and the layout of `prompts`, in which our LLaVA was trained
    PublishedWording  a published model's tokenizer; `prompts`' question between its own opening and closing words
    LookingWording    a model that takes no question (BLIP): a picture, and the first words of what it is to say

A published tokenizer is asked for the whole text at once, as its own library does, so that tokens are cut where they
were cut in training. User text is data there too: what would be read as a special token is broken up before.

Knows tokenizers, and neither a network nor a service.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import tokenizers

from services.models.captions import prompts
from services.models.captions.prompts import Prompt
from services.models.pack import Captioner
from services.models.tokenizer import StoryTokenizer

_BREAKS_MAX = 8  # breaking one token up may make another; whatever is left then is found in the ids


class Wording(Protocol):
    """What the caption engine asks of a model's words."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as data: no special id comes out."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without special tokens."""

    def story_prompt(self, captions: Sequence[str], budget_tokens: int) -> Prompt:
        """Asks for the caption after the last of `captions`. Raises ValueError when that one does not fit."""

    def description_prompt(
        self, previous_caption: str, caption: str, budget_tokens: int, cast: Sequence[str] = ()
    ) -> Prompt:
        """Asks for the description of `caption`. Raises ValueError when the captions do not fit."""


class StoryWording:
    """Of our own packs. See `Wording`."""

    def __init__(self, tokenizer: StoryTokenizer) -> None:
        self.tokenizer = tokenizer
        self.encode = tokenizer.encode
        self.decode = tokenizer.decode

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every special token: none of them belongs into an answer."""
        return tuple(sorted(self.tokenizer.special_ids))

    def story_prompt(self, captions: Sequence[str], budget_tokens: int) -> Prompt:
        """See `Wording`."""
        return prompts.story_prompt(self.tokenizer, captions, budget_tokens)

    def description_prompt(
        self, previous_caption: str, caption: str, budget_tokens: int, cast: Sequence[str] = ()
    ) -> Prompt:
        """See `Wording`."""
        return prompts.description_prompt(self.tokenizer, previous_caption, caption, budget_tokens, cast)


class PublishedWording:
    """Of a published model that answers questions. See `Wording`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, captioner: Captioner) -> None:
        """Raises ValueError when the tokenizer does not know what the manifest says of it."""
        self._tokenizer = tokenizer
        self._captioner = captioner
        self._data = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self._data.encode_special_tokens = True
        added = tokenizer.get_added_tokens_decoder()
        self._special = {number: token.content for number, token in added.items() if token.special}
        first = tokenizer.encode("", add_special_tokens=True).ids[:1]
        begins = tokenizer.id_to_token(first[0]) if first else None
        # A chat template may hold the token that the tokenizer puts in front anyway; once is enough.
        self._adds_special = begins is None or not captioner.opening.startswith(begins)
        if captioner.image_token and tokenizer.token_to_id(captioner.image_token) is None:
            raise ValueError(f"the tokenizer does not know the image token {captioner.image_token!r}")
        self._frame = self._specials(self._ids(captioner.opening + captioner.closing))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """See `Wording`."""
        return self._captioner.stop_ids

    def encode(self, text: str) -> list[int]:
        """See `Wording`."""
        ids: list[int] = self._data.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Wording`."""
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)  # a network may have more rows than words
        text: str = self._tokenizer.decode([number for number in ids if number < size], skip_special_tokens=True)
        return text

    def story_prompt(self, captions: Sequence[str], budget_tokens: int) -> Prompt:
        """See `Wording`."""
        if not captions:
            raise ValueError("a story prompt needs at least one caption")
        quoted = [self._quoted(caption) for caption in captions]
        newest = len(captions) - 1
        ending = f"{prompts.CURRENT}{quoted[newest]}{prompts.ASK_NEXT}"
        earlier: list[int] = list(range(newest))
        while True:
            told = "".join(quoted[number] for number in earlier)
            body = f"{prompts.STORY_SO_FAR}{told} {ending}" if earlier else ending
            ids = self._asked(body)
            if len(ids) <= budget_tokens:
                return Prompt(ids, (*earlier, newest))
            if not earlier:
                raise ValueError(f"the newest caption needs {len(ids)} tokens and {budget_tokens} are left")
            # The first stays longest: where the story began. About as many go as are too many; too few, and again.
            too_many = len(ids) - budget_tokens
            first, rest = earlier[0], earlier[1:]
            while rest and too_many > 0:
                too_many -= len(self.encode(quoted[rest.pop(0)]))
            earlier = [first, *rest] if len(earlier) > 1 else []

    def description_prompt(
        self, previous_caption: str, caption: str, budget_tokens: int, cast: Sequence[str] = ()
    ) -> Prompt:
        """See `Wording`."""
        body = (
            f"{prompts.PREVIOUS}{self._quoted(previous_caption)}, "
            f"{prompts.CURRENT}{self._quoted(caption)}{prompts.ASK_DESCRIPTION}"
        )
        for count in range(min(len(cast), prompts.CAST_MAX), -1, -1):
            looks = f"{prompts.CAST} {'; '.join(map(prompts.escape, cast[:count]))}. " if count else ""
            ids = self._asked(looks + body)
            if len(ids) <= budget_tokens:
                return Prompt(ids)
        raise ValueError(f"the captions need {len(ids)} tokens and {budget_tokens} are left")

    def _quoted(self, text: str) -> str:
        escaped = prompts.escape(text)
        encoding = self._data.encode(escaped, add_special_tokens=False)
        if len(encoding.ids) > prompts.CAPTION_TOKENS_MAX:
            escaped = escaped[: encoding.offsets[prompts.CAPTION_TOKENS_MAX - 1][1]]
            while (len(escaped) - len(escaped.rstrip("\\"))) % 2:  # half an escape would swallow the closing quote
                escaped = escaped[:-1]
        return f" '{escaped}'"

    def _asked(self, question: str) -> tuple[int, ...]:
        """The ids of a question between the opening and the closing."""
        opening, closing = self._captioner.opening, self._captioner.closing
        ids = self._ids(opening + _broken(question, self._special.values()) + closing)
        if self._specials(ids) != self._frame:
            # A token that normalising made out of harmless letters: then all of them become data, the slow way.
            ids = [*self._ids(opening), *self.encode(question), *self._ids(closing, adds_special=False)]
        return tuple(ids)

    def _ids(self, text: str, *, adds_special: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=self._adds_special and adds_special).ids
        return ids

    def _specials(self, ids: Sequence[int]) -> list[int]:
        return [number for number in ids if number in self._special]


class LookingWording:
    """Of a published model that takes no question. Captions are checked by the engine and not read here."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, captioner: Captioner, *, begin_id: int) -> None:
        """`begin_id` is the token before the first words."""
        self._tokenizer = tokenizer
        self._captioner = captioner
        self._prompt = Prompt((begin_id, *self.encode(captioner.opening)))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """See `Wording`."""
        return self._captioner.stop_ids

    def encode(self, text: str) -> list[int]:
        """See `Wording`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Wording`. The first words are not part of it."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def story_prompt(self, captions: Sequence[str], budget_tokens: int) -> Prompt:
        """The same whatever the captions are."""
        return self._prompt

    def description_prompt(
        self, previous_caption: str, caption: str, budget_tokens: int, cast: Sequence[str] = ()
    ) -> Prompt:
        """The same whatever the captions are."""
        return self._prompt


def _broken(text: str, special: Collection[str]) -> str:
    """`text` in which no special token can be read: a space after the first letter of each."""
    for _ in range(_BREAKS_MAX):
        found = [token for token in special if len(token) > 1 and token in text]
        for token in found:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        if not found:
            break
    return text
