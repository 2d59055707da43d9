"""Which data plane a request goes to: the least loaded one, unless its adapter already lies elsewhere and there is room."""

from collections.abc import Iterable

from controlplane.scheduling.data_plane import DataPlane
from controlplane.scheduling.request import Request
from protos.planes import AdapterPlace

# How much fuller a data plane may be and still be preferred, because the adapter is there already. Loads are 0 to 1.
AFFINITY_IN_USE = 0.3
AFFINITY_ON_DEVICE = 0.2
AFFINITY_ON_HOST = 0.05


def affinity(data_plane: DataPlane, digest: str) -> float:
    """What having the adapter there is worth, in units of load."""
    if not digest:
        return 0.0
    if data_plane.ledger.num_adapter_requests(digest):
        return AFFINITY_IN_USE
    place = data_plane.place(digest)
    if place is AdapterPlace.DEVICE:
        return AFFINITY_ON_DEVICE
    return AFFINITY_ON_HOST if place in (AdapterPlace.HOST, AdapterPlace.FETCHING) else 0.0


def preferred(request: Request, data_planes: Iterable[DataPlane]) -> DataPlane | None:
    """The best of these data planes for the request, whether or not it fits now; the first of equals."""
    digest = request.adapter_digest
    return min(data_planes, key=lambda data_plane: data_plane.load - affinity(data_plane, digest), default=None)


def choose(request: Request, data_planes: Iterable[DataPlane]) -> DataPlane | None:
    """The best of these data planes that can admit the request now, or None."""
    return preferred(request, [data_plane for data_plane in data_planes if data_plane.can_admit(request)])
