"""Several processes that teach somebody new end where one process with all their batches would, and end together."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from services.models.pack import Pack, load_pack
from services.models.tiny import build_tiny_pack
from training.customize import CHECKPOINT, CustomizationRecipe, Keep, command, customize, toon_customization
from training.customize_errors import DiskFull, LossNotFinite, RecipeInvalid, RunMismatch, WorkerUnable
from training.customize_ray import packed, unpacked
from training.loop import step_generator
from training.methods.lora import LoraRecipe
from training.new_story import known_stories, world_story
from training.peers import PeerEnded, Peers, joined

COUNT = 2
WITHIN_S = 240.0
Told = dict[int, str]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return build_tiny_pack(tmp_path_factory.mktemp("pack") / "tiny", captions=False, positions=512)


def recipe_of(name: str = "epicevo", *, accumulate: int = COUNT, steps: int = 3) -> CustomizationRecipe:
    recipe = toon_customization(name)
    lessons = replace(recipe.lessons, existing_stories=2, frames_per_story=1)
    return replace(
        recipe, steps=steps, warmup_steps=1, lessons=lessons, accumulate=accumulate, save_every_s=0.0, seed=5
    )


def teach(folder: Path, out: Path, recipe: CustomizationRecipe, *, peers: Peers, keep: Keep | None = None) -> None:
    """A run in this process, whose result lies at `out`."""
    artefact = customize(
        load_pack(out.parent / "pack"),
        world_story("otto", 64),
        known_stories(2, 64),
        recipe,
        folder,
        say=lambda line: None,
        snapshot_steps=(2,),
        keep=keep or (lambda step, artefact: None),
        peers=peers,
    )
    out.write_bytes(artefact.payload)
    out.with_suffix(".json").write_text(json.dumps(artefact.card))


# -- what one of several processes does ------------------------------------------------------------------------------


def plainly(folder: Path, rank: int) -> None:
    teach(folder / "run", folder / f"out-{rank}", recipe_of(), peers=joined())


def losing_the_disk(folder: Path, rank: int) -> None:
    def keep(step: int, artefact: Any) -> None:
        raise DiskFull("no room")

    teach(folder / "run", folder / f"out-{rank}", recipe_of(), peers=joined(), keep=keep)


def not_seeing_the_folder(folder: Path, rank: int) -> None:
    teach(folder / f"run-{rank}", folder / f"out-{rank}", recipe_of(), peers=joined())


def with_another_seed(folder: Path, rank: int) -> None:
    teach(folder / "run", folder / f"out-{rank}", replace(recipe_of(), seed=rank), peers=joined())


def diverging(folder: Path, rank: int) -> None:
    recipe = replace(recipe_of("lora", steps=6), method=LoraRecipe(rank=4, rate=1e30, named_share=0.5))
    teach(folder / "run", folder / f"out-{rank}", recipe, peers=joined())


def meeting(folder: Path, rank: int) -> None:
    peers = joined()
    assert (peers.rank, peers.count) == (rank, COUNT)
    assert peers.agreed(float(rank + 5)) == 5.0
    assert peers.most(float(rank)) == COUNT - 1
    assert peers.means([1.0, float(rank)]) == [1.0, (COUNT - 1) / 2]
    assert peers.alone(lambda: "done") == ("done" if rank == 0 else None)
    assert peers.together(lambda: rank) == rank
    with pytest.raises(OSError if rank == 0 else PeerEnded):
        peers.alone(lambda: os.stat(folder / "nothing"))
    with pytest.raises(OSError if rank == 1 else PeerEnded):
        peers.together(lambda: os.stat(folder / "nothing") if rank == 1 else None)
    assert peers.agreed(1.0) == 1.0, "they still meet afterwards"


def _process(what: Callable[[Path, int], None], folder: str, rank: int, port: int, told: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(COUNT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        what(Path(folder), rank)
    except Exception as error:
        told.put((rank, f"{type(error).__name__}: {error}"))
    else:
        told.put((rank, ""))


def together(what: Callable[[Path, int], None], folder: Path) -> Told:
    """What ended each process; nothing for one that did all there was to do. A process that never ends fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    told = spawn.Queue()
    processes = [spawn.Process(target=_process, args=(what, str(folder), rank, port, told)) for rank in range(COUNT)]
    for process in processes:
        process.start()
    try:
        return dict(told.get(timeout=WITHIN_S) for _ in processes)
    except queue.Empty:
        raise AssertionError("a process waits for one that has gone") from None
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.fixture
def folder(tmp_path: Path, pack: Pack) -> Path:
    """Where processes find the pack."""
    (tmp_path / "pack").symlink_to(pack.folder)
    return tmp_path


