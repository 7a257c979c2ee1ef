"""Makes generic mentions clear: "the alien" is told by the phrase of the new character it means, or left as it is.

    1. proposals(…)          rules find captions that may mean somebody new; a model that sees may be asked whether
    2. write_proposals(…)    one JSON object a line, for a person to read
    3. decisions(…)          the accept file: {"proposal": …, "accepted": true, "by": "who"}, a line each
    4. accepted(…)           the corpus as it is after that

Nothing is changed that a person has not decided, and nothing goes on before everything is decided: a clip that was
overlooked is a leak. Knows no network: the model is a function.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.new_story import Pixels
from training.newepisode.records import Clip, Corpus, DataInvalid
from training.newepisode.registry import NewCharacter, Registry

See = Callable[[str], Pixels]
"""A clip's picture, by id."""
Ask = Callable[[Pixels, str], str]
"""What a model that sees answers to a question about a picture."""
QUESTION = "Does this picture show {phrase}? Answer yes or no."
_YES = re.compile(r"\s*yes\b", re.IGNORECASE)
_NO = re.compile(r"\s*no\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A clip's caption, told otherwise. `said` is what was found by rule, and what the model answered."""

    clip: str
    character: str
    before: str
    after: str
    said: str  # "mention", "mention, seen", "mention, not seen" or "mention, unsure"

    @property
    def digest(self) -> str:
        """16 hex digits of what is proposed: a decision about other words is none about these."""
        told = json.dumps([self.clip, self.character, self.before, self.after])
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def proposals(corpus: Corpus, registry: Registry, *, see: See | None = None, ask: Ask | None = None) -> list[Proposal]:
    """Every caption that mentions somebody without a name. With `see` and `ask`, a model's word on each of them.

    Of several whom a mention may mean, each is proposed. Order: by clip, as the corpus has them.
    """
    found: list[Proposal] = []
    for clip in corpus.clips.values():
        for one in registry.characters:
            if one.id not in clip.new and one.is_perhaps_in(clip.caption):
                said = "mention" if see is None or ask is None else f"mention, {_seen(one, see(clip.id), ask)}"
                after = one.told_by_phrase(clip.caption)
                found.append(Proposal(clip=clip.id, character=one.id, before=clip.caption, after=after, said=said))
    return found


def _seen(one: NewCharacter, picture: Pixels, ask: Ask) -> str:
    answer = ask(picture, QUESTION.format(phrase=one.phrase))
    if _YES.match(answer):
        return "seen"
    return "not seen" if _NO.match(answer) else "unsure"


def write_proposals(found: Sequence[Proposal], path: Path) -> None:
    """One JSON object a line; `accepted` is null, for whoever decides to set."""
    lines = [
        {
            "proposal": one.digest,
            "clip": one.clip,
            "character": one.character,
            "before": one.before,
            "after": one.after,
            "said": one.said,
            "accepted": None,
            "by": "",
        }
        for one in found
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    part.replace(path)


def decisions(path: Path) -> dict[str, bool]:
    """What a person decided, by proposal. Raises DataInvalid for a line that decides nothing or twice differently."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataInvalid(f"{path} cannot be read: {error}") from None
    decided: dict[str, bool] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        proposal, is_accepted = _decision(line, f"{path}, line {number}")
        if decided.setdefault(proposal, is_accepted) != is_accepted:
            raise DataInvalid(f"{path}, line {number}: {proposal} was decided otherwise before")
    return decided


def _decision(line: str, where: str) -> tuple[str, bool]:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise DataInvalid(f"{where} is no JSON") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("proposal"), str):
        raise DataInvalid(f"{where} names no proposal")
    if not isinstance(entry.get("accepted"), bool):
        raise DataInvalid(f"{where}: accepted is neither true nor false")
    if not isinstance(entry.get("by"), str) or not entry["by"].strip():
        raise DataInvalid(f"{where} does not say by whom it was decided")
    return entry["proposal"], entry["accepted"]


def accepted(corpus: Corpus, found: Iterable[Proposal], decided: Mapping[str, bool]) -> Corpus:
    """The corpus with accepted proposals: the new captions, and those they tell of marked as shown.

    Raises DataInvalid while a proposal is undecided, for a decision about none, and for two accepted ones that tell the
    same caption of one clip differently.
    """
    all_found = list(found)
    digests = {one.digest for one in all_found}
    if open_ones := [one for one in all_found if one.digest not in decided]:
        raise DataInvalid(f"{len(open_ones)} proposals are not decided, the first is {open_ones[0].digest}")
    if unknown := sorted(decided.keys() - digests):
        raise DataInvalid(f"{unknown[0]} is no proposal of this corpus: its caption or phrase has changed")
    changed: dict[str, Clip] = {}
    for one in all_found:
        if not decided[one.digest]:
            continue
        if one.clip in changed:
            raise DataInvalid(f"two accepted proposals tell {one.clip} differently")
        clip = corpus.clips[one.clip]
        changed[one.clip] = Clip(id=clip.id, caption=one.after, new=clip.new | {one.character}, known=clip.known)
    return corpus.with_clips(changed.values())
