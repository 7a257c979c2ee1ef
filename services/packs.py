"""What `fabula pack` does, in a process of its own: the command may not import services. Prints JSON, a line each.

    python -m services.packs add SOURCE --licence MIT      {"progress": …}  {"progress": …}  {"result": …}
    python -m services.packs verify toon                   {"result": …}
    python -m services.packs remove absent                 {"error": {"reason": "PACK_NOT_FOUND", "message": …}}

The last line is the answer, and the exit status is 0 whenever there is one. Beside `services.checkup` the only module
that looks at several services' settings: a pack that they name is not removed by mistake.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from services.checkup import wanted_packs
from services.runtime.config import ConfigInvalid, Installation

PROGRESS_PERIOD_S = 0.2

Answer = dict[str, Any]
Say = Callable[[str, Answer], None]


def library_folder(installation: Installation) -> Path:
    """Where packs are added: home/packs while it is searched, else the last folder that is."""
    own = installation.home / "packs"
    return own if own in installation.pack_folders else installation.pack_folders[-1]


def add(given: argparse.Namespace, say: Say) -> Answer:
    """Copies a pack, or makes one of a published checkpoint. Raises ModelError."""
    from services.models.arldm.published import is_arldm, plan_arldm
    from services.models.captions import captioner
    from services.models.captions.published import is_captioner, plan_captioner
    from services.models.errors import PackSourceInvalid
    from services.models.library import plan_sealed
    from services.models.pack import MANIFEST
    from services.models.published import Told, plan_published
    from services.models.registry import ARCHITECTURES
    from services.models.remote import ARCHITECTURES as REMOTE
    from services.models.remote import REMOTE_CAPTIONER, EndpointSource, plan_remote
    from services.models.source import Source
    from services.sources import open_source

    is_remote = EndpointSource.is_one(given.source)
    source: Source = EndpointSource(given.source) if is_remote else open_source(given.source, fetch=given.fetch)
    files = source.files()
    if MANIFEST in files:
        plan = plan_sealed(source, files, {*ARCHITECTURES, *captioner.ARCHITECTURES, *REMOTE})
        if given.name not in ("", plan.name):
            raise PackSourceInvalid(
                f"{source.name} is sealed as pack {plan.name!r} and cannot be called {given.name!r}"
            )
    else:
        told = Told(
            licence=given.licence,
            name=given.name,
            base=given.base,
            family=given.family,
            reference_range=given.reference_range or None,
            steps=given.steps,
            text_guidance=given.text_guidance,
            image_guidance=given.image_guidance,
            made_by=_command_again(source.name, given),
        )
        if isinstance(source, EndpointSource):
            plan = plan_remote(source, told)
        elif is_captioner(files):
            plan, source = plan_captioner(source, files, told)
        elif is_arldm(files):
            plan = plan_arldm(source, files, told)
        else:
            plan = plan_published(source, files, told, ARCHITECTURES)
    added = _library().add(plan, source, _throttled(say))
    pack = added.pack
    writes_only = pack.manifest.architecture in (*captioner.ARCHITECTURES, REMOTE_CAPTIONER)
    return {
        "name": pack.name,
        "architecture": pack.manifest.architecture,
        "size_bytes": sum(entry.size_bytes for entry in pack.manifest.files.values()),
        "digest": pack.digest,
        "licence": pack.manifest.licence,
        "folder": str(pack.folder),
        "was_there": added.was_there,
        "draws_only": not (writes_only or "llava/config.json" in pack.manifest.files),
        "writes_only": writes_only,
        "notes": list(added.notes),
    }


def list_packs(given: argparse.Namespace, say: Say) -> Answer:
    """Every pack that can be found, and what was left unfinished."""
    wanted = wanted_packs()
    packs = [
        {**asdict(each), "in_use": each.name in wanted and each.hidden_by is None and not each.unfinished}
        for each in _library().packs()
    ]
    return {"packs": packs}


def verify(given: argparse.Namespace, say: Say) -> Answer:
    """Every digest of the packs named. Raises PackNotFound only for a name that was given."""
    from services.models.errors import ModelError
    from services.models.pack import find_pack, load_any_pack

    library = _library()
    names = library.names() if given.all else [given.name]
    checked = []
    for name in names:
        found: Answer = {"name": name, "ok": True, "reason": "", "message": "", "folder": "", "files_count": 0}
        try:
            folder = find_pack(name, Installation.load().pack_folders)
            found["folder"] = str(folder)
            pack = load_any_pack(folder)
            found |= {"digest": pack.digest, "files_count": len(pack.manifest.files)}
        except ModelError as error:
            if error.reason == "PACK_NOT_FOUND":
                raise
            found |= {"ok": False, "reason": error.reason, "message": str(error)}
        checked.append(found)
    return {"ok": all(each["ok"] for each in checked), "packs": checked}


def remove(given: argparse.Namespace, say: Say) -> Answer:
    """Deletes a pack. Raises PackInUse, PackNotFound."""
    freed = _library().remove(given.name, wanted=wanted_packs(), force=given.force)
    return {"name": given.name, "freed_bytes": freed}


def convert(given: argparse.Namespace, say: Say) -> Answer:
    """Makes safetensors of weights in an old format. Raises ConversionError."""
    from services.models.convert import convert_path

    done = convert_path(Path(given.source), Path(given.out))
    return {"out": str(given.out), "files": [asdict(each) for each in done.files], "left_out": list(done.left_out)}


def _library() -> Any:
    from services.models.library import Library

    installation = Installation.load()
    return Library(library_folder(installation), installation.pack_folders)


def _command_again(source: str, given: argparse.Namespace) -> str:
    """The command that makes the pack again, for its manifest."""
    told = {"--licence": given.licence, "--name": given.name, "--base": given.base, "--family": given.family}
    told["--reference-range"] = given.reference_range
    told |= {"--steps": given.steps, "--text-guidance": given.text_guidance, "--image-guidance": given.image_guidance}
    words = [word for flag, value in told.items() if value not in ("", None) for word in (flag, str(value))]
    return shlex.join(["fabula", "pack", "add", source, *words])


def _throttled(say: Say) -> Callable[[str, int, int], None]:
    said = 0.0

    def tell(path: str, done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= PROGRESS_PERIOD_S:
            said = now
            say("progress", {"path": path, "done_bytes": done, "total_bytes": total})

    return tell


def _plain(value: Any) -> str:
    """Times in ISO 8601, paths as text."""
    return value.isoformat() if isinstance(value, datetime) else str(value)


def parser() -> argparse.ArgumentParser:
    """The arguments of every verb."""
    root = argparse.ArgumentParser(prog="python -m services.packs")
    verbs = root.add_subparsers(required=True)
    one = verbs.add_parser("add")
    one.add_argument("source")
    one.add_argument("--fetch", action="store_true")
    for flag in ("name", "licence", "base", "family"):
        one.add_argument(f"--{flag}", default="")
    one.add_argument("--reference-range", default="", choices=("", "unit", "signed"))
    one.add_argument("--steps", type=int)
    one.add_argument("--text-guidance", type=float)
    one.add_argument("--image-guidance", type=float)
    one.set_defaults(run=add)
    one = verbs.add_parser("list")
    one.set_defaults(run=list_packs)
    one = verbs.add_parser("verify")
    one.add_argument("name", nargs="?", default="")
    one.add_argument("--all", action="store_true")
    one.set_defaults(run=verify)
    one = verbs.add_parser("remove")
    one.add_argument("name")
    one.add_argument("--force", action="store_true")
    one.set_defaults(run=remove)
    one = verbs.add_parser("convert")
    one.add_argument("source")
    one.add_argument("out")
    one.set_defaults(run=convert)
    return root


def main() -> int:
    """Prints the answer; 0 whatever it is."""
    answer = os.dup(1)
    os.dup2(2, 1)  # libraries may print on import; the answer alone goes to standard output

    def say(kind: str, value: Answer) -> None:
        os.write(answer, (json.dumps({kind: value}, default=_plain) + "\n").encode())

    given = parser().parse_args()
    from services.models.errors import ModelError

    try:
        say("result", given.run(given, say))
    except ModelError as error:
        say("error", {"reason": error.reason, "message": str(error)})
    except ConfigInvalid as error:
        say("error", {"reason": "SETTING_INVALID", "message": str(error)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
