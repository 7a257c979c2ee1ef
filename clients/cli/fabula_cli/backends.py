"""`fabula backends`: what an installation can do."""

from __future__ import annotations

from fabula_client import Backend, Backends
from rich.markup import escape
from rich.table import Table

from fabula_cli.options import AsJson, Home, PortBase, Target
from fabula_cli.report import clean, people, say_json
from fabula_cli.stories import connected


def backends(
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """List the packs that are loaded and what can be asked of each. The first one is the default.

    Example: fabula backends --json | jq -r '.backends[] | select(.tells_stories) | .pack'
    """
    with connected(home, port_base, target, as_json) as client:
        found = client.backends()
    if as_json:
        say_json(found)
        return
    people.print(table(found) if found.backends else "No packs are loaded.")
    for service in found.unavailable_services:
        people.print(
            f"[yellow]! The {escape(clean(service))} service does not answer; what only it knows is missing.[/]"
        )


def table(found: Backends) -> Table:
    """A line for each pack."""
    shown = Table(box=None, padding=(0, 2))
    for column in (
        "pack",
        "architecture",
        "draws",
        "writes",
        "size",
        "steps",
        "qualities",
        "references",
        "features",
    ):
        shown.add_column(column, overflow="fold")
    for backend in found:
        shown.add_row(*(escape(clean(cell)) for cell in _cells(backend, found.unavailable_services)))
    return shown


def _cells(backend: Backend, silent: tuple[str, ...]) -> list[str]:
    drawing = backend.drawing
    cells = [
        f"{backend.pack} (default)" if backend.is_default else backend.pack,
        backend.architecture,
        _whether(drawing is not None, is_known="frame" not in silent),
        _whether(backend.writes, is_known="caption" not in silent),
    ]
    if drawing is None:
        return [*cells, "", "", "", "", ""]
    steps = f"{drawing.default_steps} (up to {drawing.max_steps})" if drawing.max_steps else str(drawing.default_steps)
    return [
        *cells,
        f"{drawing.width_px}×{drawing.height_px}",
        steps,
        ", ".join(f"{each.quality} {each.steps}" for each in drawing.qualities),
        str(drawing.max_references),
        ", ".join(drawing.features),
    ]


def _whether(is_so: bool, *, is_known: bool) -> str:
    return ("yes" if is_so else "no") if is_known else "?"
