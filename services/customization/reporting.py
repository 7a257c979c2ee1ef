"""The page on a job: made of what the job left, and kept when the job has ended.

What `report` draws is gathered here: events, checkpoints, the example story, probes. While a job goes on the page is
made for whoever asks; the runner has it kept once the job has ended, and from then on it is read and not made. A job
that is resumed and ends again has a new one. Knows no transport.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import defaultdict
from datetime import UTC, datetime

import structlog

from services.customization.records import Event, Job, ProbeDrawn, Progress
from services.customization.report import ExamplePicture, JobReport, ReportCheckpoint, ReportProbe, report_page
from services.customization.repository import Repository
from services.runtime.database import now_us
from services.runtime.errors import ObjectCorrupt, ObjectNotFound
from services.runtime.store import ObjectStore

log = structlog.get_logger("fabula.customization.reporting")


class Reporter:
    """The pages of one database's jobs."""

    def __init__(self, repository: Repository, objects: ObjectStore) -> None:
        """`objects` has the pictures, and gets the pages."""
        self._repository, self._objects = repository, objects

    async def read(self, job_id: str) -> bytes:
        """The page that was kept, or as it would be now. Raises CustomizationJobNotFound."""
        sha256 = await self._repository.kept_report(job_id)
        if sha256:
            try:
                return await self._objects.get(sha256)
            except (ObjectNotFound, ObjectCorrupt) as error:
                log.error("report_lost", job_id=job_id, sha256=sha256, reason=error.reason)
        return await self._made(job_id)

    async def keep(self, job_id: str) -> None:
        """Makes the page of a job that has ended, and keeps it. Raises CustomizationJobNotFound."""
        at_us = now_us()  # of before: what happens to the job from now on makes the page an old one
        sha256 = await self._objects.put(await self._made(job_id))
        for unused in await self._repository.keep_report(job_id, sha256, at_us=at_us):
            await self._objects.delete(unused)

    async def _made(self, job_id: str) -> bytes:
        job = await self._repository.get(job_id)
        report = await self._gathered(job)
        return (await asyncio.to_thread(report_page, report)).encode()

    async def _gathered(self, job: Job) -> JobReport:
        losses: defaultdict[str, dict[int, float]] = defaultdict(dict)
        probes: list[ReportProbe] = []
        for event in await self._events(job.job_id):
            match event.what:
                case Progress(step=step, losses=parts):
                    for name, value in parts.items():
                        losses[name][step] = value
                case ProbeDrawn() as probe:
                    probes.append(
                        ReportProbe(
                            step=probe.step,
                            name=probe.probe,
                            description=probe.description,
                            image=await self._picture(probe.image_sha256),
                        )
                    )
        example = [
            ExamplePicture(image=await self._picture(frame.image_sha256), caption=frame.caption) for frame in job.frames
        ]
        checkpoints = [
            ReportCheckpoint(
                step=one.step, weights_sha256=one.weights_sha256, size_bytes=one.size_bytes, figures=one.figures
            )
            for one in await self._repository.checkpoints(job.job_id)
        ]
        ended_us = job.end_us if job.start_us is not None else None
        return JobReport(
            job_id=job.job_id,
            state=job.state.value.lower(),
            name=job.character.name,
            phrase=job.character.phrase,
            pack=job.settings.pack,
            method=job.settings.method,
            steps=job.progress.step if job.progress is not None else 0,
            step_count=job.progress.step_count if job.progress is not None else job.settings.steps,
            attempt=job.attempt,
            create_time=datetime.fromtimestamp(job.create_us / 1e6, UTC),
            elapsed_s=(ended_us - job.start_us) / 1e6 if ended_us is not None and job.start_us is not None else 0.0,
            error=f"{job.message} ({job.reason})" if job.reason else "",
            example=example,
            findings=job.findings,
            losses={name: sorted(points.items()) for name, points in losses.items()},
            probes=sorted(probes, key=lambda one: one.step),
            checkpoints=checkpoints,
            baseline=job.baseline,
            recipe=dataclasses.asdict(job.settings),
        )

    async def _events(self, job_id: str) -> list[Event]:
        found: list[Event] = []
        while batch := await self._repository.events(job_id, after=found[-1].sequence if found else 0):
            found += batch
        return found

    async def _picture(self, sha256: str) -> bytes:
        """Empty for one that is gone: a page without it is better than none."""
        try:
            return await self._objects.get(sha256)
        except (ObjectNotFound, ObjectCorrupt) as error:
            log.error("picture_lost", sha256=sha256, reason=error.reason)
            return b""
