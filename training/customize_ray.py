"""Runs `customize` in several workers under Ray Train: this process is the driver, and computes nothing itself.

1. Ray is the cluster that `RAY_ADDRESS` names (Ray sets it for its jobs), or else one of this process's own: it listens
   behind a token, keeps its files where nobody else looks, and is gone when this process is, however it ends.
2. `TorchTrainer` places the workers, and every one does what a process alone does (`customize.run`), with its share of
   each step's batches. What they see of each other is in the run's folder, which all must see under one path: the last
   complete checkpoint, and a file that tells them to stop.
3. A worker that dies takes its group with it, and the next group goes on from the checkpoint: with the same weights in
   the end, bit for bit on CPUs. When too many died, the driver ends without a word, and whoever started it decides.

Knows no pack and no method. Ray pickles what crosses between its processes: here that is the name of a function, and
JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from services.models.errors import ModelError
from training.customize import TOLD, reasons_named, run, run_folder
from training.customize_errors import CustomizationError, DiskFull, RunStopped, WorkerEnded, WorkersUnfit
from training.customize_progress import Progress, Stop
from training.peers import PeerEnded, Peers
from training.precision import on_gpu

STOP_FILE = "workers.stop"  # in the run's folder: the driver wants an end
BEGUN_FILE = "workers.begun"  # in the run's folder: there is a first worker, who looks for the other file
STORAGE = "ray"  # folder of what Ray Train itself writes down
ADDRESS = "RAY_ADDRESS"
_MOST_FAILURES = 2  # of a driver's workers; one more ends it
_MEETING_S = 24 * 3600  # workers wait so long for one that lives: the first one draws probes meanwhile
_STARTS = 3  # of a Ray of this process's own
_LOOK_EVERY_S = 0.1
_OBJECT_STORE_BYTES = 80_000_000  # Ray's least is 75 MB, and next to nothing is put there
_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead worker is missed, at most
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # a busy machine takes its time to import torch
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a node that goes is a worker that dies
}
_OWN_RAY_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # whoever started this process has chosen
    "RAY_worker_register_timeout_seconds": "600",  # a busy machine takes its time to start Python, too
}


def run_with_workers(arguments: argparse.Namespace, stop: Stop) -> dict[str, Any]:
    """Train in `arguments.workers` workers. Returns what is told of the card when a run has ended.

    Raises RunStopped, WorkersUnfit, and WorkerEnded with the reason that ended the workers; OSError when the run's
    folder cannot be written, and Ray's own errors when workers died too often: the next run goes on.
    """
    folder = run_folder(arguments).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name in (STOP_FILE, BEGUN_FILE):
        (folder / name).unlink(missing_ok=True)
    with _cluster(arguments, folder):
        stop.listen()  # Ray has put its own way of ending in place of ours
        ended = _followed(_trainer(arguments, folder), folder, stop)
    if ended.get("error"):
        raise WorkerEnded(ended["message"], reason=ended["error"])
    card: dict[str, Any] = ended["card"]
    return card


def _trainer(arguments: argparse.Namespace, folder: Path) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class OwnTrainer(TorchTrainer):  # type: ignore[misc]
        """Leaves out the process that clears up behind a driver in a cluster that outlives it: without a dashboard it
        finds nothing out, and says so every second.
        """

        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()
            return [one for one in made if not isinstance(one, PlacementGroupCleanerCallback)]

    resources = {"CPU": arguments.worker_cpus}
    if arguments.worker_gpus:
        resources["GPU"] = arguments.worker_gpus
    return (TorchTrainer if os.environ.get(ADDRESS) else OwnTrainer)(
        work,
        train_loop_config={"arguments": packed(arguments), "folder": str(folder)},
        scaling_config=ScalingConfig(
            num_workers=arguments.workers, use_gpu=arguments.worker_gpus > 0.0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(timeout_s=_MEETING_S),
        run_config=RunConfig(
            name=STORAGE, storage_path=str(folder), failure_config=FailureConfig(max_failures=_MOST_FAILURES)
        ),
    )


def _followed(trainer: Any, folder: Path, stop: Stop) -> dict[str, Any]:
    """What the first worker told at its end. Passes a wish for an end on to the workers.

    Raises RunStopped at once when nobody trains yet, and whatever Ray raises.
    """
    results: list[Any] = []
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            results.append(trainer.fit())
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised where somebody waits for it
            failures.append(error)

    # Ray Train would take SIGINT for itself in the main thread, and abort where we save.
    fitting = threading.Thread(target=fit, name="fit", daemon=True)
    fitting.start()
    while fitting.is_alive():
        fitting.join(_LOOK_EVERY_S)
        if stop():
            (folder / STOP_FILE).touch()
            if not (folder / BEGUN_FILE).exists():
                raise RunStopped("the run was told to stop before its first step")
    if failures:
        raise failures[0]
    ended: dict[str, Any] = json.loads(results[0].return_value)
    return ended


# -- in a worker -----------------------------------------------------------------------------------------------------


def work(told: Mapping[str, Any]) -> str:
    """What every worker does. Returns JSON: the `card`, or the `error` and its `message`.

    A worker that ends for a reason ends well, for the next one would meet the same; whatever else happens is raised,
    and Ray Train tries again.
    """
    arguments, folder = unpacked(told["arguments"]), Path(told["folder"])
    torch.set_num_threads(arguments.threads)
    peers = Peers(dist.get_rank(), dist.get_world_size())
    stop = Stop(folder / STOP_FILE)
    try:
        with reasons_named():
            peers.alone((folder / BEGUN_FILE).touch)
            if peers.agreed(float(stop())):
                raise RunStopped("the run was told to stop before its first step")
            progress = peers.alone(lambda: Progress(arguments.progress))
            card = run(arguments, progress or Progress(None), stop, peers)
    except PeerEnded:
        return json.dumps({})
    except (CustomizationError, ModelError) as error:
        if isinstance(error, DiskFull) and not peers.has_parted:
            raise  # the others do not know, and would wait for this one
        print(f"worker {peers.rank}: {error.reason}: {error}", file=sys.stderr, flush=True)
        return json.dumps({"error": error.reason, "message": str(error)})
    return json.dumps({"card": {name: card[name] for name in TOLD if name in card}})


def packed(arguments: argparse.Namespace) -> dict[str, Any]:
    """A command line as JSON. Its paths are absolute: a worker stands elsewhere."""
    given = vars(arguments)
    return {
        "paths": {name: str(value.absolute()) for name, value in given.items() if isinstance(value, Path)},
        "values": {name: value for name, value in given.items() if not isinstance(value, Path)},
    }


def unpacked(told: Mapping[str, Any]) -> argparse.Namespace:
    """The command line that `packed` told of."""
    return argparse.Namespace(**told["values"], **{name: Path(path) for name, path in told["paths"].items()})


# -- the cluster -----------------------------------------------------------------------------------------------------


@contextmanager
def _cluster(arguments: argparse.Namespace, folder: Path) -> Iterator[None]:
    """Ray, for as long as the run takes. Raises RunStopped for a signal while it starts, and WorkersUnfit."""
    address = os.environ.get(ADDRESS)
    with nullcontext() if address else _own_folder(folder) as own:
        environment = dict(_TRAIN_SETTINGS)
        if own is not None:
            environment |= {**_OWN_RAY_SETTINGS, "RAY_AUTH_TOKEN_PATH": str(_new_token(own))}
        os.environ.update({name: value for name, value in environment.items() if own or name not in os.environ})
        import ray  # reads its settings from the environment once, now

        try:
            if own is None:
                ray.init(address=address, log_to_driver=True)
            else:
                _start_own(_own_ray(arguments, own))
            yield
        except SystemExit as error:  # what Ray makes of SIGTERM until we listen again
            raise RunStopped("the run was told to stop before its first step") from error
        finally:
            ray.shutdown()


def _own_ray(arguments: argparse.Namespace, own: Path) -> dict[str, Any]:
    """What a Ray of this process's own is started with. Raises WorkersUnfit."""
    gpus = arguments.workers * arguments.worker_gpus
    here = torch.cuda.device_count() if on_gpu() else 0
    if gpus > here:
        raise WorkersUnfit(
            f"{arguments.workers} workers of {arguments.worker_gpus:g} GPUs need more than the {here} there are here"
        )
    return {
        "address": "local",
        # Counted, not bound: whoever started this process said how many threads a worker may have.
        "num_cpus": max(1, math.ceil(arguments.workers * arguments.worker_cpus)),
        "num_gpus": here,
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "log_to_driver": True,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(own),
    }


