"""Keeps the image store in step with the registry: an image is there before its adapter is published, and goes when no adapter
has it and no request of any control plane uses it.

The registry lists images without a name as garbage. Each control plane says by heartbeat up to which change it has seen the
registry and which nameless images its requests still use; an image is deleted when all that live agree. One that stops
saying so is taken for dead after MEMBER_TTL_S. A store belongs to one registry.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from adapter_store.image import AdapterImage
from adapter_store.image_store import ImageStore
from controlplane.errors import UnavailableError
from controlplane.registry.background_task import end_task
from controlplane.registry.directory import AdapterDirectory
from controlplane.registry.image_garbage import ImageGarbage
from controlplane.registry.records import Change, ChangeKind

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
MEMBER_TTL_S = 15
CLAIM_ATTEMPTS = 20
CLAIM_RETRY_S = 0.1


class ImageKeeper:
    """Puts images in, and takes them out when they are no longer needed."""

    def __init__(
        self, garbage: ImageGarbage, directory: AdapterDirectory, store: ImageStore, *, heartbeat_s: float = HEARTBEAT_S
    ) -> None:
        self._garbage = garbage
        self._directory = directory
        self._store = store
        self._heartbeat_s = heartbeat_s
        self._member = secrets.token_hex(8)
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        directory.on_change(self._on_change)
        directory.on_idle(self._on_idle)

    async def join(self) -> None:
        """Announces this control plane. Must come before the directory is filled: from then on nothing that it may serve is
        deleted behind its back."""
        await self._garbage.heartbeat(self._member, MEMBER_TTL_S, 0, ())

    async def start(self) -> None:
        """Notes which images are missing, and begins to collect."""
        stored = set(await asyncio.to_thread(self._store.digests))
        for record in self._directory.records():
            for digest in record.digests - stored:
                logger.error("image missing adapter=%s version=%s", record.name, digest)
                error = f"the image of version {digest[:12]} is missing from the store; update the adapter from its source"
                self._directory.set_failure(digest, error)
        self._task = asyncio.create_task(self._collect_forever(), name="image-keeper")

    async def close(self) -> None:
        """Stops collecting and takes leave of the other control planes."""
        if self._task is not None:
            await end_task(self._task)
            self._task = None
        with suppress(UnavailableError):
            await self._garbage.leave(self._member)

    @asynccontextmanager
    async def stored(self, image: AdapterImage) -> AsyncIterator[None]:
        """The image is in the store while the body publishes its adapter; if that fails, the image goes again.

        Raises:
            StoreFullError: no room.
        """
        await self._claim(image.digest)
        try:
            await asyncio.to_thread(self._store.publish, image)
            # Before the change is told: who hears of it may ask at once whether the version can be served.
            self._directory.set_failure(image.digest, "")
            yield
        except BaseException:
            # If this fails too, the claim runs out by itself.
            with suppress(UnavailableError):
                await asyncio.shield(self._garbage.unclaim(image.digest))
            self._wake.set()
            raise

    async def collect(self) -> list[str]:
        """One heartbeat, then deletes what nobody needs; returns what it deleted."""
        seen, draining = self._directory.revision.number, self._directory.draining()
        garbage = await self._garbage.heartbeat(self._member, MEMBER_TTL_S, seen, draining)
        deleted = []
        for digest in garbage:
            if self._directory.num_leases(digest) or not await self._garbage.may_delete(digest):
                continue
            await asyncio.to_thread(self._store.delete, digest)
            await self._garbage.deleted(digest)
            self._directory.set_failure(digest, "")
            logger.info("image deleted version=%s", digest)
            deleted.append(digest)
        return deleted

    async def _claim(self, digest: str) -> None:
        for _ in range(CLAIM_ATTEMPTS):
            if await self._garbage.claim(digest):
                return
            await asyncio.sleep(CLAIM_RETRY_S)  # its deletion is under way
        raise UnavailableError(
            f"the same weights (version {digest[:12]}) are being deleted since {CLAIM_ATTEMPTS * CLAIM_RETRY_S:g} s; retry",
            reason="IMAGE_BEING_DELETED",
        )

    async def _collect_forever(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self.collect()
            except UnavailableError as error:
                logger.debug("images not collected error=%r", error)
            except Exception:
                # Without its heartbeats the other control planes would take this one for dead, and delete what it uses.
                logger.exception("images not collected")
            with suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_s):
                    await self._wake.wait()

    def _on_change(self, change: Change) -> None:
        if change.kind is not ChangeKind.ADDED:
            self._wake.set()

    def _on_idle(self, digest: str) -> None:
        if not self._directory.names_of(digest):
            self._wake.set()
