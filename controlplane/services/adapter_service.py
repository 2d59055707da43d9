"""AdapterService: the rpcs by which an admin puts adapters in and takes them out.

Converts requests, in their order of checks, to calls of the registry's parts and records to answers; decides nothing itself.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from weakref import WeakValueDictionary

import grpc
from google.protobuf import timestamp_pb2
from google.protobuf.message import Message

from adapter_store.sources import Upload, UploadArea
from controlplane.errors import DeadlineError, InvalidArgumentError, PreconditionError, PreconditionViolation
from controlplane.registry.adapter_control import AdapterControl
from controlplane.registry.adapter_fields import check_name, check_register, check_unregister, check_update
from controlplane.registry.adapter_view import CHANGE_TYPES, AdapterView
from controlplane.registry.importer import DEFAULT_MAX_IMPORTS, AdapterImporter
from controlplane.registry.listing import AdapterLists
from controlplane.registry.offers import AdapterOffers
from controlplane.registry.pinning import Pinning
from controlplane.registry.records import Change, ChangeKind, Revision
from controlplane.registry.redis_registry import RequestMark
from controlplane.registry.registry import AdapterRegistry
from controlplane.registry.watch import WatchHub
from controlplane.registry.writer import AdapterEdit, NewAdapter, RegistryWriter
from controlplane.services.auth import current_caller
from protos.loraplane.v1 import adapter_pb2 as pb
from protos.loraplane.v1 import adapter_pb2_grpc

MAX_CHUNK_BYTES = 4 << 20
# A thousand adapters take 13 ms to write down: streams go on in between.
LIST_BATCH = 50
# A client that sends nothing for so long has lost its upload.
UPLOAD_IDLE_S = 60.0

P = ParamSpec("P")
T = TypeVar("T")
_Context = grpc.aio.ServicerContext[Any, Any]


class AdapterService(adapter_pb2_grpc.AdapterServiceServicer):
    """The rpcs of adapter.proto over one control plane's registry."""

    def __init__(
        self,
        registry: AdapterRegistry,
        control: AdapterControl,
        uploads: UploadArea,
        allowed_roots: Sequence[Path],
        *,
        max_imports: int = DEFAULT_MAX_IMPORTS,
        allow_dummies: bool = False,
    ) -> None:
        """`registry` is open. Call `close` before closing it. allow_dummies: adapters of random weights may be registered."""
        self._directory = registry.directory
        self._control = control
        self._uploads = uploads
        self._view = AdapterView(self._directory, control)
        self._lists = AdapterLists(self._directory, self._view.state)
        self._watches = WatchHub(registry.redis, self._directory, control)
        self._importer = AdapterImporter(
            control.geometry, uploads, allowed_roots, max_imports=max_imports, allow_dummies=allow_dummies
        )
        pinning = Pinning(self._directory, control)
        AdapterOffers(self._directory, control)
        self._writer = RegistryWriter(registry.redis, self._directory, registry.images, pinning, control.geometry)
        # request_ids under way here: a repetition waits for the first instead of importing beside it.
        # A lock lives for as long as a call has it.
        self._request_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._directory.on_change(self._on_change)

    def close(self) -> None:
        """Waits for imports that run."""
        self._importer.close()

    async def RegisterAdapter(self, request: pb.RegisterAdapterRequest, context: _Context) -> pb.RegisterAdapterResponse:
        """See adapter.proto."""
        check_register(request)
        new = NewAdapter(request.name, tuple(request.aliases), request.labels, current_caller().tenant, request.pinned)
        mark = None if request.validate_only else _mark(request, request.request_id)
        async with self._once(mark):
            record = await self._writer.answered(mark)
            if record is None:
                await self._writer.expect_free(new, in_redis=not request.validate_only)
                image = await self._importer.load(request.source)
                record = self._writer.draft(new, image)
                if request.validate_only:
                    self._writer.check_room(record)
                else:
                    record = await self._writer.publish(record, image, mark)
        return pb.RegisterAdapterResponse(adapter=self._view.adapter(record))

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[pb.UploadAdapterRequest], context: _Context
    ) -> pb.UploadAdapterResponse:
        """See adapter.proto."""
        begun: list[Upload] = []
        try:
            # A call may be cancelled while this runs, and what began all the same must end with it.
            await _in_thread(lambda: begun.append(self._uploads.begin()))
            (upload,) = begun
            await _receive(request_iterator, upload)
            upload_id = await _in_thread(upload.finish)
        except BaseException:
            for upload in begun:
                await _in_thread(upload.discard)
            raise
        expires = timestamp_pb2.Timestamp()
        expires.GetCurrentTime()
        expires.FromNanoseconds(expires.ToNanoseconds() + round(self._uploads.ttl_s * 1e9))
        return pb.UploadAdapterResponse(upload_id=upload_id, size_bytes=upload.size_bytes, expire_time=expires)

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: _Context) -> pb.GetAdapterResponse:
        """See adapter.proto."""
        record, _ = self._directory.find(request.name)
        return pb.GetAdapterResponse(adapter=self._view.adapter(record))

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: _Context) -> pb.ListAdaptersResponse:
        """See adapter.proto."""
        page, revision = self._lists.page(request), self._directory.revision
        response = pb.ListAdaptersResponse(
            next_page_token=page.next_page_token, total_size=page.total_size, revision=str(revision)
        )
        for index, record in enumerate(page.records, start=1):
            response.adapters.append(self._view.adapter(record))
            if index % LIST_BATCH == 0:
                await asyncio.sleep(0)
        return response

    async def UpdateAdapter(self, request: pb.UpdateAdapterRequest, context: _Context) -> pb.UpdateAdapterResponse:
        """See adapter.proto."""
        paths = check_update(request)
        mark = _mark(request, request.request_id)
        async with self._once(mark):
            record = await self._writer.answered(mark)
            if record is None:
                await self._writer.read(request.name)  # before the work of an import
                edit = AdapterEdit(
                    image=await self._importer.load(request.source) if "source" in paths else None,
                    labels=request.labels if "labels" in paths else None,
                    aliases=request.aliases if "aliases" in paths else None,
                    current_version=request.current_version if "current_version" in paths else None,
                )
                record = await self._writer.edit(request.name, edit, request.etag, mark)
        return pb.UpdateAdapterResponse(adapter=self._view.adapter(record))

    async def UnregisterAdapter(self, request: pb.UnregisterAdapterRequest, context: _Context) -> pb.UnregisterAdapterResponse:
        """See adapter.proto."""
        drain_s = check_unregister(request)
        record = await self._writer.remove(request.name, request.etag, force=request.force)
        if drain_s:
            with suppress(TimeoutError):
                async with asyncio.timeout(drain_s):
                    await self._directory.drained(record.name, record.digests)
        return pb.UnregisterAdapterResponse(adapter=self._view.adapter(record))

    async def PinAdapter(self, request: pb.PinAdapterRequest, context: _Context) -> pb.PinAdapterResponse:
        """See adapter.proto."""
        check_name("name", request.name)
        return pb.PinAdapterResponse(adapter=self._view.adapter(await self._writer.set_pinned(request.name, True)))

    async def UnpinAdapter(self, request: pb.UnpinAdapterRequest, context: _Context) -> pb.UnpinAdapterResponse:
        """See adapter.proto."""
        check_name("name", request.name)
        return pb.UnpinAdapterResponse(adapter=self._view.adapter(await self._writer.set_pinned(request.name, False)))

    async def PreloadAdapter(self, request: pb.PreloadAdapterRequest, context: _Context) -> pb.PreloadAdapterResponse:
        """See adapter.proto."""
        record, version = self._directory.find(request.name)
        error = self._directory.failure_of(version)
        if error:
            violation = PreconditionViolation("ADAPTER_FAILED", record.name, error)
            raise PreconditionError(f"adapter {record.name!r} cannot be loaded: {error}", [violation], reason="ADAPTER_FAILED")
        self._control.preload(version.digest)
        return pb.PreloadAdapterResponse(adapter=self._view.adapter(record))

    async def WatchAdapters(self, request: pb.WatchAdaptersRequest, context: _Context) -> AsyncIterator[pb.WatchAdaptersResponse]:
        """See adapter.proto."""
        async with aclosing(self._watches.events(_parse_revision(request.revision))) as events:
            async for event in events:
                yield pb.WatchAdaptersResponse(
                    type=CHANGE_TYPES[event.kind],
                    adapter=self._view.adapter(event.record),
                    revision=str(event.revision) if event.revision else "",
                )

    def _on_change(self, change: Change) -> None:
        """A forced removal, made here or by another control plane. Weights that another name still has are left to finish."""
        if change.kind is ChangeKind.DELETED and change.force:
            for digest in change.record.digests:
                if not self._directory.names_of(digest):
                    self._control.abort_adapter(digest)

    @asynccontextmanager
    async def _once(self, mark: RequestMark | None) -> AsyncIterator[None]:
        """One call at a time per request_id."""
        if mark is None:
            yield
            return
        async with self._request_locks.setdefault(mark.request_id, asyncio.Lock()):
            yield


