"""`fabula pack …`: add, list, verify, remove, convert.

The work is done by `services.packs` in a process of its own, which is asked by its arguments and answers in JSON: this
command starts without torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from fabula_cli import exits
from fabula_cli.installation import Installation, ServicesMissing, SupervisorFailed, last_line, need_services
from fabula_cli.options import AsJson, Home
from fabula_cli.report import aside, clean, fail, people, say_json, size

app = typer.Typer(no_args_is_help=True, help="The packs of this installation: the models that write and draw.")

MODULE = "services.packs"
PackName = Annotated[str, typer.Argument(help="The pack's name, as `fabula pack list` shows it.", show_default=False)]
Told = Callable[[dict[str, Any]], None]


class Refused(Exception):
    """The services understood and refused; the reason is stable."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def ask(installation: Installation, *arguments: str, told: Told | None = None) -> dict[str, Any]:
    """Runs a verb of this command's own module. See `ask_module`."""
    return ask_module(installation, MODULE, *arguments, told=told)


def ask_module(installation: Installation, module: str, *arguments: str, told: Told | None = None) -> dict[str, Any]:
    """Runs a verb of a module to its end and returns its result; `told` gets its progress.

    Raises Refused, ServicesMissing, SupervisorFailed.
    """
    need_services()
    answer: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+", errors="replace") as said:  # a pipe that nobody empties could fill up
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=installation.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                answer = json.loads(line)
                if "progress" in answer and told is not None:
                    told(answer["progress"])
            process.wait()
        finally:
            # Whatever ends this command ends the copying too; it goes on where it was when it is asked again.
            if process.poll() is None:
                process.terminate()
                process.wait()
        said.seek(0)
        errors = said.read()
    if "error" in answer:
        raise Refused(str(answer["error"]["reason"]), str(answer["error"]["message"]))
    if "result" not in answer:
        raise SupervisorFailed(last_line(errors) or f"{module} ended with status {process.returncode}")
    result = answer["result"]
    return result if isinstance(result, dict) else {}


@contextmanager
def answered(as_json: bool) -> Iterator[None]:
    """What asking raises becomes a message and an exit status."""
    try:
        yield
    except Refused as error:
        fail(f"{error.reason}: {error}", status=exits.REFUSED, as_json=as_json, reason=error.reason)
    except (ServicesMissing, SupervisorFailed) as error:
        fail(str(error), status=exits.FAILED, as_json=as_json)


