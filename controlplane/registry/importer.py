"""Turns the source of an adapter into a packed image, a few at a time, in threads.

Knows sources and images, nothing of names or of what is published.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from adapter_store.dummy_adapter import DummyAdapter, build_dummy
from adapter_store.geometry import BaseGeometry
from adapter_store.image import AdapterImage
from adapter_store.peft_import import import_peft
from adapter_store.sources import UploadArea, resolve_path
from controlplane.errors import PreconditionError, PreconditionViolation, ResourceExhaustedError, UnavailableError
from protos.loraplane.v1 import adapter_pb2 as pb

# Half of the cores are left to requests; each import holds an adapter in memory.
DEFAULT_MAX_IMPORTS = max(2, min(8, (os.cpu_count() or 1) // 2))
DEFAULT_MAX_WAITING = 64


class AdapterImporter:
    """Imports at most `max_imports` adapters at once; at most `max_waiting` more wait."""

    def __init__(
        self,
        geometry: Callable[[], BaseGeometry | None],
        uploads: UploadArea,
        allowed_roots: Sequence[Path],
        *,
        max_imports: int = DEFAULT_MAX_IMPORTS,
        max_waiting: int = DEFAULT_MAX_WAITING,
        allow_dummies: bool = False,
    ) -> None:
        self._geometry = geometry
        self._uploads = uploads
        self._allowed_roots = tuple(allowed_roots)
        self._allow_dummies = allow_dummies
        self._max_pending = max_imports + max_waiting
        self._num_pending = 0
        # Threads of its own: a client that goes away does not stop its import, so nothing else could count them.
        self._threads = ThreadPoolExecutor(max_imports, thread_name_prefix="adapter-import")

    def close(self) -> None:
        """Waits for the imports that run and drops those that wait."""
        self._threads.shutdown(cancel_futures=True)

    async def load(self, source: pb.AdapterSource) -> AdapterImage:
        """The image of a source; an upload is used up by it.

        Raises:
            PreconditionError: it is a dummy, and those are not allowed here.
            UnavailableError: the base model is not known yet.
            ResourceExhaustedError: too many imports wait.
            AdapterStoreError: the source or the adapter cannot be taken.
        """
        if source.WhichOneof("source") == "dummy" and not self._allow_dummies:
            raise _dummies_not_allowed()
        geometry = self._geometry()
        if geometry is None:
            raise UnavailableError(
                "no data plane has connected yet, so it is not known what the adapter must fit", reason="NO_DATA_PLANE"
            )
        if self._num_pending >= self._max_pending:
            raise ResourceExhaustedError(
                f"{self._num_pending} registrations are under way or wait; at most {self._max_pending} may; retry later",
                subject="registrations",
                reason="TOO_MANY_REGISTRATIONS",
            )
        loop = asyncio.get_running_loop()
        future = self._threads.submit(self._load, source, geometry)
        self._num_pending += 1

        def done(_: Future[AdapterImage]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._done)

        future.add_done_callback(done)
        return await asyncio.wrap_future(future)

    def _done(self) -> None:
        self._num_pending -= 1

    def _load(self, source: pb.AdapterSource, geometry: BaseGeometry) -> AdapterImage:
        match source.WhichOneof("source"):
            case "dummy":
                dummy = source.dummy
                return build_dummy(DummyAdapter(dummy.rank, tuple(dummy.target_modules), dummy.seed), geometry)
            case "upload_id":
                with self._uploads.take(source.upload_id) as directory:
                    return import_peft(directory, geometry)
            case _:
                return import_peft(resolve_path(source.path, self._allowed_roots), geometry)


def _dummies_not_allowed() -> PreconditionError:
    told = "the service makes adapters of random weights only if it was started with --allow-dummy-adapters"
    violations = [PreconditionViolation("DUMMY_NOT_ALLOWED", "source.dummy", told)]
    return PreconditionError(f"source.dummy: {told}", violations, reason="DUMMY_NOT_ALLOWED")
