"""Puts the parts of the registry together and takes them down in the right order."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from adapter_store.image_store import ImageStore
from controlplane.registry.adapter_control import AdapterControl
from controlplane.registry.directory import AdapterDirectory
from controlplane.registry.directory_sync import DirectorySync
from controlplane.registry.embedded_redis import EmbeddedRedis
from controlplane.registry.image_keeper import ImageKeeper
from controlplane.registry.records import base_key
from controlplane.registry.redis_registry import RedisRegistry

# How long to wait for a Redis that starts at the same time as we do.
OPEN_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """Where the registry lies. Without a redis_url, a private Redis runs on the state directory."""

    state_dir: Path
    redis_url: str | None = None
    key_prefix: str = "loraplane"


class AdapterRegistry:
    """One control plane's registry. Use as an async context manager."""

    def __init__(self, config: RegistryConfig, store: ImageStore, control: AdapterControl) -> None:
        self._config = config
        self._store = store
        self._embedded: EmbeddedRedis | None = None
        self._sync: DirectorySync | None = None
        self._redis: RedisRegistry | None = None
        self._images: ImageKeeper | None = None
        self.directory = AdapterDirectory(lambda: base_key(geometry) if (geometry := control.geometry()) else None)

    @property
    def redis(self) -> RedisRegistry:
        """The registry in Redis."""
        assert self._redis is not None, "not started"
        return self._redis

    @property
    def images(self) -> ImageKeeper:
        """What keeps images for as long as they are needed."""
        assert self._images is not None, "not started"
        return self._images

    async def __aenter__(self) -> "AdapterRegistry":
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Stops everything, Redis last."""
        if self._sync is not None:
            await self._sync.close()
        if self._images is not None:
            await self._images.close()
        if self._redis is not None:
            await self._redis.close()
        if self._embedded is not None:
            await self._embedded.close()

    async def _start(self) -> None:
        url = self._config.redis_url
        if url is None:
            self._embedded = EmbeddedRedis(self._config.state_dir)
            await self._embedded.start()
            url = self._embedded.url
        self._redis = RedisRegistry(url, self._config.key_prefix)
        self._images = ImageKeeper(self._redis.garbage, self.directory, self._store)
        sync = DirectorySync(self._redis, self.directory)
        await self._redis.open_within(OPEN_TIMEOUT_S)
        await self._images.join()
        await sync.start()
        self._sync = sync
        await self._images.start()
