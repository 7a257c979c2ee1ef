"""The weights store: characters' adapters on their way from the object store over memory to the slots of a network.

`AdapterStore` keeps checked adapters in memory, by the digest of their file. Whoever submits a job loads what it wears,
off the engine's thread, so that files are read and checked behind running steps, and a bad one is refused before it
touches a batch. `SlotTable` says which adapter lies in which slot of the network: what a job that is drawn wears is
never put out, of the others the one that was worn longest ago goes first.

An adapter that nobody holds any more is only a Python object without references: nothing can be used after it is gone.
While somebody holds it, nobody reads it a second time.

Whole networks are another matter: each takes as much memory as the pack's own, so `NetworkPlaces` counts them before
they are read, and sees to it that those which everybody asks for leave their places to others in turn.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

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
        self._held: WeakValueDictionary[tuple[str, str], Adapter] = WeakValueDictionary()  # by anybody, also elsewhere
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
                with self._lock:
                    shelf.adapter = self._held.get(key)  # put out for want of room, and still worn
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
                    self._held[key] = shelf.adapter
            adapter = shelf.adapter
        with self._lock:
            self._trim(key)
        return adapter

    def has(self, pack: str, digest: str) -> bool:
        """Whether it can be had without reading it."""
        with self._lock:
            shelf = self._shelves.get((pack, digest))
            return (shelf is not None and shelf.adapter is not None) or (pack, digest) in self._held

    def drop(self, digest: str) -> bool:
        """Keep an adapter no longer, of whatever pack; was it kept? Those who have it go on having it."""
        with self._lock:
            keys = [key for key in self._shelves if key[1] == digest]
            for key in keys:
                del self._shelves[key]
            for key in [key for key in self._held if key[1] == digest]:
                del self._held[key]
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


class NetworkPlaces:
    """Places for networks that characters brought, by key. Pure; whoever has it holds a lock.

    A network has its place while anybody uses it. Whoever finds all taken stands in line from then on, for as long as
    it goes on asking; once the first in line has stood there for `patience_s`, the network that has been there longest
    takes nobody new, until its last user has left and its place is free.
    """

    def __init__(self, count: int, *, patience_s: float = 5.0, forgotten_s: float = 30.0) -> None:
        """`forgotten_s`: who has not asked for so long stands in line no more."""
        self.count, self._patience_s, self._forgotten_s = count, patience_s, forgotten_s
        self._users: Counter[Hashable] = Counter()
        self._since_s: dict[Hashable, float] = {}
        self._line: dict[Hashable, tuple[float, float]] = {}  # asked first and last, in order of the first

    def enter(self, key: Hashable, now_s: float) -> bool:
        """One more user of a network, if it may."""
        self._line = {one: at for one, at in self._line.items() if one == key or now_s - at[1] <= self._forgotten_s}
        ahead = [asked_s for one, (asked_s, _) in self._line.items() if one != key]
        if key in self._users:
            leaves = min(self._since_s, key=lambda one: self._since_s[one]) == key
            is_full = len(self._users) >= self.count
            if is_full and leaves and ahead and now_s - ahead[0] >= self._patience_s:
                return False
        else:
            first_s, _ = self._line.get(key, (now_s, now_s))
            before = sum(1 for asked_s in ahead if asked_s < first_s)
            if len(self._users) + before >= self.count:
                self._line[key] = (first_s, now_s)
                return False
            self._line.pop(key, None)
            self._since_s[key] = now_s
        self._users[key] += 1
        return True

    def leave(self, key: Hashable) -> None:
        """One user less. Raises ValueError for a network that nobody uses."""
        if key not in self._users:
            raise ValueError(f"nobody uses {key!r}")
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key], self._since_s[key]


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
