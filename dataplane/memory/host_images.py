"""The host cache as the engine sees it: images that come from the store in another thread's time."""

from collections.abc import Callable
from typing import Protocol

from adapter_store.image import AdapterImage

FetchResult = AdapterImage | Exception


class HostImages(Protocol):
    """Adapter images in host memory (adapter_store.host_cache)."""

    def fetch(self, digest: str, on_done: Callable[[str, FetchResult], None]) -> None:
        """Brings an image into host memory, then calls on_done once, from any thread."""
        ...

    def get(self, digest: str) -> AdapterImage | None:
        """The image if it is in host memory."""
        ...
