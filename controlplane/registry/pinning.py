"""Pinned adapters: their share of the pool is bounded, and data planes are told which they are.

Knows adapters and page counts, nothing of where pages lie.
"""

import logging

from controlplane.errors import ResourceExhaustedError, UnavailableError
from controlplane.registry.adapter_control import AdapterControl
from controlplane.registry.directory import AdapterDirectory
from controlplane.registry.records import AdapterRecord, Change, ChangeKind, VersionRecord

logger = logging.getLogger(__name__)


class Pinning:
    """At most half of the smallest pool is pinned, so that requests always find pages."""

    def __init__(self, directory: AdapterDirectory, control: AdapterControl) -> None:
        self._directory = directory
        self._control = control
        self._told: list[str] | None = None
        self._names = {record.name for record in directory.records() if record.pinned}
        directory.on_change(self._on_change)
        control.on_connection_change(lambda _: self.tell())
        self.tell()

    def check_room(self, record: AdapterRecord) -> None:
        """Raises unless `record`, pinned, would fit beside the other pinned adapters.

        Raises:
            ResourceExhaustedError: more than half of the pool would be pinned.
            UnavailableError: no data plane has connected, so the pool is not known.
        """
        pool_pages = self._control.pool_pages()
        if pool_pages == 0:
            raise UnavailableError(
                "no data plane has connected yet, so it is not known how many pages can be pinned", reason="NO_DATA_PLANE"
            )
        others = {v.digest: v for name, v in self._pinned() if name != record.name}
        others.pop(record.current, None)
        pinned_pages, new_pages = sum(v.num_pages for v in others.values()), record.current_version.num_pages
        if pinned_pages + new_pages > pool_pages // 2:
            raise ResourceExhaustedError(
                f"pinning {record.name!r} takes {new_pages} pages beside {pinned_pages} pinned; at most {pool_pages // 2} of "
                f"{pool_pages} may be pinned; unpin another adapter",
                subject="pinned_pages",
                reason="PINNED_PAGES",
                metadata={"pages": str(new_pages), "pinned": str(pinned_pages), "limit": str(pool_pages // 2)},
            )

    def tell(self) -> None:
        """Gives the data planes what is pinned, as far as it fits: a pool may have become smaller since."""
        if self._control.pool_pages() == 0:
            return  # told when one connects
        room = self._control.pool_pages() // 2
        digests: list[str] = []
        for name, version in self._pinned():
            if version.digest in digests or self._directory.failure_of(version):
                continue
            if version.num_pages > room:
                logger.warning("not pinned adapter=%s pages=%d room=%d", name, version.num_pages, room)
                continue
            room -= version.num_pages
            digests.append(version.digest)
        if digests != self._told:
            self._told = digests
            self._control.set_pinned(digests)

    def _on_change(self, change: Change) -> None:
        name = change.record.name
        was_pinned = name in self._names
        is_pinned = change.kind is not ChangeKind.DELETED and change.record.pinned
        if is_pinned:
            self._names.add(name)
        else:
            self._names.discard(name)
        if was_pinned or is_pinned:
            self.tell()

    def _pinned(self) -> list[tuple[str, VersionRecord]]:
        """Current versions of pinned adapters, the longest registered first."""
        pinned = [record for name in self._names if (record := self._directory.get(name)) is not None]
        pinned.sort(key=lambda r: (r.create_time_us, r.name))
        return [(r.name, r.current_version) for r in pinned]
