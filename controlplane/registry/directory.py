"""The in-memory copy of all adapters from which requests are served, and the count of requests that use each version.

Knows nothing of Redis: `DirectorySync` keeps it in step. Everything here belongs to the event loop's thread and what changes it
is synchronous, so a name is resolved and its weights are held in one indivisible turn.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable
from itertools import islice
from types import TracebackType
from typing import TypeVar

from controlplane.errors import InvalidArgumentError, NotFoundError, PreconditionError, PreconditionViolation
from controlplane.messages import AdapterRef
from controlplane.registry.records import AdapterRecord, Change, ChangeKind, Revision, VersionRecord

K = TypeVar("K")

ADAPTER_TYPE = "loraplane.v1.Adapter"
MIN_DIGEST_PREFIX = 8
# Changes kept in memory for watchers; older ones are read from the registry.
DEFAULT_HISTORY = 1024


class AdapterLease:
    """Holds one version for one request from its arrival to its end; weights are deleted only when no lease is left."""

    __slots__ = ("_directory", "_released", "ref", "version")

    def __init__(self, directory: "AdapterDirectory", ref: AdapterRef, version: VersionRecord) -> None:
        self._directory = directory
        self._released = False
        self.ref = ref
        self.version = version

    @property
    def is_revoked(self) -> bool:
        """Whether the version was unregistered by force meanwhile: what has not begun with it must not begin."""
        return self._directory.is_revoked(self.ref.digest)

    def release(self) -> None:
        """Gives the version back. A second call does nothing."""
        if not self._released:
            self._released = True
            self._directory._release(self.ref)

    def __enter__(self) -> "AdapterLease":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


class AdapterDirectory:
    """All adapters by name and alias, and who uses them.

    `base_key` tells what the connected base model is (None while it is not known): versions packed for another are refused.
    """

    def __init__(self, base_key: Callable[[], str | None] = lambda: None, *, history: int = DEFAULT_HISTORY) -> None:
        self._base_key = base_key
        self._records: dict[str, AdapterRecord] = {}
        self._owners: dict[str, str] = {}  # name or alias -> name
        self._names: dict[str, set[str]] = {}  # digest -> names of the adapters that have it as a version
        self._leases: Counter[tuple[str, str]] = Counter()  # (digest, name) -> requests
        self._digest_leases: Counter[str] = Counter()
        self._revoked: set[str] = set()  # leased digests that no adapter has any more, the last one removed by force
        self._failures: dict[str, str] = {}  # digest -> why it cannot be served
        self._changes: deque[Change] = deque(maxlen=history)
        self._listeners: list[Callable[[Change], None]] = []
        self._idle_listeners: list[Callable[[str], None]] = []
        self._changed = asyncio.Event()
        self._released = asyncio.Event()
        self.revision = Revision("0", 0)

    # Reading.

    def resolve(self, name: str, field: str = "adapter") -> AdapterLease:
        """Takes a lease on what a request names: name, name@version (digest or at least 8 of its first digits) or alias.

        Raises:
            NotFoundError: no such adapter or version.
            InvalidArgumentError: the version is malformed, or several begin like that; `field` is what it is about.
            PreconditionError: the version cannot be served here.
        """
        record, version = self.find(name, field)
        self._check_servable(record, version)
        ref = AdapterRef(name=record.name, digest=version.digest, num_pages=version.num_pages)
        self._leases[ref.digest, ref.name] += 1
        self._digest_leases[ref.digest] += 1
        return AdapterLease(self, ref, version)

    def find(self, name: str, field: str = "name") -> tuple[AdapterRecord, VersionRecord]:
        """The adapter and the version that a name, name@version or alias means, without a lease. Raises as `resolve`."""
        owner, at, prefix = name.partition("@")
        record = self._records.get(self._owners.get(owner, ""))
        if record is None:
            raise NotFoundError(ADAPTER_TYPE, name, f"no adapter or alias is called {owner[:200]!r}", reason="ADAPTER_NOT_FOUND")
        if at:
            return record, find_version(record, prefix, field)
        return record, record.version(record.aliases.get(owner, record.current))

    def get(self, name: str) -> AdapterRecord | None:
        """The adapter of exactly that name, aliases apart."""
        return self._records.get(name)

    def owner_of(self, name: str) -> str | None:
        """The adapter that a name or alias belongs to, if it is taken."""
        return self._owners.get(name)

    def records(self) -> list[AdapterRecord]:
        """All adapters, in no order."""
        return list(self._records.values())

    def names_of(self, digest: str) -> tuple[str, ...]:
        """Names of the adapters that have this version, in order; empty once the last is unregistered."""
        return tuple(sorted(self._names.get(digest, ())))

    def failure_of(self, version: VersionRecord) -> str:
        """Why a version cannot be served here; empty when it can."""
        base_key = self._base_key()
        if base_key is not None and version.base_key != base_key:
            return (
                f"version {version.digest[:12]} was packed for base {version.base_key!r}, this service runs {base_key!r}; "
                "update the adapter from its source"
            )
        return self._failures.get(version.digest, "")

    def set_failure(self, digest: str, error: str) -> None:
        """Says why a version cannot be served; an empty error takes it back."""
        if error:
            self._failures[digest] = error
        else:
            self._failures.pop(digest, None)

    # Use counts.

    def num_leases(self, digest: str, name: str | None = None) -> int:
        """Requests that use a version, under one name or under any."""
        return self._digest_leases[digest] if name is None else self._leases[digest, name]

    def draining(self) -> frozenset[str]:
        """Versions that requests still use although no adapter has them any more."""
        return frozenset(digest for digest in self._digest_leases if digest not in self._names)

    def is_revoked(self, digest: str) -> bool:
        """Whether a leased version was unregistered by force."""
        return digest in self._revoked

    def on_idle(self, listener: Callable[[str], None]) -> None:
        """Calls `listener(digest)` whenever the last request that used a version is gone."""
        self._idle_listeners.append(listener)

    def _release(self, ref: AdapterRef) -> None:
        _decrement(self._leases, (ref.digest, ref.name))
        _decrement(self._digest_leases, ref.digest)
        if ref.digest not in self._digest_leases:
            self._revoked.discard(ref.digest)
            for listener in self._idle_listeners:
                listener(ref.digest)
        if (ref.digest, ref.name) not in self._leases:
            self._released.set()
            self._released = asyncio.Event()

    # Change.

    def on_change(self, listener: Callable[[Change], None]) -> None:
        """Calls `listener(change)` after each change has been applied; a replaced copy is told as the changes that lead to it."""
        self._listeners.append(listener)

    def apply(self, change: Change) -> None:
        """Applies the next change of the feed."""
        expected = Revision(self.revision.registry_id, self.revision.number + 1)
        assert change.revision == expected, f"change {change.revision} does not follow {self.revision}"
        self._put(change)
        self._changes.append(change)
        self.revision = change.revision
        self._tell(change)

    def replace(self, records: Iterable[AdapterRecord], revision: Revision) -> None:
        """Takes over a whole copy, at start or when the feed has a gap. Watchers from before must list again."""
        fresh = {record.name: record for record in records}
        changes = [Change(ChangeKind.DELETED, old, revision) for name, old in self._records.items() if name not in fresh]
        for name, record in fresh.items():
            old = self._records.get(name)
            if old is None or old != record:
                changes.append(Change(ChangeKind.MODIFIED if old else ChangeKind.ADDED, record, revision))
        for change in changes:
            self._put(change)
        self._changes.clear()
        self.revision = revision
        for change in changes:
            self._tell(change)
        self._wake()

    def changes_after(self, number: int) -> list[Change] | None:
        """Changes after that number which memory still holds all of; None if they must be read from the registry."""
        first = self.revision.number - len(self._changes)
        if number < first:
            return None
        return list(islice(self._changes, number - first, None))

    async def changed(self) -> None:
        """Returns after the next change."""
        await self._changed.wait()

    async def reached(self, revision: Revision) -> None:
        """Returns once this copy holds the change of that revision, or has been replaced by another registry's."""
        while self.revision.registry_id == revision.registry_id and self.revision.number < revision.number:
            await self._changed.wait()

    async def drained(self, name: str, digests: Iterable[str]) -> None:
        """Returns once no request uses these versions under that name."""
        waited_for = tuple(digests)
        while any(self._leases[digest, name] for digest in waited_for):
            await self._released.wait()

    def check_integrity(self) -> None:
        """Asserts that the indexes say the same as the records and the counts."""
        owners = {alias: r.name for r in self._records.values() for alias in (r.name, *r.aliases)}
        assert owners == self._owners, f"names {self._owners} should be {owners}"
        names: dict[str, set[str]] = {}
        for record in self._records.values():
            for digest in record.digests:
                names.setdefault(digest, set()).add(record.name)
        assert names == self._names, f"digests {self._names} should be {names}"
        totals: Counter[str] = Counter()
        for (digest, _), count in self._leases.items():
            assert count > 0, f"{count} leases on {digest}"
            totals[digest] += count
        assert totals == self._digest_leases, f"leases {self._digest_leases} should be {totals}"
        assert self._revoked <= self._digest_leases.keys() - self._names.keys(), f"revoked {self._revoked}"

    def _put(self, change: Change) -> None:
        name = change.record.name
        old = self._records.pop(name, None)
        if old is not None:
            for taken in (name, *old.aliases):
                # An alias may already belong to another adapter while a replaced copy is being put together.
                if self._owners.get(taken) == name:
                    del self._owners[taken]
            for digest in old.digests:
                self._names[digest].discard(name)
                if not self._names[digest]:
                    del self._names[digest]
        if change.kind is ChangeKind.DELETED:
            if change.force:
                self._revoked |= {d for d in change.record.digests if d in self._digest_leases and d not in self._names}
        else:
            self._revoked -= change.record.digests
            self._records[name] = change.record
            self._owners.update(dict.fromkeys((name, *change.record.aliases), name))
            for digest in change.record.digests:
                self._names.setdefault(digest, set()).add(name)

    def _tell(self, change: Change) -> None:
        for listener in self._listeners:
            listener(change)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _check_servable(self, record: AdapterRecord, version: VersionRecord) -> None:
        error = self.failure_of(version)
        if error:
            raise PreconditionError(
                f"adapter {record.name!r} cannot be served: {error}",
                [PreconditionViolation("ADAPTER_FAILED", record.name, error)],
                reason="ADAPTER_FAILED",
                metadata={"name": record.name, "version": version.digest},
            )