def _mark(request: Message, request_id: str) -> RequestMark | None:
    """Tells a repetition from another request: the same tenant, method and fields."""
    if not request_id:
        return None
    body = request.SerializeToString(deterministic=True)
    digest = hashlib.sha256(f"{current_caller().tenant}\n{request.DESCRIPTOR.full_name}\n".encode() + body)
    return RequestMark(request_id, digest.hexdigest())


async def _receive(requests: AsyncIterator[pb.UploadAdapterRequest], upload: Upload) -> None:
    """Writes the parts of an upload as they come."""
    while True:
        try:
            async with asyncio.timeout(UPLOAD_IDLE_S):
                part = await anext(requests, None)
        except TimeoutError:
            raise DeadlineError(f"nothing came for {UPLOAD_IDLE_S:g} s; the upload is dropped", reason="UPLOAD_IDLE") from None
        if part is None:
            return
        match part.WhichOneof("part"):
            case "file":
                await _in_thread(upload.open_file, part.file.name, part.file.size_bytes, part.file.sha256)
            case "chunk" if len(part.chunk) > MAX_CHUNK_BYTES:
                raise InvalidArgumentError.of("chunk", f"has {len(part.chunk)} bytes; at most {MAX_CHUNK_BYTES} are allowed")
            case "chunk":
                await _in_thread(upload.write, part.chunk)
            case _:
                raise InvalidArgumentError.of("part", "must be file or chunk; neither is set")


async def _in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs blocking work in a thread, to its end even when the caller is cancelled: an upload is one thread's at a time."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        if not work.cancelled():
            work.exception()
        raise


def _parse_revision(text: str) -> Revision | None:
    if not text:
        return None
    try:
        return Revision.parse(text)
    except ValueError as error:
        raise InvalidArgumentError.of("revision", str(error)) from None
