"""AdapterService over real gRPC, a real Redis and a real store; a small stand-in for the dispatcher plays the data planes.

One long file: test modules cannot import one another's helpers, and all tests here need the same served control plane.
"""

import asyncio
import base64
import hashlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.protobuf import duration_pb2, field_mask_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from safetensors.torch import save_file

from adapter_store.geometry import LORA_MODULES, BaseGeometry, LinearShape
from adapter_store.image_store import ImageStore
from adapter_store.sources import Upload, UploadArea
from controlplane.errors import NotFoundError, UnavailableError
from controlplane.messages import AdapterResidency
from controlplane.registry import watch as watch_module
from controlplane.registry import writer as writer_module
from controlplane.registry.embedded_redis import EmbeddedRedis
from controlplane.registry.redis_registry import RequestMark
from controlplane.registry.registry import AdapterRegistry, RegistryConfig
from controlplane.services.adapter_service import MAX_CHUNK_BYTES, AdapterService
from controlplane.services.auth import Authenticator, Caller
from controlplane.services.interceptors import CallGuard
from controlplane.services.server import MAX_MESSAGE_BYTES
from protos.loraplane.v1 import adapter_pb2 as pb
from protos.loraplane.v1 import adapter_pb2_grpc
from protos.planes import AdapterPlace

GEOMETRY = BaseGeometry(
    "tiny", "f" * 64, "float32", 2, 1, 8, tuple(LinearShape(name, 16, 16) for name in LORA_MODULES), max_lora_rank=8
)


@dataclass
class FakeControl:
    """What data planes would do, told by the test."""

    base: BaseGeometry | None = GEOMETRY
    num_pages: int = 100
    places: dict[str, tuple[AdapterResidency, ...]] = field(default_factory=dict)
    pinned: list[str] = field(default_factory=list)
    preloaded: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    offered: dict[str, int] = field(default_factory=dict)
    residency_callbacks: list[Callable[[str], None]] = field(default_factory=list)
    connection_callbacks: list[Callable[[bool], None]] = field(default_factory=list)

    def geometry(self) -> BaseGeometry | None:
        return self.base

    def pool_pages(self) -> int:
        return self.num_pages

    def residency(self, digest: str) -> tuple[AdapterResidency, ...]:
        return self.places.get(digest, ())

    def set_pinned(self, digests: Sequence[str]) -> None:
        self.pinned = list(digests)

    def preload(self, digest: str) -> None:
        if self.base is None:
            raise UnavailableError("no data plane is connected")
        self.preloaded.append(digest)

    def offer(self, digest: str, num_pages: int) -> None:
        self.offered[digest] = num_pages

    def withdraw(self, digest: str) -> None:
        self.offered.pop(digest, None)

    def abort_adapter(self, digest: str) -> int:
        self.aborted.append(digest)
        return 0

    def on_residency_change(self, callback: Callable[[str], None]) -> None:
        self.residency_callbacks.append(callback)

    def on_connection_change(self, callback: Callable[[bool], None]) -> None:
        self.connection_callbacks.append(callback)

    def move(self, digest: str, place: AdapterPlace) -> None:
        """A data plane says where a version lies now."""
        self.places[digest] = (AdapterResidency("plane:1", place, 4096, 1_700_000_000.5),)
        for callback in self.residency_callbacks:
            callback(digest)


@dataclass
class Served:
    """A control plane's adapter service and a client's stub."""

    stub: Any
    control: FakeControl
    registry: AdapterRegistry
    store: ImageStore
    service: AdapterService
    root: Path

    async def register(self, name: str, seed: int = 0, **fields: Any) -> pb.Adapter:
        """Registers an adapter whose weights follow from the seed."""
        source = pb.AdapterSource(path=str(write_adapter(self.root / f"seed{seed}", seed)))
        answer: pb.RegisterAdapterResponse = await self.stub.RegisterAdapter(
            pb.RegisterAdapterRequest(name=name, source=source, **fields)
        )
        return answer.adapter

    async def update(self, name: str, paths: Iterable[str], **fields: Any) -> pb.Adapter:
        """Updates an adapter; `seed` is a new source."""
        if (seed := fields.pop("seed", None)) is not None:
            fields["source"] = pb.AdapterSource(path=str(write_adapter(self.root / f"seed{seed}", seed)))
        mask = field_mask_pb2.FieldMask(paths=paths)
        answer: pb.UpdateAdapterResponse = await self.stub.UpdateAdapter(
            pb.UpdateAdapterRequest(name=name, update_mask=mask, **fields)
        )
        return answer.adapter

    async def unregister(self, name: str, **fields: Any) -> pb.Adapter:
        """Unregisters an adapter."""
        answer: pb.UnregisterAdapterResponse = await self.stub.UnregisterAdapter(pb.UnregisterAdapterRequest(name=name, **fields))
        return answer.adapter

    async def get(self, name: str) -> pb.Adapter:
        """Gets an adapter."""
        answer: pb.GetAdapterResponse = await self.stub.GetAdapter(pb.GetAdapterRequest(name=name))
        return answer.adapter

    async def list(self, **fields: Any) -> pb.ListAdaptersResponse:
        """Lists adapters."""
        answer: pb.ListAdaptersResponse = await self.stub.ListAdapters(pb.ListAdaptersRequest(**fields))
        return answer


