"""What can go wrong with teaching a pack somebody new, each with a stable reason and a message that says what to do.

CustomizationError
├── StoryInvalid      the example story cannot be learned from
├── RecipeInvalid     the recipe cannot be run on this pack
├── FramesSeen        pictures that a run must not see, or an evaluation that a run has seen
├── RunMismatch       the folder holds another run's checkpoint
├── RunStopped        somebody asked for an end; a later run goes on from the checkpoint
├── DiskFull          there is no room for what is to be kept; the last good checkpoint is
├── WorkerUnable      a worker of several cannot do what the first one does
├── WorkersUnfit      there never is room for as many workers as were asked for
├── WorkerEnded       what ended a run elsewhere, under the reason that it has there
└── LossNotFinite     training went wrong; the last good checkpoint is kept
"""

from __future__ import annotations


class CustomizationError(Exception):
    """Base of the tree."""

    reason = "CUSTOMIZATION_ERROR"


class StoryInvalid(CustomizationError):
    """The example story cannot be learned from. `field` says what of it is wrong."""

    reason = "STORY_INVALID"

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class RecipeInvalid(CustomizationError):
    """The recipe cannot be run on this pack. Choose another method or pack."""

    reason = "RECIPE_INVALID"


class FramesSeen(CustomizationError):
    """A frame is on both sides of the wall between what is learned from and what is measured on."""

    reason = "FRAMES_SEEN"


class RunMismatch(CustomizationError):
    """The folder holds another run's checkpoint. Choose another folder, or take the old one away."""

    reason = "RUN_MISMATCH"


class RunStopped(CustomizationError):
    """The run was told to stop before its end. Start it again to go on."""

    reason = "RUN_STOPPED"


class DiskFull(CustomizationError):
    """There is no room for what a run keeps. The last good checkpoint is there; make room and go on."""

    reason = "DISK_FULL"


class WorkerUnable(CustomizationError):
    """A worker cannot take part: it does not see the run's folder, or finds another pack or story. Its log says why."""

    reason = "WORKER_UNABLE"


class WorkersUnfit(CustomizationError):
    """This machine will never have room for all workers. Ask for fewer, or give them less."""

    reason = "WORKERS_UNFIT"


class WorkerEnded(CustomizationError):
    """What ended a run in another process, with the reason that it has there."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class LossNotFinite(CustomizationError):
    """A loss or gradient was not a finite number. The last good checkpoint is kept; start anew with a smaller rate."""

    reason = "LOSS_NOT_FINITE"
