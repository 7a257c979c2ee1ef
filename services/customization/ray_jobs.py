"""Training processes as Ray Jobs: the cluster finds room, the driver runs where Ray puts it.

An attempt is a submission of its own name, so a service that was killed finds it again, and submitting twice is refused
by Ray. A stop is SIGTERM to the driver, with time enough for a step and its save: Ray's own default kills it after 3 s.
A job of several workers asks for nothing itself: its driver computes nothing, and Ray Train asks for each worker. Both
wait in one queue of the cluster until there is room. Ray is not imported before a job needs it.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable
from typing import Any, Protocol

from services.customization.backends import Ended, Run
from services.runtime.errors import FabulaError, Unavailable

_RUNNING = frozenset({"PENDING", "RUNNING"})


class JobClient(Protocol):
    """What is used of `ray.job_submission.JobSubmissionClient`."""

    def submit_job(
        self,
        *,
        entrypoint: str,
        submission_id: str,
        runtime_env: dict[str, Any],
        metadata: dict[str, str],
        entrypoint_num_cpus: float,
        entrypoint_num_gpus: float,
    ) -> str:
        """Hands a job over; RuntimeError when the name is taken."""
        ...

    def get_job_info(self, job_id: str) -> Any:
        """status, message, driver_exit_code; RuntimeError for a name that is unknown."""
        ...

    def stop_job(self, job_id: str) -> bool:
        """Asks for an end."""
        ...


class RayJobsBackend:
    """Jobs of a Ray cluster. The Ray client is blocking, so it is only ever called in threads."""

    def __init__(self, client: Callable[[], JobClient], *, cpus: float, gpus: float, stop_grace_s: float) -> None:
        """`client` connects; it is called at the first need and again after a failure. `cpus` and `gpus` are for a job
        that trains in its own process.
        """
        self._connect = client
        self._client: JobClient | None = None
        self._cpus, self._gpus, self._stop_grace_s = cpus, gpus, stop_grace_s

    async def start(self, run: Run) -> None:
        def submit(client: JobClient) -> None:
            try:
                client.submit_job(
                    entrypoint=shlex.join(("python", "-m", "training.customize", *run.arguments)),
                    submission_id=run.name,
                    runtime_env={
                        "env_vars": {
                            **run.environment,
                            "RAY_JOB_STOP_SIGNAL": "SIGTERM",
                            "RAY_JOB_STOP_WAIT_TIME_S": str(round(self._stop_grace_s)),
                        }
                    },
                    metadata={"fabula_job": run.job_id, "fabula_attempt": str(run.attempt)},
                    entrypoint_num_cpus=0.0 if run.workers else self._cpus,
                    entrypoint_num_gpus=0.0 if run.workers else self._gpus,
                )
            except RuntimeError as error:
                if "already exists" not in str(error):  # else an earlier try of ours has come through
                    raise

        await self._ask(submit)

    async def look(self, run: Run) -> Ended | None:
        def ask(client: JobClient) -> Ended | None:
            try:
                info = client.get_job_info(run.name)
            except RuntimeError as error:
                if "does not exist" in str(error):
                    return Ended(detail=f"Ray knows no job {run.name}")
                raise
            status = str(getattr(info.status, "value", info.status))
            if status in _RUNNING:
                return None
            return Ended(status=info.driver_exit_code, detail=f"{status}: {info.message or ''}"[:500])

        ended: Ended | None = await self._ask(ask)
        return ended

    async def stop(self, run: Run) -> None:
        await self._ask(lambda client: client.stop_job(run.name))

    async def kill(self, run: Run) -> None:
        """Ray kills a driver itself, when the time that `stop` left is over."""
        await self.stop(run)

    async def close(self) -> None:
        """Nothing: jobs of a cluster outlive the service."""

    async def _ask(self, what: Callable[[JobClient], Any]) -> Any:
        def in_thread() -> Any:
            if self._client is None:
                self._client = self._connect()
            return what(self._client)

        try:
            return await asyncio.to_thread(in_thread)
        except FabulaError:
            raise
        except Exception as error:  # the client raises whatever its HTTP library does
            self._client = None
            raise Unavailable(
                f"the Ray cluster does not take or tell of jobs ({type(error).__name__})", metadata={"service": "ray"}
            ) from error


def job_client(address: str) -> JobClient:
    """Ray's own client of the cluster at `address`."""
    from ray.job_submission import JobSubmissionClient

    client: JobClient = JobSubmissionClient(address)
    return client
