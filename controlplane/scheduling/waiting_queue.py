"""The bounded queue of waiting requests, in the policy's order. Knows neither pages nor data planes."""

from bisect import bisect_left, insort
from itertools import islice

from controlplane.errors import QueueFullError
from controlplane.scheduling.policy import FcfsPolicy, Rank
from controlplane.scheduling.request import Request


class WaitingQueue:
    """Requests sorted by rank. A sorted list: finding is O(log n), inserting moves n pointers, far below a microsecond each."""

    def __init__(self, policy: FcfsPolicy, max_waiting: int) -> None:
        self._policy = policy
        self._max_waiting = max_waiting
        self._entries: list[tuple[Rank, Request]] = []
        # Changes whenever the content does; lets the scheduler skip what only depends on it.
        self.version = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Request:
        return self._entries[index][1]

    def first(self, count: int) -> list[Request]:
        """The first so many, best first."""
        return [request for _, request in islice(self._entries, count)]

    def all(self) -> list[Request]:
        """Every waiting request, best first."""
        return [request for _, request in self._entries]

    def add(self, request: Request) -> None:
        """Adds a new request.

        Raises:
            QueueFullError: max_waiting requests wait.
        """
        if len(self._entries) >= self._max_waiting:
            raise QueueFullError(len(self._entries), self._max_waiting)
        self._insert(request)

    def put_back(self, request: Request) -> None:
        """Adds a request that was running. Not subject to the bound: there are at most as many as can run."""
        self._insert(request)

    def remove(self, request: Request) -> None:
        """Removes a request, which must be here."""
        index = bisect_left(self._entries, self._policy.rank(request), key=lambda entry: entry[0])
        self.pop(index, request)

    def pop(self, index: int, expected: Request) -> None:
        """Removes the request at that place, which must be the expected one."""
        assert self._entries[index][1] is expected, f"request {expected.spec.request_id} is not in the waiting queue"
        del self._entries[index]
        self.version += 1

    def _insert(self, request: Request) -> None:
        # Ranks are unique, because arrivals are: requests themselves are never compared.
        insort(self._entries, (self._policy.rank(request), request), key=lambda entry: entry[0])
        self.version += 1
