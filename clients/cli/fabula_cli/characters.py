"""`fabula character …`: train, list, show, watch, compare, pause, resume, cancel, delete, undelete, publish, versions,
delete-version, undelete-version, export, import.

What needs a pack's networks in this place (export in another layout, import of what is too large for one call) is done
by `services.characters` in a process of its own: this command starts without torch.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from fabula_client import (
    CharacterVersion,
    Checked,
    CheckpointSaved,
    Client,
    Estimate,
    ExampleFrame,
    Finding,
    Job,
    JobEvent,
    JobHandle,
    JobState,
    JobStateChanged,
    ProbeDrawn,
    QueueMoved,
    StepsTaken,
    VersionPublished,
)
from fabula_client.calls import MOST_WEIGHTS_BYTES
from rich.markup import escape
from rich.table import Table

from fabula_cli import exits
from fabula_cli.installation import Installation
from fabula_cli.options import AsJson, Home, PortBase, Target
from fabula_cli.packs import answered, ask_module
from fabula_cli.report import aside, clean, duration, fail, people, say_json, size
from fabula_cli.stories import connected

app = typer.Typer(no_args_is_help=True, help="Teach a pack somebody new from one example story, and draw with them.")

MODULE = "services.characters"
STORY_FILE = "story.json"
MOST_STORY_BYTES = 1 << 20

JobId = Annotated[str, typer.Argument(help="The job's id, as `fabula character list` shows it.", show_default=False)]
Form = Literal["diffusers", "peft", "kohya", "archive"]
VERSION_ID = re.compile(r"[0-9a-f]{64}")
ARCHIVE = ".zip"
CONFIG_FILE = "adapter_config.json"  # PEFT keeps it beside its weights
VersionId = Annotated[
    str,
    typer.Argument(
        help="A version's id or its beginning, or a name: its newest version, of `fabula character versions`.",
        show_default=False,
    ),
]


@app.command()
def train(
    story: Annotated[
        Path,
        typer.Argument(help="Folder with story.json and its pictures.", exists=True, file_okay=False),
    ],
    check: Annotated[bool, typer.Option("--check", help="Only say what is wrong and what it would cost.")] = False,
    accept: Annotated[
        list[str] | None, typer.Option("--accept", help="Code of a warning that is accepted; * accepts all.")
    ] = None,
    pack: Annotated[str, typer.Option(help="The pack that learns.", show_default="the service's")] = "",
    method: Annotated[
        Literal["epicevo", "dreambooth", "custom-diffusion", "textual-inversion", "lora"] | None,
        typer.Option(help="How they are learned.", show_default="epicevo"),
    ] = None,
    learns: Annotated[
        Literal["lora", "unet"] | None, typer.Option(help="What of the network is learned.", show_default="lora")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps.", min=1, max=100_000, show_default="as many as fit")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Training time to fit the steps into.", min=0.01, show_default="the service's")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate.", show_default="the recipe's")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same weights.", min=0, max=2**53 - 1)] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Workers that train together, each on batches of its own; 0: one process.",
            min=0,
            max=2**32 - 1,
            show_default="the service's",
        ),
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Calling again with the same key starts no second job.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job until it ends.")] = True,
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """Teach a pack somebody new. The folder holds 3 to 20 pictures (five are usual) and story.json:

      {"name": "Otto", "phrase": "a black penguin with orange earmuffs",
       "frames": [{"image": "1.png", "caption": "Otto runs.", "description": "Otto, a black penguin with …, runs."}, …]}

    Examples:

      fabula character train otto/ --check

      fabula character train otto/ --minutes 5
    """
    told = _story(story, as_json)
    wanted: dict[str, Any] = {
        **told,
        "accepted_findings": accept or [],
        "pack": pack,
        "method": method or "",
        "learns": learns,
        "steps": steps,
        "budget_s": None if minutes is None else minutes * 60.0,
        "rate": rate,
        "seed": seed,
        "workers": workers,
    }
    with connected(home, port_base, target, as_json) as client:
        if check:
            _answer_checked(client.characters.check(**wanted), as_json)
            return
        job = client.characters.train(**wanted, idempotency_key=idempotency_key)
        if not as_json:
            aside.print(f"Job [bold]{escape(job.job_id)}[/]  {escape(_costs(job.value.estimate))}")
        if wait:
            _follow(job, quiet=as_json)
        _answer(job.value, as_json)
        _end(job.state, waited=wait)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(help="Most jobs to list.", min=1)] = 20,
    deleted: Annotated[bool, typer.Option("--deleted", help="Deleted jobs, too.")] = False,
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first.

    Example: fabula character list --limit 5
    """
    found: list[Job] = []
    with connected(home, port_base, target, as_json) as client:
        for job in client.characters.jobs(page_size=min(limit, 200), show_deleted=deleted):
            found.append(job.value)
            if len(found) == limit:
                break
    if as_json:
        say_json({"jobs": found})
        return
    table = Table("job", "name", "state", "step", "method", "pack", "created", box=None, padding=(0, 2))
    for each in found:
        created = each.created.strftime("%Y-%m-%d %H:%M:%S") if each.created else ""
        step = f"{each.progress.step}/{each.progress.step_count}" if each.progress else ""
        state = "deleted" if each.deleted else str(each.state)
        cells = (each.job_id, each.character.name, state, step, each.settings.method, each.settings.pack, created)
        table.add_row(*(escape(clean(cell)) for cell in cells))
    people.print(table if found else "No jobs yet.")


