"""Directories of several control planes agree, serve while Redis is away, and catch up when it is back. Against a real Redis."""

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis

from controlplane.errors import NotFoundError, UnavailableError
from controlplane.registry.directory import AdapterDirectory
from controlplane.registry.directory_sync import DirectorySync
from controlplane.registry.embedded_redis import EmbeddedRedis
from controlplane.registry.records import AdapterRecord, ChangeKind, Revision
from controlplane.registry.redis_registry import RedisRegistry
from tests.waiting import until

MakeRecord = Callable[..., AdapterRecord]


@asynccontextmanager
async def synced(url: str, prefix: str = "test", history: int = 100) -> AsyncIterator[tuple[RedisRegistry, AdapterDirectory]]:
    """One control plane's registry and directory."""
    registry, directory = RedisRegistry(url, prefix, history=history), AdapterDirectory()
    sync = DirectorySync(registry, directory)
    try:
        await sync.start()
        yield registry, directory
        directory.check_integrity()
    finally:
        await sync.close()
        await registry.close()


def test_two_directories_stay_in_step(redis_url: str, prefix: str, make_record: MakeRecord) -> None:
    async def scenario() -> None:
        async with synced(redis_url, prefix) as (first, a), synced(redis_url, prefix) as (second, b):
            await first.add(make_record("x", 1))
            await second.add(make_record("y", 2))
            change = await second.replace(make_record("x", 1, 3, etag="e2"), "e1")
            for directory in (a, b):
                await asyncio.wait_for(directory.reached(change.revision), 10)
                assert directory.resolve("x").version.digest == make_record("x", 3).current
            change = await first.remove(make_record("x", 1), "", force=False)
            for directory in (a, b):
                await asyncio.wait_for(directory.reached(change.revision), 10)
                assert directory.get("x") is None and directory.get("y") is not None
            assert a.records() == b.records() and a.revision == b.revision

    asyncio.run(scenario())


def test_writers_at_once_leave_all_directories_alike(redis_url: str, prefix: str, make_record: MakeRecord) -> None:
    async def scenario() -> None:
        async with synced(redis_url, prefix) as (first, a), synced(redis_url, prefix) as (second, b):
            writes = [r.add(make_record(f"n{n}", n)) for n in range(40) for r in (first, second)]
            results = await asyncio.gather(*writes, return_exceptions=True)
            assert sum(not isinstance(r, BaseException) for r in results) == 40
            await until(lambda: a.revision.number == b.revision.number == 40)
            assert sorted(a.records(), key=lambda r: r.name) == sorted(b.records(), key=lambda r: r.name)

    asyncio.run(scenario())


def test_a_directory_that_starts_later_knows_the_same(redis_url: str, prefix: str, make_record: MakeRecord) -> None:
    async def scenario() -> None:
        async with synced(redis_url, prefix) as (registry, a):
            change = await registry.add(make_record("x"))
            await a.reached(change.revision)
            async with synced(redis_url, prefix) as (_, b):
                assert b.records() == a.records() and b.revision == a.revision

    asyncio.run(scenario())


def test_known_adapters_are_served_while_redis_is_away_and_changes_seen_when_it_is_back(
    tmp_path: Path, make_record: MakeRecord
) -> None:
    async def scenario() -> None:
        async with EmbeddedRedis(tmp_path) as redis, synced(redis.url) as (registry, directory):
            await directory.reached((await registry.add(make_record("x"))).revision)
            os.kill(redis.pid, signal.SIGSTOP)  # away, without closing connections
            directory.resolve("x").release()
            os.kill(redis.pid, signal.SIGKILL)
            directory.resolve("x").release()
            with pytest.raises(UnavailableError):
                await registry.get("x")
            change = await _first_success(registry, make_record("y"))
            await asyncio.wait_for(directory.reached(change), 20)
            directory.resolve("x").release()
            directory.resolve("y").release()

    asyncio.run(scenario())


async def _first_success(registry: RedisRegistry, record: AdapterRecord) -> Revision:
    async with asyncio.timeout(20):
        while True:
            try:
                return (await registry.add(record)).revision
            except UnavailableError:
                await asyncio.sleep(0.05)


def test_a_directory_that_was_away_longer_than_history_takes_a_new_copy(
    redis_url: str, prefix: str, make_record: MakeRecord
) -> None:
    async def scenario() -> None:
        async with synced(redis_url, prefix, history=3) as (registry, directory):
            told: list[tuple[ChangeKind, str]] = []
            directory.on_change(lambda change: told.append((change.kind, change.record.name)))
            # Ten changes in one turn of Redis: the feed wakes when seven of them are trimmed already.
            async with Redis.from_url(redis_url) as redis:
                await redis.client_pause(300)
                writes = [asyncio.ensure_future(registry.add(make_record(f"n{n}", n))) for n in range(10)]
                await asyncio.gather(*writes)
            await until(lambda: directory.revision.number == 10)
            assert {r.name for r in directory.records()} == {f"n{n}" for n in range(10)}
            assert sorted(told) == sorted((ChangeKind.ADDED, f"n{n}") for n in range(10)) or len(told) == 10

    asyncio.run(scenario())


def test_a_registry_that_was_emptied_is_noticed(
    redis_url: str, prefix: str, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controlplane.registry.directory_sync.BLOCK_S", 0.2)

    async def scenario() -> None:
        async with synced(redis_url, prefix) as (registry, directory):
            await directory.reached((await registry.add(make_record("x"))).revision)
            async with Redis.from_url(redis_url) as redis:
                keys = [key async for key in redis.scan_iter(f"{prefix}:*")]
                await redis.delete(*keys)
            await until(lambda: not directory.records())
            with pytest.raises(NotFoundError):
                directory.resolve("x")
            change = await registry.add(make_record("z"))
            await asyncio.wait_for(directory.reached(change.revision), 10)
            directory.resolve("z").release()

    asyncio.run(scenario())


def test_everything_is_there_after_a_restart(tmp_path: Path, make_record: MakeRecord) -> None:
    async def scenario() -> None:
        record = make_record("x", 1, 2, aliases={"y": make_record("x", 1).current}, labels={"a": "b"}, pinned=True)
        async with EmbeddedRedis(tmp_path) as redis, synced(redis.url) as (registry, _):
            await registry.add(record)
            revision = (await registry.replace(replace(record, etag="e2"), "e1")).revision
        async with EmbeddedRedis(tmp_path) as redis, synced(redis.url) as (registry, directory):
            assert directory.records() == [replace(record, etag="e2")]
            assert directory.revision == revision
            assert len(await registry.changes_after(replace(revision, number=0), 10)) == 2

    asyncio.run(scenario())


def test_a_feed_without_redis_at_the_start_is_refused() -> None:
    async def scenario() -> None:
        with pytest.raises(UnavailableError):
            async with synced(f"unix:///nonexistent/{secrets.token_hex(4)}"):
                pass

    asyncio.run(scenario())
