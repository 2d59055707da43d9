"""Checks the fields of adapter requests: every violation is found and told, with the value and the limit.

Knows the limits of the contract and nothing of which adapters exist.
"""

import re
from collections.abc import Iterable, Mapping

from adapter_store.geometry import LORA_MODULES
from controlplane.errors import FieldViolation, InvalidArgumentError
from protos.loraplane.v1 import adapter_pb2 as pb

MAX_NAME = 128
MAX_LABELS = 64
MAX_LABEL_KEY = 63
MAX_LABEL_VALUE = 256
MAX_ALIASES = 64
MAX_REQUEST_ID = 128
MAX_DRAIN_TIMEOUT_S = 3600.0
UPDATE_PATHS = ("source", "labels", "aliases", "current_version")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_LABEL_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")


class FieldCheck:
    """Collects violations; `raise_if_any` ends the check."""

    def __init__(self) -> None:
        self._violations: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        """Notes that a field cannot be taken, and why."""
        self._violations.append(FieldViolation(field, description))

    def raise_if_any(self) -> None:
        """Raises InvalidArgumentError with all violations, if there are some."""
        if self._violations:
            raise InvalidArgumentError(self._violations)

    def name(self, field: str, name: str) -> None:
        """A name or alias as adapter.proto has it."""
        if not name:
            self.add(field, "is required")
        elif not _NAME.fullmatch(name):
            self.add(
                field,
                f"{_short(name)} ({len(name)} characters) must be 1 to {MAX_NAME} letters, digits, '.', '_', '-' or '/', and "
                "begin with a letter or digit",
            )

    def aliases(self, name: str, aliases: Iterable[str]) -> None:
        """Aliases of an adapter: names, distinct, none of them its own."""
        listed = list(aliases)
        if len(listed) > MAX_ALIASES:
            self.add("aliases", f"{len(listed)} given; at most {MAX_ALIASES} are allowed")
        for index, alias in enumerate(listed[:MAX_ALIASES]):
            field = f"aliases[{index}]"
            self.name(field, alias)
            if alias == name:
                self.add(field, f"{_short(alias)} is the adapter's own name")
            if alias in listed[:index]:
                self.add(field, f"{_short(alias)} is given twice")

    def labels(self, labels: Mapping[str, str]) -> None:
        """Labels: few, short, and of a form that a filter can name."""
        if len(labels) > MAX_LABELS:
            self.add("labels", f"{len(labels)} given; at most {MAX_LABELS} are allowed")
        for key, value in sorted(labels.items())[:MAX_LABELS]:
            if not _LABEL_KEY.fullmatch(key):
                self.add(
                    "labels",
                    f"key {_short(key)} must be 1 to {MAX_LABEL_KEY} letters, digits, '.', '_', '-' or '/', and begin with a "
                    "letter or digit",
                )
            if len(value) > MAX_LABEL_VALUE or not value.isprintable():
                self.add(
                    f"labels.{_short(key)}",
                    f"value {_short(value)} ({len(value)} characters) must be at most {MAX_LABEL_VALUE} printable characters",
                )

    def source(self, source: pb.AdapterSource) -> None:
        """A source says where the weights come from."""
        if source.WhichOneof("source") == "dummy":
            self._dummy(source.dummy)
        elif not (source.path or source.upload_id):
            self.add("source", "must have path, upload_id or dummy")

    def _dummy(self, dummy: pb.DummyAdapter) -> None:
        """What the base can take is not known here."""
        if dummy.rank < 1:
            self.add("source.dummy.rank", "is 0; it must be at least 1")
        if not dummy.target_modules:
            self.add("source.dummy.target_modules", f"must name modules, of {', '.join(LORA_MODULES)}")
        for index, name in enumerate(dummy.target_modules[: len(LORA_MODULES) + 1]):
            field = f"source.dummy.target_modules[{index}]"
            if name not in LORA_MODULES:
                self.add(field, f"{_short(name)} is not one of {', '.join(LORA_MODULES)}")
            elif name in dummy.target_modules[:index]:
                self.add(field, f"{name} is given twice")

    def request_id(self, request_id: str) -> None:
        """Client-minted ids are short and printable."""
        if len(request_id) > MAX_REQUEST_ID or not request_id.isprintable():
            self.add(
                "request_id", f"{_short(request_id)} ({len(request_id)} characters) must be at most {MAX_REQUEST_ID} printable"
            )


def check_register(request: pb.RegisterAdapterRequest) -> None:
    """Raises InvalidArgumentError unless every field of a registration is well-formed."""
    check = FieldCheck()
    check.name("name", request.name)
    check.source(request.source)
    check.aliases(request.name, request.aliases)
    check.labels(request.labels)
    check.request_id(request.request_id)
    check.raise_if_any()


def check_update(request: pb.UpdateAdapterRequest) -> frozenset[str]:
    """Raises InvalidArgumentError unless every field of an update is well-formed; returns what it changes."""
    check = FieldCheck()
    paths = list(request.update_mask.paths)
    check.name("name", request.name)
    if not paths:
        check.add("update_mask", f"is required; name one or more of {', '.join(UPDATE_PATHS)}")
    for path in paths:
        if path not in UPDATE_PATHS:
            check.add("update_mask", f"{_short(path)} cannot be updated; use {', '.join(UPDATE_PATHS)}")
    if "source" in paths:
        check.source(request.source)
    if "source" in paths and "current_version" in paths:
        check.add("update_mask", "source and current_version exclude each other: a new source becomes the current version")
    if "current_version" in paths and not request.current_version:
        check.add("current_version", "is required when update_mask names it")
    if "aliases" in paths:
        check.aliases(request.name, request.aliases)
    if "labels" in paths:
        check.labels(request.labels)
    check.request_id(request.request_id)
    check.raise_if_any()
    return frozenset(paths)


def check_unregister(request: pb.UnregisterAdapterRequest) -> float:
    """Raises InvalidArgumentError unless the request is well-formed; returns how long to wait for the drain, in seconds."""
    check = FieldCheck()
    check.name("name", request.name)
    drain_s = request.drain_timeout.seconds + request.drain_timeout.nanos / 1e9
    if not 0 <= drain_s <= MAX_DRAIN_TIMEOUT_S:
        check.add("drain_timeout", f"{drain_s:g} s must be from 0 to {MAX_DRAIN_TIMEOUT_S:g} s")
    check.raise_if_any()
    return drain_s


def check_name(field: str, name: str) -> None:
    """Raises InvalidArgumentError unless it is a well-formed name; for calls that name an adapter and nothing else."""
    check = FieldCheck()
    check.name(field, name)
    check.raise_if_any()


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "...")