@app.command()
def add(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder, a file://, s3://, gs:// or az:// prefix, or hub:owner/name[@revision].", show_default=False
        ),
    ],
    name: Annotated[
        str, typer.Option(help="What requests call it; of a pack.json it is fixed.", show_default="the source's")
    ] = "",
    licence: Annotated[
        str, typer.Option(help="SPDX expression of a published checkpoint's licence; a pack.json says its own.")
    ] = "",
    fetch: Annotated[bool, typer.Option("--fetch", help="Allow a download from the hub, now.")] = False,
    base: Annotated[
        str, typer.Option(help="The checkpoint that training started from.", show_default="the source's name")
    ] = "",
    family: Annotated[
        str,
        typer.Option(
            help="sd15, sd2, sd-turbo, sdxl, sdxl-turbo, storygen, arldm, flux2-klein or flux2-klein-kv; "
            "of a model on a server remote-frames or remote-captioner.",
            show_default="as the files look",
        ),
    ] = "",
    reference_range: Annotated[
        Literal["unit", "signed"] | None,
        typer.Option(
            help="Values in which the network sees earlier frames: 0 to 1, or -1 to 1.",
            show_default="unit for StoryGen, else signed",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps a frame.", min=1, max=1000, show_default="the family's")
    ] = None,
    text_guidance: Annotated[
        float | None, typer.Option(help="0 to 30; 1 is none.", min=0, max=30, show_default="the family's")
    ] = None,
    image_guidance: Annotated[
        float | None, typer.Option(help="0 to 30; 1 is none.", min=0, max=30, show_default="the family's")
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Add a pack, or make one of a published checkpoint in diffusers' or, if it writes captions, transformers' layout.

    Every file is checked against its digest. A copy that was interrupted goes on where it was when the same command
    runs again; until all is there and checked, nothing of it can be seen.

    Examples:

      fabula pack add ./storygen --licence MIT

      fabula pack add s3://models/packs/ours

      fabula pack add hub:owner/name --fetch --licence LicenseRef-theirs

      fabula pack add triton://host:8001/caption/toon --licence LicenseRef-theirs
    """
    options = {
        "--name": name,
        "--licence": licence,
        "--base": base,
        "--family": family,
        "--reference-range": reference_range,
        "--steps": steps,
        "--text-guidance": text_guidance,
        "--image-guidance": image_guidance,
    }
    # With "=", so that nothing that is told can be taken for a flag.
    words = [f"{flag}={value}" for flag, value in options.items() if value not in ("", None)]
    words += ["--fetch"] if fetch else []
    with answered(as_json), _copying(quiet=as_json) as told:
        added = ask(Installation.find(home, None), "add", *words, "--", source, told=told)
    if as_json:
        say_json(added)
        return
    how = "was there already" if added["was_there"] else "is there"
    people.print(
        f"[green]✓[/] Pack [bold]{escape(added['name'])}[/] {how}: {escape(added['architecture'])}, "
        f"{size(added['size_bytes'])}, {added['digest'][:12]}"
    )
    people.print(f"  {escape(added['folder'])}", soft_wrap=True)
    for note in added["notes"]:
        people.print(f"  [dim]{escape(clean(note))}[/]")
    writes_only = added["writes_only"]
    packs = f"FABULA_CAPTION_PACK={added['name']}" if writes_only else f"FABULA_FRAME_PACKS=toon,{added['name']}"
    people.print(f"  The services load what their settings name: [bold]{escape(packs)}[/], then `fabula up`.")
    if writes_only:
        people.print("  It writes and does not draw. FABULA_CAPTION_ALSO_FOR names the packs whose frames it tells of.")
    if added["draws_only"]:
        people.print("  It draws and has no captioner of its own.")


@app.command("list")
def list_(home: Home = None, as_json: AsJson = False) -> None:
    """List the packs that can be found, in the order of the search path.

    Example: fabula pack list --json | jq -r '.packs[].name'
    """
    with answered(as_json):
        found = ask(Installation.find(home, None), "list")
    if as_json:
        say_json(found)
        return
    if not found["packs"]:
        people.print("No packs.")
        return
    table = Table("pack", "architecture", "size", "made", "licence", "digest", "where", box=None, padding=(0, 2))
    for each in found["packs"]:
        made = datetime.fromisoformat(each["created"]).date().isoformat() if each["created"] else ""
        mark = " [green]in use[/]" if each["in_use"] else ""
        where = escape(each["folder"])
        if each["unfinished"]:
            where = f"[yellow]unfinished: add it again to go on[/] {where}"
        elif each["fault"]:
            where = f"[red]{escape(each['reason'])}[/] {where}"
        elif each["hidden_by"]:
            where = f"[yellow]hidden by {escape(each['hidden_by'])}[/] {where}"
        table.add_row(
            escape(each["name"]) + mark,
            escape(each["architecture"]),
            size(each["size_bytes"]),
            made,
            escape(each["licence"]),
            each["digest"][:12],
            where,
        )
    people.print(table)


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="The pack's name.", show_default=False)] = "",
    all_: Annotated[bool, typer.Option("--all", help="Every pack that can be found.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Compare every file of a pack with its digest. Exit status 7 when something is wrong.

    Examples:

      fabula pack verify toon

      fabula pack verify --all --json | jq '.packs[] | select(.ok | not)'
    """
    if bool(name) == all_:
        fail("name one pack, or say --all", status=exits.USAGE, as_json=as_json, reason="USAGE")
    with answered(as_json):
        checked = ask(Installation.find(home, None), "verify", *(["--all"] if all_ else ["--", name]))
    if as_json:
        say_json(checked)
    else:
        for each in checked["packs"]:
            if each["ok"]:
                files = f"{each['files_count']} files as their digests say, {each['digest'][:12]}"
                people.print(f"[green]✓[/] {escape(each['name'])}: {files}")
            else:
                people.print(f"[red]✗[/] {escape(each['name'])}: {each['reason']}: {escape(clean(each['message']))}")
    if not checked["ok"]:
        raise typer.Exit(exits.FAULTS_FOUND)


@app.command()
def remove(
    name: PackName,
    force: Annotated[bool, typer.Option("--force", help="Also a pack that the settings name.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Remove a pack, or what an unfinished `add` left of it. Refused while the settings name it.

    Example: fabula pack remove storygen
    """
    with answered(as_json):
        removed = ask(Installation.find(home, None), "remove", *(["--force"] if force else []), "--", name)
    if as_json:
        say_json(removed)
    else:
        people.print(f"[green]✓[/] Pack {escape(name)} is gone; {size(removed['freed_bytes'])} are free again.")


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(help="A .bin, .ckpt, .pt or .pth file, or a folder that holds such.", exists=True),
    ],
    out: Annotated[Path, typer.Argument(help="The .safetensors file, or the folder, to make.", show_default=False)],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make safetensors of weights in old formats, which are pickles and can run code.

    They are read in a process that may do nothing else: without network where the system allows that, without an
    environment, with limits on memory and time, and only if they hold nothing but weights.

    Examples:

      fabula pack convert checkpoint_StorySalon/ storygen/

      fabula pack convert last.ckpt last.safetensors
    """
    with answered(as_json):
        done = ask(Installation.find(home, None), "convert", "--", str(source), str(out))
    if as_json:
        say_json(done)
        return
    for each in done["files"]:
        people.print(
            f"[green]✓[/] {escape(each['source'])} → {escape(each['out'])}: {each['tensors_count']} tensors, "
            f"{size(each['size_bytes'])}"
        )
        if each["dropped"]:
            shown = ", ".join(each["dropped"][:8]) + (" …" if len(each["dropped"]) > 8 else "")
            people.print(f"  [dim]dropped, because no weights: {escape(clean(shown))}[/]")
    if done["left_out"]:
        people.print(f"  [dim]left out: {escape(clean(', '.join(done['left_out'])))}[/]")


@contextmanager
def _copying(*, quiet: bool) -> Iterator[Told | None]:
    """Gives what shows the progress of a copy: a bar on a terminal, nothing elsewhere."""
    if quiet or not aside.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=aside, transient=True) as bar:
        task = bar.add_task("looking …", total=None)

        def told(progress: dict[str, Any]) -> None:
            bar.update(
                task,
                description=escape(progress["path"]),
                completed=progress["done_bytes"],
                total=progress["total_bytes"],
            )

        yield told
