"""How busy a data plane is and what lies in it, in the form in which the service reports it."""

from collections.abc import Mapping

from controlplane.messages import AdapterResidency, DataPlaneDescription, DataPlaneLoad, ResidentAdapter
from controlplane.scheduling.data_plane import DataPlane
from protos.planes import AdapterPlace


def data_plane_load(address: str, description: DataPlaneDescription | None, data_plane: DataPlane | None) -> DataPlaneLoad:
    """As of its latest report. data_plane: None while it is away."""
    if data_plane is None:
        return DataPlaneLoad(address, connected=False, description=description)
    adapters = tuple(
        ResidentAdapter(event.digest, event.num_pages, data_plane.ledger.num_adapter_requests(event.digest))
        for event in data_plane.adapters.values()
        if event.place is AdapterPlace.DEVICE
    )
    return DataPlaneLoad(
        address=address,
        connected=True,
        description=description,
        num_running=len(data_plane.running),
        pool=data_plane.pool,
        adapters=adapters,
        num_steps=data_plane.timing.num_steps,
        last_step_s=data_plane.last_step_s,
        total_step_s=data_plane.total_step_s,
        num_preemptions=data_plane.num_preemptions,
    )


def adapter_residency(digest: str, data_planes: Mapping[str, DataPlane], to_epoch_s: float) -> tuple[AdapterResidency, ...]:
    """Where an adapter lies. to_epoch_s: what makes a time of the scheduler one since the Unix epoch."""
    found = []
    for address, data_plane in data_planes.items():
        event = data_plane.adapters.get(digest)
        if event is not None:
            used = data_plane.adapter_last_used.get(digest)
            last_used = used + to_epoch_s if used is not None else None
            found.append(AdapterResidency(address, event.place, event.size_bytes, last_used, event.error))
    return tuple(found)