@app.command()
def show(
    job_id: JobId, home: Home = None, port_base: PortBase = None, target: Target = None, as_json: AsJson = False
) -> None:
    """Show a job as it stands.

    Example: fabula character show 01a1f96a-…
    """
    with connected(home, port_base, target, as_json) as client:
        _answer(client.characters.get(job_id).value, as_json)


@app.command()
def watch(
    job_id: JobId,
    after: Annotated[int, typer.Option(help="Only events after this sequence number.", min=0)] = 0,
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """Follow a job until it ends. With --json a line for each event.

    Example: fabula character watch 01a1f96a-… --json | jq -c .losses
    """
    with connected(home, port_base, target, as_json) as client:
        job = client.characters.get(job_id)
        if as_json:
            for event in job.watch(after_sequence=after):
                say_json({"event": _kind(event), **_facts(event)}, indent=None)
            job.refresh()
        else:
            _follow(job, quiet=False, after=after)
            _answer(job.value, as_json)
        _end(job.state, waited=True)


@app.command()
def compare(
    job_id: JobId,
    out: Annotated[Path | None, typer.Option(help="Write the whole page, HTML in one file.", dir_okay=False)] = None,
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """Compare a job's checkpoints: what was measured on each, and which one to publish.

    Example: fabula character compare 01a1f96a-… --out otto.html
    """
    with connected(home, port_base, target, as_json) as client:
        job = client.characters.get(job_id)
        checkpoints = job.checkpoints()
        report = None if out is None else job.read_report()
    page = ""
    if report is not None and out is not None:
        page = _written(out, report.encode(), as_json)
    if as_json:
        say_json({"job_id": job.job_id, "checkpoints": checkpoints, "page": page or None})
        return
    if not checkpoints:
        people.print("No checkpoint is complete yet.")
    else:
        names = list(dict.fromkeys(name for one in checkpoints for name in one.figures))
        table = Table("step", *(escape(clean(name)) for name in names), "size", "weights", "", box=None, padding=(0, 2))
        for one in checkpoints:
            figures = (f"{one.figures[name]:.3f}" if name in one.figures else "" for name in names)
            mark = "[green]suggested[/]" if one.is_suggested else ""
            table.add_row(str(one.step), *figures, size(one.size_bytes), escape(one.weights_sha256[:12]), mark)
        people.print(table)
    if page:
        people.print(f"[green]✓[/] {escape(page)}", soft_wrap=True)


@app.command()
def pause(
    job_id: JobId, home: Home = None, port_base: PortBase = None, target: Target = None, as_json: AsJson = False
) -> None:
    """Stop a job for now; `resume` has it go on.

    Example: fabula character pause 01a1f96a-…
    """
    _wish("pause", job_id, home, port_base, target, as_json)


@app.command()
def resume(
    job_id: JobId, home: Home = None, port_base: PortBase = None, target: Target = None, as_json: AsJson = False
) -> None:
    """Have a paused job go on, or a failed one whose checkpoint is whole.

    Example: fabula character resume 01a1f96a-…
    """
    _wish("resume", job_id, home, port_base, target, as_json)


@app.command()
def cancel(
    job_id: JobId, home: Home = None, port_base: PortBase = None, target: Target = None, as_json: AsJson = False
) -> None:
    """Stop a job for good. What it has learned stays and can be published.

    Example: fabula character cancel 01a1f96a-…
    """
    _wish("cancel", job_id, home, port_base, target, as_json)


@app.command()
def delete(
    job_id: JobId, home: Home = None, port_base: PortBase = None, target: Target = None, as_json: AsJson = False
) -> None:
    """Delete a job. For a while it can be undeleted; published versions stay.

    Example: fabula character delete 01a1f96a-…
    """
    _wish("delete", job_id, home, port_base, target, as_json)


@app.command()
def undelete(
    job_id: JobId, home: Home = None, port_base: PortBase = None, target: Target = None, as_json: AsJson = False
) -> None:
    """Take a deletion back.

    Example: fabula character undelete 01a1f96a-…
    """
    _wish("undelete", job_id, home, port_base, target, as_json)


@app.command()
def publish(
    job_id: JobId,
    step: Annotated[
        int | None, typer.Option(help="The checkpoint's step.", min=1, show_default="the suggested one")
    ] = None,
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """Make what a job has learned a character that frame services can draw at once.

    Example: fabula character publish 01a1f96a-…
    """
    with connected(home, port_base, target, as_json) as client:
        version = client.characters.get(job_id).publish(step or 0)
    if as_json:
        say_json(version)
        return
    people.print(
        f"[green]✓[/] [bold]{escape(clean(version.character.name))}[/] of step {version.step} is published for the "
        f"pack {escape(version.pack)}."
    )
    people.print(f"  version {escape(version.version_id)}\n  weights {escape(version.weights_sha256)}", soft_wrap=True)


@app.command()
def versions(
    name: Annotated[str, typer.Argument(help="Only versions of this name.", show_default=False)] = "",
    limit: Annotated[int, typer.Option(help="Most versions to list.", min=1)] = 20,
    deleted: Annotated[bool, typer.Option("--deleted", help="Deleted versions, too.")] = False,
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """List published characters, newest first.

    Example: fabula character versions Otto
    """
    found: list[CharacterVersion] = []
    with connected(home, port_base, target, as_json) as client:
        for version in client.characters.versions(name=name, page_size=min(limit, 200), show_deleted=deleted):
            found.append(version)
            if len(found) == limit:
                break
    if as_json:
        say_json({"versions": found})
        return
    table = Table("version", "name", "phrase", "pack", "method", "step", "size", "published", box=None, padding=(0, 2))
    for each in found:
        published = each.published.strftime("%Y-%m-%d %H:%M:%S") if each.published else ""
        if each.deleted:
            published = "deleted"
        cells = (each.version_id[:12], each.character.name, each.character.phrase, each.pack, each.method)
        table.add_row(*(escape(clean(cell)) for cell in cells), str(each.step), size(each.size_bytes), published)
    people.print(table if found else "No characters yet.")


@app.command("delete-version")
def delete_version(
    version: VersionId, home: Home = None, port_base: PortBase = None, target: Target = None, as_json: AsJson = False
) -> None:
    """Delete a published character's version: nothing new is drawn with it. For a while it can be undeleted.

    Example: fabula character delete-version Otto
    """
    with connected(home, port_base, target, as_json) as client:
        deleted = client.characters.delete_version(_meant(client, version, as_json, deleted=False))
    if as_json:
        say_json(deleted)
        return
    until = f" until {deleted.purged.strftime('%Y-%m-%d %H:%M:%S')} UTC" if deleted.purged else ""
    name = escape(clean(deleted.character.name))
    people.print(f"[green]✓[/] [bold]{name}[/] of version {escape(deleted.version_id[:12])} is deleted.")
    people.print(f"  Back again{until}: fabula character undelete-version {escape(deleted.version_id)}", soft_wrap=True)


@app.command("undelete-version")
def undelete_version(
    version: Annotated[
        str,
        typer.Argument(
            help="A deleted version's id or its beginning, or a name, of `fabula character versions --deleted`.",
            show_default=False,
        ),
    ],
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """Take a version's deletion back.

    Example: fabula character undelete-version Otto
    """
    with connected(home, port_base, target, as_json) as client:
        back = client.characters.undelete_version(_meant(client, version, as_json, deleted=True))
    if as_json:
        say_json(back)
        return
    name = escape(clean(back.character.name))
    people.print(f"[green]✓[/] [bold]{name}[/] of version {escape(back.version_id[:12])} is back.")


@app.command()
def export(
    version: VersionId,
    out: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)],
    form: Annotated[
        Form, typer.Option(help="Whose layout of safetensors; archive: one file with name, look and pictures, too.")
    ] = "diffusers",
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """Write a published character's weights as other tools read them, or all of it for another Fabula.

    Examples:

      fabula character export Otto otto.safetensors --form kohya

      fabula character export Otto otto.zip --form archive
    """
    with connected(home, port_base, target, as_json) as client:
        chosen = _chosen(client, version, as_json)
        payload = client.characters.archive(chosen) if form == "archive" else client.characters.read_weights(chosen)
    if form == "archive":
        written: dict[str, Any] = {"form": form, "files": [_written(out, payload, as_json)], "size_bytes": len(payload)}
        _say_written(chosen, written, as_json)
        return
    with tempfile.TemporaryDirectory() as folder, answered(as_json):
        file = Path(folder) / "weights.safetensors"
        file.write_bytes(payload)
        words = ("export", f"--pack={chosen.pack}", f"--form={form}", "--", str(file), str(out.resolve()))
        written = ask_module(Installation.find(home, port_base), MODULE, *words)
    _say_written(chosen, written, as_json)


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="A LoRA in PEFT's, diffusers' or kohya's layout, safetensors; or an archive that `export` wrote.",
            exists=True,
            dir_okay=False,
        ),
    ],
    name: Annotated[str, typer.Option(help="Who it is.", show_default="the archive's")] = "",
    phrase: Annotated[
        str, typer.Option(help='What they look like: "a black penguin with orange earmuffs".', show_default="the same")
    ] = "",
    noun: Annotated[str, typer.Option(help="What they are in one word.", show_default="as the phrase says")] = "",
    pack: Annotated[str, typer.Option(help="The pack that it was made for.", show_default="the service's")] = "",
    reference: Annotated[
        list[Path] | None, typer.Option(help="A picture of them; once for each.", exists=True, dir_okay=False)
    ] = None,
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """Make weights from elsewhere a character that frame services draw, checked against the pack.

    Examples:

      fabula character import otto.safetensors --name Otto --phrase "a black penguin with orange earmuffs"

      fabula character import otto.zip
    """
    is_archive = source.suffix.lower() == ARCHIVE
    if not is_archive and not (name and phrase):
        fail("say who it is: --name and --phrase", status=exits.USAGE, as_json=as_json, reason="CHARACTER_UNNAMED")
    if is_archive and (name or phrase or noun or reference):
        fail(
            "an archive says itself who it is; leave out --name, --phrase, --noun and --reference",
            status=exits.USAGE,
            as_json=as_json,
            reason="CHARACTER_NAMED_TWICE",
        )
    with connected(home, port_base, target, as_json) as client:
        if is_archive:
            imported = client.characters.import_archive(source, pack=pack)
        else:
            given: dict[str, Any] = {"name": name, "phrase": phrase, "noun": noun, "references": reference or []}
            given |= _weights(source, pack, Installation.find(home, port_base), as_json)
            imported = client.characters.import_version(**given)
    version = imported.version
    if as_json:
        say_json({"version": version, "is_new": imported.is_new})
        return
    told = "is there now" if imported.is_new else "was there before"
    people.print(
        f"[green]✓[/] [bold]{escape(clean(version.character.name))}[/] {told}, for the pack {escape(version.pack)}; "
        f"rank {version.rank}, {size(version.size_bytes)}."
    )
    people.print(f"  version {escape(version.version_id)}\n  weights {escape(version.weights_sha256)}", soft_wrap=True)


def _weights(source: Path, pack: str, installation: Installation, as_json: bool) -> dict[str, Any]:
    """How a file's weights are handed over: with the call, or, larger ones, through this machine's own store."""
    if source.stat().st_size > MOST_WEIGHTS_BYTES:
        with answered(as_json):
            words = ("import", f"--pack={pack or 'toon'}", "--", str(source.resolve()))
            kept = ask_module(installation, MODULE, *words)
        return {"weights_sha256": kept["weights_sha256"], "pack": pack or "toon"}
    beside = source.with_name(CONFIG_FILE)
    config = beside.read_text(encoding="utf-8") if beside.is_file() else ""
    return {"weights": source, "pack": pack, "adapter_config": config}


def _written(path: Path, payload: bytes, as_json: bool) -> str:
    """Writes a file, whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(payload)
        part.replace(path)
    except OSError as error:
        fail(
            f"{path} cannot be written: {error.strerror}",
            status=exits.REFUSED,
            as_json=as_json,
            reason="FILE_UNWRITABLE",
        )
    return str(path)


def _say_written(version: CharacterVersion, written: dict[str, Any], as_json: bool) -> None:
    if as_json:
        say_json({"version_id": version.version_id, **written})
        return
    for each in written["files"]:
        people.print(f"[green]✓[/] {escape(each)}", soft_wrap=True)


def _story(folder: Path, as_json: bool) -> dict[str, Any]:
    """What story.json tells, with the paths of its pictures. What is in it the service checks."""

    def wrong(message: str) -> None:
        fail(f"{folder / STORY_FILE}: {message}", status=exits.USAGE, as_json=as_json, reason="STORY_UNREADABLE")

    told: Any = None
    try:
        file = folder / STORY_FILE
        if file.stat().st_size > MOST_STORY_BYTES:
            wrong("is too large for a story")
        told = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        wrong(error.strerror or "cannot be read")
    except (ValueError, RecursionError) as error:
        wrong(f"is no JSON: {str(error)[:80]}")
    if not isinstance(told, dict) or not isinstance(told.get("frames"), list):
        wrong("is no object with name, phrase and frames")
    if unknown := sorted(told.keys() - {"name", "phrase", "noun", "frames"}):
        wrong(f"has unknown keys: {', '.join(unknown)[:80]}")
    frames = []
    for number, one in enumerate(told["frames"], 1):
        if not isinstance(one, dict) or not isinstance(one.get("image"), str):
            wrong(f"frame {number} is no object with image, caption and description")
        if unknown := sorted(one.keys() - {"image", "caption", "description"}):
            wrong(f"frame {number} has unknown keys: {', '.join(unknown)[:80]}")
        picture = folder / one["image"]
        if not picture.resolve().is_relative_to(folder.resolve()):
            wrong(f"frame {number}: {one['image']} leads out of the folder")
        if not picture.is_file():
            wrong(f"frame {number}: there is no picture {one['image']}")
        texts = {name: one.get(name, "") for name in ("caption", "description")}
        if not all(isinstance(text, str) for text in texts.values()):
            wrong(f"frame {number}: caption and description are texts")
        frames.append(ExampleFrame(image=picture, **texts))
    who = {name: told.get(name, "") for name in ("name", "phrase", "noun")}
    if not all(isinstance(text, str) for text in who.values()):
        wrong("name, phrase and noun are texts")
    return {**who, "frames": frames}


def _wish(verb: str, job_id: str, home: Path | None, port_base: int | None, target: str | None, as_json: bool) -> None:
    with connected(home, port_base, target, as_json) as client:
        job = client.characters.get(job_id)
        getattr(job, verb)()
        _answer(job.value, as_json)


def _meant(client: Client, version: str, as_json: bool, *, deleted: bool) -> str:
    """The id of the version that was meant. A whole one goes on as it is: deleting twice is well."""
    if VERSION_ID.fullmatch(version):
        return version
    return _chosen(client, version, as_json, deleted=deleted).version_id


def _chosen(client: Client, version: str, as_json: bool, *, deleted: bool = False) -> CharacterVersion:
    """The version that was meant: by id, by its beginning where that is clear, or the newest of a name.

    Of those that can be drawn, or of those that are deleted.
    """
    like: list[CharacterVersion] = []
    for each in client.characters.versions(page_size=200, show_deleted=deleted):
        if deleted and each.deleted is None:
            continue
        if version in (each.version_id, each.character.name):
            return each
        if len(version) >= 6 and each.version_id.startswith(version):
            like.append(each)
    if len(like) == 1:
        return like[0]
    kind, listed = ("deleted version", "versions --deleted") if deleted else ("character version", "versions")
    problem = f"{version} is the beginning of several versions" if like else f"there is no {kind} {version}"
    fail(f"{problem}; see `fabula character {listed}`", status=exits.REFUSED, as_json=as_json, reason="VERSION_UNKNOWN")


def _follow(job: JobHandle, *, quiet: bool, after: int = 0) -> None:
    """Shows a job's events, a line each, until it ends."""
    try:
        for event in job.watch(after_sequence=after):
            if not quiet and (line := _line(event)):
                aside.print(line, soft_wrap=True)
    except KeyboardInterrupt:
        name = job.job_id
        aside.print(
            f"The job goes on. Look again: fabula character watch {name}   Stop it: fabula character cancel {name}"
        )
        raise
    job.refresh()


def _line(event: JobEvent) -> str:
    match event:
        case JobStateChanged(state=state, attempt=attempt, error=error):
            why = f": {error.message} ({error.reason})" if error else ""
            again = f", attempt {attempt}" if attempt > 1 else ""
            return escape(clean(f"{state}{again}{why}"))
        case StepsTaken(progress=progress):
            losses = "  ".join(f"{name} {value:.4f}" for name, value in sorted(progress.losses.items()))
            left = f"  {duration(progress.eta_s)} left" if progress.eta_s else ""
            return escape(clean(f"step {progress.step}/{progress.step_count}  {losses}{left}"))
        case CheckpointSaved(checkpoint=checkpoint):
            figures = "  ".join(f"{name} {value:.3f}" for name, value in sorted(checkpoint.figures.items()))
            return escape(clean(f"checkpoint {checkpoint.step}  {figures}".rstrip()))
        case ProbeDrawn(step=step, probe=probe):
            return f"[dim]{escape(clean(f'probe {probe} at step {step}'))}[/]"
        case VersionPublished(version=version):
            return escape(clean(f"published {version.character.name}, {version.version_id[:12]}"))
        case QueueMoved(ahead_count=ahead):
            return f"{ahead} jobs before this one"
    return ""


def _kind(event: JobEvent) -> str:
    """An event's class in the words of the protos: "state_changed"."""
    names = {
        JobStateChanged: "state_changed",
        StepsTaken: "progress",
        CheckpointSaved: "checkpoint_saved",
        ProbeDrawn: "probe_drawn",
        VersionPublished: "version_published",
        QueueMoved: "queue_moved",
    }
    return names.get(type(event), "unknown")


def _facts(event: JobEvent) -> dict[str, Any]:
    """Its fields, a progress's own among them."""
    facts = {name: getattr(event, name) for name in event.__dataclass_fields__ if name != "progress"}
    if isinstance(event, StepsTaken):
        facts |= {name: getattr(event.progress, name) for name in event.progress.__dataclass_fields__}
    return facts


def _answer_checked(checked: Checked, as_json: bool) -> None:
    if as_json:
        say_json(checked)
    else:
        _say_findings(checked.findings)
        people.print(
            "[green]✓[/] It can be learned from."
            if checked.is_acceptable
            else "[red]✗[/] It cannot be learned from so."
        )
        people.print(f"  {escape(_costs(checked.estimate))}")
    if not checked.is_acceptable:
        sys.exit(exits.FAULTS_FOUND)


def _say_findings(findings: Sequence[Finding]) -> None:
    for finding in findings:
        mark = "[red]✗[/]" if finding.severity == "error" else "[yellow]![/]"
        text = f"{escape(clean(finding.message))} [dim]{escape(clean(finding.mend))}[/] ({escape(clean(finding.code))})"
        people.print(f"{mark} {text}", soft_wrap=True)


def _costs(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    price = f"{duration(estimate.compute_s)} of {'GPU' if estimate.is_gpu else 'CPU'} time"
    guess = "" if estimate.measured_count else ", a guess"
    return f"{price}; ready in {duration(estimate.min_eta_s)} to {duration(estimate.max_eta_s)}{guess}"


def _answer(job: Job, as_json: bool) -> None:
    if as_json:
        say_json({"job": job})
        return
    state = "deleted" if job.deleted else str(job.state)
    people.print(f"[bold]{escape(job.job_id)}[/]  {state}  {escape(clean(job.character.name))}")
    if job.error is not None:
        people.print(f"[red]{escape(clean(job.error.message))}[/] ({escape(clean(job.error.reason))})")
    if job.progress is not None:
        people.print(f"  step {job.progress.step} of {job.progress.step_count}")
    _say_findings(job.findings)
    for version in job.versions:
        people.print(f"  published: step {version.step}, version {escape(version.version_id[:12])}")
    if job.state is JobState.SUCCEEDED and not job.versions and not job.deleted:
        people.print(f"  Now: fabula character compare {escape(job.job_id)}, then publish.", soft_wrap=True)


def _end(state: JobState, *, waited: bool) -> None:
    if waited and state is not JobState.SUCCEEDED:
        sys.exit(exits.STORY_ENDED_BADLY)
