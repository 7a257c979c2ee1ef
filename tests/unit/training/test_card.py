"""The pack's card says of every network which run made it, also of one that an earlier pack had already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.card import model_card, runs_table
from training.eyes import CHECKPOINT as EYES
from training.frame import CHECKPOINT as FRAME
from training.loop import STARTED_FROM
from training.storage import Checkpoint, save_checkpoint
from training.text import CHECKPOINT as TEXT

EARLIER = """# toon

| network | began with | steps | minutes | held-out figures |
| --- | --- | --- | --- | --- |
| text encoder | nothing | 3807 | 69 | whole 0.9300 |
| frame model | nothing | 2887 | 281 | loss 0.1138 |
| eyes | nothing | 2982 | 50 | whole 0.8825 |

| eyes | another table |
"""


def run(folder: Path, name: str, **facts: Any) -> None:
    known = {"step": 7, "elapsed_s": 120.0, "figures": {"loss": 0.5}, "done": True}
    save_checkpoint(folder / name, Checkpoint({}, {**known, **facts}))


def test_a_row_is_of_the_run_or_else_of_the_card_before(tmp_path: Path) -> None:
    run(tmp_path, FRAME, **{STARTED_FROM: "0123456789abcdef"})
    run(tmp_path, EYES, step=0, figures={})  # started and not run: the network is still the earlier one
    assert runs_table(tmp_path, EARLIER).splitlines()[2:] == [
        "| text encoder | nothing | 3807 | 69 | whole 0.9300 |",
        "| frame model | pack 0123456789ab | 7 | 2 | loss 0.5000 |",
        "| eyes | nothing | 2982 | 50 | whole 0.8825 |",
    ]
    assert not (tmp_path / TEXT).exists()
    assert len(runs_table(tmp_path).splitlines()) == 3, "without an earlier card only what was run is told"


def test_a_card_is_an_earlier_card(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("FABULA_TRAINING_DIR", str(tmp_path))
    card = model_card(earlier=EARLIER)
    assert "| frame model | nothing | 2887 | 281 | loss 0.1138 |" in card
    assert "Not evaluated yet" in card
    assert runs_table(tmp_path, card) == runs_table(tmp_path, EARLIER)
