"""The weights store: characters' adapters on their way from the object store over memory to the slots of a network.

`AdapterStore` keeps checked adapters in memory, by the digest of their file. Whoever submits a job loads what it wears,
off the engine's thread, so that files are read and checked behind running steps, and a bad one is refused before it
touches a batch. `SlotTable` says which adapter lies in which slot of the network: what a job that is drawn wears is
never put out, of the others the one that was worn longest ago goes first.

An adapter that nobody holds any more is only a Python object without references: nothing can be used after it is gone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from services.models.lora import Adapter

Read = Callable[[], Adapter]
"""Fetches and checks one adapter; slow, may raise."""


@dataclass
class _Shelf:
    """One adapter in memory, or on its way there."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    adapter: Adapter | None = None


class AdapterStore:
    """Checked adapters in memory, least recently used out first. From any thread."""

    def __init__(self, budget_bytes: int) -> None:
        """`budget_bytes` is what it keeps for later; what jobs wear meanwhile they keep themselves."""
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._shelves: OrderedDict[tuple[str, str], _Shelf] = OrderedDict()
        self.loads_count = 0

    @property
    def kept_bytes(self) -> int:
        """Of all adapters that are kept."""
        with self._lock:
            return self._size_bytes()

    def get(self, pack: str, digest: str, read: Read) -> Adapter:
        """The adapter, read at most once however many want it at the same time. Raises what `read` raises."""
        key = (pack, digest)
        with self._lock:
            shelf = self._shelves.setdefault(key, _Shelf())
            self._shelves.move_to_end(key)
        with shelf.lock:  # others of the same digest wait here, everybody else goes on
            if shelf.adapter is None:
                try:
                    shelf.adapter = read()
                except BaseException:
                    with self._lock:
                        if self._shelves.get(key) is shelf:
                            del self._shelves[key]
                    raise
                with self._lock:
                    self.loads_count += 1
            adapter = shelf.adapter
        with self._lock:
            self._trim(key)
        return adapter

    def drop(self, digest: str) -> bool:
        """Keep an adapter no longer, of whatever pack; was it kept? Those who have it go on having it."""
        with self._lock:
            keys = [key for key in self._shelves if key[1] == digest]
            for key in keys:
                del self._shelves[key]
        return bool(keys)

    def _trim(self, newest: tuple[str, str]) -> None:
        for key in [key for key in self._shelves if key != newest]:
            if self._is_huge(key) and self._is_huge(newest):
                del self._shelves[key]
        for key in [key for key in self._shelves if key != newest and not self._is_huge(key)]:
            if self._size_bytes(huge=False) <= self._budget_bytes:
                return
            if self._shelves[key].adapter is not None:
                del self._shelves[key]

    def _is_huge(self, key: tuple[str, str]) -> bool:
        """Larger than the budget. The newest of those is kept beside it, so that it puts nobody else out."""
        shelf = self._shelves.get(key)
        return shelf is not None and shelf.adapter is not None and shelf.adapter.size_bytes > self._budget_bytes

    def _size_bytes(self, *, huge: bool = True) -> int:
        return sum(
            shelf.adapter.size_bytes
            for key, shelf in self._shelves.items()
            if shelf.adapter is not None and (huge or not self._is_huge(key))
        )


class SlotTable:
    """Which adapter lies in which of the slots 1 … `count`. Pure; the engine's thread only."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count, 0, -1))
        self._slots: OrderedDict[str, int] = OrderedDict()  # by digest, worn longest ago first
        self._wearers: dict[str, int] = {}

    @property
    def resident(self) -> tuple[str, ...]:
        """Digests that lie in slots, worn longest ago first."""
        return tuple(self._slots)

    def slot_of(self, digest: str) -> int | None:
        """Where an adapter lies."""
        return self._slots.get(digest)

    def wear(self, digest: str) -> tuple[int, bool] | None:
        """A slot for one more wearer, and whether it has to be filled first; None when every slot is worn."""
        if digest in self._slots:
            self._slots.move_to_end(digest)
            self._wearers[digest] = self._wearers.get(digest, 0) + 1
            return self._slots[digest], False
        if not self._free:
            unworn = next((other for other in self._slots if not self._wearers.get(other)), None)
            if unworn is None:
                return None
            self._free.append(self._slots.pop(unworn))
        self._slots[digest] = self._free.pop()
        self._wearers[digest] = 1
        return self._slots[digest], True

    def take_off(self, digests: Iterable[str]) -> None:
        """As many wearers less. The adapters stay until their slots are wanted."""
        for digest in digests:
            if self._wearers.get(digest, 0) < 1:
                raise ValueError(f"nobody wears {digest[:12]}")
            self._wearers[digest] -= 1
            if not self._wearers[digest]:
                del self._wearers[digest]

    def forget(self, digest: str) -> None:
        """Its slot could not be filled, or is not to be trusted: free it. Unknown digests are well."""
        slot = self._slots.pop(digest, None)
        self._wearers.pop(digest, None)
        if slot is not None:
            self._free.append(slot)
