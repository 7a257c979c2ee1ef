"""The order of a pack's making, and how its stages are started."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from training import toon_pack


def test_stages_that_processes_share_are_started_as_torch_expects_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, ...]] = []
    monkeypatch.setattr(toon_pack, "_module", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    alone, together = toon_pack.stages(tmp_path), toon_pack.stages(tmp_path, processes=2)
    assert list(alone) == list(together)
    together["decoder"]()
    assert started == [
        (
            *("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "training.vae", "--decoder", "--threads", "2"),
        )
    ]
    together["evaluation"]()
    assert started[1][0] == "training.evaluation.toon", "not everything is training"


def test_every_shared_stage_has_a_command() -> None:
    for name, (module, *_) in toon_pack._TOGETHER.items():
        assert callable(importlib.import_module(module).main), name
    assert toon_pack._TOGETHER.keys() < toon_pack.stages(toon_pack.PACK).keys()


def test_more_processes_than_gpus_are_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(toon_pack, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("sys.argv", ["toon_pack", "--processes", "2"])
    with pytest.raises(SystemExit):
        toon_pack.main()
    assert "a GPU of its own" in capsys.readouterr().err