def _start_own(asked: Mapping[str, Any]) -> None:
    """Start a Ray of this process's own, again if need be: a node gives itself 30 s, which a busy machine may not have.

    Raises what Ray raises the last time.
    """
    import ray

    for left in reversed(range(_STARTS)):
        try:
            ray.init(**asked)
            return
        except CustomizationError:
            raise
        except Exception:
            if not left:
                raise
            traceback.print_exc()
            for child in psutil.Process().children(recursive=True):  # they are all of the node that did not start
                with suppress(psutil.NoSuchProcess):
                    child.kill()


def _new_token(own: Path) -> Path:
    """What processes of a Ray of our own know each other by: its ports are open to everybody on this machine."""
    path = own / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return path


@contextmanager
def _own_folder(folder: Path) -> Iterator[Path]:
    """A folder for Ray's sockets and logs, which are open to everybody in a folder that is not.

    Its path is short, for sockets' names are; and the same for every driver of a run, so that one that was killed
    leaves nothing behind for long.
    """
    mark = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    path = Path(tempfile.gettempdir()) / f"fr{os.getuid()}-{mark}"
    with suppress(FileNotFoundError):
        if path.lstat().st_uid == os.getuid():
            shutil.rmtree(path, ignore_errors=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:  # somebody else's, or one that a process is still writing into
        path = Path(tempfile.mkdtemp(prefix="fr"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
