"""What the registry asks of the rest of the control plane about data planes; the dispatcher answers."""

from collections.abc import Callable, Sequence
from typing import Protocol

from adapter_store.geometry import BaseGeometry
from controlplane.messages import AdapterResidency


class AdapterControl(Protocol):
    """The part of the dispatcher that concerns adapters."""

    def geometry(self) -> BaseGeometry | None:
        """The base model's geometry; None until a data plane connected for the first time."""

    def pool_pages(self) -> int:
        """Pages of the smallest known pool; 0 until a data plane connected for the first time."""

    def residency(self, digest: str) -> tuple[AdapterResidency, ...]:
        """Where a version lies, one entry per data plane that holds or fetches it or failed to."""

    def set_pinned(self, digests: Sequence[str]) -> None:
        """Replaces the versions that no data plane may evict."""

    def preload(self, digest: str) -> None:
        """Asks every connected data plane to bring a version to its device; UnavailableError when none is connected."""

    def offer(self, digest: str, num_pages: int) -> None:
        """A version may be brought to data planes that have pages to spare."""

    def withdraw(self, digest: str) -> None:
        """Takes an offer back; nothing if there was none."""

    def abort_adapter(self, digest: str) -> int:
        """Fails every unfinished request of a version; returns how many."""

    def on_residency_change(self, callback: Callable[[str], None]) -> None:
        """Calls back with a digest whenever it changes place on some data plane."""

    def on_connection_change(self, callback: Callable[[bool], None]) -> None:
        """Calls back whenever the first data plane connects or the last is lost."""
