"""`fabula pack`: what is asked of the services' own module, what is said of its answer, and the exit status.

The module is played by a script that tells what it was asked, except where the test says that it is the real one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from fabula_cli import exits, packs
from fabula_cli.main import app
from rich.console import Console
from typer.testing import CliRunner, Result

SCRIPT = """
import json, os, sys, time
with open({asked!r}, "a") as file:
    file.write(json.dumps({{"arguments": sys.argv[1:], "home": os.environ["FABULA_HOME"]}}) + "\\n")
sys.stderr.write("a library talks\\n" * 20000)
for line in {lines!r}:
    print(line, flush=True)
time.sleep({sleep})
sys.exit({status})
"""
ADDED = {
    "name": "ours",
    "architecture": "storygen",
    "size_bytes": 3 << 30,
    "digest": "ab" * 32,
    "licence": "MIT",
    "folder": "/home/packs/ours",
    "was_there": False,
    "draws_only": True,
    "writes_only": False,
    "notes": ["left out: [red]x"],
}


class Played:
    """The services' module, played."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.home = folder / "home"
        monkeypatch.setattr(packs, "MODULE", "played_packs")
        monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(packs, "people", Console(highlight=False, width=200))  # whatever the tests run in

    def answers(self, *lines: Any, status: int = 0, sleep: float = 0) -> None:
        said = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        script = SCRIPT.format(asked=str(self.folder / "asked"), lines=said, status=status, sleep=sleep)
        (self.folder / "played_packs.py").write_text(script)

    def asked(self) -> list[str]:
        """The arguments of the last call."""
        last = json.loads((self.folder / "asked").read_text().splitlines()[-1])
        assert last["home"] == str(self.home)
        arguments = last["arguments"]
        assert isinstance(arguments, list)
        return arguments

    def run(self, *words: str) -> Result:
        return CliRunner().invoke(app, ["pack", *words, "--home", str(self.home)])


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(tmp_path, monkeypatch)


def test_adding_tells_the_module_all_and_people_what_came_of_it(played: Played) -> None:
    progress = {"path": "unet/w.safetensors", "done_bytes": 1, "total_bytes": 2}
    played.answers({"progress": progress}, {"result": ADDED})
    done = played.run("add", "s3://models/ours", "--licence", "--name", "--fetch", "--steps", "7", "--text-guidance=0")
    assert done.exit_code == exits.OK, done.output
    assert played.asked() == [
        "add",
        "--licence=--name",  # what is told stays what it is, whatever it looks like
        "--steps=7",
        "--text-guidance=0.0",
        "--fetch",
        "--",
        "s3://models/ours",
    ]
    for said in ("ours", "storygen", "3.00 GiB", "abababababab", "left out: [red]x", "FABULA_FRAME_PACKS=toon,ours"):
        assert said in done.output
    as_json = played.run("add", "s3://models/ours", "--json")
    assert json.loads(as_json.stdout) == ADDED
    assert played.asked() == ["add", "--", "s3://models/ours"]


def test_a_captioner_is_named_where_captioners_are(played: Played) -> None:
    played.answers({"result": {**ADDED, "architecture": "llava", "draws_only": False, "writes_only": True}})
    done = played.run("add", "hub:theirs/llava", "--fetch")
    assert "FABULA_CAPTION_PACK=ours" in done.output
    assert "FABULA_CAPTION_ALSO_FOR" in done.output
    assert "FABULA_FRAME_PACKS" not in done.output


@pytest.mark.parametrize(
    "words",
    [
        ("add", "ours"),
        ("list",),
        ("verify", "ours"),
        ("remove", "ours"),
        ("convert", "{here}", "{here}/out"),
    ],
    ids=lambda words: words[0],
)
def test_what_is_refused_has_its_reason_and_exit_status(played: Played, words: tuple[str, ...]) -> None:
    played.answers({"error": {"reason": "PACK_DISK_FULL", "message": "no room\x1b[2J"}})
    words = tuple(word.format(here=played.folder) for word in words)
    refused = played.run(*words)
    assert refused.exit_code == exits.REFUSED
    assert "PACK_DISK_FULL: no room" in refused.stderr
    assert "\x1b[2J" not in refused.output
    as_json = json.loads(played.run(*words, "--json").stdout)
    assert as_json["error"]["reason"] == "PACK_DISK_FULL"


def test_a_module_that_ends_without_an_answer_is_a_failure(played: Played) -> None:
    played.answers(status=3)
    failed = played.run("list")
    assert failed.exit_code == exits.FAILED
    assert "a library talks" in failed.stderr


