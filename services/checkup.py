"""Checks an installation from the inside, for `fabula doctor`: settings, packs, database, libraries. Prints one JSON
object.

    python -m services.checkup

Starts nothing and changes nothing. It is the only module that looks at several services' settings, and only to say
what is wrong.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from services.runtime.config import ConfigInvalid, Installation

LIBRARIES = ("torch", "vllm", "ray.serve", "diffusers", "transformers", "peft", "dbos", "torchvision")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    mend: str = ""  # what to do about it; empty when it is well


def check_settings() -> Iterator[Finding]:
    """Every section of the configuration, each by the service it belongs to."""
    from services.caption.config import CaptionSettings
    from services.customization.config import CustomizationSettings
    from services.frame.config import FrameSettings
    from services.story.config import StorySettings

    for section in (Installation, StorySettings, CaptionSettings, FrameSettings, CustomizationSettings):
        try:
            section.load()
        except ConfigInvalid as error:
            mend = "Correct or remove the named key in the environment or in config.toml."
            yield Finding(name="settings", ok=False, detail=str(error), mend=mend)
            return
    if FrameSettings.load().characters_url != CustomizationSettings.load().characters_url:
        names = "FABULA_FRAME_CHARACTERS_URL and FABULA_CUSTOMIZATION_CHARACTERS_URL"
        mend = "Give both the same value, or neither: what is published is drawn from there."
        yield Finding(name="settings", ok=False, detail=f"{names} differ", mend=mend)
        return
    yield Finding(name="settings", ok=True, detail="every key is known and in range")


def wanted_packs() -> list[str]:
    """The packs that the services are set to load, without repetition."""
    from services.caption.config import CaptionSettings
    from services.customization.config import CustomizationSettings
    from services.frame.config import FrameSettings
    from services.story.config import StorySettings

    named = [StorySettings.load().default_pack, *FrameSettings.load().pack_names, CaptionSettings.load().pack]
    return list(dict.fromkeys([*named, CustomizationSettings.load().default_pack]))


def check_packs() -> Iterator[Finding]:
    """Each pack that will be loaded: found, complete, and every file as its digest says."""
    from services.models.errors import ModelError
    from services.models.pack import find_pack, load_any_pack

    installation = Installation.load()
    for name in wanted_packs():
        try:
            pack = load_any_pack(find_pack(name, installation.pack_folders))
        except (ModelError, OSError) as error:
            folders = ", ".join(str(folder) for folder in installation.pack_folders)
            mend = f"Restore the pack (`git checkout` it, or `make toon-pack`) in one of: {folders}"
            yield Finding(name=f"pack {name}", ok=False, detail=str(error), mend=mend)
        else:
            count = len(pack.manifest.files)
            detail = f"{count} files as their digests say, {pack.digest[:19]}"
            yield Finding(name=f"pack {name}", ok=True, detail=detail)


def check_databases() -> Iterator[Finding]:
    """Whether they answer and every migration is applied. An embedded one that does not exist yet is well."""
    from services.customization import database as customization
    from services.story.database import database_urls
    from services.story.migrate import is_current

    installation = Installation.load()
    url, home = installation.database_url, installation.home

    def story_is_current() -> bool:
        return is_current(database_urls(url, home))

    def customization_is_current() -> bool:
        return customization.is_current(customization.database_url(url, home))

    for service, file, look in (
        ("story", "fabula.db", story_is_current),
        ("customization", customization.FILE_NAME, customization_is_current),
    ):
        name = f"database of {service}"
        if not url and not (home / file).exists():
            yield Finding(name=name, ok=True, detail="made at the first `fabula up`")
            continue
        try:
            current = look()
        except Exception as error:  # noqa: BLE001 - every driver has errors of its own, and each is the same finding
            mend = "Check that the database of FABULA_DATABASE_URL runs and lets you in."
            detail = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            yield Finding(name=name, ok=False, detail=detail, mend=mend)
            continue
        mend = f"Run `python -m services.{service} migrate` (`fabula up` does it for the embedded database)."
        detail = "reachable, migrations applied" if current else "migrations missing"
        yield Finding(name=name, ok=current, detail=detail, mend="" if current else mend)


def check_libraries() -> Iterator[Finding]:
    """Whether what the engines stand on can be imported in this environment."""
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - a compiled library may fail to import in any way
            detail = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            yield Finding(name=f"import {name}", ok=False, detail=detail, mend="Run `make clean setup`.")
            return
    yield Finding(name="libraries", ok=True, detail=f"{', '.join(LIBRARIES)} import")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (check_settings, check_packs, check_databases, check_libraries)


def main() -> int:
    """Prints the findings; 0 whatever they are, for the reader judges."""
    answer = os.dup(1)
    os.dup2(2, 1)  # libraries may print on import; the answer alone goes to standard output
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check()
        except ConfigInvalid as error:
            name = check.__name__.removeprefix("check_")
            findings.append(Finding(name=name, ok=False, detail=str(error), mend="Correct the named setting."))
    os.write(answer, (json.dumps({"findings": [asdict(each) for each in findings]}) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
