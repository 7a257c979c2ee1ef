"""Decodes pictures whose last step is done, while the engine's thread goes on with those of others.

Of use where the host only tells a device what to do: a GPU decodes in a stream of its own between the steps' kernels,
and the picture is packed into its file meanwhile. On a CPU both would want the same cores.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import torch

WAITING_MAX = 2  # batches of pictures; with more, whoever hands over waits, so that memory stays bounded

Work = Callable[[], None]


class Decoding:
    """One thread, and on a GPU one stream."""

    def __init__(self, device: torch.device, *, done: Callable[[], None], clock: Callable[[], float]) -> None:
        """`done` is called in the thread here after each piece of work."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._done = done
        self._clock = clock
        self._waiting: queue.Queue[tuple[Work, torch.cuda.Event | None] | None] = queue.Queue(WAITING_MAX)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="frame-decoding", daemon=True)
        self.busy_since_s: float | None = None  # start of the work in hand; None while idle

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def broke(self) -> bool:
        """A piece of work raised: `collect` raises it again."""
        return self._error is not None

    def hand_over(self, work: Work) -> None:
        """`work` runs once the device has done what this thread told it so far. Waits while too much is waiting."""
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(self._device))
        self._waiting.put((work, ready))

    def hand_over_if_free(self, work: Work) -> bool:
        """The same for what can be left out or done elsewhere, without waiting; was it taken?"""
        if self._waiting.full():  # whoever hands over is one thread
            return False
        self.hand_over(work)
        return True

    def collect(self) -> None:
        """Raises what work raised."""
        if self._error is not None:
            raise self._error

    def close(self, timeout_s: float = 10.0) -> None:
        """Does what was handed over, and ends. A piece of work that hangs is left behind."""
        if not self._thread.is_alive():
            return
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (next_up := self._waiting.get()) is not None:
            self.busy_since_s = self._clock()
            try:
                self._do(*next_up)
            except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that collects
                self._error = error
            finally:
                self.busy_since_s = None
                self._done()

    def _do(self, work: Work, ready: torch.cuda.Event | None) -> None:
        if self._stream is None or ready is None:
            work()
            return
        # What `work` reads was made in another stream. It stays referenced until the host has the picture, and so until
        # this stream is done with it.
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            work()


__all__ = ["WAITING_MAX", "Decoding"]
