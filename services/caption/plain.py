"""Drives a captioner in plain transformers: for networks that vLLM does not serve (BLIP, MPT and other baselines).

`PlainDriver` is a `Driver` like vLLM's. Its thread gives every request in flight one token in turn, so a long answer
delays nobody and a cancelled one costs at most one token more. A request is a batch of one with a generator of its
own: the same request gives the same tokens, alone or among others. Slower than vLLM by far; for comparisons, and for
small models. Knows no prompt and no transport.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog
import torch

from services.caption.driver import Ask, DriverSettings, InProcessDriver, Reply, prepare_environment
from services.caption.job import Finish
from services.models.captions.writers import State, Writer, choose, load_writer

log = structlog.get_logger("fabula.caption")


class PlainDriver(InProcessDriver):
    """transformers stepped by one thread. See `Driver`."""

    def __init__(self, settings: DriverSettings, architecture: str) -> None:
        """`architecture` is a name of `writers.WRITERS`."""
        super().__init__(settings)
        self._architecture = architecture

    def _load(self) -> None:
        prepare_environment(self._settings)
        torch.set_num_threads(self._settings.threads)
        try:
            writer = load_writer(
                self._architecture,
                self._settings.base,
                dtype=getattr(torch, self._settings.dtype),
                device="cuda" if self._settings.on_gpu else "cpu",
            )
        except Exception as error:
            log.exception("captioner_cannot_start")
            raise RuntimeError(f"the captioner cannot start: {type(error).__name__}: {error}") from None
        self._engine = PlainEngine(writer)

    def _submit(self, number: str, ask: Ask) -> None:
        self._engine.add_request(number, ask)

    def _finished(self) -> list[tuple[str, Callable[[Ask], Reply]]]:
        return [(number, partial(_as_it_is, reply)) for number, reply in self._engine.step()]


def _as_it_is(reply: Reply, ask: Ask) -> Reply:
    return reply


@dataclass
class _Answer:
    """One that is being written."""

    ask: Ask
    state: State
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)


class PlainEngine:
    """What vLLM's engine does for many requests, one row at a time. Only ever called by one thread."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._answers: dict[str, _Answer] = {}
        self.engine_core: Any = self  # who stops vLLM's engine asks for its core

    @torch.inference_mode()
    def add_request(self, number: str, ask: Ask) -> None:
        """Takes a request. Raises ValueError for one with an adapter: none is worn here."""
        if ask.adapter is not None:
            raise ValueError(f"adapter {ask.adapter!r} cannot be worn without vLLM")
        state = self._writer.begin(ask.ids, ask.image)
        self._answers[number] = _Answer(ask, state, torch.Generator().manual_seed(ask.seed))

    def abort_request(self, numbers: list[str]) -> None:
        """Forgets requests."""
        for number in numbers:
            self._answers.pop(number, None)

    @torch.inference_mode()
    def step(self) -> list[tuple[str, Reply]]:
        """One more token of every answer; those that are finished."""
        finished = []
        for number, answer in list(self._answers.items()):
            finish = self._advance(answer)
            if finish is not None:
                del self._answers[number]
                reply = Reply(ids=tuple(answer.ids), finish=finish, prompt_tokens=len(answer.ask.ids))
                finished.append((number, reply))
        return finished

    def shutdown(self) -> None:
        """Forgets everything."""
        self._answers.clear()

    def _advance(self, answer: _Answer) -> Finish | None:
        ask = answer.ask
        token = choose(
            self._writer.logits(answer.state),
            temperature=ask.temperature,
            top_p=ask.top_p,
            generator=answer.generator,
            forbidden=ask.forbidden_ids,
        )
        if token in ask.stop_ids:
            return Finish.STOP
        answer.ids.append(token)
        answer.state.take(token)
        return Finish.LENGTH if len(answer.ids) >= ask.max_tokens else None
