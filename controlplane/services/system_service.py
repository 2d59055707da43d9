"""`SystemService`: what is served, how loaded it is, and draining it. Knows nothing of how any of that comes about."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from controlplane.dispatch.dispatcher import Dispatcher
from controlplane.errors import InvalidArgumentError
from controlplane.messages import DataPlaneDescription, DataPlaneLoad, DrainResult, ResidentAdapter
from protos.loraplane.v1 import system_pb2 as pb
from protos.loraplane.v1 import system_pb2_grpc
from protos.planes import duration_from_seconds, duration_to_seconds

if TYPE_CHECKING:
    from typing import Any

    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

DEFAULT_DRAIN_S = 30.0
MAX_DRAIN_S = 3600.0


class SystemService(system_pb2_grpc.SystemServiceServicer):
    """What the service is and how busy it is."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        names_of: Callable[[str], tuple[str, ...]],
        drain: Callable[[float], Awaitable[DrainResult]],
        *,
        version: str,
        max_waiting: int,
        max_upload_bytes: int,
    ) -> None:
        """names_of: the adapters that have a version; drain: stops the whole service from taking requests."""
        self._dispatcher = dispatcher
        self._names_of = names_of
        self._drain = drain
        self._version = version
        self._max_waiting = max_waiting
        self._max_upload_bytes = max_upload_bytes

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: "Context") -> pb.GetServerInfoResponse:
        """The base model, its limits and the versions."""
        limits = pb.Limits(max_waiting=self._max_waiting, max_upload_bytes=self._max_upload_bytes)
        info = pb.GetServerInfoResponse(version=self._version, limits=limits)
        model = self._dispatcher.description()
        if model is not None:
            _describe_model(info, model)
        for plane in self._dispatcher.load().data_planes:
            if plane.connected and plane.description is not None:
                info.data_planes.append(_data_plane_info(plane.address, plane.description))
        return info

    async def GetLoad(self, request: pb.GetLoadRequest, context: "Context") -> pb.GetLoadResponse:
        """Queues, memory and throughput as of the latest reports."""
        load = self._dispatcher.load()
        return pb.GetLoadResponse(
            num_waiting=load.num_waiting,
            num_running=load.num_running,
            data_planes=[self._data_plane_load(plane) for plane in load.data_planes],
            output_tokens_per_s=load.output_tokens_per_s,
            draining=load.draining,
        )

    async def Drain(self, request: pb.DrainRequest, context: "Context") -> pb.DrainResponse:
        """Stops admitting, and returns when the last request has ended."""
        timeout_s = duration_to_seconds(request.timeout) if request.HasField("timeout") else DEFAULT_DRAIN_S
        if not 0 <= timeout_s <= MAX_DRAIN_S:
            raise InvalidArgumentError.of("timeout", f"is {timeout_s:g} s; it must be from 0 to {MAX_DRAIN_S:g} s")
        result = await self._drain(timeout_s)
        return pb.DrainResponse(num_finished=result.num_finished, num_aborted=result.num_aborted)

    def _data_plane_load(self, plane: DataPlaneLoad) -> pb.DataPlaneLoad:
        counts = plane.pool
        num_pages = plane.description.num_pages if plane.description else 0
        return pb.DataPlaneLoad(
            address=plane.address,
            connected=plane.connected,
            num_running=plane.num_running,
            pool=pb.PoolUsage(
                num_pages=num_pages,
                kv_pages=counts.kv_pages,
                adapter_pages=counts.adapter_pages,
                idle_adapter_pages=counts.idle_adapter_pages,
                free_pages=counts.free_pages,
            ),
            adapters=[self._resident(adapter) for adapter in plane.adapters],
            num_steps=plane.num_steps,
            last_step_time=duration_from_seconds(plane.last_step_s),
            num_preemptions=plane.num_preemptions,
            step_time=duration_from_seconds(plane.total_step_s),
        )

    def _resident(self, adapter: ResidentAdapter) -> pb.ResidentAdapter:
        return pb.ResidentAdapter(
            names=self._names_of(adapter.digest),
            version=adapter.digest,
            num_pages=adapter.num_pages,
            num_requests=adapter.num_requests,
        )


def _describe_model(info: pb.GetServerInfoResponse, model: DataPlaneDescription) -> None:
    geometry = model.geometry
    info.base_model = geometry.model_name
    info.base_model_fingerprint = geometry.fingerprint
    info.architecture = model.architecture
    info.limits.max_model_len = model.max_model_len
    info.limits.max_num_seqs = model.max_num_seqs
    info.limits.max_lora_rank = geometry.max_lora_rank
    info.limits.lora_modules.extend(module.name for module in geometry.modules)
    info.limits.vocab_size = model.vocab_size


def _data_plane_info(address: str, description: DataPlaneDescription) -> pb.DataPlaneInfo:
    geometry = description.geometry
    return pb.DataPlaneInfo(
        address=address,
        device=description.device,
        dtype=geometry.dtype,
        page_tokens=geometry.page_tokens,
        page_bytes=geometry.page_bytes,
        num_pages=description.num_pages,
        version=description.version,
    )