def write_adapter(directory: Path, seed: int, rank: int = 4, **config: object) -> Path:
    """A PEFT adapter directory as save_pretrained makes it."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(GEOMETRY.num_layers):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, 16, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(16, rank, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    plain["base_model_name_or_path"] = "tiny-base"
    (directory / "adapter_config.json").write_text(json.dumps(plain | config))
    return directory


@asynccontextmanager
async def serving(
    tmp_path: Path,
    redis_url: str | None = None,
    control: FakeControl | None = None,
    callers: dict[str, Caller] | None = None,
    *,
    allow_dummies: bool = False,
) -> AsyncIterator[Served]:
    """A server with everything of the registry in it."""
    control = control or FakeControl()
    store = ImageStore(tmp_path / "store")
    uploads = UploadArea(tmp_path / "uploads", max_bytes=1 << 20, max_uploads=2)
    root = tmp_path / "adapters"
    root.mkdir(exist_ok=True)
    async with AdapterRegistry(RegistryConfig(tmp_path / "state", redis_url), store, control) as registry:
        service = AdapterService(registry, control, uploads, [root], allow_dummies=allow_dummies)
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        server = grpc.aio.server(interceptors=[CallGuard(Authenticator(callers))], options=options)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Served(adapter_pb2_grpc.AdapterServiceStub(channel), control, registry, store, service, root)
        await server.stop(None)
        service.close()
        registry.directory.check_integrity()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Runs a scenario against a service with an embedded Redis."""

    def run(scenario: Callable[[Served], Any], **options: Any) -> None:
        async def with_service() -> None:
            async with asyncio.timeout(60), serving(tmp_path, **options) as served:
                await scenario(served)

        asyncio.run(with_service())

    return run


Run = Callable[..., None]


@dataclass
class Refusal:
    """How a call was refused; filled when its `refused` block ends."""

    message: str = ""
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    details: list[Any] = field(default_factory=list)

    def detail(self, kind: type[Any]) -> Any:
        """The detail of that kind."""
        for packed in self.details:
            message = kind()
            if packed.Unpack(message):
                return message
        raise AssertionError(f"no {kind.__name__} in {self.details}")

    @property
    def fields(self) -> list[str]:
        """Fields of a BadRequest."""
        return [v.field for v in self.detail(error_details_pb2.BadRequest).field_violations]


class Refused:
    """Expects one call to fail with a code, and a text in its message."""

    def __init__(self, code: grpc.StatusCode, text: str = "") -> None:
        self.code, self.text, self.refusal = code, text, Refusal()

    def __enter__(self) -> Refusal:
        return self.refusal

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        assert isinstance(error, grpc.aio.AioRpcError), f"expected {self.code}, got {error!r}"
        assert error.code() is self.code, error
        assert self.text in (error.details() or ""), error.details()
        status = rpc_status.from_call(error)
        self.refusal.details = list(status.details)
        info = self.refusal.detail(error_details_pb2.ErrorInfo)
        assert info.domain == "loraplane"
        self.refusal.message, self.refusal.reason, self.refusal.metadata = status.message, info.reason, dict(info.metadata)
        return True


Code = grpc.StatusCode


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


def test_a_repeated_request_id_gets_the_first_answer(run: Run) -> None:
    async def scenario(s: Served) -> None:
        first, second = await asyncio.gather(*(s.register("a", 1, request_id="r1") for _ in range(2)))
        assert first == second == await s.register("a", 1, request_id="r1")
        with Refused(Code.INVALID_ARGUMENT, "used within a day for a different request") as refusal:
            await s.register("b", 1, request_id="r1")
        assert refusal.fields == ["request_id"]
        updated = await s.update("a", ["source"], seed=2, request_id="r2")
        assert await s.update("a", ["source"], seed=2, request_id="r2") == updated
        assert len(updated.versions) == 2

    run(scenario)


def test_calls_with_one_request_id_never_run_beside_each_other(run: Run) -> None:
    async def scenario(s: Served) -> None:
        num_inside, most = 0, 0

        async def call(times: int) -> None:
            nonlocal num_inside, most
            for _ in range(times):
                async with s.service._once(RequestMark("r1", "fingerprint")):
                    num_inside += 1
                    most = max(most, num_inside)
                    await asyncio.sleep(0)
                    num_inside -= 1

        # The first comes again at once, while the second has been woken and does not run yet.
        await asyncio.gather(call(3), call(1), call(1))
        assert most == 1
        assert not s.service._request_locks

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


def test_dummy_adapters_are_registered_as_any_other(run: Run) -> None:
    async def scenario(served: Served) -> None:
        dummy = pb.DummyAdapter(rank=8, target_modules=["v_proj", "q_proj"], seed=3)
        request = pb.RegisterAdapterRequest(name="dummy", source=pb.AdapterSource(dummy=dummy), labels={"of": "load"})
        adapter = (await served.stub.RegisterAdapter(request)).adapter
        current = adapter.current
        assert (current.rank, current.alpha, list(current.target_modules)) == (8, 8.0, ["q_proj", "v_proj"])
        assert (current.base_model, dict(adapter.labels)) == ("dummy", {"of": "load"})
        assert served.store.read(current.version, GEOMETRY).header.num_pages == current.num_pages
        # The same weights once more are the same version; another seed is another one.
        dummy.seed = 4
        updated = await served.update("dummy", ["source"], source=pb.AdapterSource(dummy=dummy))
        assert [v.version for v in updated.versions] == [current.version, updated.current.version]
        again = await served.update("dummy", ["source"], source=request.source)
        assert again.current.version == current.version

    run(scenario, allow_dummies=True)


