"""What the registry keeps about an adapter, as frozen dataclasses, and their one form as JSON.

Knows nothing of Redis, of protobuf or of where weights lie.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from adapter_store.geometry import BaseGeometry

_REVISION = re.compile(r"([0-9a-f]{1,32})-(\d{1,18})")


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """Immutable weights, named by the digest of their image."""

    digest: str
    base_model: str
    rank: int
    alpha: float
    rslora: bool
    target_modules: tuple[str, ...]
    size_bytes: int
    num_pages: int
    # What the image was packed for (`base_key`); a control plane with another base does not serve it.
    base_key: str
    create_time_us: int


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One adapter. `versions` is oldest first, `current` and the values of `aliases` are digests among them."""

    name: str
    current: str
    versions: tuple[VersionRecord, ...]
    etag: str
    create_time_us: int
    update_time_us: int
    aliases: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    tenant: str = ""
    pinned: bool = False

    @property
    def current_version(self) -> VersionRecord:
        """What the bare name serves."""
        return self.version(self.current)

    @property
    def digests(self) -> frozenset[str]:
        """Digests of all versions."""
        return frozenset(v.digest for v in self.versions)

    def version(self, digest: str) -> VersionRecord:
        """The version of that digest, which must be one of this adapter's."""
        return next(v for v in self.versions if v.digest == digest)


class ChangeKind(Enum):
    """What happened to an adapter."""

    ADDED = "added"
    MODIFIED = "modified"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Revision:
    """A point in the registry's history. Numbers count its changes without gaps; another registry has another id."""

    registry_id: str
    number: int

    def __str__(self) -> str:
        return f"{self.registry_id}-{self.number}"

    @classmethod
    def parse(cls, text: str) -> "Revision":
        """Reads what str() wrote.

        Raises:
            ValueError: the text is not a revision.
        """
        match = _REVISION.fullmatch(text)
        if match is None:
            raise ValueError(f"{text[:80]!r} is not a revision; take one from ListAdapters or from a watch")
        return cls(match[1], int(match[2]))


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of the change feed: the adapter after the change, or before it for DELETED."""

    kind: ChangeKind
    record: AdapterRecord
    revision: Revision
    # For DELETED: requests in progress are to be aborted, not drained.
    force: bool = False


def record_to_json(record: AdapterRecord) -> str:
    """An adapter as it lies in Redis."""
    return json.dumps(asdict(record), separators=(",", ":"), sort_keys=True)


def record_from_json(text: str) -> AdapterRecord:
    """Reads what record_to_json wrote. Fields that this version does not know are left out, so that a newer one may add some."""
    body: dict[str, Any] = json.loads(text)
    versions = tuple(
        VersionRecord(**{**_known(VersionRecord, v), "target_modules": tuple(v["target_modules"])}) for v in body["versions"]
    )
    return AdapterRecord(**{**_known(AdapterRecord, body), "versions": versions})


def _known(cls: type[AdapterRecord] | type[VersionRecord], body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: body[name] for name in cls.__dataclass_fields__ if name in body}


def base_key(geometry: BaseGeometry) -> str:
    """Names what an image is packed for: equal keys, interchangeable images."""
    return f"{geometry.fingerprint[:16]}/{geometry.dtype}"
