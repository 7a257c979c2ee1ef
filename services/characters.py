"""What `fabula character` does to files, in a process of its own: the command may not import services. Prints JSON.

    python -m services.characters export --pack toon --form kohya WEIGHTS OUT        {"result": …}
    python -m services.characters import --pack toon FILE                            {"result": …}

Weights are read against the pack's own networks, so a file that does not fit is refused here and not when somebody
draws with it. What is imported lies where frame replicas read, under its SHA-256. The last line is the answer, and the
exit status is 0 whenever there is one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.runtime.config import ConfigInvalid, Installation
from services.runtime.errors import FabulaError

Answer = dict[str, Any]
_MOST_BYTES = 16 << 30  # of a file of weights: a whole UNet of the largest family has half of that


class FileUnfit(Exception):
    """A file cannot be read, or is not what it should be."""

    reason = "FILE_UNFIT"


def export(given: argparse.Namespace) -> Answer:
    """Weights in another layout. Of PEFT's, the configuration that it needs is written beside them."""
    from services.models.lora import adapter_config, write_adapter

    adapter, base_digest = _adapter(Path(given.weights), given.pack)
    out = Path(given.out)
    payload = write_adapter(adapter, given.form, base_digest=base_digest)
    files = [_written(out, payload)]
    if given.form == "peft" and adapter.factors:
        config = json.dumps(adapter_config(adapter), indent=2, sort_keys=True) + "\n"
        files.append(_written(out.with_name("adapter_config.json"), config.encode()))
    return {"form": given.form, "files": files, "rank": adapter.rank, "size_bytes": len(payload)}


def import_(given: argparse.Namespace) -> Answer:
    """Weights from elsewhere, checked and kept where frame replicas read."""
    from services.customization.importing import stored_form
    from services.frame.config import FrameSettings
    from services.runtime.store import ObjectStore

    installation = Installation.load()
    adapter, base_digest = _adapter(Path(given.source), given.pack)
    payload = stored_form(adapter, Path(given.source), base_digest)
    store = ObjectStore.open(FrameSettings.load().characters_url, installation.home / "characters")
    sha256 = asyncio.run(store.put(payload))
    return {
        "weights_sha256": sha256,
        "pack": given.pack,
        "base_digest": base_digest,
        "rank": adapter.rank,
        "size_bytes": len(payload),
        "words": sorted(adapter.words),
    }


def _adapter(path: Path, pack_name: str) -> tuple[Any, str]:
    """The adapter in a file, checked against a pack, and the digest of the network that it belongs to."""
    from services.customization.importing import adapter_for
    from services.models.pack import find_pack

    if not path.is_file():
        raise FileUnfit(f"there is no file {path}")
    if path.stat().st_size > _MOST_BYTES:
        raise FileUnfit(f"{path.name} is larger than {_MOST_BYTES >> 30} GiB")
    return adapter_for(path, find_pack(pack_name, Installation.load().pack_folders))


def _written(path: Path, payload: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(payload)
    part.replace(path)
    return str(path)


def parser() -> argparse.ArgumentParser:
    """The verbs."""
    root = argparse.ArgumentParser(prog="python -m services.characters")
    verbs = root.add_subparsers(required=True)
    one = verbs.add_parser("export")
    one.add_argument("--pack", required=True)
    one.add_argument("--form", choices=("peft", "diffusers", "kohya"), default="peft")
    one.add_argument("weights")
    one.add_argument("out")
    one.set_defaults(run=export)
    one = verbs.add_parser("import")
    one.add_argument("--pack", required=True)
    one.add_argument("source")
    one.set_defaults(run=import_)
    return root


def main() -> int:
    """Prints the answer; 0 whatever it is."""
    answer = os.dup(1)
    os.dup2(2, 1)  # libraries may print on import; the answer alone goes to standard output

    def say(kind: str, value: Answer) -> None:
        os.write(answer, (json.dumps({kind: value}, ensure_ascii=False) + "\n").encode())

    given = parser().parse_args()
    from services.models.errors import ModelError

    run: Callable[[argparse.Namespace], Answer] = given.run
    try:
        say("result", run(given))
    except (ModelError, FabulaError, FileUnfit) as error:
        say("error", {"reason": error.reason, "message": str(error)})
    except OSError as error:
        say("error", {"reason": FileUnfit.reason, "message": f"{error.filename or 'a file'}: {error.strerror}"})
    except ConfigInvalid as error:
        say("error", {"reason": "SETTING_INVALID", "message": str(error)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
