"""Which images no adapter names, and which control planes may still use them: the registry's side of deleting images.

Knows digests alone; `ImageKeeper` acts on it. Every method raises UnavailableError while Redis is away.
"""

from collections.abc import Iterable

from controlplane.registry import scripts
from controlplane.registry.redis_scripts import RedisScripts

# How long an image may wait for its adapter to be published, and how long deleting one may take.
CLAIM_S = 600
DELETE_S = 30


class ImageGarbage:
    """The garbage list and the heartbeats of one registry."""

    def __init__(self, redis: RedisScripts) -> None:
        self._redis = redis

    async def claim(self, digest: str) -> bool:
        """Keeps an image safe from collection while its adapter is being published; False while it is just being deleted."""
        answer = await self._redis.run(scripts.CLAIM, ["garbage"], [digest, CLAIM_S])
        return bool(answer[0] == "CLAIMED")

    async def unclaim(self, digest: str) -> None:
        """Gives a claim back after a registration that failed."""
        await self._redis.run(scripts.UNCLAIM, ["garbage"], [digest])

    async def heartbeat(self, member: str, ttl_s: int, seen: int, draining: Iterable[str]) -> list[str]:
        """Says that a control plane lives, what it has seen and still uses; returns digests that may be garbage."""
        digests: list[str] = await self._redis.run(scripts.HEARTBEAT, ["members", "garbage"], [member, ttl_s, seen, *draining])
        return digests

    async def leave(self, member: str) -> None:
        """Takes a control plane's heartbeat away."""
        await self._redis.run(scripts.LEAVE, ["members"], [member])

    async def may_delete(self, digest: str) -> bool:
        """Whether no adapter has that digest and no control plane uses it; True must be followed by `deleted`."""
        answer = await self._redis.run(scripts.COLLECT, ["members", "garbage", "digests"], [digest, DELETE_S])
        return bool(answer[0] == "DELETE")

    async def deleted(self, digest: str) -> None:
        """The image is gone."""
        await self._redis.run(scripts.COLLECTED, ["garbage"], [digest])
