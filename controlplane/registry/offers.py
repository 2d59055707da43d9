"""Tells the data planes' side which versions a request may ask for at any moment, so that they can be brought in early.

Knows adapters and page counts, nothing of which data plane has room.
"""

from controlplane.registry.adapter_control import AdapterControl
from controlplane.registry.directory import AdapterDirectory
from controlplane.registry.records import AdapterRecord, Change


class AdapterOffers:
    """Offers the current version of every adapter that can be served here, and nothing else."""

    def __init__(self, directory: AdapterDirectory, control: AdapterControl) -> None:
        self._directory = directory
        self._control = control
        directory.on_change(self._on_change)
        control.on_connection_change(self._on_connection_change)
        self._offer_all()

    def _on_change(self, change: Change) -> None:
        self._offer(change.record)

    def _on_connection_change(self, is_connected: bool) -> None:
        if is_connected:
            self._offer_all()  # only now it is known what the base is, and so what can be served

    def _offer_all(self) -> None:
        for record in self._directory.records():
            self._offer(record)

    def _offer(self, record: AdapterRecord) -> None:
        """Offers what the adapter serves, takes back what no adapter serves any more."""
        for version in record.versions:
            names = self._directory.names_of(version.digest)
            is_current = any((r := self._directory.get(name)) is not None and r.current == version.digest for name in names)
            if is_current and not self._directory.failure_of(version):
                self._control.offer(version.digest, version.num_pages)
            else:
                self._control.withdraw(version.digest)
