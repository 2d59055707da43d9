"""The dispatcher: takes requests in, drives the scheduler and the data plane sessions, and hands tokens to their sinks.

UNFINISHED: public signatures only; bodies follow.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adapter_store.geometry import BaseGeometry
from controlplane.messages import (
    AdapterResidency,
    DataPlaneDescription,
    DoesNotFit,
    DrainResult,
    LoadSnapshot,
    RequestSpec,
    TokenSink,
)


@dataclass(frozen=True, slots=True)
class DispatcherConfig:
    """Bounds of the dispatcher."""

    max_waiting: int = 1024


class RequestHandle:
    """A submitted request, to its submitter: good for Dispatcher.abort and nothing else."""


class Dispatcher:
    """Owns the scheduler and one session per data plane. Everything runs on one event loop; only start/close/drain await."""

    def __init__(
        self, addresses: Sequence[str], config: DispatcherConfig | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        raise NotImplementedError

    async def start(self) -> None:
        """Opens the sessions; returns at once, they connect in the background."""
        raise NotImplementedError

    async def close(self) -> None:
        """Fails what is unfinished with UNAVAILABLE and closes the sessions."""
        raise NotImplementedError

    async def wait_connected(self, timeout_s: float) -> bool:
        """Waits until a data plane is connected; False if none was in time."""
        raise NotImplementedError

    def on_connection_change(self, callback: Callable[[bool], None]) -> None:
        """Calls back with `is_connected` whenever that changes (health status)."""
        raise NotImplementedError

    def on_residency_change(self, callback: Callable[[str], None]) -> None:
        """Calls back with an adapter's digest whenever it changes place on some data plane."""
        raise NotImplementedError

    @property
    def is_connected(self) -> bool:
        """Whether at least one data plane is connected."""
        raise NotImplementedError

    @property
    def is_draining(self) -> bool:
        """Whether drain() was called."""
        raise NotImplementedError

    def geometry(self) -> BaseGeometry | None:
        """The base model's geometry; None until a data plane connected for the first time."""
        raise NotImplementedError

    def description(self) -> DataPlaneDescription | None:
        """The description all data planes agree on, with the smallest max_model_len; None until one connected."""
        raise NotImplementedError

    def pool_pages(self) -> int:
        """Pages of the smallest known pool; 0 until a data plane connected for the first time."""
        raise NotImplementedError

    def check_fits(self, spec: RequestSpec) -> DoesNotFit | None:
        """Why this request could never run on any known data plane, or None if it can."""
        raise NotImplementedError

    def submit(self, spec: RequestSpec, sink: TokenSink) -> RequestHandle:
        """Queues a request.

        Raises:
            QueueFullError: max_waiting requests wait.
            UnavailableError: draining, or no data plane is connected.
        """
        raise NotImplementedError

    def abort(self, handle: RequestHandle) -> None:
        """Drops a request; its sink is not called again. Does nothing if it has ended."""
        raise NotImplementedError

    def abort_adapter(self, digest: str) -> int:
        """Fails every unfinished request of that adapter with ABORTED, reason ADAPTER_REMOVED; returns how many."""
        raise NotImplementedError

    def residency(self, digest: str) -> tuple[AdapterResidency, ...]:
        """Where that adapter lies, one entry per data plane that holds or fetches it or failed to."""
        raise NotImplementedError

    def set_pinned(self, digests: Sequence[str]) -> None:
        """Replaces the adapters that no data plane may evict."""
        raise NotImplementedError

    def preload(self, digest: str) -> None:
        """Asks every connected data plane to bring that adapter to its device.

        Raises:
            UnavailableError: no data plane is connected.
        """
        raise NotImplementedError

    def load(self) -> LoadSnapshot:
        """Queues, memory and throughput as of the latest reports."""
        raise NotImplementedError

    async def drain(self, timeout_s: float) -> DrainResult:
        """Stops taking requests, waits for the running ones, aborts what is left at the timeout."""
        raise NotImplementedError
