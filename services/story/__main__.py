"""`python -m services.story [serve|migrate]`: runs the story service, or brings its database up to date."""

from __future__ import annotations

import argparse
import asyncio
import sys

import structlog

from services.runtime.config import ConfigInvalid, Installation
from services.runtime.errors import FabulaError
from services.runtime.telemetry import configure_logging
from services.story.config import StorySettings


def main() -> int:
    """Exit status 2: a setting or an argument is wrong; 1: something the process needs is not there."""
    parser = argparse.ArgumentParser(prog="python -m services.story", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("serve", "migrate"), default="serve")
    command = parser.parse_args().command
    try:
        installation, settings = Installation.load(), StorySettings.load()
        configure_logging("story", installation.log_level)
        if command == "migrate":
            from services.story.database import database_urls
            from services.story.migrate import upgrade

            installation.make_home()
            upgrade(database_urls(installation.database_url, installation.home))
            return 0
        from services.story.process import serve

        asyncio.run(serve(installation, settings))
    except ConfigInvalid as error:
        print(error, file=sys.stderr)
        return 2
    except (FabulaError, OSError) as error:
        structlog.get_logger("fabula.story").error("start_failed", exc_info=error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
