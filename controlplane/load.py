"""How busy one data plane is, in the form in which the service reports it."""

from controlplane.messages import DataPlaneDescription, DataPlaneLoad, ResidentAdapter
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
        num_preemptions=data_plane.num_preemptions,
    )
