"""What a step of a customization shows, as numbers. Knows no pack, picture or method."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.models.denoiser import Dropout
from training.new_story import MOST_FRAMES, STORY_FRAMES


@dataclass(frozen=True, kw_only=True)
class LessonRecipe:
    """What a step shows. The defaults are what EpicEvo's paper says, or the most literal reading of it."""

    existing_stories: int = 5  # that a run knows, of which a step shows one: five for each new character
    existing_first_seed: int = 0
    frames_per_story: int = STORY_FRAMES  # rows of a step, twice, as far as a story has them; fewer cost less
    # StoryGen: how many earlier frames the rows of a step see, as far as their story has them. The newest one says
    # most. AR-LDM's rows see all that its history holds, as it was trained.
    references_shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    dropout: Dropout = field(
        default_factory=lambda: Dropout(text=0.10, references=0.10, no_references=0.20)
    )  # StoryGen
    frame_dropout: float = 0.10  # AR-LDM: of rows whose caption and history become nothing, together
    exemplars: int = 4  # pictures of each character that the discriminator is shown, at most
    prior_seed: int = 0  # of the pictures that the network itself draws, where a method asks for them

    def __post_init__(self) -> None:
        """Raises ValueError for what no batch can be drawn of."""
        if not 1 <= self.frames_per_story <= MOST_FRAMES:
            raise ValueError(f"frames_per_story is 1 to {MOST_FRAMES}")
        if self.existing_stories < 1 or self.exemplars < 1:
            raise ValueError("existing_stories and exemplars are at least 1")
        if not 0.0 <= self.frame_dropout <= 1.0:
            raise ValueError("frame_dropout is from 0 to 1")
