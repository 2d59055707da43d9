"""Adapters as clients see them: the record, and where its weights lie on the data planes right now.

The one conversion of registry records to protobuf.
"""

from google.protobuf import timestamp_pb2

from controlplane.messages import AdapterResidency
from controlplane.registry.adapter_control import AdapterControl
from controlplane.registry.directory import AdapterDirectory
from controlplane.registry.records import AdapterRecord, ChangeKind, VersionRecord
from protos.loraplane.v1 import adapter_pb2 as pb
from protos.planes import AdapterPlace

CHANGE_TYPES = {
    ChangeKind.ADDED: pb.CHANGE_TYPE_ADDED,
    ChangeKind.MODIFIED: pb.CHANGE_TYPE_MODIFIED,
    ChangeKind.DELETED: pb.CHANGE_TYPE_DELETED,
}
_TIERS = {AdapterPlace.HOST: pb.MEMORY_TIER_HOST, AdapterPlace.DEVICE: pb.MEMORY_TIER_DEVICE}


class AdapterView:
    """Makes Adapter messages."""

    def __init__(self, directory: AdapterDirectory, control: AdapterControl) -> None:
        self._directory = directory
        self._control = control

    def adapter(self, record: AdapterRecord) -> pb.Adapter:
        """A record with state and residency; one that is no longer published is DRAINING while requests use it."""
        residency = self._control.residency(record.current)
        state, error = self._state(record, residency)
        return pb.Adapter(
            name=record.name,
            current=version_to_proto(record.current_version),
            versions=[version_to_proto(v) for v in record.versions],
            aliases=record.aliases,
            labels=record.labels,
            tenant=record.tenant,
            pinned=record.pinned,
            state=state,
            error=error,
            etag=record.etag,
            create_time=_timestamp(record.create_time_us),
            update_time=_timestamp(record.update_time_us),
            residency=[_residency_to_proto(r) for r in residency if r.place in _TIERS],
        )

    def state(self, record: AdapterRecord) -> pb.AdapterState.ValueType:
        """Where an adapter is in its life."""
        return self._state(record, self._control.residency(record.current))[0]

    def _state(self, record: AdapterRecord, residency: tuple[AdapterResidency, ...]) -> tuple[pb.AdapterState.ValueType, str]:
        published = self._directory.get(record.name)
        if published is None and any(self._directory.num_leases(digest, record.name) for digest in record.digests):
            return pb.ADAPTER_STATE_DRAINING, ""
        error = self._directory.failure_of(record.current_version)
        if error:
            return pb.ADAPTER_STATE_FAILED, error
        places = {r.place for r in residency}
        if AdapterPlace.DEVICE in places:
            return pb.ADAPTER_STATE_READY, ""
        if AdapterPlace.FETCHING in places:
            return pb.ADAPTER_STATE_FETCHING, ""
        if AdapterPlace.FAILED in places:
            failed = ", ".join(f"{r.address} ({r.error})" for r in residency if r.place is AdapterPlace.FAILED)
            return pb.ADAPTER_STATE_FAILED, f"could not be loaded on {failed}; the next request tries again"
        return pb.ADAPTER_STATE_REGISTERED, ""


def version_to_proto(version: VersionRecord) -> pb.AdapterVersion:
    """A version as clients see it."""
    return pb.AdapterVersion(
        version=version.digest,
        base_model=version.base_model,
        rank=version.rank,
        alpha=version.alpha,
        rslora=version.rslora,
        target_modules=version.target_modules,
        size_bytes=version.size_bytes,
        num_pages=version.num_pages,
        create_time=_timestamp(version.create_time_us),
    )


def _residency_to_proto(residency: AdapterResidency) -> pb.Residency:
    message = pb.Residency(data_plane=residency.address, tier=_TIERS[residency.place], size_bytes=residency.size_bytes)
    if residency.last_used is not None:
        message.last_used.CopyFrom(_timestamp(round(residency.last_used * 1e6)))
    return message


def _timestamp(time_us: int) -> timestamp_pb2.Timestamp:
    seconds, rest_us = divmod(time_us, 1_000_000)
    return timestamp_pb2.Timestamp(seconds=seconds, nanos=rest_us * 1000)
