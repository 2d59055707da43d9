"""The places of an adapter on this data plane, the moves allowed between them, and what an idle adapter is worth keeping.

Knows nothing of pages' contents, of requests, or of who fetches.
"""

import math
from dataclasses import dataclass
from enum import Enum, auto

from adapter_store.image import AdapterImage
from dataplane.memory.adapter_copy import AdapterCopy
from dataplane.memory.page_pool import PageKind, PageOwner
from protos.planes import AdapterEvent, AdapterPlace


class AdapterState(Enum):
    """Where an adapter is. NONE is never stored: such an adapter has no entry."""

    NONE = auto()
    FETCHING = auto()
    HOST = auto()
    COPYING = auto()
    DEVICE = auto()
    FAILED = auto()


ALLOWED_MOVES = {
    AdapterState.NONE: {AdapterState.FETCHING},
    AdapterState.FETCHING: {AdapterState.HOST, AdapterState.FAILED, AdapterState.NONE},
    # Back to FETCHING: the host cache evicted the image before it was copied.
    AdapterState.HOST: {AdapterState.COPYING, AdapterState.FETCHING, AdapterState.NONE},
    # Not to DEVICE: it was evicted before its copy was done.
    AdapterState.COPYING: {AdapterState.DEVICE, AdapterState.HOST, AdapterState.NONE},
    AdapterState.DEVICE: {AdapterState.HOST, AdapterState.NONE},
    AdapterState.FAILED: {AdapterState.FETCHING, AdapterState.NONE},
}

# What the control plane is told. It counts an adapter as on the device when it can be used there.
PLACES = {
    AdapterState.NONE: AdapterPlace.NONE,
    AdapterState.FETCHING: AdapterPlace.FETCHING,
    AdapterState.HOST: AdapterPlace.HOST,
    AdapterState.COPYING: AdapterPlace.HOST,
    AdapterState.DEVICE: AdapterPlace.DEVICE,
    AdapterState.FAILED: AdapterPlace.FAILED,
}


class Readiness(Enum):
    """Whether a request can be computed, as far as its adapter goes."""

    READY = auto()
    LOADING = auto()
    # Its image is here but no page is free for it.
    STARVED = auto()


# A use counts half as much after this time.
HEAT_HALF_LIFE_S = 30.0

# A copy costs about as much as moving this many pages more than it moves; reading the store costs this many times a copy.
COPY_OVERHEAD_PAGES = 1.0
STORE_COST_FACTOR = 20.0


@dataclass(slots=True)
class AdapterEntry:
    """One adapter. `image` is held from fetch to copy while a request waits for it; `copy` while it has pages.

    is_on_host: whether the host cache has its image, as far as it has told: bringing it back then costs no read of the store.
    """

    digest: str
    state: AdapterState = AdapterState.NONE
    num_references: int = 0
    image: AdapterImage | None = None
    is_on_host: bool = False
    size_bytes: int = 0
    pages: tuple[int, ...] = ()
    copy: AdapterCopy | None = None
    error: str = ""
    heat: float = 0.0
    heated_at: float = 0.0

    @property
    def owner(self) -> PageOwner:
        """The name under which it holds pages."""
        return PageOwner(PageKind.ADAPTER, self.digest)

    def move(self, state: AdapterState) -> None:
        """Changes place, if the table allows it."""
        assert state in ALLOWED_MOVES[self.state], f"adapter {self.digest}: no move from {self.state.name} to {state.name}"
        self.state = state

    def add_use(self, now: float) -> None:
        """Counts a use: frequency and recency in one number that halves every HEAT_HALF_LIFE_S."""
        self.heat = self.heat * math.exp2((self.heated_at - now) / HEAT_HALF_LIFE_S) + 1.0
        self.heated_at = now

    @property
    def worth(self) -> float:
        """Cost that evicting it is expected to bring back, for each page that it gives free. The lowest is evicted first.

        As a logarithm, with the time of the last use in it: all adapters cool at the same rate, so the order of two of them does
        not change with time, and neither does this number until the next use. What is still being copied goes last: its pages
        can be written again only when it is there.
        """
        if self.state is AdapterState.COPYING:
            return math.inf
        if self.heat == 0.0:
            return -math.inf
        reload_cost = (COPY_OVERHEAD_PAGES + len(self.pages)) * (1.0 if self.is_on_host else STORE_COST_FACTOR)
        return math.log2(self.heat * reload_cost / len(self.pages)) + self.heated_at / HEAT_HALF_LIFE_S

    def event(self) -> AdapterEvent:
        """What the control plane is told about where it is."""
        on_device = self.state is AdapterState.DEVICE
        return AdapterEvent(
            digest=self.digest,
            place=PLACES[self.state],
            num_pages=len(self.pages) if on_device else 0,
            size_bytes=self.size_bytes if on_device or self.state in (AdapterState.HOST, AdapterState.COPYING) else 0,
            error=self.error,
        )