def test_dummy_adapters_are_refused_by_field_and_by_the_base(run: Run) -> None:
    def request(**fields: Any) -> pb.RegisterAdapterRequest:
        return pb.RegisterAdapterRequest(name="dummy", source=pb.AdapterSource(dummy=pb.DummyAdapter(**fields)))

    async def scenario(served: Served) -> None:
        with Refused(Code.INVALID_ARGUMENT) as refusal:
            await served.stub.RegisterAdapter(request())
        assert refusal.fields == ["source.dummy.rank", "source.dummy.target_modules"]
        with Refused(Code.INVALID_ARGUMENT, "given twice") as refusal:
            await served.stub.RegisterAdapter(request(rank=1, target_modules=["q_proj", "lm_head", "q_proj"]))
        assert refusal.fields == ["source.dummy.target_modules[1]", "source.dummy.target_modules[2]"]
        with Refused(Code.FAILED_PRECONDITION, "max_lora_rank of 8") as refusal:
            await served.stub.RegisterAdapter(request(rank=9, target_modules=["q_proj"]))
        assert refusal.reason == "ADAPTER_REJECTED"
        assert served.store.digests() == ()

    run(scenario, allow_dummies=True)


def test_without_leave_no_dummy_adapter_is_made(run: Run) -> None:
    async def scenario(served: Served) -> None:
        dummy = pb.DummyAdapter(rank=8, target_modules=["q_proj"])
        with Refused(Code.FAILED_PRECONDITION, "--allow-dummy-adapters") as refusal:
            await served.stub.RegisterAdapter(pb.RegisterAdapterRequest(name="a", source=pb.AdapterSource(dummy=dummy)))
        assert refusal.reason == "DUMMY_NOT_ALLOWED"
        assert refusal.detail(error_details_pb2.PreconditionFailure).violations[0].subject == "source.dummy"

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


