"""The `fabula` command: what it can do, in one place. Each verb lives in a module of its own."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from fabula_cli import exits
from fabula_cli.backends import backends
from fabula_cli.characters import app as characters
from fabula_cli.demo import demo
from fabula_cli.doctor import doctor
from fabula_cli.installation import Installation
from fabula_cli.options import AsJson, Home, PortBase
from fabula_cli.packs import app as packs
from fabula_cli.services import down, status
from fabula_cli.services import up as bring_services_up
from fabula_cli.stories import app as stories

app = typer.Typer(
    name="fabula",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Continue a visual story from one picture and one sentence, on your own machine.",
    epilog=exits.TABLE,
)


@app.command()
def up(
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when everything is ready, or at once.")] = True,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Longest wait, seconds.")] = 300.0,
    serve_config: Annotated[
        Path | None,
        typer.Option(
            help="Which models run where.", exists=True, dir_okay=False, show_default="deploy/serve/laptop.yaml"
        ),
    ] = None,
    home: Home = None,
    port_base: PortBase = None,
    as_json: AsJson = False,
) -> None:
    """Start the services in the background. Does nothing when they run already.

    Examples:

      fabula up

      fabula up --home /tmp/second --port-base 9470 --json
    """
    bring_services_up(wait, timeout_s, serve_config, Installation.find(home, port_base), as_json)


app.command()(down)
app.command()(status)
app.command()(doctor)
app.command()(demo)
app.command()(backends)
app.add_typer(stories, name="story")
app.add_typer(characters, name="character")
app.add_typer(packs, name="pack")


def main() -> None:
    """The entry point."""
    # A command that is told to end cleans up behind it as after Ctrl-C: `demo` stops what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(exits.TERMINATED))
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(exits.INTERRUPTED)


if __name__ == "__main__":
    main()
