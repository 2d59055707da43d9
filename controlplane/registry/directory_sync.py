"""Keeps the in-memory directory in step with the registry in Redis, through Redis's absences and restarts.

Knows nothing of requests. While Redis is away the directory stays as it was; afterwards it goes on where it stopped, or takes
over a whole new copy when the feed no longer reaches back that far.
"""

import asyncio
import logging

from controlplane.errors import OutOfRangeError, UnavailableError
from controlplane.registry.background_task import end_task
from controlplane.registry.directory import AdapterDirectory
from controlplane.registry.redis_registry import ChangeFeed, RedisRegistry, RegistryMismatchError

logger = logging.getLogger(__name__)

# A wait this long without a change ends in a look at the registry itself, so that one that was emptied is noticed.
BLOCK_S = 5.0
BATCH = 200
FIRST_RETRY_S = 0.05
MAX_RETRY_S = 5.0


class DirectorySync:
    """Follows the change feed of one registry into one directory."""

    def __init__(self, registry: RedisRegistry, directory: AdapterDirectory) -> None:
        self._registry = registry
        self._directory = directory
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Fills the directory, then follows.

        Raises:
            UnavailableError: Redis is away.
            RegistryMismatchError: it holds what this version cannot read.
        """
        await self._take_copy()
        self._task = asyncio.create_task(self._follow(), name="directory-sync")

    async def close(self) -> None:
        """Stops following."""
        if self._task is not None:
            await end_task(self._task)
            self._task = None

    async def _take_copy(self) -> None:
        await self._registry.open()
        records, revision = await self._registry.snapshot()
        self._directory.replace(records, revision)
        logger.info("directory copied adapters=%d revision=%s", len(records), revision)

    async def _follow(self) -> None:
        delay_s = FIRST_RETRY_S
        while True:
            try:
                async with self._registry.feed(BLOCK_S) as feed:
                    await self._catch_up()
                    if delay_s > FIRST_RETRY_S:
                        logger.info("registry back revision=%s", self._directory.revision)
                    delay_s = FIRST_RETRY_S
                    await self._follow_feed(feed)
            except UnavailableError as error:
                # Once per absence, not once per attempt.
                if delay_s == FIRST_RETRY_S:
                    logger.warning("registry away error=%r; serving the adapters known at %s", error, self._directory.revision)
            except RegistryMismatchError:
                logger.exception("registry replaced by one that cannot be read")
            except Exception:
                logger.exception("directory sync failed revision=%s", self._directory.revision)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, MAX_RETRY_S)

    async def _follow_feed(self, feed: ChangeFeed) -> None:
        while True:
            await feed.wait_beyond(self._directory.revision)
            await self._catch_up()

    async def _catch_up(self) -> None:
        try:
            while changes := await self._registry.changes_after(self._directory.revision, BATCH):
                for change in changes:
                    self._directory.apply(change)
        except OutOfRangeError as error:
            logger.warning("directory copied again reason=%r", error.message)
            await self._take_copy()