def upload_parts(directory: Path, chunk_bytes: int = 700) -> Iterator[pb.UploadAdapterRequest]:
    """The files of a directory as a client sends them."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        content = (directory / name).read_bytes()
        header = pb.FileHeader(name=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        yield pb.UploadAdapterRequest(file=header)
        for start in range(0, len(content), chunk_bytes):
            yield pb.UploadAdapterRequest(chunk=content[start : start + chunk_bytes])


def test_an_uploaded_adapter_equals_the_same_one_from_a_path_and_is_used_once(run: Run, tmp_path: Path) -> None:
    async def scenario(s: Served) -> None:
        directory = write_adapter(tmp_path / "client", 3)
        answer = await s.stub.UploadAdapter(upload_parts(directory))
        assert answer.size_bytes == sum(f.stat().st_size for f in directory.iterdir())
        assert answer.expire_time.seconds > 1_700_000_000
        request = pb.RegisterAdapterRequest(name="up", source=pb.AdapterSource(upload_id=answer.upload_id), request_id="r")
        uploaded = (await s.stub.RegisterAdapter(request)).adapter
        assert uploaded.current.version == (await s.register("path", 3)).current.version
        assert (await s.stub.RegisterAdapter(request)).adapter == uploaded  # a lost answer, asked for again
        request.name, request.request_id = "again", ""
        with Refused(Code.NOT_FOUND, "used already"):
            await s.stub.RegisterAdapter(request)
        assert list((tmp_path / "uploads").iterdir()) == []

    run(scenario)


def test_broken_uploads_are_refused_and_leave_nothing(run: Run, tmp_path: Path) -> None:
    async def scenario(s: Served) -> None:
        parts = list(upload_parts(write_adapter(tmp_path / "client", 3)))
        header = pb.FileHeader(name="adapter_config.json", size_bytes=2 << 20, sha256="0" * 64)
        flipped = pb.UploadAdapterRequest(chunk=b"!" + parts[-1].chunk[1:])
        cases: list[tuple[list[pb.UploadAdapterRequest], grpc.StatusCode, str]] = [
            (parts[1:], Code.INVALID_ARGUMENT, "before the header"),
            (parts[:-1], Code.INVALID_ARGUMENT, "ended after"),
            ([*parts[:-1], flipped], Code.INVALID_ARGUMENT, "SHA-256"),
            ([pb.UploadAdapterRequest()], Code.INVALID_ARGUMENT, "file or chunk"),
            ([], Code.INVALID_ARGUMENT, "was not sent"),
            ([parts[0], pb.UploadAdapterRequest(chunk=bytes(MAX_CHUNK_BYTES + 1))], Code.INVALID_ARGUMENT, "at most 4194304"),
            ([parts[0], parts[0]], Code.INVALID_ARGUMENT, "adapter_config.json"),
            ([pb.UploadAdapterRequest(file=pb.FileHeader(name="../x", size_bytes=1))], Code.INVALID_ARGUMENT, "'../x'"),
            ([pb.UploadAdapterRequest(file=header)], Code.RESOURCE_EXHAUSTED, "the limit is 1048576"),
        ]
        for sent, code, text in cases:
            with Refused(code, text):
                await s.stub.UploadAdapter(iter(sent))
            assert list((tmp_path / "uploads").iterdir()) == []

    run(scenario)


def test_an_upload_that_is_cancelled_as_it_begins_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = UploadArea.begin
    begins: list[Upload] = []

    def begin_slowly(area: UploadArea) -> Upload:
        begins.append(begin(area))
        time.sleep(0.1)
        return begins[-1]

    monkeypatch.setattr(UploadArea, "begin", begin_slowly)

    async def scenario(s: Served) -> None:
        call = s.stub.UploadAdapter()
        await until(lambda: bool(begins))
        call.cancel()
        await until(lambda: not any((tmp_path / "uploads").iterdir()))

    run(scenario)


def test_a_cancelled_upload_leaves_nothing_and_frees_its_place(run: Run, tmp_path: Path) -> None:
    async def scenario(s: Served) -> None:
        parts = list(upload_parts(write_adapter(tmp_path / "client", 3)))
        for _ in range(4):  # more than may be under way at once
            call = s.stub.UploadAdapter()
            await call.write(parts[0])
            await until(lambda: any((tmp_path / "uploads").iterdir()))
            call.cancel()
            await until(lambda: not any((tmp_path / "uploads").iterdir()))
        assert (await s.stub.UploadAdapter(iter(parts))).upload_id

    run(scenario)


def test_too_many_uploads_are_turned_away(run: Run, tmp_path: Path) -> None:
    async def scenario(s: Served) -> None:
        parts = list(upload_parts(write_adapter(tmp_path / "client", 3)))
        for _ in range(2):
            await s.stub.UploadAdapter(iter(parts))
        with Refused(Code.RESOURCE_EXHAUSTED, "the limit is 2"):
            await s.stub.UploadAdapter(iter(parts))

    run(scenario)


async def until(condition: Callable[[], bool]) -> None:
    """Waits for something that happens beside the calls."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_new_source_makes_a_new_version_and_rollback_serves_the_old_one(run: Run) -> None:
    async def scenario(s: Served) -> None:
        first = await s.register("a", 1, aliases=["stable"])
        lease = s.registry.directory.resolve("a")
        second = await s.update("a", ["source", "labels"], seed=2, labels={"n": "2"})
        assert [v.version for v in second.versions] == [first.current.version, second.current.version]
        assert second.current.version != first.current.version
        assert second.etag != first.etag and second.update_time.ToNanoseconds() > first.update_time.ToNanoseconds()
        assert second.create_time == first.create_time and second.labels == {"n": "2"}
        assert lease.version.digest == first.current.version  # a running request keeps its version
        resolve = s.registry.directory.resolve
        assert resolve("a").version.digest == second.current.version
        assert resolve("stable").version.digest == first.current.version
        back = await s.update("a", ["current_version"], current_version=first.current.version[:10])
        assert back.current == first.current and len(back.versions) == 2
        assert resolve("a").version.digest == first.current.version
        again = await s.update("a", ["source"], seed=2)
        assert list(again.versions) == list(second.versions) and again.current == second.current

    run(scenario)


def test_aliases_are_replaced_as_a_whole_and_may_name_versions(run: Run) -> None:
    async def scenario(s: Served) -> None:
        first = await s.register("a", 1, aliases=["old"])
        second = await s.update("a", ["source"], seed=2)
        old, new = first.current.version, second.current.version
        changed = await s.update("a", ["aliases"], aliases={"x": old[:8], "y": ""})
        assert changed.aliases == {"x": old, "y": new}
        with Refused(Code.NOT_FOUND):
            await s.get("old")
        await s.register("b", 3)
        with Refused(Code.ALREADY_EXISTS, "'b' is taken"):
            await s.update("a", ["aliases"], aliases={"b": ""})
        with Refused(Code.NOT_FOUND, "has no version '00000000'"):
            await s.update("a", ["aliases"], aliases={"z": "00000000"})
        assert (await s.get("a")).aliases == {"x": old, "y": new}

    run(scenario)


def test_an_etag_that_is_no_longer_right_aborts_update_and_unregister(run: Run) -> None:
    async def scenario(s: Served) -> None:
        first = await s.register("a", 1)
        second = await s.update("a", ["labels"], labels={"k": "1"}, etag=first.etag)
        with Refused(Code.ABORTED, "has changed") as refusal:
            await s.update("a", ["labels"], labels={"k": "2"}, etag=first.etag)
        assert refusal.reason == "ETAG_MISMATCH" and refusal.metadata["found"] == second.etag
        with Refused(Code.ABORTED, "has changed"):
            await s.unregister("a", etag=first.etag)
        assert (await s.get("a")).labels == {"k": "1"}
        await s.unregister("a", etag=second.etag)

    run(scenario)


def test_concurrent_updates_without_etag_all_take_effect(run: Run) -> None:
    async def scenario(s: Served) -> None:
        await s.register("a", 0)
        await asyncio.gather(*(s.update("a", ["source"], seed=seed) for seed in range(1, 6)))
        assert len((await s.get("a")).versions) == 6

    run(scenario)


