"""Which adapters each data plane should bring in next: those of the first waiting requests, then those asked for by hand."""

from collections.abc import Iterable, Sequence

from controlplane.scheduling.data_plane import DataPlane
from controlplane.scheduling.placement import preferred
from controlplane.scheduling.request import Request
from protos.planes import AdapterPlace

MAX_PREFETCH = 16
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


def prefetch_lists(waiting: Sequence[Request], preload: Sequence[str], data_planes: Sequence[DataPlane]) -> dict[str, list[str]]:
    """For each data plane's address, digests, soonest first: of waiting requests where each would go, then the preloads."""
    lists: dict[str, list[str]] = {data_plane.address: [] for data_plane in data_planes}
    for request in waiting:
        data_plane = preferred(request, data_planes) if request.adapter_digest else None
        if data_plane is not None and request.adapter_digest not in lists[data_plane.address]:
            lists[data_plane.address].append(request.adapter_digest)
    for digests in lists.values():
        del digests[MAX_PREFETCH:]
        digests.extend(digest for digest in preload if digest not in digests)
    return lists
