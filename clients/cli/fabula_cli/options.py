"""The options that several commands share, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Answer with JSON on standard output.")]
Home = Annotated[
    Path | None,
    typer.Option(
        "--home", envvar="FABULA_HOME", help="Folder of the installation.", show_default="~/.local/share/fabula"
    ),
]
PortBase = Annotated[
    int | None,
    typer.Option(
        "--port-base",
        envvar="FABULA_PORT_BASE",
        min=1024,
        max=65000,
        help="First of the installation's ports; it takes up to 130 from there.",
        show_default="8470",
    ),
]
Target = Annotated[
    str | None,
    typer.Option("--target", envvar="FABULA_CLI_TARGET", help="host:port of another story service's gRPC."),
]
StoryId = Annotated[str, typer.Argument(help="The story's id, as `fabula story list` shows it.", show_default=False)]
