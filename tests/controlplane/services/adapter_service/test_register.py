"""What a registration publishes, what is refused, and that a refusal leaves nothing."""

import asyncio
from pathlib import Path

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2

from protos.loraplane.v1 import adapter_pb2 as pb
from tests.controlplane.services.adapter_service.refusal import Code, Refused
from tests.controlplane.services.adapter_service.served import GEOMETRY, FakeControl, Run, Served, write_adapter
from tests.waiting import until


def test_a_registered_adapter_is_served_as_it_was_described(run: Run) -> None:
    async def scenario(s: Served) -> None:
        adapter = await s.register("team/pirate", labels={"lang": "en"}, aliases=["arr"])
        version = adapter.current
        assert (version.rank, version.alpha, version.rslora) == (4, 8.0, False)
        assert list(version.target_modules) == ["q_proj"]
        assert version.base_model == "tiny-base"
        assert s.store.digests() == (version.version,)
        assert version.num_pages == s.store.read_header(version.version).num_pages
        assert version.size_bytes == version.num_pages * GEOMETRY.page_bytes
        assert adapter.aliases == {"arr": version.version} and adapter.labels == {"lang": "en"}
        assert adapter.state == pb.ADAPTER_STATE_REGISTERED and adapter.tenant == "default" and adapter.etag
        assert adapter.create_time.seconds > 1_700_000_000 and list(adapter.versions) == [version]
        for name in ("team/pirate", "arr", f"team/pirate@{version.version[:8]}"):
            assert await s.get(name) == adapter
            assert s.registry.directory.resolve(name).version.digest == version.version

    run(scenario)


def test_registering_twice_says_exists_and_leaves_the_first(run: Run) -> None:
    async def scenario(s: Served) -> None:
        first = await s.register("a", 1, aliases=["b"])
        with Refused(Code.ALREADY_EXISTS, "'a' is taken: it is an adapter") as refusal:
            await s.register("a", 2)
        assert refusal.detail(error_details_pb2.ResourceInfo).resource_name == "a"
        with Refused(Code.ALREADY_EXISTS, "'b' is taken: it is an alias of adapter 'a'"):
            await s.register("b", 2)
        with Refused(Code.ALREADY_EXISTS, "'a' is taken"):
            await s.register("c", 2, aliases=["a"])
        assert await s.get("a") == first
        assert s.store.digests() == (first.current.version,)

    run(scenario)


def test_of_concurrent_registrations_of_a_name_one_wins_and_the_others_leave_nothing(run: Run) -> None:
    async def scenario(s: Served) -> None:
        results = await asyncio.gather(*(s.register("a", seed) for seed in range(6)), return_exceptions=True)
        won = [r for r in results if isinstance(r, pb.Adapter)]
        lost = [r for r in results if isinstance(r, grpc.aio.AioRpcError)]
        assert len(won) == 1 and [e.code() for e in lost] == [Code.ALREADY_EXISTS] * 5
        await until(lambda: s.store.digests() == (won[0].current.version,))

    run(scenario)


def test_validate_only_checks_everything_and_publishes_nothing(run: Run) -> None:
    async def scenario(s: Served) -> None:
        adapter = await s.register("a", 1, validate_only=True, request_id="r1")
        assert adapter.current.rank == 4
        assert s.store.digests() == () and s.registry.directory.records() == []
        with Refused(Code.NOT_FOUND):
            await s.get("a")
        assert (await s.register("a", 1, request_id="r1")).current.version == adapter.current.version
        with Refused(Code.ALREADY_EXISTS):
            await s.register("a", 1, validate_only=True)

    run(scenario)


def test_every_bad_field_of_a_registration_is_named_at_once(run: Run) -> None:
    async def scenario(s: Served) -> None:
        request = pb.RegisterAdapterRequest(
            name="-a",
            aliases=["x", "x", "b@d", "-a"],
            labels={"k=": "v", "long": "v" * 300},
            request_id="r" * 200,
        )
        with Refused(Code.INVALID_ARGUMENT, "'-a' (2 characters)") as refusal:
            await s.stub.RegisterAdapter(request)
        named = refusal.fields
        assert named == [
            "name",
            "source",
            "aliases[1]",
            "aliases[2]",
            "aliases[3]",
            "aliases[3]",
            "labels",
            "labels.'long'",
            "request_id",
        ]

    run(scenario)


