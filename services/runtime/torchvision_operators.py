"""Lets `import torchvision` work where torchvision's compiled operators are missing.

There is no CPU build of torchvision to go with a CPU torch, and the public wheel
fails at import because the operator schemas `torchvision::nms` and `torchvision::qnms`
do not exist. vLLM's LLaVA and transformers' processors import torchvision but use only
its pure-Python transforms, so declaring the two schemas is enough.

`python -m services.runtime.torchvision_operators` writes one line into the environment's
site-packages, so that every process, vLLM's children included, gets the hook before
anything can import torchvision. Knows nothing of our services.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_SCHEMAS = ("nms", "qnms")
_library = None  # kept alive: torch forgets a schema when its Library object dies


def declare() -> None:
    """Declare the missing operator schemas; does nothing where they are compiled in."""
    global _library
    spec = importlib.util.find_spec("torchvision")
    if _library is not None or spec is None or spec.origin is None:
        return
    import torch

    try:
        torch.ops.load_library(str(Path(spec.origin).with_name("_C.so")))  # type: ignore[no-untyped-call]
    except OSError:
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in _SCHEMAS:
            library.define(  # type: ignore[no-untyped-call]
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        _library = library


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Declares the schemas just before torchvision is first imported, then steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            declare()
        return None


def install_import_hook() -> None:
    """Arrange for `declare` to run before the first import of torchvision. Costs no import of torch."""
    if not any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())


def write_path_file(site_packages: Path) -> Path:
    """Write the `.pth` line that installs the hook in every process of an environment.

    The hook's source is copied in beside it, so the environment works without the repository on its path.
    """
    module = site_packages / "fabula_torchvision_operators.py"
    module.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    path_file = site_packages / "fabula_torchvision_operators.pth"
    path_file.write_text("import fabula_torchvision_operators as f; f.install_import_hook()\n", encoding="utf-8")
    return path_file


if __name__ == "__main__":
    print(write_path_file(Path(sysconfig.get_path("purelib"))))
