"""Changes to adapters, from a checked request to what this control plane serves: import, publish, wait until it is served here.

Knows the registry and the store; nothing of gRPC. Each method returns the record as it then is.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from adapter_store.geometry import BaseGeometry
from adapter_store.image import AdapterImage
from controlplane.errors import EtagMismatchError, NotFoundError, UnavailableError
from controlplane.registry.directory import ADAPTER_TYPE, AdapterDirectory, find_version
from controlplane.registry.image_keeper import ImageKeeper
from controlplane.registry.pinning import Pinning
from controlplane.registry.records import AdapterRecord, Change, Revision, VersionRecord, base_key
from controlplane.registry.redis_registry import RedisRegistry, RequestMark, name_taken

# An adapter keeps this many versions; beyond it the oldest that is neither current nor aliased goes.
MAX_VERSIONS = 64
WRITE_ATTEMPTS = 8
# The feed brings a change in milliseconds; this is for a Redis that dies just after it took it.
SERVED_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class NewAdapter:
    """What is to be published under a new name."""

    name: str
    aliases: tuple[str, ...]
    labels: Mapping[str, str]
    tenant: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class AdapterEdit:
    """Changes to an adapter; None leaves a part as it is. Alias targets are digests, their prefixes, or empty for current."""

    image: AdapterImage | None = None
    labels: Mapping[str, str] | None = None
    aliases: Mapping[str, str] | None = None
    current_version: str | None = None


class RegistryWriter:
    """Makes every change of the registry that a client asks for."""

    def __init__(
        self,
        registry: RedisRegistry,
        directory: AdapterDirectory,
        images: ImageKeeper,
        pinning: Pinning,
        geometry: Callable[[], BaseGeometry | None],
    ) -> None:
        self._registry = registry
        self._directory = directory
        self._images = images
        self._pinning = pinning
        self._geometry = geometry
        # From the look at the pinned pages to the pin.
        self._pin_lock = asyncio.Lock()

    async def expect_free(self, new: NewAdapter, *, in_redis: bool) -> None:
        """Before the work of an import: raises AlreadyExistsError if the name or an alias is taken, and, asked to look in Redis
        too, UnavailableError if that is away. Publishing decides."""
        for name in (new.name, *new.aliases):
            owner = self._directory.owner_of(name)
            if owner is not None:
                raise name_taken(name, owner)
        if in_redis and await self._registry.get(new.name) is not None:
            raise name_taken(new.name, new.name)

    def draft(self, new: NewAdapter, image: AdapterImage) -> AdapterRecord:
        """The record that `publish` would make."""
        version = self._version(image)
        return AdapterRecord(
            name=new.name,
            current=version.digest,
            versions=(version,),
            etag=_new_etag(),
            create_time_us=version.create_time_us,
            update_time_us=version.create_time_us,
            aliases=dict.fromkeys(new.aliases, version.digest),
            labels=dict(new.labels),
            tenant=new.tenant,
            pinned=new.pinned,
        )

    def check_room(self, record: AdapterRecord) -> None:
        """Raises ResourceExhaustedError if a pinned record takes too many pages."""
        if record.pinned:
            self._pinning.check_room(record)

    async def publish(self, record: AdapterRecord, image: AdapterImage, request: RequestMark | None) -> AdapterRecord:
        """Stores the image, then publishes the record."""
        async with self._images.stored(image):
            if not record.pinned:
                return await self._served(await self._registry.add(record, request))
            async with self._pin_lock:
                self.check_room(record)
                return await self._served(await self._registry.add(record, request))

    async def edit(self, name: str, edit: AdapterEdit, etag: str, request: RequestMark | None) -> AdapterRecord:
        """Applies an edit to the adapter as it is in Redis."""
        if edit.image is None:
            return await self._change(name, etag, lambda old: self._edited(old, edit), request)
        async with self._images.stored(edit.image):
            return await self._change(name, etag, lambda old: self._edited(old, edit), request)

    async def set_pinned(self, name: str, pinned: bool) -> AdapterRecord:
        """Pins or unpins."""
        return await self._change(name, "", lambda old: replace(old, pinned=pinned))

    async def remove(self, name: str, etag: str, *, force: bool) -> AdapterRecord:
        """Unpublishes; from its return on this control plane answers NOT_FOUND."""
        record = await self.read(name)
        return await self._served(await self._registry.remove(record, etag, force=force))

    async def answered(self, request: RequestMark | None) -> AdapterRecord | None:
        """What a repeated request was answered the first time."""
        change = await self._registry.answered(request) if request else None
        return await self._served(change) if change else None

    async def read(self, name: str) -> AdapterRecord:
        """The adapter as it is in Redis. Raises NotFoundError."""
        record = await self._registry.get(name)
        if record is None:
            owner = self._directory.owner_of(name)
            hint = f"; it is an alias of {owner!r}, which can be changed by its name" if owner not in (None, name) else ""
            raise NotFoundError(ADAPTER_TYPE, name, f"no adapter is called {name!r}{hint}", reason="ADAPTER_NOT_FOUND")
        return record

    async def _change(
        self, name: str, etag: str, edit: Callable[[AdapterRecord], AdapterRecord], request: RequestMark | None = None
    ) -> AdapterRecord:
        """Reads, edits and writes; again if somebody was faster and the caller did not insist on an etag."""
        async with self._pin_lock:
            for attempt in range(1, WRITE_ATTEMPTS + 1):
                old = await self.read(name)
                if etag and etag != old.etag:
                    raise EtagMismatchError(name, etag, old.etag)
                new = edit(old)
                if new == old:
                    return old
                self.check_room(new)
                new = replace(new, etag=_new_etag(), update_time_us=max(_now_us(), old.update_time_us + 1))
                try:
                    return await self._served(await self._registry.replace(new, old.etag, request))
                except EtagMismatchError:
                    if etag or attempt == WRITE_ATTEMPTS:
                        raise
        raise AssertionError("unreachable")

    def _edited(self, old: AdapterRecord, edit: AdapterEdit) -> AdapterRecord:
        new = old
        if edit.image is not None:
            new = _with_version(old, self._version(edit.image))
        if edit.current_version is not None:
            new = replace(new, current=find_version(new, edit.current_version, "current_version").digest)
        if edit.labels is not None:
            new = replace(new, labels=dict(edit.labels))
        if edit.aliases is not None:
            targets = {
                alias: find_version(new, prefix, f"aliases.{alias}").digest if prefix else new.current
                for alias, prefix in edit.aliases.items()
            }
            new = replace(new, aliases=targets)
        return _without_surplus(new)

    async def _served(self, change: Change) -> AdapterRecord:
        await self._reached(change.revision)
        return change.record

    async def _reached(self, revision: Revision) -> None:
        try:
            async with asyncio.timeout(SERVED_TIMEOUT_S):
                await self._directory.reached(revision)
        except TimeoutError:
            raise UnavailableError(
                f"the registry took the change (revision {revision}) and went away before this control plane served it; retry",
                reason="REGISTRY_AWAY",
            ) from None

    def _version(self, image: AdapterImage) -> VersionRecord:
        geometry = self._geometry()
        assert geometry is not None, "an image was imported, so the base is known"
        header = image.header
        return VersionRecord(
            digest=image.digest,
            base_model=header.base_model,
            rank=header.rank,
            alpha=header.alpha,
            rslora=header.rslora,
            target_modules=header.target_modules,
            size_bytes=header.size_bytes,
            num_pages=header.num_pages,
            base_key=base_key(geometry),
            create_time_us=_now_us(),
        )


def _with_version(old: AdapterRecord, version: VersionRecord) -> AdapterRecord:
    """The same weights again are the version they were; only the name may serve another one now."""
    if version.digest in old.digests:
        return replace(old, current=version.digest)
    return replace(old, current=version.digest, versions=(*old.versions, version))


def _without_surplus(record: AdapterRecord) -> AdapterRecord:
    kept = list(record.versions)
    needed = {record.current, *record.aliases.values()}
    while len(kept) > MAX_VERSIONS and (oldest := next((v for v in kept if v.digest not in needed), None)):
        kept.remove(oldest)
    return replace(record, versions=tuple(kept))


def _new_etag() -> str:
    return secrets.token_hex(8)


def _now_us() -> int:
    return time.time_ns() // 1000
