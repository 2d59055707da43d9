"""The registry as it lies in Redis: atomic writes with etags, the change feed, and answers to repeated requests.

Knows what the keys and scripts are (`scripts.py`), nothing of requests, weights or protobuf. While Redis is away everything here
raises UnavailableError.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from controlplane.errors import (
    AlreadyExistsError,
    EtagMismatchError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    UnavailableError,
)
from controlplane.registry import scripts
from controlplane.registry.directory import ADAPTER_TYPE
from controlplane.registry.image_garbage import ImageGarbage
from controlplane.registry.records import AdapterRecord, Change, ChangeKind, Revision, record_from_json, record_to_json
from controlplane.registry.redis_scripts import RedisScripts, StreamWait

OPEN_RETRY_S = 0.2
# Changes kept for watchers and for control planes that were away.
DEFAULT_HISTORY = 10_000
REQUEST_ID_TTL_S = 24 * 3600


class RegistryMismatchError(Exception):
    """Redis holds a registry that this version, or this session with it, cannot go on with."""


@dataclass(frozen=True, slots=True)
class RequestMark:
    """A client's request_id and a fingerprint of what it asked for: the same pair again gets the first answer."""

    request_id: str
    fingerprint: str


class RedisRegistry:
    """One registry, under one key prefix of one Redis. `open()` comes first."""

    def __init__(self, url: str, prefix: str = "loraplane", *, history: int = DEFAULT_HISTORY) -> None:
        self._prefix = prefix
        self._history = history
        self._redis = RedisScripts(url, prefix)
        self.garbage = ImageGarbage(self._redis)
        self.registry_id = ""

    async def open(self) -> None:
        """Reads, or writes for a new registry, which schema this is and which registry.

        Raises:
            RegistryMismatchError: another version of loraplane wrote it.
        """
        version, registry_id = await self._redis.run(scripts.OPEN, ["schema"], [scripts.SCHEMA_VERSION, secrets.token_hex(4)])
        if version != scripts.SCHEMA_VERSION:
            raise RegistryMismatchError(
                f"the registry under {self._prefix!r} has schema {version!r}, this version of loraplane reads and "
                f"writes schema {scripts.SCHEMA_VERSION!r}; use another --key-prefix or the matching version"
            )
        self.registry_id = registry_id

    async def open_within(self, timeout_s: float) -> None:
        """As `open`, trying until Redis is there or the time is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            try:
                return await self.open()
            except UnavailableError:
                if loop.time() + OPEN_RETRY_S > deadline:
                    raise
            await asyncio.sleep(OPEN_RETRY_S)

    async def close(self) -> None:
        """Closes the connections."""
        await self._redis.close()

    # Reading.

    async def snapshot(self) -> tuple[list[AdapterRecord], Revision]:
        """All adapters, and the revision at which they were so."""
        answer = await self._redis.run(scripts.SNAPSHOT, ["revision", "names"], [self._redis.key("adapter:")])
        return [record_from_json(text) for text in answer[1:]], self._revision(answer[0])

    async def get(self, name: str) -> AdapterRecord | None:
        """One adapter as it is in Redis now."""
        text = await self._redis.run(scripts.GET, [f"adapter:{name}"])
        return record_from_json(text) if text is not None else None

    async def answered(self, request: RequestMark) -> Change | None:
        """The answer that an earlier request with this id got, if there was one.

        Raises:
            InvalidArgumentError: it asked for something else.
        """
        found = await self._redis.run(scripts.ANSWERED, [f"request:{request.request_id}"])
        if not found:
            return None
        if found[0] != request.fingerprint:
            raise _request_id_reused(request.request_id)
        return self._change(*found[1:])

    async def changes_after(self, revision: Revision, limit: int) -> list[Change]:
        """The next changes after a revision, at most `limit`; empty when there are none yet.

        Raises:
            OutOfRangeError: history no longer reaches back that far, or it is another registry's revision.
        """
        if revision.registry_id != self.registry_id:
            raise _trimmed(revision, "it belongs to another registry")
        keys = ["schema", "revision", "changes"]
        answer = await self._redis.run(scripts.CHANGES, keys, [self.registry_id, revision.number, limit])
        if answer[0] == "OTHER_REGISTRY":
            raise _trimmed(revision, "the registry was made anew")
        if answer[0] == "OUT_OF_RANGE":
            raise _trimmed(revision, f"the last change is {answer[1]} and {self._history} changes are kept")
        return [self._change(**_fields(entry), revision=entry[0].partition("-")[0]) for entry in answer[1]]

    @asynccontextmanager
    async def feed(self, block_s: float) -> AsyncIterator["ChangeFeed"]:
        """Waits for changes on a connection of its own, at most `block_s` at a time."""
        async with self._redis.stream("changes", block_s) as stream:
            yield ChangeFeed(stream)

    # Writing.

    async def add(self, record: AdapterRecord, request: RequestMark | None = None) -> Change:
        """Publishes a new adapter.

        Raises:
            AlreadyExistsError: its name or an alias is taken.
            InvalidArgumentError: the request_id asked for something else before.
        """
        return await self._write(ChangeKind.ADDED, record, "", request=request)

    async def replace(self, record: AdapterRecord, etag: str, request: RequestMark | None = None) -> Change:
        """Puts `record` in the place of the adapter of its name, if that still has the given etag.

        Raises:
            NotFoundError, EtagMismatchError, and those of `add`.
        """
        return await self._write(ChangeKind.MODIFIED, record, etag, request=request)

    async def remove(self, record: AdapterRecord, etag: str, *, force: bool) -> Change:
        """Unpublishes the adapter of that name, if it still has the given etag (any, if empty).

        Raises:
            NotFoundError, EtagMismatchError.
        """
        return await self._write(ChangeKind.DELETED, record, etag, force=force)

    async def _write(
        self, kind: ChangeKind, record: AdapterRecord, etag: str, *, request: RequestMark | None = None, force: bool = False
    ) -> Change:
        keys = ["schema", "revision", "names", "digests", "changes", "garbage", f"adapter:{record.name}"]
        keys.append(f"request:{request.request_id}" if request else "schema")
        body = "" if kind is ChangeKind.DELETED else record_to_json(record)
        args = [self.registry_id, kind.value, record.name, body, etag, "1" if force else "", self._history]
        args += [request.fingerprint if request else "", REQUEST_ID_TTL_S]
        answer = await self._redis.run(scripts.WRITE, keys, args)
        match answer[0]:
            case "WRITTEN" | "REPEATED":
                return self._change(answer[1], answer[2], answer[3], "1" if force else "")
            case "NOT_FOUND":
                raise NotFoundError(
                    ADAPTER_TYPE, record.name, f"no adapter is called {record.name!r}", reason="ADAPTER_NOT_FOUND"
                )
            case "ETAG_MISMATCH":
                raise EtagMismatchError(record.name, etag, answer[1])
            case "TAKEN":
                raise name_taken(answer[1], answer[2])
            case "REQUEST_ID_REUSED" if request:
                raise _request_id_reused(request.request_id)
            case _:
                raise UnavailableError("the registry in Redis was made anew; it is being read again", reason="REGISTRY_AWAY")

    # Within.

    def _revision(self, number: str) -> Revision:
        return Revision(self.registry_id, int(number))

    def _change(self, kind: str, record: str, revision: str, force: str = "") -> Change:
        return Change(ChangeKind(kind), record_from_json(record), self._revision(revision), force=bool(force))


class ChangeFeed:
    """Tells when there is more than a directory has seen."""

    def __init__(self, stream: StreamWait) -> None:
        self._stream = stream

    async def wait_beyond(self, revision: Revision) -> None:
        """Returns when there is a change after that revision, or when the time to wait is over."""
        await self._stream.wait_beyond(revision.number)


def name_taken(name: str, owner: str) -> AlreadyExistsError:
    """The error of a name or alias that an adapter has already."""
    what = "an adapter" if name == owner else f"an alias of adapter {owner!r}"
    return AlreadyExistsError(ADAPTER_TYPE, name, f"{name!r} is taken: it is {what}", reason="ADAPTER_EXISTS")


def _request_id_reused(request_id: str) -> InvalidArgumentError:
    return InvalidArgumentError.of(
        "request_id", f"{request_id!r} was used within a day for a different request; mint a new one", reason="REQUEST_ID_REUSED"
    )


def _trimmed(revision: Revision, why: str) -> OutOfRangeError:
    return OutOfRangeError(
        f"cannot go on from revision {revision}: {why}; list again and go on from the revision of the list",
        reason="REVISION_GONE",
        metadata={"revision": str(revision)},
    )


def _fields(entry: Any) -> dict[str, str]:
    flat = entry[1]
    return dict(zip(flat[::2], flat[1::2], strict=True))
