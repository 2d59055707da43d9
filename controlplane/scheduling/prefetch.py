"""Which adapters each data plane should bring in next: those of the first waiting requests, then those asked for by hand."""

from collections.abc import Iterable, Sequence

from controlplane.scheduling.data_plane import DataPlane
from controlplane.scheduling.placement import preferred
from controlplane.scheduling.request import Request
from protos.planes import AdapterPlace

# Waiting requests whose adapters are named: as many as are admitted in a second and more, so that each adapter is there in time.
LOOKAHEAD = 64
MAX_PRELOAD = 64


class PreloadList:
    """Adapters that somebody asked to bring to the device ahead of need; bounded, the oldest is dropped."""

    def __init__(self) -> None:
        self._digests: dict[str, None] = {}
        self.version = 0

    def add(self, digest: str) -> None:
        """Asks for an adapter (again)."""
        self._digests.pop(digest, None)
        self._digests[digest] = None
        if len(self._digests) > MAX_PRELOAD:
            del self._digests[next(iter(self._digests))]
        self.version += 1

    def discard(self, digest: str) -> None:
        """Forgets an adapter: it has arrived or failed everywhere, or is gone."""
        if digest in self._digests:
            del self._digests[digest]
            self.version += 1

    def settle(self, digest: str, data_planes: Iterable[DataPlane]) -> None:
        """Forgets an adapter once every data plane has brought it to its device or failed to."""
        if digest in self._digests and all(
            data_plane.place(digest) in (AdapterPlace.DEVICE, AdapterPlace.FAILED) for data_plane in data_planes
        ):
            self.discard(digest)

    def digests(self) -> list[str]:
        """What is still asked for, oldest first."""
        return list(self._digests)


def prefetch_lists(
    waiting: Sequence[Request], preload: Sequence[str], data_planes: Sequence[DataPlane]
) -> dict[str, tuple[str, ...]]:
    """For each data plane's address, digests, soonest first: of waiting requests where each would go, then the preloads.

    What has to be fetched for them takes no more than half of the host cache, or the last would push out the first.
    """
    lists: dict[str, dict[str, None]] = {data_plane.address: {} for data_plane in data_planes}
    room = {data_plane.address: data_plane.max_prefetch_pages for data_plane in data_planes}
    alone = data_planes[0] if len(data_planes) == 1 else None
    for request in waiting:
        adapter = request.spec.adapter
        data_plane = None if adapter is None else alone or preferred(request, data_planes)
        if adapter is None or data_plane is None:
            continue
        digests = lists[data_plane.address]
        if adapter.digest not in digests and room[data_plane.address] > 0:
            digests[adapter.digest] = None
            is_there = data_plane.place(adapter.digest) is AdapterPlace.DEVICE
            room[data_plane.address] -= 0 if is_there else adapter.num_pages
    for digests in lists.values():
        digests.update(dict.fromkeys(preload))
    return {address: tuple(digests) for address, digests in lists.items()}
