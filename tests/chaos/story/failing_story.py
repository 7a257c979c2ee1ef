"""Runs the story service, but has it die without warning at a named moment. Only tests know of this file.

python failing_story.py <moment> <count>      dies at the count-th time the moment comes
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from dbos import DBOS

from services.runtime.store import ObjectStore
from services.story.__main__ import main
from services.story.repository import Repository
from services.story.workflow import StoryWorkflows

left = int(sys.argv[2])


def die() -> None:
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def before(owner: type, name: str) -> None:
    function: Callable[..., Any] = getattr(owner, name)

    async def dying(*arguments: Any, **named: Any) -> Any:
        die()
        return await function(*arguments, **named)

    setattr(owner, name, dying)


def after(owner: type, name: str) -> None:
    function: Callable[..., Any] = getattr(owner, name)

    async def dying(*arguments: Any, **named: Any) -> Any:
        result = await function(*arguments, **named)
        die()
        return result

    setattr(owner, name, dying)


MOMENTS: dict[str, Callable[[], None]] = {
    "story-committed": lambda: after(Repository, "create"),
    "before-hand-over": lambda: before(DBOS, "enqueue_workflow_async"),
    "after-hand-over": lambda: before(Repository, "mark_enqueued"),
    "caption-received": lambda: before(Repository, "write_caption"),
    "caption-committed": lambda: after(Repository, "write_caption"),
    "description-committed": lambda: after(Repository, "write_description"),
    "picture-received": lambda: before(ObjectStore, "put"),
    "before-commit": lambda: before(Repository, "commit_frame"),
    "after-commit": lambda: after(Repository, "commit_frame"),
    "before-end": lambda: before(StoryWorkflows, "_end"),
    "after-end": lambda: after(StoryWorkflows, "_end"),
}

if __name__ == "__main__":
    MOMENTS[sys.argv[1]]()
    sys.argv = [sys.argv[0]]
    sys.exit(main())
