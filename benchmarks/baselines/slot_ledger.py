"""Admission for fixed slots: adapters take slots and no pages, and the batch has no more distinct ones than there are slots.

The control plane's side of the fixed slots; knows nothing of where they are.
"""

from collections import Counter
from dataclasses import replace

from controlplane.messages import AdapterRef, DataPlaneDescription, DoesNotFit, RequestSpec
from controlplane.scheduling.ledger import Ledger
from controlplane.scheduling.policy import FcfsPolicy
from controlplane.scheduling.scheduler import Scheduler, SchedulerConfig
from protos.planes import EngineState

# Requests whose adapter finds no slot are passed over, however many and however often, as vLLM does: to stop at a few of them
# would leave slots' adapters with fewer requests than wait for them.
_NO_LIMIT = 1 << 31


class SlotLedger(Ledger):
    """Pages of KV, and slots. An adapter holds its slot until the last of its requests is gone, aborted ones included."""

    def __init__(self, num_pages: int, page_tokens: int, num_slots: int) -> None:
        super().__init__(num_pages, page_tokens)
        self._num_slots = num_slots
        self._digest_of: dict[int, str] = {}
        self._num_requests_of: Counter[str] = Counter()

    def num_adapter_requests(self, digest: str) -> int:
        """Requests that keep this adapter in its slot."""
        return self._num_requests_of[digest]

    def can_ever_admit(self, max_num_tokens: int, adapter: AdapterRef | None) -> bool:
        """Whether the request fits at its longest when nothing else runs."""
        return super().can_ever_admit(max_num_tokens, None)

    def can_admit(self, num_tokens: int, max_num_tokens: int, adapter: AdapterRef | None) -> bool:
        """Whether its adapter has a slot, or can have one, and its KV fits."""
        holders = self._num_requests_of
        has_slot = adapter is None or adapter.digest in holders or len(holders) < self._num_slots
        return has_slot and super().can_admit(num_tokens, max_num_tokens, None)

    def charge(self, request_key: int, num_tokens: int, max_num_tokens: int, adapter: AdapterRef | None) -> None:
        """Books an admission."""
        super().charge(request_key, num_tokens, max_num_tokens, None)
        if adapter is not None:
            self._digest_of[request_key] = adapter.digest
            self._num_requests_of[adapter.digest] += 1

    def release(self, request_key: int) -> None:
        """Frees an admission's pages, and its slot if it was the adapter's last."""
        super().release(request_key)
        digest = self._digest_of.pop(request_key, None)
        if digest is not None:
            self._num_requests_of[digest] -= 1
            if not self._num_requests_of[digest]:
                del self._num_requests_of[digest]


class SlotScheduler(Scheduler):
    """The scheduler with slots in the ledger of every data plane."""

    def __init__(self, num_slots: int, config: SchedulerConfig) -> None:
        super().__init__(config, FcfsPolicy(max_overtakes=_NO_LIMIT, window=_NO_LIMIT))
        self._num_slots = num_slots

    def data_plane_connected(self, address: str, description: DataPlaneDescription, state: EngineState) -> None:
        """A session has opened; its description counts the pages of KV alone."""
        super().data_plane_connected(address, description, state)
        ledger = SlotLedger(description.num_pages, description.geometry.page_tokens, self._num_slots)
        self.connected[address].ledger = ledger

    def check_fits(self, spec: RequestSpec) -> DoesNotFit | None:
        """Why this request could never run: for want of pages for its KV, and of nothing else."""
        return super().check_fits(replace(spec, adapter=None))
