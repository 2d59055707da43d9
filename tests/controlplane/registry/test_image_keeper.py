"""An image is there while an adapter has it or a request of a control plane uses it, and goes afterwards: on a real Redis."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from adapter_store.geometry import BaseGeometry, LinearShape
from adapter_store.image import AdapterImage, AdapterOrigin, ModuleWeights, build_image
from adapter_store.image_store import ImageStore
from controlplane.errors import PreconditionError, UnavailableError
from controlplane.registry import image_keeper
from controlplane.registry.directory import AdapterDirectory
from controlplane.registry.directory_sync import DirectorySync
from controlplane.registry.image_keeper import ImageKeeper
from controlplane.registry.records import AdapterRecord, Change
from controlplane.registry.redis_registry import RedisRegistry
from tests.waiting import until

MakeRecord = Callable[..., AdapterRecord]

GEOMETRY = BaseGeometry("tiny", "f" * 64, "float32", 1, 1, 8, (LinearShape("q_proj", 16, 16),), 8)


def make_image(seed: int) -> AdapterImage:
    """Equal seeds give equal images."""
    row = torch.full((1, 16), float(seed))
    return build_image(GEOMETRY, {"q_proj": ModuleWeights(1, 1.0, {0: row}, {0: row.t()})}, AdapterOrigin("tiny", 1.0, False))


def named(record: AdapterRecord, image: AdapterImage, name: str | None = None) -> AdapterRecord:
    """The record with that image as its only version."""
    version = replace(record.versions[0], digest=image.digest)
    return replace(record, name=name or record.name, current=version.digest, versions=(version,))


@dataclass
class Member:
    """One control plane."""

    registry: RedisRegistry
    directory: AdapterDirectory
    keeper: ImageKeeper

    async def add(self, record: AdapterRecord, image: AdapterImage) -> None:
        """Publishes and waits until it is served."""
        async with self.keeper.stored(image):
            change = await self.registry.add(record)
        await self.seen(change)

    async def remove(self, record: AdapterRecord) -> Change:
        """Unpublishes and waits until it is no longer served here."""
        change = await self.registry.remove(record, "", force=False)
        await self.seen(change)
        return change

    async def seen(self, change: Change) -> None:
        """Waits for the feed."""
        await asyncio.wait_for(self.directory.reached(change.revision), 10)


@asynccontextmanager
async def member(url: str, prefix: str, store: ImageStore) -> AsyncIterator[Member]:
    """A control plane that collects when told to: its own timer is not started."""
    registry, directory = RedisRegistry(url, prefix), AdapterDirectory()
    keeper, sync = ImageKeeper(registry.garbage, directory, store), DirectorySync(registry, directory)
    try:
        await keeper.join()
        await sync.start()
        yield Member(registry, directory, keeper)
        directory.check_integrity()
    finally:
        await keeper.close()
        await sync.close()
        await registry.close()


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    """Empty."""
    return ImageStore(tmp_path / "store")


def test_an_unregistered_image_goes_when_its_last_lease_does(
    redis_url: str, prefix: str, store: ImageStore, make_record: MakeRecord
) -> None:
    async def scenario() -> None:
        async with member(redis_url, prefix, store) as one:
            image = make_image(1)
            record = named(make_record("a"), image)
            await one.add(record, image)
            assert await one.keeper.collect() == []
            lease = one.directory.resolve("a")
            await one.remove(record)
            assert await one.keeper.collect() == []
            assert store.digests() == (image.digest,)
            lease.release()
            assert await one.keeper.collect() == [image.digest]
            assert store.digests() == ()
            assert await one.keeper.collect() == []

    asyncio.run(scenario())


def test_an_image_that_another_name_has_stays(redis_url: str, prefix: str, store: ImageStore, make_record: MakeRecord) -> None:
    async def scenario() -> None:
        async with member(redis_url, prefix, store) as one:
            image = make_image(1)
            a, b = (named(make_record("x"), image, name) for name in "ab")
            await one.add(a, image)
            await one.add(b, image)
            await one.remove(a)
            assert await one.keeper.collect() == []
            await one.remove(b)
            assert await one.keeper.collect() == [image.digest]

    asyncio.run(scenario())


def test_an_image_that_another_control_plane_still_uses_stays(
    redis_url: str, prefix: str, store: ImageStore, make_record: MakeRecord
) -> None:
    async def scenario() -> None:
        async with member(redis_url, prefix, store) as one, member(redis_url, prefix, store) as two:
            image = make_image(1)
            record = named(make_record("a"), image)
            await one.add(record, image)
            await asyncio.wait_for(two.directory.reached(one.directory.revision), 10)
            lease = two.directory.resolve("a")
            change = await one.remove(record)
            # The other has not said yet that it saw the removal, so it may be using the image.
            assert await one.keeper.collect() == []
            await two.seen(change)
            assert await two.keeper.collect() == []
            assert await one.keeper.collect() == []
            lease.release()
            assert await one.keeper.collect() == []
            assert await two.keeper.collect() == [image.digest]

    asyncio.run(scenario())


def test_heartbeats_go_on_after_an_error_of_any_kind(
    redis_url: str, prefix: str, store: ImageStore, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with member(redis_url, prefix, store) as one:
            image = make_image(1)
            record = named(make_record("a"), image)
            await one.add(record, image)
            beats = asyncio.Queue[None]()

            async def failing() -> list[str]:
                beats.put_nowait(None)
                raise RuntimeError("this store is broken")

            monkeypatch.setattr(one.keeper, "collect", failing)
            await one.keeper.start()
            await asyncio.wait_for(beats.get(), 10)
            await one.remove(record)  # wakes the keeper
            await asyncio.wait_for(beats.get(), 10)

    asyncio.run(scenario())


def test_a_dead_control_plane_holds_nothing_for_ever(
    redis_url: str, prefix: str, store: ImageStore, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with member(redis_url, prefix, store) as one, member(redis_url, prefix, store) as two:
            image = make_image(1)
            record = named(make_record("a"), image)
            await one.add(record, image)
            await one.remove(record)
            assert await one.keeper.collect() == []
            monkeypatch.setattr(image_keeper, "MEMBER_TTL_S", 0)
            await two.keeper.join()  # its last sign of life is over at once
            monkeypatch.undo()
            assert await one.keeper.collect() == [image.digest]

    asyncio.run(scenario())


def test_nothing_is_left_of_a_registration_that_fails(
    redis_url: str, prefix: str, store: ImageStore, make_record: MakeRecord
) -> None:
    async def scenario() -> None:
        async with member(redis_url, prefix, store) as one:
            image = make_image(1)
            with pytest.raises(RuntimeError):
                async with one.keeper.stored(image):
                    assert store.digests() == (image.digest,)
                    assert await one.keeper.collect() == []  # not while it is being published
                    raise RuntimeError
            assert await one.keeper.collect() == [image.digest]
            assert store.digests() == ()

    asyncio.run(scenario())


def test_weights_registered_again_while_they_are_garbage_stay(
    redis_url: str, prefix: str, store: ImageStore, make_record: MakeRecord
) -> None:
    async def scenario() -> None:
        async with member(redis_url, prefix, store) as one:
            image = make_image(1)
            record = named(make_record("a"), image)
            await one.add(record, image)
            await one.remove(record)
            async with one.keeper.stored(image):
                assert await one.keeper.collect() == []
                change = await one.registry.add(record)
            await one.seen(change)
            assert await one.keeper.collect() == []
            assert store.digests() == (image.digest,)

    asyncio.run(scenario())


def test_weights_that_are_just_being_deleted_wait_for_that(
    redis_url: str, prefix: str, store: ImageStore, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_keeper, "CLAIM_RETRY_S", 0.01)

    async def scenario() -> None:
        async with member(redis_url, prefix, store) as one:
            image = make_image(1)
            record = named(make_record("a"), image)
            await one.add(record, image)
            await one.remove(record)
            await one.keeper.collect()
            await one.registry.garbage.claim(image.digest)
            await one.registry.garbage.unclaim(image.digest)
            assert await one.registry.garbage.may_delete(image.digest)
            with pytest.raises(UnavailableError, match="being deleted"):
                await one.add(record, image)
            await one.registry.garbage.deleted(image.digest)
            await one.add(record, image)
            assert store.digests() == (image.digest,)

    asyncio.run(scenario())


def test_an_adapter_whose_image_is_missing_is_refused_until_it_is_stored_again(
    redis_url: str, prefix: str, store: ImageStore, make_record: MakeRecord
) -> None:
    async def scenario() -> None:
        image = make_image(1)
        record = named(make_record("a"), image)
        async with member(redis_url, prefix, store) as one:
            await one.add(record, image)
        store.delete(image.digest)
        async with member(redis_url, prefix, store) as one:
            await one.keeper.start()
            with pytest.raises(PreconditionError, match="is missing from the store"):
                one.directory.resolve("a")
            heard: list[str] = []
            one.directory.on_change(lambda change: heard.append(one.directory.failure_of(change.record.current_version)))
            async with one.keeper.stored(image):
                await one.seen(await one.registry.replace(replace(record, etag="e2"), "e1"))
            one.directory.resolve("a").release()
            assert heard == [""], "whoever is told of the change finds that it can be served"

    asyncio.run(scenario())


def test_the_keeper_collects_by_itself_when_a_lease_ends(
    redis_url: str, prefix: str, store: ImageStore, make_record: MakeRecord
) -> None:
    async def scenario() -> None:
        async with member(redis_url, prefix, store) as one:
            image = make_image(1)
            record = named(make_record("a"), image)
            await one.add(record, image)
            await one.keeper.start()
            lease = one.directory.resolve("a")
            await one.remove(record)
            lease.release()
            async with asyncio.timeout(4):  # below the time between heartbeats
                await until(lambda: not store.digests())

    asyncio.run(scenario())
