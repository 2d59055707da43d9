"""Watches of the registry: changes in order from any kept revision on, and news of where adapters lie.

A watch is a position in the history, not a queue: a slow reader costs nothing, and one that falls behind all history is told so.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from controlplane.errors import OutOfRangeError, ResourceExhaustedError
from controlplane.registry.adapter_control import AdapterControl
from controlplane.registry.directory import AdapterDirectory
from controlplane.registry.records import AdapterRecord, Change, ChangeKind, Revision
from controlplane.registry.redis_registry import RedisRegistry

MAX_WATCHES = 256
BATCH = 100


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """What a watcher is told. `revision` is None while the adapters known at the start are not all sent yet."""

    kind: ChangeKind
    record: AdapterRecord
    revision: Revision | None


class _Watch:
    """One watcher's unsent news: whether there was a change, and adapters whose weights moved (each once)."""

    __slots__ = ("moved", "wake")

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.moved: set[str] = set()


class WatchHub:
    """All watches of one control plane."""

    def __init__(self, registry: RedisRegistry, directory: AdapterDirectory, control: AdapterControl) -> None:
        self._registry = registry
        self._directory = directory
        self._watches: set[_Watch] = set()
        directory.on_change(self._on_change)
        control.on_residency_change(self._on_residency_change)

    async def events(self, start: Revision | None) -> AsyncGenerator[WatchEvent, None]:
        """Everything after `start` without end; without a start, first every adapter as ADDED.

        Raises:
            ResourceExhaustedError: too many watches.
            OutOfRangeError: history does not reach back to `start`, or the reader fell behind it.
            UnavailableError: history must be read from the registry, and that is away.
        """
        if len(self._watches) >= MAX_WATCHES:
            raise ResourceExhaustedError(
                f"{len(self._watches)} watches are open; at most {MAX_WATCHES} may be",
                subject="watches",
                reason="TOO_MANY_WATCHES",
            )
        watch = _Watch()
        self._watches.add(watch)
        try:
            cursor = start
            if cursor is None:
                cursor = self._directory.revision
                records = sorted(self._directory.records(), key=lambda r: r.name)
                for index, record in enumerate(records, start=1):
                    yield WatchEvent(ChangeKind.ADDED, record, cursor if index == len(records) else None)
            while True:
                watch.wake.clear()
                changes = await self._changes_after(cursor)
                for change in changes:
                    cursor = change.revision
                    yield WatchEvent(change.kind, change.record, cursor)
                if changes:
                    continue
                moved, watch.moved = watch.moved, set()
                for name in sorted(moved):
                    if (known := self._directory.get(name)) is not None:
                        yield WatchEvent(ChangeKind.MODIFIED, known, cursor)
                await watch.wake.wait()
        finally:
            self._watches.discard(watch)

    async def _changes_after(self, cursor: Revision) -> list[Change]:
        here = self._directory.revision
        if cursor.registry_id != here.registry_id:
            raise OutOfRangeError(
                f"revision {cursor} belongs to another registry; list again and watch from the revision of the list",
                reason="REVISION_GONE",
                metadata={"revision": str(cursor)},
            )
        if cursor == here:
            return []
        # Ahead of this control plane, if the client watched another one before: the registry knows whether that can be.
        changes = None if cursor.number > here.number else self._directory.changes_after(cursor.number)
        return changes if changes is not None else await self._registry.changes_after(cursor, BATCH)

    def _on_change(self, _: Change) -> None:
        for watch in self._watches:
            watch.wake.set()

    def _on_residency_change(self, digest: str) -> None:
        names = [n for n in self._directory.names_of(digest) if (r := self._directory.get(n)) and r.current == digest]
        if names:
            for watch in self._watches:
                watch.moved.update(names)
                watch.wake.set()
