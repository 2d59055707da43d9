"""Writes are atomic, one wins; history has no gaps; repeated requests get their first answer. Against a real Redis."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from controlplane.errors import (
    AlreadyExistsError,
    EtagMismatchError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    UnavailableError,
)
from controlplane.registry.records import AdapterRecord, ChangeKind, Revision
from controlplane.registry.redis_registry import RedisRegistry, RegistryMismatchError, RequestMark

MakeRecord = Callable[..., AdapterRecord]
Scenario = Callable[[RedisRegistry], Awaitable[None]]


@pytest.fixture
def run(redis_url: str, prefix: str) -> Callable[..., None]:
    """Runs a scenario with an open registry."""

    def run(scenario: Scenario, history: int = 100) -> None:
        async def with_registry() -> None:
            registry = RedisRegistry(redis_url, prefix, history=history)
            try:
                await registry.open()
                await scenario(registry)
            finally:
                await registry.close()

        asyncio.run(with_registry())

    return run


Run = Callable[..., None]


def test_what_is_written_is_read_and_told(run: Run, make_record: MakeRecord) -> None:
    async def scenario(registry: RedisRegistry) -> None:
        first = make_record("a", aliases={"b": make_record("a").current}, labels={"k": 'v"\\é'})
        second = replace(first, etag="e2", aliases={}, pinned=True)
        added = await registry.add(first)
        modified = await registry.replace(second, "e1")
        assert await registry.get("a") == second
        assert await registry.snapshot() == ([second], modified.revision)
        deleted = await registry.remove(second, "e2", force=True)
        assert await registry.get("a") is None
        assert await registry.snapshot() == ([], deleted.revision)
        told = await registry.changes_after(Revision(registry.registry_id, 0), 10)
        assert told == [added, modified, deleted]
        assert [(c.kind, c.record, c.force) for c in told] == [
            (ChangeKind.ADDED, first, False),
            (ChangeKind.MODIFIED, second, False),
            (ChangeKind.DELETED, second, True),
        ]
        assert [c.revision.number for c in told] == [1, 2, 3]

    run(scenario)


def test_of_concurrent_publishes_under_one_name_exactly_one_wins(run: Run, make_record: MakeRecord) -> None:
    async def scenario(registry: RedisRegistry) -> None:
        records = [make_record("a", n, etag=f"e{n}") for n in range(20)]
        results = await asyncio.gather(*(registry.add(r) for r in records), return_exceptions=True)
        won = [r for r in results if not isinstance(r, BaseException)]
        assert len(won) == 1
        assert all(isinstance(r, AlreadyExistsError) for r in results if isinstance(r, BaseException))
        assert await registry.get("a") == won[0].record
        assert len(await registry.changes_after(Revision(registry.registry_id, 0), 100)) == 1

    run(scenario)


def test_of_concurrent_updates_from_one_etag_exactly_one_wins(run: Run, make_record: MakeRecord) -> None:
    async def scenario(registry: RedisRegistry) -> None:
        await registry.add(make_record("a"))
        changes = (registry.replace(make_record("a", etag=f"n{n}"), "e1") for n in range(20))
        results = await asyncio.gather(*changes, return_exceptions=True)
        assert sum(not isinstance(r, BaseException) for r in results) == 1
        assert all(isinstance(r, EtagMismatchError) for r in results if isinstance(r, BaseException))

    run(scenario)


def test_names_and_aliases_share_one_namespace(run: Run, make_record: MakeRecord) -> None:
    async def scenario(registry: RedisRegistry) -> None:
        a, b = make_record("a", aliases={"x": make_record("a").current}), make_record("b")
        await registry.add(a)
        await registry.add(b)
        taken: list[tuple[AdapterRecord, str]] = [
            (make_record("x"), "'x' is taken: it is an alias of adapter 'a'"),
            (make_record("c", aliases={"a": make_record("c").current}), "'a' is taken: it is an adapter"),
            (make_record("c", aliases={"x": make_record("c").current}), "'x' is taken"),
        ]
        for record, message in taken:
            with pytest.raises(AlreadyExistsError, match=message):
                await registry.add(record)
        with pytest.raises(AlreadyExistsError, match="'x' is taken"):
            await registry.replace(replace(b, aliases={"x": b.current}), "e1")
        assert await registry.get("c") is None
        # An alias that was given up is free again, and one's own alias is no conflict.
        await registry.replace(replace(a, aliases={"x": a.current, "y": a.current}), "e1")
        await registry.replace(replace(a, aliases={"y": a.current}), "e1")
        await registry.add(make_record("x"))
        await registry.remove(a, "", force=False)
        await registry.add(make_record("y"))

    run(scenario)


def test_writes_to_what_is_not_there_or_has_changed_are_refused(run: Run, make_record: MakeRecord) -> None:
    async def scenario(registry: RedisRegistry) -> None:
        with pytest.raises(NotFoundError):
            await registry.replace(make_record("a"), "e1")
        with pytest.raises(NotFoundError):
            await registry.remove(make_record("a"), "", force=False)
        await registry.add(make_record("a"))
        with pytest.raises(EtagMismatchError, match="its etag is 'e1', the call gave 'e0'"):
            await registry.remove(make_record("a"), "e0", force=False)
        assert (await registry.snapshot())[1].number == 1

    run(scenario)


def test_a_repeated_request_gets_the_first_answer_and_writes_nothing(run: Run, make_record: MakeRecord) -> None:
    async def scenario(registry: RedisRegistry) -> None:
        mark = RequestMark("r1", "fingerprint")
        assert await registry.answered(mark) is None
        results = await asyncio.gather(*(registry.add(make_record("a", etag=f"e{n}"), mark) for n in range(5)))
        assert all(result == results[0] for result in results)
        await registry.remove(make_record("a"), "", force=False)
        assert await registry.add(make_record("a"), mark) == results[0]
        assert await registry.answered(mark) == results[0]
        assert (await registry.snapshot())[0] == []
        for call in (registry.answered(RequestMark("r1", "other")), registry.add(make_record("b"), RequestMark("r1", "other"))):
            with pytest.raises(InvalidArgumentError, match="used within a day"):
                await call

    run(scenario)


def test_answers_are_forgotten_after_a_day(run: Run, make_record: MakeRecord, redis_url: str, prefix: str) -> None:
    async def scenario(registry: RedisRegistry) -> None:
        await registry.add(make_record("a"), RequestMark("r1", "f"))
        async with Redis.from_url(redis_url) as redis:
            assert 24 * 3600 - 60 < await redis.ttl(f"{prefix}:v1:request:r1") <= 24 * 3600

    run(scenario)


def test_history_is_bounded_and_says_when_it_does_not_reach_back(run: Run, make_record: MakeRecord) -> None:
    async def scenario(registry: RedisRegistry) -> None:
        for n in range(6):
            await registry.add(make_record(f"a{n}"))
        here = registry.registry_id
        assert [c.record.name for c in await registry.changes_after(Revision(here, 2), 2)] == ["a2", "a3"]
        assert await registry.changes_after(Revision(here, 6), 10) == []
        for gone in (Revision(here, 1), Revision(here, 7), Revision("0", 6)):
            with pytest.raises(OutOfRangeError, match="list again"):
                await registry.changes_after(gone, 10)

    run(scenario, history=4)


def test_the_feed_wakes_on_a_change_made_by_another(run: Run, make_record: MakeRecord) -> None:
    async def scenario(registry: RedisRegistry) -> None:
        async with registry.feed(block_s=30.0) as feed:
            waiting = asyncio.ensure_future(feed.wait_beyond(Revision(registry.registry_id, 0)))
            await registry.add(make_record("a"))
            await asyncio.wait_for(waiting, 10)

    run(scenario)


def test_another_schema_is_refused(run: Run, redis_url: str, prefix: str) -> None:
    async def scenario(registry: RedisRegistry) -> None:
        async with Redis.from_url(redis_url) as redis:
            await redis.hset(f"{prefix}:schema", "version", "2")
        with pytest.raises(RegistryMismatchError, match="has schema '2'"):
            await registry.open()

    run(scenario)


def test_a_registry_made_anew_is_not_written_by_a_session_with_the_old_one(
    run: Run, make_record: MakeRecord, redis_url: str, prefix: str
) -> None:
    async def scenario(registry: RedisRegistry) -> None:
        async with Redis.from_url(redis_url) as redis:
            await redis.delete(f"{prefix}:schema")
        with pytest.raises(UnavailableError, match="made anew"):
            await registry.add(make_record("a"))
        with pytest.raises(OutOfRangeError, match="made anew"):
            await registry.changes_after(Revision(registry.registry_id, 0), 10)

    run(scenario)


def test_without_redis_every_call_is_unavailable(make_record: MakeRecord) -> None:
    async def scenario() -> None:
        registry = RedisRegistry("unix:///nonexistent/redis.sock")
        calls: list[Callable[[], Awaitable[object]]] = [
            registry.open,
            registry.snapshot,
            lambda: registry.get("a"),
            lambda: registry.add(make_record("a")),
            lambda: registry.remove(make_record("a"), "", force=False),
            lambda: registry.garbage.claim("d"),
        ]
        for call in calls:
            with pytest.raises(UnavailableError, match="registry is away") as caught:
                await call()
            assert caught.value.retry_after_s
        await registry.close()

    asyncio.run(scenario())


def test_a_thousand_adapters_are_copied_in_one_snapshot(run: Run, make_record: MakeRecord) -> None:
    async def scenario(registry: RedisRegistry) -> None:
        await asyncio.gather(*(registry.add(make_record(f"a{n}", n)) for n in range(1000)))
        records, revision = await registry.snapshot()
        assert {r.name for r in records} == {f"a{n}" for n in range(1000)}
        assert revision.number == 1000

    run(scenario, history=10)
