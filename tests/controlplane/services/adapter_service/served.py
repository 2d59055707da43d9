"""AdapterService over real gRPC, a real Redis and a real store; a small stand-in for the dispatcher plays the data planes."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch
from google.protobuf import field_mask_pb2
from safetensors.torch import save_file

from adapter_store.geometry import LORA_MODULES, BaseGeometry, LinearShape
from adapter_store.image_store import ImageStore
from adapter_store.sources import UploadArea
from controlplane.errors import UnavailableError
from controlplane.messages import AdapterResidency
from controlplane.registry.registry import AdapterRegistry, RegistryConfig
from controlplane.services.adapter_service import AdapterService
from controlplane.services.auth import Authenticator, Caller
from controlplane.services.interceptors import CallGuard
from controlplane.services.server import MAX_MESSAGE_BYTES
from protos.loraplane.v1 import adapter_pb2 as pb
from protos.loraplane.v1 import adapter_pb2_grpc
from protos.planes import AdapterPlace

GEOMETRY = BaseGeometry(
    "tiny", "f" * 64, "float32", 2, 1, 8, tuple(LinearShape(name, 16, 16) for name in LORA_MODULES), max_lora_rank=8
)


Run = Callable[..., None]


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


async def take(call: Any, count: int) -> list[pb.WatchAdaptersResponse]:
    """The next messages of a watch."""
    async with asyncio.timeout(20):
        return [await call.read() for _ in range(count)]
