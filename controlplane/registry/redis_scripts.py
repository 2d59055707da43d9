"""Runs Lua scripts in one Redis under one key prefix, and waits for its streams. Whatever goes wrong there is UnavailableError.

Knows how keys are named, nothing of what the scripts do.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError, ResponseError

from controlplane.errors import UnavailableError
from controlplane.registry.scripts import SCHEMA_VERSION

COMMAND_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 16


class RedisScripts:
    """A bounded pool of connections. A burst of calls waits for a connection, as long as for an answer."""

    def __init__(self, url: str, prefix: str) -> None:
        self._url = url
        self._prefix = prefix
        self._redis = _connect(url, MAX_CONNECTIONS, COMMAND_TIMEOUT_S)
        self._scripts: dict[str, AsyncScript] = {}

    async def close(self) -> None:
        """Closes the connections."""
        await self._redis.aclose()

    def key(self, name: str) -> str:
        """The key of that name; all but the schema's own carry its version."""
        return f"{self._prefix}:schema" if name == "schema" else f"{self._prefix}:v{SCHEMA_VERSION}:{name}"

    async def run(self, script: str, keys: Sequence[str], args: Sequence[str | int] = ()) -> Any:
        """The answer of a script to keys, named without their prefix, and arguments.

        Raises:
            UnavailableError: Redis is away or refuses.
        """
        if script not in self._scripts:
            self._scripts[script] = self._redis.register_script(script)
        with _reaching():
            return await self._scripts[script](keys=[self.key(key) for key in keys], args=args)

    @asynccontextmanager
    async def stream(self, name: str, block_s: float) -> AsyncIterator["StreamWait"]:
        """A connection of its own on which to wait for a stream, at most `block_s` at a time."""
        redis = _connect(self._url, 1, block_s + COMMAND_TIMEOUT_S)
        try:
            yield StreamWait(redis, self.key(name), block_s)
        finally:
            await redis.aclose()


class StreamWait:
    """Waits for entries of one stream; waiting blocks its connection."""

    def __init__(self, redis: Redis, key: str, block_s: float) -> None:
        self._redis = redis
        self._key = key
        self._block_ms = round(block_s * 1000)

    async def wait_beyond(self, number: int) -> None:
        """Returns when there is an entry after number-0, or when the time to wait is over. Raises UnavailableError."""
        with _reaching():
            await self._redis.xread({self._key: f"{number}-0"}, count=1, block=self._block_ms)


@contextmanager
def _reaching() -> Iterator[None]:
    """Makes every failure to reach Redis, or of Redis to do as told, an UnavailableError."""
    try:
        yield
    except ResponseError as error:
        # Redis refuses for a state of its own (out of memory, read-only replica, disk) or for a bug in a script.
        raise UnavailableError(f"the registry refused: {error}", reason="REGISTRY_REFUSED") from error
    except (RedisError, OSError) as error:
        raise UnavailableError(
            f"the registry is away ({type(error).__name__}); known adapters are served, changes must wait", reason="REGISTRY_AWAY"
        ) from error


def _connect(url: str, max_connections: int, timeout_s: float) -> Redis:
    """No retries in here: a write that was sent may have been done. Callers repeat with their request_id."""
    pool: BlockingConnectionPool = BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=COMMAND_TIMEOUT_S,
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=timeout_s,
        socket_connect_timeout=COMMAND_TIMEOUT_S,
    )
    return Redis.from_pool(pool)