def find_version(record: AdapterRecord, prefix: str, field: str) -> VersionRecord:
    """The one version of an adapter whose digest begins like this. Raises as `AdapterDirectory.resolve`."""
    if len(prefix) < MIN_DIGEST_PREFIX or any(c not in "0123456789abcdef" for c in prefix):
        raise InvalidArgumentError.of(
            field, f"version {prefix[:80]!r} must be at least {MIN_DIGEST_PREFIX} lower-case hex digits of a digest"
        )
    found = [v for v in record.versions if v.digest.startswith(prefix)]
    if not found:
        known = ", ".join(v.digest[:12] for v in record.versions[-5:])
        raise NotFoundError(
            f"{ADAPTER_TYPE}Version",
            f"{record.name}@{prefix[:80]}",
            f"adapter {record.name!r} has no version {prefix[:80]!r}; the newest are {known}",
            reason="VERSION_NOT_FOUND",
        )
    if len(found) > 1:
        raise InvalidArgumentError.of(
            field, f"version {prefix!r} of {record.name!r} is ambiguous: {', '.join(v.digest for v in found)}"
        )
    return found[0]


def _decrement(counts: Counter[K], key: K) -> None:
    counts[key] -= 1
    assert counts[key] >= 0, f"{key} released more often than taken"
    if not counts[key]:
        del counts[key]
