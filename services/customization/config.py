"""Settings of the customization service: `FABULA_CUSTOMIZATION_*`, section `[customization]` of config.toml."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.runtime.config import Installation, Settings


class CustomizationSettings(Settings):
    """How characters are learned here. Every default suits one machine that also serves."""

    model_config = SettingsConfigDict(env_prefix="FABULA_CUSTOMIZATION_", frozen=True, extra="forbid")
    section: ClassVar[str] = "customization"

    backend: Literal["local", "ray", "kuberay"] = "local"  # where a job's training process runs
    default_pack: str = "toon"  # the pack of a request that names none
    # Jobs, their checkpoints and reports; empty: home/customization. Other backends than local need a folder that the
    # service and every place where training runs see under the same path.
    folder: Path | None = None
    # Stories of those whom packs know, a folder for each pack (`training.new_story.read_known`); a pack without one is
    # taught beside stories of the toon world, and an arldm pack not at all. Seen where training runs, like `folder`.
    known_folder: Path | None = None
    characters_url: str = ""  # object store that frame replicas read, their FABULA_FRAME_CHARACTERS_URL; empty: as they
    import_rank_max: int = Field(default=16, ge=1, le=256)  # as the frame replicas' FABULA_FRAME_ADAPTER_RANK_MAX
    max_running: int = Field(default=1, ge=1, le=64)  # jobs trained at once; the others wait for their turn
    max_queued: int = Field(default=20, ge=1, le=10_000)  # jobs that wait; one more is refused at once
    default_budget_s: float = Field(default=600.0, gt=0)  # training time of a job that names neither steps nor budget
    most_budget_s: float = Field(default=24 * 3600.0, gt=0)  # training time that a job may ask for
    # Workers that train a job together under Ray Train, from when it is made to its end; 0: one process, without Ray.
    # Each takes batches of its own, so more of them learn from more at a step, and no step is taken sooner.
    workers: int = Field(default=0, ge=0, le=64)  # of a job that does not say how many
    max_workers: int = Field(default=4, ge=0, le=64)  # that a job may ask for, if `workers` is not more
    worker_cpus: float = Field(default=0.0, ge=0)  # that each worker asks Ray for; 0: as many as it has threads
    threads: int = Field(default=0, ge=0, le=256)  # CPU threads of a process or worker; 0: every core, shared out
    niceness: int = Field(default=10, ge=0, le=19)  # of a local training process: it gets what serving leaves
    save_every_s: float = Field(default=30.0, gt=0)  # between complete checkpoints: what a crash costs at most
    snapshots: int = Field(default=5, ge=1, le=100)  # times that a job leaves weights that can be published
    probes: bool = True  # draw probes at every snapshot; a job takes some longer for it
    crashes_max: int = Field(default=3, ge=0, le=100)  # in a row without a step between them; one more fails the job
    stop_grace_s: float = Field(default=300.0, gt=0)  # for the step in progress and its save; then it is killed
    poll_s: float = Field(default=0.5, gt=0)  # how often jobs are looked at, and what other processes wrote
    keep_deleted_s: float = Field(default=7 * 86_400.0, ge=0)  # a deleted job or version can be undeleted for so long
    # Let the pack's eyes look whether the character is to be seen. Costs the memory of torch, once.
    eyes: bool = True

    gpus: float = Field(default=0.0, ge=0)  # GPUs that a job or each worker asks Ray for; 0: it trains on CPUs
    ray_address: str = "http://127.0.0.1:8265"  # backend ray: the dashboard of the cluster that takes jobs
    kuberay_api: str = "https://kubernetes.default.svc"  # backend kuberay: the cluster's API
    kuberay_namespace: str = "fabula"  # of the jobs
    kuberay_image: str = ""  # with training and its packages; the backend needs it
    kuberay_claim: str = "fabula-customization"  # PersistentVolumeClaim that holds `folder`, ReadWriteMany
    kuberay_auth_secret: str = ""  # Secret with Ray's token for the clusters of jobs; empty: they ask for none
    kuberay_cpus: int = Field(default=4, ge=1)  # that a job, or each of its workers, asks for
    kuberay_memory_gib: int = Field(default=16, ge=1)  # that a job, or each of its workers, asks for

    def jobs_folder(self, installation: Installation) -> Path:
        """Where jobs are kept."""
        return self.folder or installation.home / "customization"

    def known_of(self, pack: str) -> Path | None:
        """The folder of stories of those whom a pack knows, where there is one."""
        folder = None if self.known_folder is None else self.known_folder / pack
        return folder if folder is not None and folder.is_dir() else None

    @property
    def most_workers(self) -> int:
        """Workers that a job may ask for: what every job gets nobody is refused."""
        return max(self.workers, self.max_workers)

    def threads_of(self, workers: int) -> int:
        """CPU threads of a training process, or of each of so many workers.

        A worker on another machine than this one shares it with nobody.
        """
        own = max(1, workers) if self.backend == "local" else 1
        return self.threads or max(1, len(os.sched_getaffinity(0)) // own)

    def cpus_of_a_worker(self, threads: int) -> float:
        """CPUs that each worker of so many threads asks Ray for."""
        if self.backend == "kuberay":
            return float(self.kuberay_cpus)  # all of its pod's, so that each has a pod of its own
        return self.worker_cpus or float(threads)