def test_two_workers_learn_what_one_learns_from_twice_the_batches(folder: Path) -> None:
    assert together(plainly, folder) == {0: "", 1: ""}
    teach(folder / "alone", folder / "out", recipe_of(), peers=Peers())
    first, second = ((folder / f"out-{rank}").read_bytes() for rank in range(COUNT))
    assert first == second, "every process has the same weights"
    learned, expected = load(first), load((folder / "out").read_bytes())
    assert learned.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(learned[name], value, atol=2e-3, rtol=2e-2)
    losses, alone = (
        json.loads((folder / name).with_suffix(".json").read_text())["losses"] for name in ("out-0", "out")
    )
    assert losses.keys() == alone.keys()
    for name, means in alone.items():
        assert losses[name] == pytest.approx(means, rel=1e-3, abs=1e-4), name

    teach(folder / "half", folder / "half-out", recipe_of(accumulate=1), peers=Peers())
    half = load((folder / "half-out").read_bytes())
    assert any(not torch.allclose(half[name], value, atol=2e-3, rtol=2e-2) for name, value in expected.items()), (
        "one batch a step teaches something else, so the comparison above can fail"
    )


def test_processes_meet_and_a_failure_of_one_ends_all(tmp_path: Path) -> None:
    assert together(meeting, tmp_path) == {0: "", 1: ""}


def test_a_full_disk_of_the_first_worker_ends_the_others_too(folder: Path) -> None:
    assert together(losing_the_disk, folder) == {0: "DiskFull: no room", 1: "PeerEnded: "}
    assert (folder / "run" / CHECKPOINT).is_file()


def test_a_worker_that_does_not_see_the_runs_folder_ends_the_run(folder: Path) -> None:
    told = together(not_seeing_the_folder, folder)
    assert told[0] == f"WorkerUnable: {WorkerUnable.__doc__}"
    assert "does not see" in told[1]


def test_a_worker_with_another_run_ends_the_run(folder: Path) -> None:
    told = together(with_another_seed, folder)
    assert told[0].startswith(WorkerUnable.__name__)
    assert told[1].startswith(RunMismatch.__name__)


def test_a_loss_that_is_no_number_ends_all_workers_for_the_same_reason(folder: Path) -> None:
    told = together(diverging, folder)
    assert all(one.startswith(LossNotFinite.__name__) for one in told.values()), told


# -- one process alone -----------------------------------------------------------------------------------------------


def test_a_batch_is_the_same_whoever_takes_it() -> None:
    taken = [number for rank in range(3) for number in Peers(rank, 3).batches(6)]
    assert taken == list(range(6))
    assert list(Peers().batches(4)) == [0, 1, 2, 3]
    drawn = [torch.rand(1, generator=step_generator(3, 7, number)).item() for number in range(4)]
    assert len(set(drawn)) == 4
    assert drawn[0] == torch.rand(1, generator=step_generator(3, 7)).item()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_batches_that_cannot_be_shared_out_evenly_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="evenly"):
        Peers(0, 2).batches(count)


def test_a_run_says_so_when_its_batches_cannot_be_shared_out(pack: Pack, tmp_path: Path) -> None:
    class Two(Peers):
        def together(self, what: Callable[[], Any]) -> Any:
            return what()

    with pytest.raises(RecipeInvalid, match="shared out evenly among 2"):
        customize(
            pack,
            world_story("otto", 64),
            known_stories(2, 64),
            recipe_of(accumulate=3),
            tmp_path,
            peers=Two(0, 2),
        )


WORDS = ["--pack", "packs/tiny", "--world-character", "otto", "--out", "/o.safetensors", "--steps", "3"]


def test_a_command_line_reaches_a_worker_as_json() -> None:
    arguments = command().parse_args([*WORDS, "--workers", "2", "--worker-gpus", "0.5", "--threads", "1"])
    there = unpacked(json.loads(json.dumps(packed(arguments))))
    assert there.pack == Path.cwd() / "packs" / "tiny", "a worker stands elsewhere"
    assert (there.out, there.story, there.steps) == (Path("/o.safetensors"), None, 3)
    assert (there.workers, there.worker_cpus, there.worker_gpus, there.accumulate) == (2, 1.0, 0.5, 1)


@pytest.mark.parametrize(
    "words", [["--workers", "0"], ["--workers", "x"], ["--accumulate", "0"], ["--worker-cpus", "nan"],
              ["--worker-gpus", "-1"], ["--worker-gpus", "many"]],
)  # fmt: skip
def test_a_command_line_that_asks_for_nonsense_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command().parse_args([*WORDS, *words])
    assert "is no number from" in capsys.readouterr().err
