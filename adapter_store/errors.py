"""What can go wrong with an adapter on its way into, or out of, the store.

AdapterStoreError
├── SourceNotFoundError     the named path or upload does not exist
├── SourceForbiddenError    the path leads outside the allowed roots
├── UploadError             an upload broke its protocol; names the field
├── AdapterRejectedError    the base model cannot take the adapter; lists every violation
├── AdapterCorruptError     bytes are not what they should be; names file and tensor
├── ImageNotFoundError      no image of that digest is in the store
└── StoreFullError          a bound of the store, the uploads or the host cache's queue is reached
"""

from collections.abc import Sequence
from dataclasses import dataclass

# A wrong base model breaks every tensor alike. An answer travels in the trailers of an rpc, which hold about 8 KiB, so the
# list says enough and then counts the rest.
MAX_VIOLATIONS = 16
MAX_TEXT_CHARS = 200


class AdapterStoreError(Exception):
    """Base of everything this package raises on purpose. The message is for people."""


class SourceNotFoundError(AdapterStoreError):
    """The source of an adapter does not exist (or is not one)."""

    def __init__(self, source: str, description: str) -> None:
        self.source = source
        super().__init__(f"adapter source {shorten(source)}: {description}")


class SourceForbiddenError(AdapterStoreError):
    """The source of an adapter lies where this service may not read."""

    def __init__(self, source: str, description: str) -> None:
        self.source = source
        super().__init__(f"adapter source {shorten(source)}: {description}")


class UploadError(AdapterStoreError):
    """A client's upload broke the protocol: `field` names the part of the message that was wrong."""

    def __init__(self, field: str, description: str) -> None:
        self.field = field
        self.description = description
        super().__init__(f"upload: {field}: {description}")


@dataclass(frozen=True, slots=True)
class Violation:
    """One reason why the base cannot take an adapter: `kind` for programs (UPPER_CASE), the rest for people."""

    kind: str
    subject: str
    description: str


class AdapterRejectedError(AdapterStoreError):
    """The adapter is readable, but serving it would not give what it was trained to give."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        kept = tuple(violations[:MAX_VIOLATIONS])
        if len(violations) > len(kept):
            more = len(violations) - len(kept)
            kept = (*kept, Violation("MORE_VIOLATIONS", "adapter", f"{more} more violations are not listed"))
        self.violations = kept
        count = "1 problem" if len(violations) == 1 else f"{len(violations)} problems"
        super().__init__(f"adapter refused, {count}: " + "; ".join(f"{v.subject}: {v.description}" for v in kept[:3]))


class AdapterCorruptError(AdapterStoreError):
    """A file does not hold what its format or its digest promises."""

    def __init__(self, file: str, tensor: str, found: str) -> None:
        self.file = file
        self.tensor = tensor
        self.found = found
        where = f"{shorten(file)}, tensor {shorten(tensor)}" if tensor else shorten(file)
        super().__init__(f"{where}: {found}")


class ImageNotFoundError(AdapterStoreError):
    """The store holds no image of that digest."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        super().__init__(f"no adapter image {shorten(digest)} in the store; register the adapter again")


class HostMemoryError(AdapterStoreError):
    """This machine does not give the memory that adapters were to have."""

    def __init__(self, size_bytes: int, description: str) -> None:
        super().__init__(f"{size_bytes} bytes of host memory for adapters {description}; lower --host-cache-bytes")


class StoreFullError(AdapterStoreError):
    """A bound is reached: `subject` names what is full."""

    def __init__(self, subject: str, description: str) -> None:
        self.subject = subject
        super().__init__(f"{subject}: {description}")


def shorten(text: str) -> str:
    """Text from outside as it may stand in a message: bounded, and control characters escaped."""
    clean = text if text.isprintable() else repr(text)[1:-1]
    return clean if len(clean) <= MAX_TEXT_CHARS else f"{clean[:MAX_TEXT_CHARS]}..."