def test_bad_updates_are_refused_by_field(run: Run) -> None:
    async def scenario(s: Served) -> None:
        await s.register("a", 1, aliases=["b"])
        cases: list[tuple[list[str], dict[str, Any], list[str]]] = [
            ([], {}, ["update_mask"]),
            (["pinned"], {}, ["update_mask"]),
            (["source"], {}, ["source"]),
            (["current_version"], {}, ["current_version"]),
            (["current_version"], {"current_version": "xyz"}, ["current_version"]),
            (["source", "current_version"], {"current_version": "0" * 8}, ["source", "update_mask"]),
            (["aliases"], {"aliases": {"a": "", "b c": ""}}, ["aliases[0]", "aliases[1]"]),
        ]
        for paths, fields, expected in cases:
            with Refused(Code.INVALID_ARGUMENT) as refusal:
                await s.update("a", paths, **fields)
            assert sorted(refusal.fields) == expected, paths
        with Refused(Code.NOT_FOUND, "it is an alias of 'a'"):
            await s.update("b", ["labels"])
        with Refused(Code.NOT_FOUND, "no adapter is called 'c'"):
            await s.update("c", ["labels"])

    run(scenario)


def test_beyond_the_limit_the_oldest_version_that_nobody_names_goes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MAX_VERSIONS", 3)

    async def scenario(s: Served) -> None:
        versions = [(await s.register("a", 0, aliases=["kept"])).current.version]
        versions += [(await s.update("a", ["source"], seed=seed)).current.version for seed in range(1, 4)]
        kept = [versions[0], *versions[2:]]
        assert [v.version for v in (await s.get("a")).versions] == kept
        await until(lambda: s.store.digests() == tuple(sorted(kept)))

    run(scenario)


def test_unregister_takes_the_name_at_once_and_the_weights_after_the_last_request(run: Run) -> None:
    async def scenario(s: Served) -> None:
        adapter = await s.register("a", 1, aliases=["b"])
        lease = s.registry.directory.resolve("a")
        gone = await s.unregister("a")
        assert gone.state == pb.ADAPTER_STATE_DRAINING and gone.name == "a"
        for name in ("a", "b"):
            with Refused(Code.NOT_FOUND):
                await s.get(name)
            with pytest.raises(NotFoundError):
                s.registry.directory.resolve(name)
        assert s.store.digests() == (adapter.current.version,)
        lease.release()
        await until(lambda: s.store.digests() == ())
        assert s.control.aborted == []
        with Refused(Code.NOT_FOUND):
            await s.unregister("a")

    run(scenario)


def test_unregister_waits_for_the_drain_as_long_as_asked(run: Run) -> None:
    async def scenario(s: Served) -> None:
        await s.register("a", 1)
        await s.register("b", 2)
        held, freed = s.registry.directory.resolve("a"), s.registry.directory.resolve("b")
        short, long = duration_pb2.Duration(nanos=1_000_000), duration_pb2.Duration(seconds=50)
        assert (await s.unregister("a", drain_timeout=short)).state == pb.ADAPTER_STATE_DRAINING
        waiting = asyncio.ensure_future(s.unregister("b", drain_timeout=long))
        await until(lambda: s.registry.directory.get("b") is None)
        freed.release()
        assert (await waiting).state == pb.ADAPTER_STATE_REGISTERED
        held.release()
        with Refused(Code.INVALID_ARGUMENT, "drain_timeout: -1 s must be from 0 to 3600 s"):
            await s.unregister("a", drain_timeout=duration_pb2.Duration(seconds=-1))

    run(scenario)


def test_force_aborts_the_requests_unless_another_name_has_the_weights(run: Run) -> None:
    async def scenario(s: Served) -> None:
        digest = (await s.register("a", 1)).current.version
        await s.register("b", 1)
        await s.unregister("a", force=True)
        assert s.control.aborted == []
        await s.unregister("b", force=True)
        assert s.control.aborted == [digest]

    run(scenario)


def test_a_name_is_free_again_while_its_old_weights_drain(run: Run) -> None:
    async def scenario(s: Served) -> None:
        old = (await s.register("a", 1)).current.version
        lease = s.registry.directory.resolve("a")
        await s.unregister("a")
        new = (await s.register("a", 2)).current.version
        assert lease.version.digest == old and s.registry.directory.resolve("a").version.digest == new
        assert s.store.digests() == tuple(sorted((old, new)))
        # The same weights again, while they are about to go.
        await s.register("c", 1)
        lease.release()
        await s.registry.images.collect()
        assert s.store.digests() == tuple(sorted((old, new)))

    run(scenario)


