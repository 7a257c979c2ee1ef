"""Makes stories, durably: a DBOS workflow does what `plan.py` says is next and survives the death of its process.

Each step's result is a reference (a text or a picture's SHA-256), never pixels, kept as JSON. A step that fails for a
reason that can pass is tried again inside itself for as long as that takes, so a waiting story costs no log and a
restart just goes on trying. Steps look first whether their result is in the database already: between that and the
workflow engine's own record lies a gap in which a crash could repeat something, and what is found there is not
repeated.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import structlog
from dbos import DBOS, DBOSConfig, DBOSPortableJSONSerializer, SetWorkflowID

from services.runtime.call import call_from_headers, calling
from services.runtime.errors import Code, FabulaError, Internal, StoryNotFound, error_from_reason
from services.runtime.store import ObjectStore
from services.story import characters
from services.story import plan as planning
from services.story.backends import CaptionBackend, FrameBackend
from services.story.config import StorySettings
from services.story.events import Broadcaster
from services.story.metrics import ENDED, RETRIES, STAGE_SECONDS, WAITS
from services.story.plan import Command, Commit, Describe, Render, WriteCaption
from services.story.records import (
    ACTIVE,
    Options,
    Passing,
    State,
    StoryWarning,
    options_from_json,
    options_to_json,
)
from services.story.repository import Repository
from services.story.retry import GiveUp, decide

APPLICATION_NAME = "fabula-story"
# Part of every running story's record: only a process with the same version takes it over. Raise it when the order or
# the meaning of the steps changes, and keep the old code for as long as stories of the old version may be unfinished.
WORKFLOW_VERSION = "1"
QUEUE = "stories"
QUEUE_POLL_S = 0.1  # how soon an accepted story starts
PAST_EVERY_STEP = 2**31 - 1  # the largest step number DBOS's column holds
MOST_RECOVERIES = 50  # a story that has taken its process down so often is set aside

log = structlog.get_logger("fabula.story.workflow")
T = TypeVar("T")


class Stopped(Exception):
    """The story has ended by somebody else's hand: cancelled, or deleted."""


