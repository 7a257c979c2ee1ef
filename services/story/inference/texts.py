"""Texts of a request, by the same rule as a story's caption, and warnings as text."""

from __future__ import annotations

from collections.abc import Iterable

from fabula.warning.v1 import warning_pb2

from services.runtime.errors import CaptionEmpty, CaptionTooLong, DescriptionEmpty, DescriptionTooLong, InvalidArgument
from services.story.inference.refusals import Names, naming, renamed
from services.story.intake import check_caption

AS_DESCRIPTION: dict[type[InvalidArgument], type[InvalidArgument]] = {
    CaptionEmpty: DescriptionEmpty,
    CaptionTooLong: DescriptionTooLong,
}


def checked_caption(place: str, text: str) -> str:
    """A caption as stories keep theirs; `place` names it in a refusal. Raises the Caption… errors."""
    with naming({"caption": place}):
        return check_caption(text)


def checked_description(place: str, text: str) -> str:
    """A description, by the same rule. Raises DescriptionEmpty, DescriptionTooLong, CaptionCharactersInvalid."""
    try:
        return checked_caption(place, text)
    except (CaptionEmpty, CaptionTooLong) as error:
        message = error.message.replace("the caption has", "the text has").replace("A caption", "A description")
        raise AS_DESCRIPTION[type(error)](message, field=place, metadata=error.metadata) from None


def warnings_text(warnings: Iterable[warning_pb2.Warning], names: Names) -> str:
    """One line for each: its stable reason, the tensor it is about, its message."""
    return "\n".join(f"{each.reason}: {renamed(each.field, names)}: {each.message}" for each in warnings)