def test_pins_are_told_to_the_data_planes_and_leave_half_of_the_pool(run: Run) -> None:
    async def scenario(s: Served) -> None:
        a = await s.register("a", 1, pinned=True)
        pages = a.current.num_pages
        assert a.pinned and s.control.pinned == [a.current.version]
        s.control.num_pages = pages * 4
        b = await s.register("b", 2)
        assert (await s.stub.PinAdapter(pb.PinAdapterRequest(name="b"))).adapter.pinned
        assert s.control.pinned == [a.current.version, b.current.version]
        await s.register("c", 3)
        with Refused(Code.RESOURCE_EXHAUSTED, f"at most {pages * 2} of {pages * 4} may be pinned") as refusal:
            await s.stub.PinAdapter(pb.PinAdapterRequest(name="c"))
        assert refusal.detail(error_details_pb2.QuotaFailure).violations[0].subject == "pinned_pages"
        with Refused(Code.RESOURCE_EXHAUSTED):
            await s.register("d", 4, pinned=True)
        # Weights that are pinned already take no second share.
        await s.register("e", 1, pinned=True)
        await s.stub.UnpinAdapter(pb.UnpinAdapterRequest(name="b"))
        assert s.control.pinned == [a.current.version]
        newer = await s.update("a", ["source"], seed=5)
        await s.unregister("e")
        assert s.control.pinned == [newer.current.version]
        await s.unregister("a")
        assert s.control.pinned == []
        for call, request in ((s.stub.PinAdapter, pb.PinAdapterRequest), (s.stub.UnpinAdapter, pb.UnpinAdapterRequest)):
            with Refused(Code.NOT_FOUND):
                await call(request(name="a"))

    run(scenario)