class StoryWorkflows:
    """Runs stories on this process's event loop. One per process, because DBOS is."""

    def __init__(
        self,
        *,
        repository: Repository,
        store: ObjectStore,
        caption: CaptionBackend,
        frame: FrameBackend,
        broadcaster: Broadcaster,
        settings: StorySettings,
    ) -> None:
        self._repository = repository
        self._store = store
        self._caption = caption
        self._frame = frame
        self._broadcaster = broadcaster
        self._settings = settings
        self._cancels: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._waiting: set[str] = set()
        self.running: set[str] = set()

    # -- the engine --------------------------------------------------------------------------------------------------

    async def launch(self, *, system_database_url: str, executor_id: str, migrate: bool) -> None:
        """Starts DBOS on the running loop; from then on queued stories start."""
        config: DBOSConfig = {
            "name": APPLICATION_NAME,
            "system_database_url": system_database_url,
            "executor_id": executor_id,
            "application_version": WORKFLOW_VERSION,
            "serializer": DBOSPortableJSONSerializer(),
            "run_migrations": migrate,
            "log_level": "WARNING",
            "enable_otlp": False,
        }
        DBOS(config=config)
        self._workflow = DBOS.workflow(name="continue_story", max_recovery_attempts=MOST_RECOVERIES)(self._entry())
        DBOS.launch()
        await DBOS.register_queue_async(
            QUEUE,
            worker_concurrency=self._settings.max_running,
            polling_interval_sec=QUEUE_POLL_S,
            on_conflict="always_update",
        )

    def _entry(self) -> Callable[[str], Coroutine[Any, Any, str]]:
        async def continue_story(story_id: str) -> str:
            return await self._run(story_id)

        return continue_story

    async def enqueue(self, story_id: str) -> None:
        """Hands a story to the engine. Doing it again changes nothing."""
        with SetWorkflowID(story_id):
            await DBOS.enqueue_workflow_async(QUEUE, self._workflow, story_id)
        await self._repository.mark_enqueued(story_id)

    async def recover(self, executor_id: str) -> None:
        """Takes over what a dead process had in progress. Doing it again, or from two processes, changes nothing."""
        await asyncio.to_thread(DBOS._recover_pending_workflows, [executor_id])

    async def engine_records(self, story_ids: list[str]) -> dict[str, tuple[str, str]]:
        """What the engine says of these stories: state (PENDING, ENQUEUED, SUCCESS, ERROR, …) and executor."""
        statuses = await DBOS.list_workflows_async(workflow_ids=story_ids, load_input=False, load_output=False)
        return {status.workflow_id: (str(status.status), str(status.executor_id)) for status in statuses}

    async def run_again(self, story_id: str) -> None:
        """Queues a story anew that no process is running."""
        await DBOS.resume_workflow_async(story_id, queue_name=QUEUE)

    async def rewind(self, story_id: str) -> None:
        """Queues a story anew whose run ended with an error, all recorded steps kept. Raises what DBOS raises."""
        await DBOS.rewind_workflow_async(story_id, start_step=PAST_EVERY_STEP, queue_name=QUEUE)

    async def forget(self, story_id: str) -> None:
        """Removes the engine's record of a story, texts included."""
        await DBOS.delete_workflow_async(story_id)

    def cancel(self, story_id: str) -> None:
        """Tells a story running here that it was cancelled: its call in flight ends at once."""
        if story_id in self.running:
            self._cancels[story_id].set()

    # -- one story ---------------------------------------------------------------------------------------------------

    async def _run(self, story_id: str) -> str:
        self.running.add(story_id)
        with structlog.contextvars.bound_contextvars(story_id=story_id):
            try:
                # No steps, because a replay may read something else; but tried like steps: what leaves here is final.
                traceparent, request_id = await self._try(story_id, "origin", lambda: self._repository.origin(story_id))
                if await self._try(story_id, "state", lambda: self._repository.state(story_id)) is State.WAITING:
                    self._waiting.add(story_id)  # said by a process that died since
                with calling(call_from_headers(request_id=request_id, traceparent=traceparent, timeout_s=None)):
                    return await self._make(story_id)
            except Stopped:
                return "STOPPED"
            finally:
                self.running.discard(story_id)
                self._waiting.discard(story_id)
                self._cancels.pop(story_id, None)

    async def _make(self, story_id: str) -> str:
        try:
            story = await self._step("begin", self._begin, story_id)
            options = options_from_json(story["options"])
            plan = planning.begin(
                seed=options.seed,
                frame_count=options.frame_count,
                caption=story["caption"],
                image_sha256=story["image_sha256"],
            )
            drawn: dict[str, Any] = {}
            while (command := planning.next_command(plan)) is not None:
                drawn, result = await self._perform(story_id, options, command, drawn)
                plan = planning.apply(plan, command, result)
            await self._step("finish", self._end, story_id, State.SUCCEEDED.value, "", "")
            return State.SUCCEEDED.value
        except FabulaError as error:
            failure = error
        await self._step("fail", self._end, story_id, State.FAILED.value, failure.reason, failure.message)
        return State.FAILED.value

    async def _perform(
        self, story_id: str, options: Options, command: Command, drawn: dict[str, Any]
    ) -> tuple[dict[str, Any], str]:
        match command:
            case WriteCaption():
                return {}, await self._step("write_caption", self._write_caption, story_id, options, command)
            case Describe():
                return {}, await self._step("describe", self._describe, story_id, options, command)
            case Render():
                drawn = await self._step("render", self._render, story_id, options, command)
                return drawn, drawn["image_sha256"]
            case Commit():
                return {}, await self._step("commit", self._commit, story_id, options, command, drawn)

    async def _step(self, name: str, function: Callable[..., Awaitable[T]], story_id: str, *arguments: Any) -> T:
        """One durable step: the recorded result if there is one, else the function's, tried until it works or ends.

        A failure is recorded as plain data and raised from there, so that a replay fails in the same way. Raises
        FabulaError and Stopped.
        """

        async def attempt() -> dict[str, Any]:
            try:
                return {"result": await self._try(story_id, name, lambda: function(story_id, *arguments))}
            except Stopped:
                return {"stopped": True}
            except FabulaError as error:
                return {"reason": error.reason, "message": error.message}

        with STAGE_SECONDS.labels(stage=name).time():
            outcome: dict[str, Any] = await DBOS.run_step_async({"name": name}, attempt)
        if outcome.get("stopped"):
            raise Stopped
        if "reason" in outcome:
            raise error_from_reason(Code.INTERNAL, outcome["reason"], outcome["message"])
        result: T = outcome["result"]
        return result

    async def _try(self, story_id: str, name: str, function: Callable[[], Awaitable[T]]) -> T:
        attempt = 0
        repeats: Counter[str] = Counter()
        while True:
            try:
                result = await self._until_cancelled(story_id, function())
                await self._go_on(story_id)
                return result
            except Stopped:
                raise
            except StoryNotFound:
                raise Stopped from None
            except FabulaError as found:
                error = found
            except Exception as found:
                log.error("step_failed", step=name, exc_info=found)
                error = Internal(f"the step {name} failed unexpectedly; the log has the details")
            attempt += 1
            repeats[error.reason] += 1
            decision = decide(
                error,
                attempt=attempt,
                repeats=repeats[error.reason],
                first_s=self._settings.retry_first_s,
                most_s=self._settings.retry_most_s,
                random=random.random(),
            )
            if isinstance(decision, GiveUp):
                log.warning("step_given_up", step=name, reason=decision.error.reason, attempt=attempt)
                raise decision.error
            RETRIES.labels(reason=error.reason).inc()
            log.info("step_tried_again", step=name, reason=error.reason, attempt=attempt, after_s=decision.after_s)
            if decision.waiting:
                await self._wait_openly(story_id, error)
            await self._until_cancelled(story_id, asyncio.sleep(decision.after_s))

    async def _until_cancelled(self, story_id: str, work: Awaitable[T]) -> T:
        """The work's result. Raises Stopped, with the work cancelled, as soon as the story has ended."""
        task = asyncio.ensure_future(work)
        ended = asyncio.create_task(self._ended(story_id))
        try:
            await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise Stopped
        finally:
            ended.cancel()
            task.cancel()
            await asyncio.gather(task, ended, return_exceptions=True)

    async def _ended(self, story_id: str) -> None:
        """Returns when the story is over: at once if this process ended it, else when the database says so."""
        cancelled = self._cancels[story_id]
        while not cancelled.is_set():
            try:
                async with asyncio.timeout(self._settings.poll_s):
                    await cancelled.wait()
            except TimeoutError:
                try:
                    if (await self._repository.state(story_id)).ended:
                        return
                except StoryNotFound:
                    return
                except FabulaError as error:
                    log.warning("cancel_poll_failed", reason=error.reason)

    async def _wait_openly(self, story_id: str, error: FabulaError) -> None:
        """Shows that the story waits. A full disk may refuse even that; the story then waits without saying so."""
        if story_id in self._waiting:
            return
        try:
            moved = await self._repository.change_state(
                story_id,
                State.WAITING,
                only_from={State.RUNNING},
                reason=error.reason,
                message=f"{error.message} The story goes on by itself when that is over.",
            )
        except FabulaError as second:
            log.warning("waiting_not_shown", reason=second.reason)
            return
        self._waiting.add(story_id)
        if moved:
            WAITS.labels(reason=error.reason).inc()
            self._broadcaster.durable(story_id)

    async def _go_on(self, story_id: str) -> None:
        """Shows that the story no longer waits, if it said that it did."""
        if story_id not in self._waiting:
            return
        await self._repository.change_state(story_id, State.RUNNING, only_from={State.WAITING})
        self._waiting.discard(story_id)
        self._broadcaster.durable(story_id)

    # -- the steps ---------------------------------------------------------------------------------------------------

    async def _begin(self, story_id: str) -> dict[str, Any]:
        if await self._repository.change_state(story_id, State.RUNNING, only_from={State.QUEUED}):
            self._broadcaster.durable(story_id)
        story = await self._repository.get(story_id)
        if story.state.ended:
            raise Stopped
        given, options = story.frames[0], story.options
        return {
            "options": options_to_json(options),
            "caption": given.caption,
            "image_sha256": given.image_sha256,
        }

    async def _write_caption(self, story_id: str, options: Options, command: WriteCaption) -> str:
        frame = await self._repository.frame(story_id, command.frame_index)
        if frame is not None:
            return frame.caption
        started = time.monotonic()
        written = await self._caption.write_caption(
            pack=options.pack,
            image=await self._store.get(command.image_sha256),
            captions=command.captions,
            characters=options.characters,
            seed=command.seed,
            temperature=options.temperature,
        )
        strange = characters.unfamiliar(written.warnings, options.characters)
        await self._warn(story_id, strange, {"captions[0]": "caption"})
        kept = await self._repository.write_caption(
            story_id,
            command.frame_index,
            caption=written.text,
            seed=command.seed,
            duration_s=time.monotonic() - started,
        )
        return self._committed(story_id, kept)

    async def _describe(self, story_id: str, options: Options, command: Describe) -> str:
        frame = await self._repository.frame(story_id, command.frame_index)
        if frame is not None and frame.description is not None:
            return frame.description
        started = time.monotonic()
        written = await self._caption.describe(
            pack=options.pack,
            image=await self._store.get(command.image_sha256),
            previous_caption=command.previous_caption,
            caption=command.caption,
            earlier_captions=command.earlier_captions,
            earlier_descriptions=command.earlier_descriptions,
            characters=options.characters,
            seed=command.seed,
            temperature=options.temperature,
        )
        users = {"previous_caption": "caption"} if command.frame_index == 1 else {}
        await self._warn(story_id, characters.unfamiliar(written.warnings, options.characters), users)
        kept = await self._repository.write_description(
            story_id,
            command.frame_index,
            description=written.text,
            seed=command.seed,
            duration_s=time.monotonic() - started,
        )
        return self._committed(story_id, kept)

    async def _render(self, story_id: str, options: Options, command: Render) -> dict[str, Any]:
        def pass_on(what: Passing) -> None:
            self._broadcaster.passing(story_id, what)

        references = [(await self._store.get(ref.image_sha256), ref.description) for ref in command.references]
        given = next((number for number, ref in enumerate(command.references) if ref.given), None)
        drawn = await self._frame.render(
            frame_index=command.frame_index,
            pack=options.pack,
            description=command.description,
            references=references,
            given=given,
            seed=command.seed,
            steps=options.steps,
            text_guidance=options.text_guidance,
            image_guidance=options.image_guidance,
            quality=options.quality,
            characters=[one.weights_sha256 for one in characters.drawn_in(options.characters, command.description)],
            on_passing=pass_on,
        )
        # Kept apart from drawing: when the disk is full, only this is tried again and the picture is not drawn twice.
        sha256 = await self._try(story_id, "keep_picture", lambda: self._store.put(drawn.image))
        await self._warn(story_id, drawn.warnings, {f"references[{given}].image": "image"})
        return {
            "image_sha256": sha256,
            "width_px": drawn.width_px,
            "height_px": drawn.height_px,
            "image_seed": command.seed,
            "queue_s": drawn.queue_s,
            "render_s": drawn.render_s,
            "pack_digest": drawn.pack_digest,
            "engine_fingerprint": drawn.engine_fingerprint,
            "steps": drawn.steps,
            "text_guidance": drawn.text_guidance,
            "image_guidance": drawn.image_guidance,
        }

    async def _commit(self, story_id: str, _options: Options, command: Commit, drawn: dict[str, Any]) -> str:
        defaults = {name: drawn[name] for name in ("steps", "text_guidance", "image_guidance")}
        columns = {name: value for name, value in drawn.items() if name not in defaults}
        kept = await self._repository.commit_frame(story_id, command.frame_index, columns, defaults)
        return self._committed(story_id, kept)

    async def _end(self, story_id: str, state: str, reason: str, message: str) -> None:
        if await self._repository.change_state(
            story_id, State(state), only_from=ACTIVE, reason=reason, message=message
        ):
            ENDED.labels(state=state).inc()
            self._broadcaster.durable(story_id)
            log.info("story_ended", state=state, reason=reason)

    async def _warn(self, story_id: str, told: Iterable[StoryWarning], users: Mapping[str, str]) -> None:
        """Keeps the warnings about what the user gave; `users` is what the services call that, and what the user does.

        What else a service warns about was written or drawn by the pack itself. Before the step's own result is kept,
        or a crash in between would lose them.
        """
        given = [replace(each, field=users[each.field]) for each in told if each.field in users]
        if not given:
            return
        is_new: bool = await self._try(story_id, "warn", lambda: self._repository.warn(story_id, given))
        if is_new:
            self._broadcaster.durable(story_id)

    def _committed(self, story_id: str, kept: str | None) -> str:
        if kept is None:
            raise Stopped
        self._broadcaster.durable(story_id)
        return kept