def test_the_list_is_a_table_and_json(played: Played) -> None:
    plain = {
        "name": "toon",
        "folder": "/shipped/toon",
        "architecture": "storygen",
        "size_bytes": 40 << 20,
        "created": "2026-11-22T06:00:00+00:00",
        "licence": "Apache-2.0",
        "digest": "12" * 32,
        "hidden_by": None,
        "unfinished": False,
        "fault": "",
        "reason": "",
        "in_use": True,
    }
    others = [
        {
            "name": "sick",
            "fault": "pack.json is odd",
            "reason": "PACK_MANIFEST_INVALID",
            "created": None,
            "in_use": False,
        },
        {"name": "half", "unfinished": True, "created": None, "in_use": False},
        {"name": "toon", "hidden_by": "/shipped/toon", "in_use": False},
    ]
    found = {"packs": [plain, *({**plain, **each} for each in others)]}
    played.answers({"result": found})
    told = played.run("list").output
    for said in ("toon", "storygen", "40 MiB", "2026-11-22", "Apache-2.0", "121212121212", "/shipped/toon", "in use"):
        assert said in told
    for said in ("PACK_MANIFEST_INVALID", "unfinished", "hidden by"):
        assert said in told
    assert json.loads(played.run("list", "--json").stdout) == found
    played.answers({"result": {"packs": []}})
    assert "No packs" in played.run("list").output


def test_verifying_says_every_problem_and_ends_with_its_status(played: Played) -> None:
    well = {"name": "toon", "ok": True, "reason": "", "message": "", "files_count": 30, "digest": "12" * 32}
    sick = {"name": "ours", "ok": False, "reason": "PACK_FILE_DAMAGED", "message": "unet/w has 3 bytes"}
    played.answers({"result": {"ok": True, "packs": [well]}})
    done = played.run("verify", "toon")
    assert (done.exit_code, played.asked()) == (exits.OK, ["verify", "--", "toon"])
    assert "30 files as their digests say" in done.output
    played.answers({"result": {"ok": False, "packs": [well, sick]}})
    done = played.run("verify", "--all")
    assert (done.exit_code, played.asked()) == (exits.FAULTS_FOUND, ["verify", "--all"])
    assert "ours: PACK_FILE_DAMAGED: unet/w has 3 bytes" in done.output
    assert played.run("verify", "--all", "--json").exit_code == exits.FAULTS_FOUND
    for words in (("verify",), ("verify", "toon", "--all")):
        assert played.run(*words).exit_code == exits.USAGE


def test_removing_and_converting_say_what_they_did(played: Played) -> None:
    played.answers({"result": {"name": "ours", "freed_bytes": 5 << 20}})
    done = played.run("remove", "ours", "--force")
    assert (done.exit_code, played.asked()) == (exits.OK, ["remove", "--force", "--", "ours"])
    assert "5 MiB" in done.output
    converted = {"source": "a.bin", "out": "a.safetensors", "tensors_count": 3, "size_bytes": 9, "dropped": ["epoch"]}
    played.answers({"result": {"out": "new", "files": [converted], "left_out": ["notes.exe"]}})
    done = played.run("convert", str(played.folder), "new")
    assert (done.exit_code, played.asked()) == (exits.OK, ["convert", "--", str(played.folder), "new"])
    for said in ("a.bin → a.safetensors", "3 tensors", "epoch", "notes.exe"):
        assert said in done.output


def test_whoever_ends_the_command_ends_the_copy(played: Played) -> None:
    played.answers({"progress": {"path": "w", "done_bytes": 1, "total_bytes": 2}}, sleep=600)
    command = [sys.executable, "-m", "fabula_cli.main", "pack", "add", "ours", "--home", str(played.home)]
    runner = (
        "import sys; from fabula_cli import packs; from fabula_cli.main import main;"
        " packs.MODULE = 'played_packs'; sys.argv = sys.argv[1:]; main()"
    )
    process = subprocess.Popen([sys.executable, "-c", runner, *command[2:]], stderr=subprocess.DEVNULL)
    try:
        child = _child_of(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == exits.TERMINATED
        assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _child_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    for _ in range(600):
        if (told := children.read_text().split()) and "played_packs" in Path(f"/proc/{told[0]}/cmdline").read_text():
            return int(told[0])
        time.sleep(0.1)
    raise AssertionError("it started nothing")


def test_the_command_starts_without_torch() -> None:
    code = "import sys, fabula_cli.main; sys.exit(any(name in sys.modules for name in ('torch', 'services')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_help_names_every_family_that_can_be_told() -> None:
    """Those of Stable Diffusion, and architectures that are families by themselves."""
    from services.models.registry import ARCHITECTURES
    from services.models.remote import ARCHITECTURES as REMOTE
    from services.models.stable_diffusion.pack import FAMILIES

    command: Any = typer.main.get_command(app)
    parameters = command.commands["pack"].commands["add"].params
    (told,) = (each.help for each in parameters if each.name == "family")
    known = {*FAMILIES, *ARCHITECTURES, *REMOTE} - {"stable-diffusion", "stable-diffusion-xl"}
    assert {word.strip(",;.") for word in told.split()} & {*known, *FAMILIES, *ARCHITECTURES} == known