def test_pins_are_told_again_when_a_data_plane_connects_as_far_as_they_fit(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as s:
            first = await s.register("a", 1, pinned=True)
            await s.register("b", 2, pinned=True)
        async with serving(tmp_path, control=FakeControl(num_pages=0)) as s:
            assert s.control.pinned == []
            s.control.num_pages = 2 * first.current.num_pages
            for callback in s.control.connection_callbacks:
                callback(True)
            assert s.control.pinned == [first.current.version]

    asyncio.run(scenario())


def test_data_planes_are_offered_what_the_names_serve_and_nothing_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as s:
            first, other = await s.register("a", 1), await s.register("b", 2)
            assert s.control.offered == {each.current.version: each.current.num_pages for each in (first, other)}
            second = await s.update("a", ["source"], seed=3)
            assert set(s.control.offered) == {second.current.version, other.current.version}
            # The weights of a's first version are served again, under another name.
            third = await s.register("c", 1)
            assert set(s.control.offered) == {second.current.version, other.current.version, third.current.version}
            await s.unregister("b")
            assert set(s.control.offered) == {second.current.version, third.current.version}
        async with serving(tmp_path) as s:
            assert set(s.control.offered) == {second.current.version, third.current.version}
        # Until a data plane connects it is not known whether it has the base that they were made for.
        async with serving(tmp_path, control=FakeControl(base=None)) as s:
            s.control.base = replace(GEOMETRY, fingerprint="e" * 64)
            for callback in s.control.connection_callbacks:
                callback(True)
            assert s.control.offered == {}

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_preload_asks_the_data_planes_and_get_shows_where_the_weights_are(run: Run) -> None:
    async def scenario(s: Served) -> None:
        digest = (await s.register("a", 1, aliases=["b"])).current.version
        await s.stub.PreloadAdapter(pb.PreloadAdapterRequest(name=f"b@{digest[:8]}"))
        assert s.control.preloaded == [digest]
        states = {
            AdapterPlace.FETCHING: (pb.ADAPTER_STATE_FETCHING, []),
            AdapterPlace.HOST: (pb.ADAPTER_STATE_REGISTERED, [pb.MEMORY_TIER_HOST]),
            AdapterPlace.DEVICE: (pb.ADAPTER_STATE_READY, [pb.MEMORY_TIER_DEVICE]),
            AdapterPlace.FAILED: (pb.ADAPTER_STATE_FAILED, []),
        }
        for place, (state, tiers) in states.items():
            s.control.move(digest, place)
            adapter = await s.get("a")
            assert adapter.state == state
            assert [r.tier for r in adapter.residency] == tiers
        assert "plane:1" in adapter.error
        s.control.move(digest, AdapterPlace.DEVICE)
        residency = (await s.get("a")).residency[0]
        assert (residency.data_plane, residency.size_bytes) == ("plane:1", 4096)
        assert residency.last_used.ToMilliseconds() == 1_700_000_000_500
        with Refused(Code.NOT_FOUND):
            await s.stub.PreloadAdapter(pb.PreloadAdapterRequest(name="c"))
        s.control.base = None
        with Refused(Code.UNAVAILABLE):
            await s.stub.PreloadAdapter(pb.PreloadAdapterRequest(name="a"))

    run(scenario)


def test_lists_are_filtered_ordered_and_paged(run: Run) -> None:
    async def scenario(s: Served) -> None:
        for n in range(5):
            await s.register(f"a{n}", n, labels={"parity": "odd" if n % 2 else "even"}, pinned=n == 3)
        digest = (await s.register("b", 9)).current.version
        s.control.move(digest, AdapterPlace.DEVICE)

        async def names(**fields: Any) -> list[str]:
            return [a.name for a in (await s.list(**fields)).adapters]

        assert await names() == ["a0", "a1", "a2", "a3", "a4", "b"]
        assert await names(order_by="name desc") == ["b", "a4", "a3", "a2", "a1", "a0"]
        assert await names(order_by="create_time desc") == ["b", "a4", "a3", "a2", "a1", "a0"]
        await s.update("a0", ["labels"], labels={"parity": "even", "x": "y z"})
        assert (await names(order_by="update_time"))[-1] == "a0"
        assert await names(filter="name:a AND label.parity=odd") == ["a1", "a3"]
        assert await names(filter="label.x=y z") == ["a0"]
        assert await names(filter="pinned=true") == ["a3"]
        assert await names(filter="state=READY") == ["b"]
        assert await names(filter="state=ADAPTER_STATE_READY AND module=q_proj AND rank>=4 AND rank<=4") == ["b"]
        assert await names(filter="module=k_proj") == []
        assert await names(filter="rank>=5") == []
        seen, token = [], ""
        while True:
            page = await s.list(page_size=2, order_by="name desc", filter="name:a", page_token=token)
            assert page.total_size == 5 and len(page.adapters) <= 2
            seen += [a.name for a in page.adapters]
            token = page.next_page_token
            if not token:
                break
            if len(seen) == 2:  # what comes and goes in between neither repeats nor hides others
                await s.unregister("a4")
                await s.register("a9", 4)
        assert seen == ["a4", "a3", "a2", "a1", "a0"]

    run(scenario)


# JSON that is not a page token's.
NO_TOKENS = (b"null", b"5", b"{}", b'["", "", 0]', b'["", "", 1e999, "a"]', b'["", "", 0, null]', b"[" * 20_000)


def test_malformed_lists_are_refused_by_field(run: Run) -> None:
    async def scenario(s: Served) -> None:
        for n in range(3):
            await s.register(f"a{n}", n)
        token = (await s.list(page_size=1)).next_page_token
        cases: list[tuple[str, dict[str, Any]]] = [
            ("page_size", {"page_size": 1001}),
            ("page_token", {"page_token": "!"}),
            ("page_token", {"page_token": "AAAA"}),
            *(("page_token", {"page_token": base64.b64encode(body).decode()}) for body in NO_TOKENS),
            ("page_token", {"page_token": "A" * (1 << 20)}),
            ("page_token", {"page_token": token, "order_by": "name desc"}),
            ("filter", {"filter": "colour=red"}),
            ("filter", {"filter": "name:a OR name:b"}),
            ("filter", {"filter": "state=HAPPY"}),
            ("filter", {"filter": "pinned=maybe"}),
            ("filter", {"filter": "name:" + "a" * 3000}),
            ("order_by", {"order_by": "size"}),
            ("order_by", {"order_by": "name up"}),
        ]
        for expected, fields in cases:
            with Refused(Code.INVALID_ARGUMENT) as refusal:
                await s.list(**fields)
            assert refusal.fields == [expected], fields

    run(scenario)


async def take(call: Any, count: int) -> list[pb.WatchAdaptersResponse]:
    """The next messages of a watch."""
    async with asyncio.timeout(20):
        return [await call.read() for _ in range(count)]


def summary(events: Sequence[pb.WatchAdaptersResponse]) -> list[tuple[str, str]]:
    """Type and name of each."""
    return [(pb.ChangeType.Name(e.type).removeprefix("CHANGE_TYPE_"), e.adapter.name) for e in events]


def test_a_watch_tells_what_is_there_then_what_changes(run: Run) -> None:
    async def scenario(s: Served) -> None:
        await s.register("a", 1)
        await s.register("b", 2)
        call = s.stub.WatchAdapters(pb.WatchAdaptersRequest())
        known = await take(call, 2)
        assert summary(known) == [("ADDED", "a"), ("ADDED", "b")]
        # Only the last of what is known can be gone on from: a client that stops before it must begin anew.
        assert [bool(e.revision) for e in known] == [False, True]
        digest = (await s.update("a", ["labels"], labels={"k": "v"})).current.version
        await s.unregister("b")
        events = await take(call, 2)
        assert summary(events) == [("MODIFIED", "a"), ("DELETED", "b")]
        assert events[0].adapter.labels == {"k": "v"}
        s.control.move(digest, AdapterPlace.DEVICE)
        moved = (await take(call, 1))[0]
        assert summary([moved]) == [("MODIFIED", "a")] and moved.adapter.state == pb.ADAPTER_STATE_READY
        assert moved.revision == events[-1].revision
        call.cancel()

    run(scenario)


def test_a_watch_goes_on_from_any_kept_revision_without_loss(run: Run) -> None:
    async def scenario(s: Served) -> None:
        start = (await s.list()).revision
        for n in range(4):
            await s.register(f"a{n}", n)
        call = s.stub.WatchAdapters(pb.WatchAdaptersRequest(revision=start))
        events = await take(call, 4)
        assert summary(events) == [("ADDED", f"a{n}") for n in range(4)]
        call.cancel()
        for event, rest in zip(events, (3, 2, 1, 0), strict=True):
            call = s.stub.WatchAdapters(pb.WatchAdaptersRequest(revision=event.revision))
            assert summary(await take(call, rest)) == summary(events[4 - rest :])
            call.cancel()

    run(scenario)


def test_history_beyond_memory_is_read_from_redis(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as s:
            start = (await s.list()).revision
            await s.register("a", 1)
            await s.update("a", ["labels"], labels={"k": "v"})
        async with serving(tmp_path) as s:  # a new process: nothing in memory
            call = s.stub.WatchAdapters(pb.WatchAdaptersRequest(revision=start))
            assert summary(await take(call, 2)) == [("ADDED", "a"), ("MODIFIED", "a")]
            await s.unregister("a")
            assert summary(await take(call, 1)) == [("DELETED", "a")]
            call.cancel()

    asyncio.run(scenario())


def test_revisions_that_cannot_be_gone_on_from_are_out_of_range(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(s: Served) -> None:
        start = (await s.list()).revision
        here = start.partition("-")[0]
        s.registry.redis._history = 2
        for n in range(4):
            await s.register(f"a{n}", n)
        s.registry.directory._changes.clear()
        for revision in (start, f"{here}-99", "0-4"):
            with Refused(Code.OUT_OF_RANGE, "list again") as refusal:
                await take(s.stub.WatchAdapters(pb.WatchAdaptersRequest(revision=revision)), 1)
            assert refusal.reason == "REVISION_GONE"
        with Refused(Code.INVALID_ARGUMENT, "is not a revision"):
            await take(s.stub.WatchAdapters(pb.WatchAdaptersRequest(revision="soon")), 1)
        monkeypatch.setattr(watch_module, "MAX_WATCHES", 0)
        with Refused(Code.RESOURCE_EXHAUSTED, "at most 0"):
            await take(s.stub.WatchAdapters(pb.WatchAdaptersRequest()), 1)

    run(scenario)


def test_a_watch_that_ends_is_forgotten(run: Run) -> None:
    async def scenario(s: Served) -> None:
        await s.register("a", 1)
        for _ in range(3):
            call = s.stub.WatchAdapters(pb.WatchAdaptersRequest())
            await take(call, 1)
            call.cancel()
        await until(lambda: not s.service._watches._watches)

    run(scenario)


def test_while_redis_is_away_reads_go_on_and_writes_are_unavailable(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with EmbeddedRedis(tmp_path / "redis") as redis, serving(tmp_path, redis.url) as s:
            adapter = await s.register("a", 1)
            os.kill(redis.pid, signal.SIGKILL)
            assert await s.get("a") == adapter
            assert list((await s.list()).adapters) == [adapter]
            s.registry.directory.resolve("a").release()
            with Refused(Code.UNAVAILABLE, "registry is away") as refusal:
                await s.register("b", 2)
            assert refusal.reason == "REGISTRY_AWAY"
            assert refusal.detail(error_details_pb2.RetryInfo).retry_delay.ToSeconds() >= 1
            while True:  # the private Redis is started again by itself
                try:
                    await s.register("b", 2)
                    break
                except grpc.aio.AioRpcError as error:
                    assert error.code() is Code.UNAVAILABLE
                    await asyncio.sleep(0.05)
            assert s.registry.directory.resolve("b").ref.name == "b"
            assert len(s.store.digests()) == 2

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_two_control_planes_share_one_registry(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with EmbeddedRedis(tmp_path / "redis") as redis:
            url = redis.url
            async with serving(tmp_path, url) as one, serving(tmp_path, url) as two:
                adapter = await one.register("a", 1)
                await until(lambda: two.registry.directory.get("a") is not None)
                assert await two.get("a") == adapter
                lease = two.registry.directory.resolve("a")
                await one.unregister("a", force=True)
                await until(lambda: two.control.aborted == [adapter.current.version])
                assert one.control.aborted == [adapter.current.version]
                await one.registry.images.collect()
                assert one.store.digests() == (adapter.current.version,)  # the other still uses it
                lease.release()
                await until(lambda: one.store.digests() == ())

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_adapters_outlive_a_restart_and_a_base_they_were_not_made_for_refuses_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as s:
            adapter = await s.register("a", 1, labels={"k": "v"}, aliases=["b"])
        async with serving(tmp_path) as s:
            assert await s.get("b") == adapter
        other = BaseGeometry("other", "e" * 64, "float32", 2, 1, 8, GEOMETRY.modules, max_lora_rank=8)
        async with serving(tmp_path, control=FakeControl(base=other)) as s:
            shown = await s.get("a")
            assert shown.state == pb.ADAPTER_STATE_FAILED and "was packed for base" in shown.error
            with Refused(Code.FAILED_PRECONDITION, "was packed for base") as refusal:
                await s.stub.PreloadAdapter(pb.PreloadAdapterRequest(name="a"))
            [violation] = refusal.detail(error_details_pb2.PreconditionFailure).violations
            assert (violation.type, violation.subject) == ("ADAPTER_FAILED", "a")
            mended = await s.update("a", ["source"], seed=1)
            assert mended.state == pb.ADAPTER_STATE_REGISTERED and mended.current.version != adapter.current.version

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_only_admins_get_in_and_the_tenant_comes_from_the_credential(run: Run) -> None:
    callers = {"boss": Caller("acme", True), "user": Caller("acme", False)}

    async def scenario(s: Served) -> None:
        source = pb.AdapterSource(path=str(write_adapter(s.root / "seed", 1)))
        request = pb.RegisterAdapterRequest(name="a", source=source)
        with Refused(Code.UNAUTHENTICATED):
            await s.stub.RegisterAdapter(request)
        with Refused(Code.PERMISSION_DENIED):
            await s.stub.RegisterAdapter(request, metadata=[("authorization", "Bearer user")])
        with Refused(Code.PERMISSION_DENIED):
            await take(s.stub.WatchAdapters(pb.WatchAdaptersRequest(), metadata=[("authorization", "Bearer user")]), 1)
        answer = await s.stub.RegisterAdapter(request, metadata=[("authorization", "Bearer boss")])
        assert answer.adapter.tenant == "acme"

    run(scenario, callers=callers)