def test_what_is_too_much_is_named_with_its_number_and_the_limit(run: Run) -> None:
    async def scenario(s: Served) -> None:
        labels = {f"k{number}": "v" for number in range(65)}
        aliases = [f"b{number}" for number in range(65)]
        for fields, named, words in (
            ({"labels": labels}, "labels", "65 given; at most 64"),
            ({"aliases": aliases}, "aliases", "65 given; at most 64"),
            ({"request_id": "r" * 129}, "request_id", "(129 characters) must be at most 128"),
        ):
            with Refused(Code.INVALID_ARGUMENT, words) as refusal:
                await s.register("a", **fields)
            assert refusal.fields == [named]
        kept = await s.register("a", labels=dict(list(labels.items())[:64]), aliases=aliases[:64])
        assert (len(kept.labels), len(kept.aliases)) == (64, 64)
        for seconds in (-1, 3601):
            with Refused(Code.INVALID_ARGUMENT, f"{seconds} s must be from 0 to 3600 s") as refusal:
                await s.unregister("a", drain_timeout=duration_pb2.Duration(seconds=seconds))
            assert refusal.fields == ["drain_timeout"]
        assert (await s.get("a")) == kept

    run(scenario)


@pytest.mark.parametrize("name", ["", "a" * 129, "a b", "a@b", "ä", "/a", "a\n"])
def test_names_outside_the_contract_are_refused(run: Run, name: str) -> None:
    async def scenario(s: Served) -> None:
        with Refused(Code.INVALID_ARGUMENT, "name:") as refusal:
            await s.register(name)
        assert refusal.fields == ["name"]

    run(scenario)


def test_bad_sources_are_refused_with_their_status_and_leave_nothing(run: Run) -> None:
    async def scenario(s: Served) -> None:
        async def register(path: Path | str) -> None:
            source = pb.AdapterSource(path=str(path))
            await s.stub.RegisterAdapter(pb.RegisterAdapterRequest(name="a", source=source))

        with Refused(Code.PERMISSION_DENIED, "outside the allowed roots"):
            await register("/etc")
        with Refused(Code.NOT_FOUND, "is not a directory"):
            await register(s.root / "nothing")
        with Refused(Code.NOT_FOUND, "used already or has expired"):
            await s.stub.RegisterAdapter(pb.RegisterAdapterRequest(name="a", source=pb.AdapterSource(upload_id="ab" * 16)))
        with Refused(Code.FAILED_PRECONDITION, "rank") as refusal:
            await register(write_adapter(s.root / "wide", 1, rank=9))
        assert refusal.detail(error_details_pb2.PreconditionFailure).violations
        with Refused(Code.FAILED_PRECONDITION, "use_dora"):
            await register(write_adapter(s.root / "dora", 1, use_dora=True))
        cut = write_adapter(s.root / "cut", 1) / "adapter_model.safetensors"
        cut.write_bytes(cut.read_bytes()[:-8])
        with Refused(Code.DATA_LOSS) as refusal:
            await register(cut.parent)
        assert refusal.metadata["file"].endswith("adapter_model.safetensors")
        assert s.store.digests() == () and s.registry.directory.records() == []

    run(scenario)


def test_without_a_data_plane_nothing_can_be_registered(run: Run) -> None:
    async def scenario(s: Served) -> None:
        with Refused(Code.UNAVAILABLE, "no data plane has connected yet") as refusal:
            await s.register("a")
        assert refusal.detail(error_details_pb2.RetryInfo).retry_delay.ToSeconds() >= 1

    run(scenario, control=FakeControl(base=None, num_pages=0))


def test_too_many_registrations_at_once_are_turned_away(run: Run) -> None:
    async def scenario(s: Served) -> None:
        s.service._importer._max_pending = 0
        with Refused(Code.RESOURCE_EXHAUSTED, "at most 0 may") as refusal:
            await s.register("a")
        assert refusal.detail(error_details_pb2.RetryInfo)

    run(scenario)
